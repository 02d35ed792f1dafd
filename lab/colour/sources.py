"""The pictures that a base model in colour is trained on: where they are from, which are left out, and how they are cut.

No picture is committed. `prepare` reads git repositories, and writes the cut pictures with what is known of each to a folder.
"""

import functools
import hashlib
import io
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from core.faces import Face, FaceNetwork, load_faces

SIZE = (192, 240)
"""The width and height of a cut picture."""
MARK = 238
"""The height of artflow's pictures above the line of its mark."""
WORDS = Path(__file__).with_name("words.txt")
KEPT_OUT = 12
"""One picture in so many is never trained on."""
NOT_THESE = ("happy merchant", "doctor who", "doctor strange", "big boss", "german painter", "father time", "among us")
"""Prompts of plain words that mean something else."""


class Source(NamedTuple):
    """A repository on GitHub, at the commit whose pictures were looked at."""

    repository: str
    commit: str
    licence: str
    credit: str


class Picture(NamedTuple):
    """A picture of a source, before it is cut."""

    name: str
    words: list[str]
    image: Image.Image
    widths: tuple[float, ...]
    """How wide it is cut, in widths of its face, if it is large enough."""
    only_vae: bool = False


SOURCES = {
    "artflow": Source(
        "initiative-sh/artflow-portraits", "4accf11f6d777e10272cad2242245e12a417252f", "CC-BY-4.0", "artflow.ai"
    ),
    "person": Source(
        "faker-js/assets-person-portrait", "63aef57b5a839aebe3ad913ec7c76469aabbb6c5", "CC0-1.0", "Faker"
    ),
    "sfhq": Source(
        "SelfishGene/SFHQ-dataset", "4c898bc7936c19c201a163c4d636943e80d7bc19", "MIT", "David Beniaguev"
    ),
}  # fmt: skip
SHEETS = {
    "sample_4x8": slice(None),
    "variability_age": slice(4, None),
    "variability_age_X_ethnicity_1": slice(4, None),
    "variability_age_X_ethnicity_2": slice(4, None),
    "variability_ethnicity": slice(None),
    "variability_expression": slice(None),
    "variability_hair_color": slice(None),
    "variability_hair_style": slice(None),
}
"""SFHQ's sheets of faces, and the rows of each that have adults alone."""
CHILDREN = frozenset(
    f"variability_{cell}"
    for cell in ("ethnicity/2/1", "ethnicity/5/12", "expression/2/8", "expression/2/9", "hair_color/2/6", "hair_color/2/8",
                 "hair_color/2/11", "hair_color/4/1", "hair_color/5/10", "hair_color/5/12", "hair_style/1/7",
                 "hair_style/3/1", "hair_style/4/0")
) | {"sample_4x8/2/0", "sample_4x8/2/1", "sample_4x8/3/4"}  # fmt: skip
"""Cells of the other rows with faces that may be a child's."""


def prepare(mirrors: Path, output: Path, sources: list[str]) -> None:
    """Write the cut pictures as crops.npy, and what is known of each as crops.jsonl."""
    network = load_faces()
    output.mkdir(parents=True, exist_ok=True)
    crops, vectors, rows, dropped = [], [], [], {}
    for source in sources:
        repository = mirrors / SOURCES[source].repository.replace("/", "+") / "repo"
        for picture in READERS[source](repository, SOURCES[source].commit):
            face, fault = _usable_face(network, picture.image)
            if face is None:
                dropped[f"{source}: {fault}"] = dropped.get(f"{source}: {fault}", 0) + 1
                continue
            if source == "sfhq":  # Whose sheets show some faces several times.
                vectors.append(network.embed([picture.image], [face])[0])
                if len(vectors) > 1 and max(vectors[-1] @ other for other in vectors[:-1]) > 0.9:
                    dropped["sfhq: twice"] = dropped.get("sfhq: twice", 0) + 1
                    continue
            for width in picture.widths:
                crop, share = _cut(picture.image, face, width)
                number = int(hashlib.sha256(picture.name.encode()).hexdigest(), 16)
                row = {"source": source, "name": picture.name, "words": picture.words, "share": round(share, 3)}
                rows.append(row | {"only_vae": picture.only_vae, "kept_out": number % KEPT_OUT == 0})
                crops.append(np.asarray(crop))
                if len(rows) % 500 == 0:
                    print(source, len(rows), dropped, flush=True)
    whole = np.stack(crops)
    np.save(output / "crops.npy", whole)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (output / "crops.jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(rows)} pictures, sha256 {hashlib.sha256(whole.tobytes()).hexdigest()}, dropped {dropped}")


def _usable_face(network: FaceNetwork, image: Image.Image) -> tuple[Face | None, str]:
    """The only face of a picture, if it is large, whole and of a natural colour; else what is wrong."""
    # YuNet looks at three times this size.
    small = image.resize((80, round(80 * image.height / image.width)), reducing_gap=2.0)
    faces = [face for face in network.detect(small) if face.score > 0.6]
    if len(faces) != 1:
        return None, f"{min(len(faces), 2)} faces"
    factor = image.width / small.width
    left, top, right, bottom = (side * factor for side in faces[0].box)
    face = Face((left, top, right, bottom), faces[0].landmarks * factor, faces[0].score)
    if face.score < 0.8 or left < 0 or top < 0 or right > image.width or bottom > image.height + 8 * factor:
        return None, "face unclear or cut"
    width, height = right - left, bottom - top
    centre = image.crop((left + 0.2 * width, top + 0.2 * height, right - 0.2 * width, bottom - 0.15 * height))
    y, cb, cr = np.median(np.asarray(centre.convert("YCbCr")).reshape(-1, 3), axis=0)
    # Where skin is in YCbCr: grey pictures have no chroma, and orcs, aliens and neon light another one.
    if not 6 <= cr - 128 <= 42 or not -48 <= cb - 128 <= -3:
        return None, "colour"
    return (face, "") if 45 <= y <= 215 else (None, "light")


def _cut(image: Image.Image, face: Face, widths: float) -> tuple[Image.Image, float]:
    """A picture of SIZE with the face in the middle, and the share of its width that the face has."""
    left, top, right, bottom = face.box
    width = min(widths * (right - left), image.width, image.height * SIZE[0] / SIZE[1])
    height = width * SIZE[1] / SIZE[0]
    x = min(max((left + right - width) / 2, 0), image.width - width)
    y = min(max((top + bottom) / 2 - 0.53 * height, 0), image.height - height)
    box = (x, y, x + width, y + height)
    return image.resize(SIZE, Image.Resampling.LANCZOS, box=box), (right - left) / width


def read_words() -> tuple[frozenset[str], frozenset[str]]:
    """The words that prompts for the base model may have, and those for the VAE."""
    _, looks, more = re.split(r"(?:^#.*\n)+", WORDS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return frozenset(looks.split()), frozenset((looks + more).split())


def _artflow(repository: Path, commit: str) -> Iterator[Picture]:
    looks, more = read_words()

    def allowed(words: list[str], known: frozenset[str]) -> bool:
        # A number is an age, and below twenty perhaps a child's.
        return all(word in known or (word.isdigit() and int(word) >= 20) for word in words)

    for path in _files(repository, commit, "images"):
        words = Path(path).stem.lower().split("-")[:-1]
        if (
            path.endswith(".jpg")
            and words
            and allowed(words, more)
            and not any(said in " ".join(words) for said in NOT_THESE)
        ):
            image = _open(repository, commit, path)
            yield Picture(path, words, image.crop((0, 0, image.width, MARK)), (1.9,), not allowed(words, looks))


def _person(repository: Path, commit: str) -> Iterator[Picture]:
    for sex in ("female", "male"):
        for number in range(100):
            prompt = json.loads(_read(repository, commit, f"{sex}/metadata/{number}.json"))["prompt"]
            words = prompt.lower().replace("-", " ").split()
            image = _open(repository, commit, f"{sex}/512/{number}.jpg")
            yield Picture(f"{sex}/{number}", words, image, (1.6, 1.9, 2.5))


def _sfhq(repository: Path, commit: str) -> Iterator[Picture]:
    for sheet, chosen in SHEETS.items():
        image = _open(repository, commit, f"images/SFHQ_{sheet}.jpg")
        light = np.asarray(image.convert("L"))
        rows = _bands(light.max(axis=1) >= 40)
        columns = _bands(light[rows[0][0] :].max(axis=0) >= 32)
        for row, (top, bottom) in list(enumerate(rows))[chosen]:
            for column, (left, right) in enumerate(columns):
                if (name := f"{sheet}/{row}/{column}") not in CHILDREN:
                    age = {4: ["adult"], 5: ["old"]}.get(row, []) if "_age" in sheet else []
                    cell = image.crop((left + 2, top + 2, right - 2, bottom - 2))
                    yield Picture(name, age, cell, (1.9,))


def _bands(lit: np.ndarray) -> list[tuple[int, int]]:
    """Where the cells of a sheet begin and end: rows or columns that are lit for longer than a label is high."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], lit, [False]]).astype(int)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2) if end - start > 60]


READERS = {"artflow": _artflow, "person": _person, "sfhq": _sfhq}


def _files(repository: Path, commit: str, folder: str) -> list[str]:
    command = ["git", "-C", str(repository), "ls-tree", "-r", "-z", "--name-only", commit, f"{folder}/"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]


@functools.cache
def _reader(repository: Path) -> subprocess.Popen[bytes]:
    """A process of git that is asked for one file after the other: a process each would take longer than the faces."""
    command = ["git", "-C", str(repository), "cat-file", "--batch"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _read(repository: Path, commit: str, path: str) -> bytes:
    git = _reader(repository)
    assert git.stdin and git.stdout
    git.stdin.write(f"{commit}:{path}\n".encode())
    git.stdin.flush()
    return git.stdout.read(int(git.stdout.readline().split()[-1]) + 1)[:-1]


def _open(repository: Path, commit: str, path: str) -> Image.Image:
    return Image.open(io.BytesIO(_read(repository, commit, path))).convert("RGB")
