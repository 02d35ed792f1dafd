"""The arguments of the commands about pictures and photos. Importing this loads no torch, so that --help answers at once."""

import argparse
import math
from pathlib import Path
from typing import get_args, get_type_hints

from .. import photos  # the package loads its modules only when a name is used
from ..config import Precision, RecipeName
from .common import (
    add_base,
    add_device,
    add_dry_run,
    add_face_network,
    add_judge,
    add_sidecars_option,
    add_training_adapter,
    unicode_text,
)
from .outputs import add_overwrite, output_file, output_folder
from .settings import SCHEDULE, add_settings


def add_headshots(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s PHOTOS --base BASE [--output DIR] [OPTIONS] (--help lists them)"
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of 10 to 20 photos of one person")
    add_base(parser, required=True)
    parser.add_argument(
        "--output", type=output_folder, metavar="DIR",
        help="folder for the LoRA, the pictures and their page; what is there is not made again (default: PHOTOS-headshots)",
    )  # fmt: skip
    _add_order(parser)
    parser.add_argument("--yes", action="store_true", help="ask nothing, not even on a terminal")
    add_dry_run(parser)
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object per report on stdout; asks nothing")


def add_studio(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s PEOPLE --base BASE --output DIR [OPTIONS] (--help lists them)"
    parser.add_argument(
        "people", type=Path, metavar="PEOPLE",
        help="a folder with a folder of photos for each person, in it a person.toml that says agreed = true; or a manifest "
        "(.csv, .jsonl) with name, photos and agreed",
    )  # fmt: skip
    add_base(parser, required=True)
    parser.add_argument(
        "--output", type=output_folder, required=True, metavar="DIR",
        help="a folder in it for each person's LoRA and pictures, and the report; what is there is not made again",
    )  # fmt: skip
    _add_order(parser)
    add_device(parser)
    parser.add_argument(
        "--ray", metavar="HOST:PORT|local",
        help="make several people at a time, on a GPU each: the head node of a Ray cluster, or local for this machine's GPUs",
    )  # fmt: skip
    add_dry_run(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object per report and person on stdout")


def add_forget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the name of the person's folder in the studio's output")
    parser.add_argument("--output", type=output_folder, required=True, metavar="DIR", help="the studio's output")


def _add_order(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--style-pack", metavar="NAME", help="`facelora generate --style-pack list` lists them")
    parser.add_argument(
        "--style-folder", action="append", default=[], type=Path, metavar="DIR", help="your own style packs"
    )
    parser.add_argument("--count", type=int, help="pictures to draw (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the first picture; the next ones count up (default: 1)")
    parser.add_argument(
        "--recipe", choices=get_args(RecipeName), default="balanced", help="how much is trained (default: balanced)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="other settings of the training")
    add_training_adapter(parser)
    add_sidecars_option(parser)
    add_settings(parser, ("trigger_word", "class_word", "steps", "check_photos", *SCHEDULE))


def add_generate(parser: argparse.ArgumentParser) -> None:
    add_base(parser, required=False)
    add_settings(parser, SCHEDULE)
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="may be repeated")
    _add_people(parser)
    _add_prompts(parser)
    _add_output(parser)
    _add_drawing(parser)
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="list the pictures as JSON")


def _add_people(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--person", action="append", default=[], type=unicode_text, metavar="NAME=FILE[:STRENGTH]",
        help="the LoRA of one of several people, for each; prompts name them in braces: '{anna} and {ben} in an office'",
    )  # fmt: skip
    parser.add_argument(
        "--region", action="append", default=[], type=unicode_text, metavar="NAME=LEFT,TOP,RIGHT,BOTTOM",
        help="where a --person is, as shares of the picture, or NAME=MASK.png, for each (default: side by side)",
    )  # fmt: skip


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt",
        action="append",
        type=unicode_text,
        default=[],
        help="may be repeated; default: the LoRA's trigger phrase; words have no weights: "
        "brackets, as in (word:1.3), are characters",
    )
    parser.add_argument(
        "--style-pack", metavar="NAME", help="make headshots in the styles of a pack; 'list' lists them"
    )
    parser.add_argument("--style", action="append", metavar="NAME", help="only this style of the pack; may be repeated")
    parser.add_argument(
        "--style-folder", action="append", default=[], type=Path, metavar="DIR", help="your own style packs"
    )
    parser.add_argument(
        "--subject",
        type=unicode_text,
        metavar="WORDS",
        help="the person in style prompts; default: the LoRA's trigger phrase",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the folder of the pictures, and for ranking and redrawing them by likeness to photos."""
    parser.add_argument(
        "--output",
        type=output_folder,
        metavar="DIR",
        help="folder for the pictures; what is there is not made again, and moves to DIR/earlier where it was made otherwise",
    )
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="PHOTOS",
        help="photos of the person: sorts the pictures by likeness; NAME=PHOTOS for each --person",
    )
    parser.add_argument(
        "--keep",
        type=int,
        metavar="K",
        help="copy the K most alike into DIR/kept (default: a quarter; needs --reference)",
    )
    parser.add_argument(
        "--face-pass",
        type=float,
        metavar="SHARE",
        help="draw faces anew that are smaller than this share of the base's "
        "resolution, where likeness does not fall by it; 0: never (default: 0.25; needs --reference)",
    )
    parser.add_argument(
        "--face-denoise", type=float, metavar="SHARE", help="of the steps that are taken for it (default: 0.35)"
    )


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--negative",
        type=unicode_text,
        default="",
        help="what should not be in the pictures (FLUX.1-dev and the like take none, nor does --guidance 1)",
    )
    parser.add_argument("--count", type=int, default=4, help="pictures of each prompt, or of a whole pack (default: 4)")
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the first picture; the next ones count up (default: 1)"
    )
    parser.add_argument("--size", type=_size, metavar="WxH", help="in pixels; default: what the base was trained at")
    parser.add_argument("--steps", type=int, help="sampling steps (default: what suits the base, or the style's)")
    parser.add_argument(
        "--guidance",
        type=float,
        help="classifier-free guidance, CFG scale (default: what suits the base, or the style's)",
    )
    parser.add_argument("--sampler", help="default: what suits the base (dpmpp_2m_karras; FLUX.1 and later: euler); "
                        "an unknown one lists them")  # fmt: skip
    parser.add_argument("--clip-skip", type=int, default=1, help="1: last layer of the text encoder (default: 1)")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures at a time (default: 1)")
    parser.add_argument("--precision", choices=get_args(Precision), default="auto")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 512x640")
    return int(width), int(height)


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of photos of one person")
    parser.add_argument(
        "--sheet", type=output_file, metavar="FILE.html", help="also write a page with the faces and the reasons"
    )
    add_overwrite(parser)
    add_base(parser, required=False)
    parser.add_argument("--resolution", type=int, help="that is trained at, in pixels (default: the base's, else 1024)")
    parser.add_argument(
        "--threshold", action="append", default=[], type=_threshold, metavar="NAME=NUMBER",
        help="where a verdict changes (docs/photos.md lists the names); may be repeated",
    )  # fmt: skip
    add_face_network(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def _threshold(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    kinds = get_type_hints(photos.Thresholds)
    if name not in kinds:
        raise argparse.ArgumentTypeError(f"{name!r} is no threshold: {', '.join(kinds)}")
    try:
        value = kinds[name](number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        what = "whole number" if kinds[name] is int else "number"
        raise argparse.ArgumentTypeError(f"{number!r} in {text!r} is not a {what}")
    return name, value


def add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of pictures")
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="PHOTOS", help="folder of photos of the person"
    )
    parser.add_argument(
        "--sheet", type=output_file, metavar="FILE.png", help="also write a sheet of the pictures, sorted"
    )
    add_overwrite(parser)
    add_face_network(parser)
    add_judge(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")
