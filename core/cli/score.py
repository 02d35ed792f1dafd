"""The command `score`, which measures how much pictures look like photos."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import photos, pictures, training  # Their modules load only when a name is used.
from .common import print_warning
from .options import Options, argument, option
from .shared_options import FACE_NETWORK, JSON, JUDGE, OVERWRITE
from .values import InputPath, PngOutput


@dataclass(frozen=True)
class ScoreOptions(Options):
    images: InputPath = argument("Folder of pictures", "IMAGES")
    reference: InputPath = option("Folder of photos of the person", "PHOTOS")
    sheet: PngOutput | None = option("Also write a sheet of the sorted pictures")
    overwrite: bool = OVERWRITE
    face_network: str = FACE_NETWORK
    judge: str | None = JUDGE
    json: bool = JSON


def run(options: ScoreOptions) -> None:
    from ..faces import Reference, check_judge, load_faces

    images = [
        photo
        for photo in photos.read_photos(options.images, repeats=False, drawn=True, on_warning=print_warning)
        if not _is_sheet(photo)
    ]
    reference = photos.read_photos(options.reference, on_warning=print_warning)
    network = load_faces(options.face_network)
    person = Reference.on((photo.image() for photo in reference), network)
    found = person.compare(photo.image() for photo in images)
    judged: Sequence[float | None] = [None] * len(images)
    if options.judge:
        judge = load_faces(options.judge)
        check_judge(judge, network)
        judged = Reference.on((photo.image() for photo in reference), judge).likeness(photo.image() for photo in images)
    scored = [
        (training.Score.of(photo.name, *seen, other), photo)
        for photo, seen, other in zip(images, found, judged, strict=True)
    ]
    scored.sort(key=lambda one: -2.0 if one[0].likeness is None else one[0].likeness, reverse=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(score) for score, _ in scored], indent=1))
    else:
        print("\n".join(f"{score}  {score.image}" for score, _ in scored))
    if options.sheet:
        _save_sheet(scored, options.sheet)


def _save_sheet(scored: Sequence[tuple["training.Score", "photos.Photo"]], place: Path) -> None:
    """Save a sheet of the pictures, marked as drawn if they are. Some or all may be photos."""
    from ..storage.drawn import DRAWN, PARTLY_DRAWN, read_mark, save_png

    rows = [scored[start : start + 6] for start in range(0, len(scored), 6)]
    sheet = pictures.contact_sheet(
        [
            (f"{6 * number + 1} to {6 * number + len(row)}", [photo.image(shorter_side=256) for _, photo in row])
            for number, row in enumerate(rows)
        ],
        tile=224,
        labels=[[str(score) for score, _ in row] for row in rows],
        title="likeness, the most alike first",
    )
    marks = {read_mark(photo.source) for _, photo in scored if isinstance(photo.source, Path)}
    mark = DRAWN if marks == {DRAWN} else PARTLY_DRAWN if marks - {None} else None
    save_png(place, sheet, {photos.SHEET_KEY: "score"}, mark=mark)


def _is_sheet(photo: "photos.Photo") -> bool:
    """Return whether a file in the folder of pictures is a contact sheet made by this program."""
    assert isinstance(photo.source, Path), "photos of a folder have a path"
    return photo.name == pictures.CONTACT_SHEET or photos.is_sheet(photo.source)
