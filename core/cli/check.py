"""The command `check`, which judges photos to train on."""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_type_hints

from .. import photos  # Its modules load only when a name is used.
from ..errors import BadConfig, BadFile, counted
from ..storage.files import make_folder, write_file
from .common import base_from, print_warning, terminal_width
from .options import Options, argument, below, option
from .shared_options import BASE, FACE_NETWORK, JSON, OVERWRITE, BaseParts
from .values import Folder, HtmlOutput, InputName, InputPath

if TYPE_CHECKING:
    from ..faces import FaceNetwork


def threshold_from(text: str) -> tuple[str, float]:
    """Convert NAME=NUMBER to the name and the value of one of `Thresholds`."""
    name, _, number = text.partition("=")
    kinds = get_type_hints(photos.Thresholds)
    if name not in kinds:
        raise argparse.ArgumentTypeError(f"unknown threshold {name!r}; choose from {', '.join(kinds)}")
    try:
        value = kinds[name](number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        what = "whole number" if kinds[name] is int else "number"
        raise argparse.ArgumentTypeError(f"{number!r} in {text!r} is not a {what}")
    return name, value


@dataclass(frozen=True)
class CheckOptions(Options):
    photos: InputPath = argument("Folder of photos of one person", "PHOTOS")
    sheet: HtmlOutput | None = option("Also write a page with the faces and the reasons")
    like: InputPath | None = option(
        "Folder of real photos of the person: choose the pictures in PHOTOS that show them, and say why others don't",
        "DIR",
    )
    output: Folder | None = option("With --like: folder to copy the chosen pictures to")
    count: int | None = option(
        "With --like: number of pictures to choose, the most varied ones (default: all that fit)"
    )
    overwrite: bool = OVERWRITE
    base: InputName | None = BASE
    parts: BaseParts = below()
    resolution: int | None = option("Training resolution in pixels (default: the base model's, or 1024)")
    threshold: list[Annotated[tuple[str, float], threshold_from]] = option(
        "Value at which a verdict changes; may be repeated (docs/photos.md lists the names)", "NAME=NUMBER"
    )
    face_network: str = FACE_NETWORK
    json: bool = JSON


def run(options: CheckOptions) -> int:
    """Run the command. Returns 1 if too few photos can be used to train on, else 0."""
    from ..faces import faces_if_installed, load_faces

    resolution = options.resolution
    if resolution is None:
        resolution = base_from(options.base, options.parts).resolution if options.base else 1024
    if options.like is None and (options.output or options.count is not None):
        raise BadConfig("--output and --count choose among pictures: they require --like")
    if options.like and options.sheet:
        raise BadConfig("--sheet: not with --like. Copy the chosen pictures with --output")
    drawn = options.like is not None
    given = photos.read_photos(options.photos, repeats=not drawn, drawn=drawn, on_warning=print_warning)
    network = load_faces(options.face_network) if drawn else faces_if_installed(print_warning, options.face_network)
    name = network.name if network else "sface"
    thresholds = photos.Thresholds.for_resolution(resolution, name)
    if drawn and not (options.resolution or options.base):  # Nothing is known about the size that drawn pictures need.
        thresholds = photos.Thresholds.for_reference(name)
    thresholds = dataclasses.replace(thresholds, **dict(options.threshold))
    if options.like and network:
        return _choose(options, given, network, thresholds)
    report = photos.check_photos(given, network, thresholds)
    if options.json:
        print(json.dumps(report.to_dict() | {"resolution": resolution}, indent=1))
    else:
        print(photos.format_report(report, terminal_width()))
        advice = "" if options.base or options.resolution else ". Use --base or --resolution for another size"
        print(f"Judged for training at {resolution} px{advice}.")
        if about := photos.about_small_faces(report.usable, resolution):
            print(f"{about[0].upper()}{about[1:]}.")
    if options.sheet:
        photos.save_sheet(report, options.sheet)
    return 0 if report.enough else 1


def _choose(
    options: CheckOptions, given: "Sequence[photos.Photo]", network: "FaceNetwork", thresholds: "photos.Thresholds"
) -> int:
    from ..faces import second_network

    assert options.like
    if options.count is not None and options.count < 1:
        raise BadConfig(f"--count {options.count}: must be at least 1")
    real = photos.read_photos(options.like, apart=options.output, on_warning=print_warning)
    second = second_network(network)
    found = photos.choose_alike(
        given, real, network, second, count=options.count or 0, thresholds=thresholds, required=False
    )
    chosen = [one.report.photo for one in found if not one.reason]
    if options.output:
        _copy(chosen, make_folder(options.output), options.overwrite)
    if options.json:
        described = [one.report.to_dict() | {"judged": one.judged, "left_out": one.reason or None} for one in found]
        summary = {"chosen": len(chosen), "second_network": second and second.name, "pictures": described}
        print(json.dumps(summary, indent=1))
    else:
        print(*found, sep="\n")
        others = f"and {second.name}" if second else "alone; install dlib for a second opinion"
        print(f"{len(chosen)} of {len(found)} chosen by {network.name} {others}")
    photos.check_chosen(found, thresholds)
    return 0


def _copy(chosen: "Sequence[photos.Photo]", folder: Path, overwrite: bool) -> None:
    for photo in chosen:
        assert isinstance(photo.source, Path), "pictures of a folder have a path"
        path, content = folder / photo.source.name, photo.source.read_bytes()
        if path.exists() and not overwrite and path.read_bytes() != content:
            raise BadFile(f"{path}: this file already exists; choose another output, or replace it with --overwrite")
        write_file(path, lambda file, content=content: file.write(content))
    if earlier := photos.count_photos(folder) - len(chosen):
        others = f"{counted(earlier, 'other picture')} in this folder"
        print_warning(f"{folder}: {others} would be trained on too. Delete what isn't of the person")
