"""The arguments of the commands about pictures and photos. Importing this doesn't load torch, which keeps --help fast."""

import argparse
import math
from pathlib import Path
from typing import get_args, get_type_hints

from .. import photos  # Its modules load only when a name is used.
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
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="Folder of 10 to 20 photos of one person")
    add_base(parser, required=True)
    parser.add_argument(
        "--output", type=output_folder, metavar="DIR",
        help="Folder for the LoRA, the pictures and their page. Existing ones are not made again (default: PHOTOS-headshots)",
    )  # fmt: skip
    _add_order(parser)
    parser.add_argument("--yes", action="store_true", help="Ask no questions")
    add_dry_run(parser)
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="Print one JSON object per report, and ask no questions")


def add_studio(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s PEOPLE --base BASE --output DIR [OPTIONS] (--help lists them)"
    parser.add_argument(
        "people", type=Path, metavar="PEOPLE",
        help="Folder with a folder for each person: photos, and a person.toml with agreed = true. Or a manifest "
        "(.csv, .jsonl) with name, photos and agreed",
    )  # fmt: skip
    add_base(parser, required=True)
    parser.add_argument(
        "--output", type=output_folder, required=True, metavar="DIR",
        help="Folder for the report, and for a folder of each person. Existing results are not made again",
    )  # fmt: skip
    _add_order(parser)
    add_device(parser)
    parser.add_argument(
        "--ray", metavar="HOST:PORT|local",
        help="Make several people at once, each on a GPU. Head node of a Ray cluster, or local for this machine's GPUs",
    )  # fmt: skip
    add_dry_run(parser)
    parser.add_argument("--json", action="store_true", help="Print one JSON object per report and person")


def add_forget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="Name of the person's folder in the studio's output")
    parser.add_argument("--output", type=output_folder, required=True, metavar="DIR", help="The studio's output")


def _add_order(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--style-pack", metavar="NAME", help="Style pack. `facelora generate --style-pack list` lists them"
    )
    parser.add_argument(
        "--style-folder",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="Folder with your own style packs; may be repeated",
    )
    parser.add_argument("--count", type=int, help="Pictures to draw (default: 20)")
    parser.add_argument(
        "--seed", type=int, default=1, help="Seed of the first picture; the next ones count up (default: 1)"
    )
    parser.add_argument(
        "--recipe",
        choices=get_args(RecipeName),
        default="balanced",
        help="Preset for a quick, normal or thorough training run (default: balanced)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="File with other settings of the training run")
    add_training_adapter(parser)
    add_sidecars_option(parser)
    add_settings(parser, ("trigger_word", "class_word", "steps", "check_photos", *SCHEDULE))


def add_generate(parser: argparse.ArgumentParser) -> None:
    add_base(parser, required=False)
    add_settings(parser, SCHEDULE)
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="LoRA to draw with; may be repeated"
    )
    _add_people(parser)
    _add_prompts(parser)
    _add_output(parser)
    _add_drawing(parser)
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="List the pictures as JSON")


def _add_people(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--person", action="append", default=[], type=unicode_text, metavar="NAME=FILE[:STRENGTH]",
        help="LoRA of one of several people; give one for each. Prompts name them in braces: '{anna} and {ben} in an office'",
    )  # fmt: skip
    parser.add_argument(
        "--region", action="append", default=[], type=unicode_text, metavar="NAME=LEFT,TOP,RIGHT,BOTTOM",
        help="Where a --person is, in fractions of the picture, or NAME=MASK.png; give one for each (default: side by side)",
    )  # fmt: skip


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt",
        action="append",
        type=unicode_text,
        default=[],
        help="Prompt; may be repeated (default: a photo of the LoRA's trigger phrase). It is plain text: brackets, as in "
        "(word:1.3), are ordinary characters",
    )
    parser.add_argument(
        "--style-pack", metavar="NAME", help="Draw headshots in the styles of a pack. 'list' lists the packs"
    )
    parser.add_argument(
        "--style", action="append", metavar="NAME", help="Draw only this style of the pack; may be repeated"
    )
    parser.add_argument(
        "--style-folder",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="Folder with your own style packs; may be repeated",
    )
    parser.add_argument(
        "--subject",
        type=unicode_text,
        metavar="WORDS",
        help="Words for the person in style prompts (default: the LoRA's trigger phrase)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    """Add the options for the folder of the pictures, and for ranking and redrawing them by likeness to photos."""
    parser.add_argument(
        "--output",
        type=output_folder,
        metavar="DIR",
        help="Folder for the pictures. Existing ones are not drawn again; others with the same name move to DIR/earlier",
    )
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="PHOTOS",
        help="Photos of the person, to sort the pictures by likeness. Give NAME=PHOTOS for each --person",
    )
    parser.add_argument(
        "--keep",
        type=int,
        metavar="K",
        help="Copy the K most alike pictures into DIR/kept (default: a quarter; needs --reference)",
    )
    parser.add_argument(
        "--face-pass",
        type=float,
        metavar="SHARE",
        help="Redraw faces smaller than this fraction of the base model's resolution, unless that lowers likeness; 0: never "
        "(default: 0.25; needs --reference)",
    )
    parser.add_argument(
        "--face-denoise",
        type=float,
        metavar="SHARE",
        help="Fraction of the sampling steps used to redraw a face (default: 0.35)",
    )


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--negative",
        type=unicode_text,
        default="",
        help="What should not be in the pictures. Not used by FLUX.1-dev and similar base models, or with --guidance 1",
    )
    parser.add_argument(
        "--count", type=int, default=4, help="Pictures for each prompt, or for a whole pack (default: 4)"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="Seed of the first picture; the next ones count up (default: 1)"
    )
    parser.add_argument(
        "--size", type=_size, metavar="WxH", help="Size in pixels (default: what the base model was trained at)"
    )
    parser.add_argument("--steps", type=int, help="Sampling steps (default: what suits the base model or the style)")
    parser.add_argument(
        "--guidance",
        type=float,
        help="Guidance, the CFG scale (default: what suits the base model or the style)",
    )
    parser.add_argument("--sampler", help="Sampler; an unknown name lists them (default: what suits the base "
                        "model: dpmpp_2m_karras; FLUX.1 and later: euler)")  # fmt: skip
    parser.add_argument(
        "--clip-skip", type=int, default=1, help="Layer of the text encoder to use; 1 is the last (default: 1)"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="Pictures drawn at once (default: 1)")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="auto",
        help="Precision of weights and arithmetic (default: auto)",
    )


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 512x640")
    return int(width), int(height)


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="Folder of photos of one person")
    parser.add_argument(
        "--sheet", type=output_file, metavar="FILE.html", help="Also write a page with the faces and the reasons"
    )
    add_overwrite(parser)
    add_base(parser, required=False)
    parser.add_argument(
        "--resolution", type=int, help="Training resolution in pixels (default: the base model's, or 1024)"
    )
    parser.add_argument(
        "--threshold", action="append", default=[], type=_threshold, metavar="NAME=NUMBER",
        help="Value at which a verdict changes; may be repeated (docs/photos.md lists the names)",
    )  # fmt: skip
    add_face_network(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON")


def _threshold(text: str) -> tuple[str, float]:
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


def add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="IMAGES", help="Folder of pictures")
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="PHOTOS", help="Folder of photos of the person"
    )
    parser.add_argument(
        "--sheet", type=output_file, metavar="FILE.png", help="Also write a sheet of the sorted pictures"
    )
    add_overwrite(parser)
    add_face_network(parser)
    add_judge(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON")
