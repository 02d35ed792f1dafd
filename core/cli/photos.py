"""The commands `check`, which judges photos to train on, and `score`, which measures how much pictures look like photos."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from ..faces import Reference, check_judge, faces_if_installed, load_faces
from ..photos import (
    SHEET_KEY,
    Photo,
    Thresholds,
    check_photos,
    format_report,
    is_sheet,
    read_photos,
    save_sheet,
)
from ..pictures import (
    CONTACT_SHEET,
    contact_sheet,
)
from ..storage.drawn import DRAWN, PARTLY_DRAWN, read_mark, save_png
from ..training import Score
from .common import base_from, print_warning, terminal_width


def run_check(options: argparse.Namespace) -> int:
    """Run the command. Returns 1 if too few photos can be used to train on, else 0."""
    resolution = options.resolution
    if resolution is None:
        resolution = base_from(options).resolution if options.base else 1024
    photos = read_photos(options.photos, on_warning=print_warning)
    network = faces_if_installed(print_warning, options.face_network)
    thresholds = Thresholds.for_resolution(resolution, network.name if network else "sface")
    report = check_photos(photos, network, dataclasses.replace(thresholds, **dict(options.threshold)))
    if options.json:
        print(json.dumps(report.to_dict() | {"resolution": resolution}, indent=1))
    else:
        print(format_report(report, terminal_width()))
        chosen = options.base or options.resolution
        print(
            f"Judged for training at {resolution} px{'' if chosen else '. Use --base or --resolution for another size'}."
        )
    if options.sheet:
        save_sheet(report, options.sheet)
    return 0 if report.enough else 1


def run_score(options: argparse.Namespace) -> None:
    pictures = read_photos(options.images, repeats=False, drawn=True, on_warning=print_warning)
    images = [photo for photo in pictures if not _is_sheet(photo)]
    reference = read_photos(options.reference, on_warning=print_warning)
    network = load_faces(options.face_network)
    person = Reference.on((photo.image() for photo in reference), network)
    found = person.compare(photo.image() for photo in images)
    judged: Sequence[float | None] = [None] * len(images)
    if options.judge:
        judge = load_faces(options.judge)
        check_judge(judge, network)
        judged = Reference.on((photo.image() for photo in reference), judge).likeness(photo.image() for photo in images)
    scored = [
        (Score.of(photo.name, *seen, other), photo) for photo, seen, other in zip(images, found, judged, strict=True)
    ]
    scored.sort(key=lambda one: -2.0 if one[0].likeness is None else one[0].likeness, reverse=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(score) for score, _ in scored], indent=1))
    else:
        print("\n".join(f"{score}  {score.image}" for score, _ in scored))
    if options.sheet:
        tiles = [(photo.image(shorter_side=256), str(score)) for score, photo in scored]
        rows = [tiles[start : start + 6] for start in range(0, len(tiles), 6)]
        sheet = contact_sheet(
            [(f"{6 * number + 1} to {6 * number + len(row)}", [image for image, _ in row]) for number, row in enumerate(rows)],
            tile=224, labels=[[label for _, label in row] for row in rows], title="likeness, the most alike first",
        )  # fmt: skip
        save_png(options.sheet, sheet, {SHEET_KEY: "score"}, mark=_mark_of_sheet(images))


def _mark_of_sheet(images: Sequence[Photo]) -> str | None:
    """Return the mark of a sheet of these pictures. Some or all may be photos."""
    marks = {read_mark(image.source) for image in images if isinstance(image.source, Path)}
    return DRAWN if marks == {DRAWN} else PARTLY_DRAWN if marks - {None} else None


def _is_sheet(photo: Photo) -> bool:
    """Return whether a file in the folder of pictures is a contact sheet made by this program."""
    assert isinstance(photo.source, Path), "photos of a folder have a path"
    return photo.name == CONTACT_SHEET or is_sheet(photo.source)
