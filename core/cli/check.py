"""The command `check`, which judges photos to train on."""

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Annotated, get_type_hints

from .. import photos  # Its modules load only when a name is used.
from .common import base_from, print_warning, terminal_width
from .options import Options, argument, below, option
from .shared_options import BASE, FACE_NETWORK, JSON, OVERWRITE, BaseParts
from .values import HtmlOutput, InputName, InputPath


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
        raise argparse.ArgumentTypeError(
            f"{number!r} in {text!r} is not a {'whole number' if kinds[name] is int else 'number'}"
        )
    return name, value


@dataclass(frozen=True)
class CheckOptions(Options):
    photos: InputPath = argument("Folder of photos of one person", "PHOTOS")
    sheet: HtmlOutput | None = option("Also write a page with the faces and the reasons")
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
    from ..faces import faces_if_installed

    resolution = options.resolution
    if resolution is None:
        resolution = base_from(options.base, options.parts).resolution if options.base else 1024
    given = photos.read_photos(options.photos, on_warning=print_warning)
    network = faces_if_installed(print_warning, options.face_network)
    thresholds = photos.Thresholds.for_resolution(resolution, network.name if network else "sface")
    report = photos.check_photos(given, network, dataclasses.replace(thresholds, **dict(options.threshold)))
    if options.json:
        print(json.dumps(report.to_dict() | {"resolution": resolution}, indent=1))
    else:
        print(photos.format_report(report, terminal_width()))
        chosen = options.base or options.resolution
        print(
            f"Judged for training at {resolution} px{'' if chosen else '. Use --base or --resolution for another size'}."
        )
    if options.sheet:
        photos.save_sheet(report, options.sheet)
    return 0 if report.enough else 1
