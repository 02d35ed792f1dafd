"""The table of docs/group.md: `python -m tools.group_tables --work DIR` measures it and writes it there.

Two people whom the demo's base model has never seen are drawn into one picture, in each way, from the LoRAs that
`facelora train PHOTOS --base demo` makes of eight photos of each. Each face is then compared with two further photos of
both people, which neither the training nor the face passes have seen. LoRAs, pictures and records are kept in DIR, so that
what is there is neither trained nor drawn nor measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from core.cli import main as facelora
from core.demo import BASE_FILE, GUIDANCE, PICTURE_SIZE
from core.demo.people import UNSEEN_PEOPLE, person_photos
from core.faces import FaceNetwork, Reference, load_faces
from core.lora.file import LoraFile
from core.models import Base, load_base
from core.pictures.generate import GenerateConfig, Job, generate
from core.pictures.group import Group, GroupMember, generate_group
from core.pictures.group_batch import GroupReference, redraw_faces
from core.pictures.headshot import FacePass
from core.storage.files import write_text
from tools.photo_tables import replace_table, table

DOCUMENT = Path(__file__).parent.parent / "docs" / "group.md"
TEST = 2
"""Photos of each person to judge by; the others are what is trained on and what the face passes compare with."""
PROMPT = "a photo of {first} and {second}"
NAMES, TRIGGERS = ("first", "second"), ("sks", "ohwx")
SIZE = (2 * PICTURE_SIZE[0], PICTURE_SIZE[1])
STEPS = 10
AT_A_TIME = 4
"""The pictures that are drawn together, and lost where it is stopped."""
ALONE, ADDED, REGIONS, PASSES, BOTH = "alone", "LoRAs added up", "regions", "face passes", "regions and face passes"
WAYS = (ALONE, ADDED, REGIONS, PASSES, BOTH)
DENOISE = {PASSES: 0.75, BOTH: 0.5}
"""The share of the steps that a face pass takes again: the faces of others need more of it than those that are near already."""


@dataclass(frozen=True)
class Row:
    """One picture, and how alike each face is to the person whose it should be, and to the other."""

    pair: tuple[int, int]
    way: str
    seed: int
    own: tuple[float | None, ...]
    """None where no face is found."""
    other: tuple[float | None, ...]


@dataclass(frozen=True)
class Pair:
    """Two people, their LoRAs, and what they are compared with."""

    numbers: tuple[int, int]
    group: Group
    reference: GroupReference
    """By the photos that were trained on."""
    judge: GroupReference


def open_pair(numbers: tuple[int, int], work: Path, network: FaceNetwork) -> Pair:
    """The pair, whose LoRAs are trained where they are not there yet."""
    people, given, kept_back = [], {}, {}
    for name, number, trigger in zip(NAMES, numbers, TRIGGERS, strict=True):
        photos, path = person_photos(number), work / f"{number}-{trigger}.safetensors"
        given[name], kept_back[name] = photos[:-TEST], photos[-TEST:]
        if not path.exists():
            folder = work / f"photos-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            for index, photo in enumerate(given[name], start=1):
                photo.save(folder / f"{index}.png")
            command = [
                "train",
                str(folder),
                "--base",
                "demo",
                "--trigger-word",
                trigger,
                "--output",
                str(path),
                "--seed=1",
            ]
            if code := facelora([*command, "--resume"]):
                raise SystemExit(f"facelora ended with {code}")
        people.append(GroupMember(name, LoraFile.read(path), f"{trigger} person"))
    group = Group(tuple(people))
    return Pair(numbers, group, *(GroupReference(group, photos, network) for photos in (given, kept_back)))


def draw(base: Base, pair: Pair, way: str, jobs: Sequence[Job], saved: Sequence[Path]) -> list[list[Image.Image]]:
    """The picture of each job in that way; of `ALONE` one of each person, as the command for one person draws it.

    `saved` are the files of the pictures with regions, which face passes then go over.
    """
    group, config = pair.group, GenerateConfig(batch_size=len(jobs))
    everyone = [(person.lora, 1.0) for person in group.people]

    def drawn(loras: Sequence[tuple[LoraFile, float]], words: Callable[[str], str], size=SIZE) -> list[Image.Image]:
        asked = [replace(job, prompt=words(job.prompt), size=size) for job in jobs]
        pictures = {picture.job: picture.image for picture in generate(base, loras, asked, config)}
        return [pictures[job] for job in asked]

    if way == ALONE:
        each = [
            drawn([one], partial(group.words_of, person), PICTURE_SIZE)
            for person, one in zip(group.people, everyone, strict=True)
        ]
        return [list(images) for images in zip(*each, strict=True)]
    if way == ADDED:
        return [[image] for image in drawn(everyone, group.everyones_words)]
    if way == REGIONS:
        return [[picture.image] for picture in generate_group(base, group, jobs)]
    images = drawn([], group.scene_words) if way == PASSES else [Image.open(path).convert("RGB") for path in saved]
    pictures = {job: (job, image) for job, image in zip(jobs, images, strict=True)}
    passed = redraw_faces(base, pair.reference, pictures, config, FacePass(denoise=DENOISE[way]))
    return [[passed[job].image] for job in jobs]


def judge(pair: Pair, way: str, images: Sequence[Image.Image]) -> tuple[list[float | None], list[float | None]]:
    """The likeness of each person's face to that person's photos, and to the other's."""
    if way == ALONE:
        found = [(image, faces[0] if (faces := pair.judge.network.detect(image)) else None) for image in images]
    else:
        found = [(images[0], one.face if one else None) for one in pair.judge.find(images[0])]

    def alike(person: Reference, image: Image.Image, face) -> float | None:
        return person.of_faces(image, [face])[0] if face else None

    people = pair.judge.people
    own = [alike(person, *one) for person, one in zip(people, found, strict=True)]
    return own, [alike(person, *one) for person, one in zip(people[::-1], found, strict=True)]


def measure(base: Base, pair: Pair, way: str, seeds: Sequence[int], folder: Path) -> Iterator[Row]:
    """The Row of each seed's picture, which is kept in the folder."""

    def file(way: str, seed: int, index: int = 0) -> Path:
        return folder / f"{'-'.join(map(str, pair.numbers))} {way} {seed}{' second' * index}.png"

    jobs = [Job(PROMPT, seed, size=SIZE, steps=STEPS, guidance=GUIDANCE) for seed in seeds]
    for seed, images in zip(seeds, draw(base, pair, way, jobs, [file(REGIONS, seed) for seed in seeds]), strict=True):
        for index, image in enumerate(images):
            image.save(file(way, seed, index))
        own, other = judge(pair, way, images)
        yield Row(pair.numbers, way, seed, tuple(own), tuple(other))


def read_records(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [
        Row((first, second), one["way"], one["seed"], tuple(one["own"]), tuple(one["other"]))
        for one in map(json.loads, lines)
        for first, second in [one["pair"]]
    ]


def rows(records: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Of each way: means over all faces, where one that is missing counts 0, and how many were taken for the other person's."""
    alone = mean_likeness([row for row in records if row.way == ALONE])
    for way in WAYS:
        if group := [row for row in records if row.way == way]:
            faces = [pair for row in group for pair in zip(row.own, row.other, strict=True)]
            seen = [(own, other) for own, other in faces if own is not None and other is not None]
            own = mean_likeness(group)
            confused = sum(other > own for own, other in seen)
            weakest = [min(value or 0 for value in row.own) for row in group]
            share = f"{own / alone:.0%}" if alone else ""
            yield (
                way, str(len(group)), f"{own:.3f}", share, f"{np.mean([other for _, other in seen]):.3f}",
                f"{confused} of {len(faces)}", f"{len(faces) - len(seen)}", f"{np.mean(weakest):.3f}",
            )  # fmt: skip


def mean_likeness(records: Sequence[Row]) -> float:
    return float(np.mean([value or 0.0 for row in records for value in row.own] or [0.0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="what is there is not made again")
    parser.add_argument(
        "--pair", action="append", nargs=2, type=int, choices=UNSEEN_PEOPLE, metavar="N", help="default: 35 36"
    )
    parser.add_argument("--count", type=int, default=40, help="pictures of each way, of all pairs (default: 40)")
    parser.add_argument("--way", action="append", choices=WAYS, help="only this one; may be repeated")
    options = parser.parse_args()
    path, folder = options.work / "records.jsonl", options.work / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    finished = {(row.pair, row.way, row.seed) for row in read_records(path)}
    base, network = load_base(BASE_FILE), load_faces()
    pairs = [(first, second) for first, second in options.pair or [(35, 36)]]
    for numbers in pairs:
        pair = open_pair(numbers, options.work, network)
        seeds = range(101, 101 + options.count // len(pairs))
        for start in range(0, len(seeds), AT_A_TIME):
            for way in options.way or WAYS:
                missing = [seed for seed in seeds[start : start + AT_A_TIME] if (numbers, way, seed) not in finished]
                if missing:
                    lines = [json.dumps(asdict(row)) + "\n" for row in measure(base, pair, way, missing, folder)]
                    with path.open("a", encoding="utf-8") as records:
                        records.writelines(lines)
    header = ("way", "pictures", "likeness", "of alone", "to the other", "confused", "missing", "least alike of two")
    content = table(header, rows(read_records(path)))
    print(content)
    write_text(DOCUMENT, replace_table(DOCUMENT.read_text(encoding="utf-8"), "ways", content))


if __name__ == "__main__":
    main()
