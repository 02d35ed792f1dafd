"""The tables of recipes in docs/likeness.md: `python -m lab.recipe_tables` writes them there.

Each row is the command `facelora train PHOTOS --base demo` with some options, run on eight photos (or `--photos`) of people
whom the demo's base model has never seen. What comes out is judged by two further photos and by pictures of other seeds, by
SFace, which the training may select by, and by dlib's network, which nothing selects by. A run takes three to four
minutes of one core. Finished runs are lines of the records' file: what is there is not measured again, and `--options`,
`--photos`, `--person` and `--seed` add others. It needs dlib: pip install dlib-bin && pip install --no-deps
face_recognition_models
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from core.cli import main as facelora
from core.demo import BASE_FILE, GUIDANCE, PICTURE_SIZE, Judge
from core.demo.people import UNSEEN_PEOPLE, person_photos
from core.errors import counted
from core.faces import FaceNetwork, embed_images, likeness, load_faces
from core.lora.file import LoraFile
from core.models import load_base
from core.photos.captions import class_caption, default_caption
from core.pictures.generate import GenerateConfig, PictureJob, generate
from core.training.likeness import picture_change
from tools.tables import table, write_tables

DOCUMENT = Path(__file__).parent.parent / "docs" / "likeness.md"
RECORDS = Path(__file__).with_name("recipe_runs.jsonl")
SEEN = [str(count) for count in (100, 200, 300, 400, 500, 600, 800, 1000)]
"""The photos seen for which curves have a column."""
SEEDS = range(101, 117)
"""Of the pictures to judge by; the selection's count from the training's seed."""
SAMPLE_STEPS = 10
EVERY = 100
"""Photos seen between the intermediate LoRAs of a run's curve."""
TEST = 2
"""Photos of each person to judge by; the others are what the command is given."""
ALL = 8
"""The number of these others."""


@dataclass(frozen=True)
class Verdict:
    """What one face network says of one run."""

    likeness: float
    """Mean cosine to the test photos of pictures with the trigger word; 0 where no face is found."""
    own: float
    """The same of the photos that the command was given: what a perfect LoRA would have."""
    stranger: float
    """The same of the base model's pictures of the class."""
    leakage: float
    """Rise of `stranger` by the LoRA."""
    rank1: float
    """Share of the pictures that are more like the test photos than like any other person of the set."""
    copying: float | None = None
    """Mean cosine of the pictures with a face to the nearest photo that the command was given, minus that to the nearest test
    photo."""

    @property
    def gain(self) -> float:
        """How far likeness is above that of the base model's pictures of the class."""
        return self.likeness - self.stranger


@dataclass(frozen=True)
class Row:
    """One finished run."""

    options: str
    """Of the command, beside photos, base, output and seed."""
    person: int
    seed: int
    step: int
    """That was kept."""
    drift: float
    """Mean change of pictures of the class from the base's, in grey levels."""
    verdicts: dict[str, Verdict]
    """By the network's name."""
    curve: dict[str, float] = field(default_factory=dict)
    """Likeness by the first network after each EVERY photos, by the photos seen."""
    photos: int = ALL
    """The number of photos that the command was given."""


def run(options: str, person: int, seed: int, count: int, judges: Sequence[FaceNetwork]) -> Row:
    """The Row of one run of the command on the first `count` photos."""
    photos = person_photos(person)
    used, test = photos[:count], photos[-TEST:]
    with tempfile.TemporaryDirectory() as folder:
        output, given = Path(folder) / "lora.safetensors", Path(folder) / "photos"
        given.mkdir()
        for number, photo in enumerate(used, start=1):
            photo.save(given / f"{number}.png")
        words = shlex.split(options)
        batch = int(dict(itertools.pairwise(words)).get("--batch-size", "4"))
        command = ["train", str(given), "--base", "demo", "--output", str(output), "--seed", str(seed), "--json"]
        if code := facelora([*command, "--save-every", str(EVERY // batch), *words]):
            raise SystemExit(f"facelora ended with {code}")
        lora = LoraFile.read(output)
        subject, of_class = default_caption("sks", "person"), class_caption("person")
        of_person, before, after = draw(subject, lora), by_base(of_class), draw(of_class, lora)
        first, curve = Judge(judges[0], person, test), {}
        for saved in sorted(output.parent.glob("lora-step*.safetensors")):
            step = int(saved.stem.rpartition("step")[2])
            curve[str(step * batch)] = mean(first.likeness(draw(subject, LoraFile.read(saved))))
    verdicts = {}
    for network in judges:
        judge = Judge(network, person, test)
        stranger = mean(judge.likeness(before))
        verdicts[network.name] = Verdict(
            likeness=mean(judge.likeness(of_person)),
            own=mean(judge.likeness(used)),
            stranger=stranger,
            leakage=round(mean(judge.likeness(after)) - stranger, 4),
            rank1=judge.recognised(of_person) / len(of_person),
            copying=copying(*(embed_images(network, images) for images in (of_person, used, test))),
        )
    drift = mean([picture_change(a, b) for a, b in zip(before, after, strict=True)])
    return Row(options, person, seed, int(lora.metadata["ss_steps"]), drift, verdicts, curve, count)


def copying(pictures: np.ndarray, used: np.ndarray, test: np.ndarray) -> float:
    """As `Verdict.copying`, of identity vectors (N, D); 0 if no picture has a face.

    Pictures and photos without a face, which are rows of NaN, are left out.
    """
    seen = pictures[~np.isnan(pictures).any(axis=1)]
    near, far = (np.nanmax(likeness(seen, photos), axis=1) for photos in (used, test))
    return mean(near - far) if len(seen) else 0.0


def mean(values: Sequence[float] | np.ndarray) -> float:
    return round(float(np.mean(values)), 4)


@functools.cache
def by_base(prompt: str) -> list[Image.Image]:
    return draw(prompt, None)


def draw(prompt: str, lora: LoraFile | None, seeds: Sequence[int] = SEEDS) -> list[Image.Image]:
    jobs = [PictureJob(prompt, seed, size=PICTURE_SIZE, guidance=GUIDANCE, steps=SAMPLE_STEPS) for seed in seeds]
    loras = [] if lora is None else [(lora, 1.0)]
    return [p.image for p in generate(load_base(BASE_FILE), loras, jobs, GenerateConfig(batch_size=len(SEEDS)))]


def read_records(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return [
        Row(**row | {"verdicts": {name: Verdict(**verdict) for name, verdict in row["verdicts"].items()}})
        for row in rows
    ]


def people_and_seeds(rows: Sequence[Row]) -> str:
    people, seeds = (", ".join(map(str, sorted({getattr(row, name) for row in rows}))) for name in ("person", "seed"))
    return f"{people}; {seeds}"


def summary(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Of the command without options, what each network says: means over all runs, standard errors over the people."""
    plain, cells = [row for row in rows if not row.options and row.photos == ALL], []
    for name in plain[0].verdicts if plain else ():
        each = [row.verdicts[name] for row in plain]
        by_person: dict[int, list[float]] = {}
        for row in plain:
            by_person.setdefault(row.person, []).append(row.verdicts[name].likeness)
        of_people = [float(np.mean(scores)) for scores in by_person.values()]
        cells.append(
            (
                name, people_and_seeds(plain), with_error(of_people, sign=""), f"{np.mean([v.own for v in each]):.3f}",
                f"{np.mean([v.stranger for v in each]):.3f}", f"{np.mean([v.rank1 for v in each]):.0%}",
                with_error([v.leakage for v in each]), f"{np.mean([row.drift for row in plain]):.1f}",
            )
        )  # fmt: skip
    return cells


def plain_runs(rows: Sequence[Row]) -> dict[tuple[int, int], Row]:
    """The runs of the command without options on all photos, by person and seed."""
    return {(row.person, row.seed): row for row in rows if not row.options and row.photos == ALL}


def few(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Of each number of photos and choice of options: means, and the share of what all photos reach on the same people."""
    plain, groups = plain_runs(rows), {}
    for row in rows:
        if row.photos != ALL and (row.person, row.seed) in plain:
            groups.setdefault((row.photos, row.options), []).append(row)
    cells = []
    for (count, options), group in sorted(groups.items()):
        pairs = [(row, plain[row.person, row.seed]) for row in group]
        shares = {
            name: np.mean([a.verdicts[name].gain for a, _ in pairs])
            / np.mean([b.verdicts[name].gain for _, b in pairs])
            for name in ("sface", "dlib")
        }
        each = [row.verdicts["sface"] for row in group]
        cells.append(
            (
                str(count), f"`{options}`" if options else "the recipe", people_and_seeds(group),
                with_error([one.likeness for one in each], sign=""), f"{shares['sface']:.2f}", f"{shares['dlib']:.2f}",
                with_error([one.leakage for one in each]), f"{np.mean([one.copying for one in each]):.2f}",
                f"{np.mean([row.drift for row in group]):.1f}",
            )
        )  # fmt: skip
    return cells


def differences(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Of each choice of options, what it changes on the same people and seeds: means and standard errors of the pairs."""
    plain = plain_runs(rows)
    choices: dict[str, list[Row]] = {}
    for row in rows:
        if row.options and row.photos == ALL and (row.person, row.seed) in plain:
            choices.setdefault(row.options, []).append(row)
    cells = []
    for options, group in choices.items():
        pairs = [(row, plain[row.person, row.seed]) for row in group]
        changes = {
            (network, name): [getattr(a.verdicts[network], name) - getattr(b.verdicts[network], name) for a, b in pairs]
            for network in group[0].verdicts
            for name in ("likeness", "leakage")
        }
        cells.append(
            (
                f"`{options}`", people_and_seeds(group), f"{np.mean([a.verdicts['sface'].likeness for a, _ in pairs]):.3f}",
                with_error(changes["sface", "likeness"]), with_error(changes["sface", "leakage"]),
                with_error(changes["dlib", "likeness"], digits=4), f"{np.mean([a.drift - b.drift for a, b in pairs]):+.1f}",
            )
        )  # fmt: skip
    return cells


def curves(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The mean likeness of runs after so many photos seen, and what the intermediate LoRAs that they keep have."""
    choices: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        if row.curve:
            choices.setdefault((-row.photos, row.options), []).append(row)
    cells = []
    for (count, options), group in sorted(choices.items(), key=lambda item: item[0][0]):
        at = [
            np.mean([row.curve[seen] for row in group]) if all(seen in r.curve for r in group) else None
            for seen in SEEN
        ]
        kept = np.mean([next(iter(row.verdicts.values())).likeness for row in group])
        figures = ("" if value is None else f"{value:.2f}" for value in at)
        name = f"`{options}`" if options else "the recipe"
        name = name if count == -ALL else f"{counted(-count, 'photo')}, {name}"
        cells.append((name, people_and_seeds(group), *figures, f"{kept:.3f}"))
    return cells


def with_error(values: Sequence[float], digits: int = 3, sign: str = "+") -> str:
    """Mean and standard error, the latter from two values on."""
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.{digits}f}{error}"


def tables(rows: Sequence[Row]) -> dict[str, str]:
    measured = ("judge", "people; seeds", "likeness", "photos", "base", "rank-1", "leakage", "drift")
    tried = ("options", "people; seeds", "likeness", "change", "leakage", "dlib's likeness", "drift")
    soon = ("options", "people; seeds", *SEEN, "kept")
    fewer = ("photos", "options", "people; seeds", "likeness", "of eight's", "by dlib", "leakage", "copying", "drift")
    filled = {
        "defaults": (measured, summary(rows)), "tried": (tried, differences(rows)), "how soon": (soon, curves(rows)),
        "few photos": (fewer, few(rows)),
    }  # fmt: skip
    return {name: table(header, cells) for name, (header, cells) in filled.items() if cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--options", action="append", metavar="TEXT", help="measure the command with these; repeatable")
    parser.add_argument("--person", action="append", type=int, choices=UNSEEN_PEOPLE, help="default: all; repeatable")
    parser.add_argument("--seed", action="append", type=int, help="default: 1; repeatable")
    parser.add_argument("--photos", type=int, default=ALL, choices=range(1, ALL + 1), help="default: %(default)s")
    options = parser.parse_args()
    finished = {(row.options, row.person, row.seed, row.photos) for row in read_records(options.records)}
    judges = [load_faces(), load_faces("dlib")] if options.options else []
    for text in options.options or ():
        for seed in options.seed or [1]:
            for person in options.person or UNSEEN_PEOPLE:
                if (text, person, seed, options.photos) not in finished:
                    line = json.dumps(asdict(run(text, person, seed, options.photos, judges)))
                    with options.records.open("a", encoding="utf-8") as records:
                        records.write(line + "\n")
    write_tables(DOCUMENT, tables(read_records(options.records)))


if __name__ == "__main__":
    main()
