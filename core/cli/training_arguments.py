"""The arguments of the commands that train, or time it. Importing this loads no torch, so that --help answers at once."""

import argparse
import sys
from pathlib import Path
from typing import get_args

from ..bench.shapes import REAL_CHANNELS, SHAPES
from ..config import Precision, RecipeName, Targets
from .common import (
    add_base,
    add_device,
    add_dry_run,
    add_face_network,
    add_judge,
    add_sidecars_option,
    add_training_adapter,
    show_first,
    unicode_text,
)
from .outputs import output_file, output_folder
from .settings import add_settings


def add_train(parser: argparse.ArgumentParser) -> None:
    # Without this, argparse would list every setting in each message about wrong usage.
    parser.usage = "%(prog)s PHOTOS --base BASE --output FILE.safetensors [OPTIONS] (--help-all lists them)"
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of photos (jpg, png, webp, heic, ...)")
    add_base(parser, required=True)
    parser.add_argument(
        "--output", type=output_file, required=True, metavar="FILE.safetensors", help="the LoRA to write"
    )
    parser.add_argument("--class-photos", type=Path, metavar="DIR", help="photos of the class, for prior preservation")
    parser.add_argument("--continue-from", type=Path, metavar="FILE", help="LoRA to go on from")
    add_training_adapter(parser)
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="settings; options given here win over the file's"
    )
    parser.add_argument(
        "--recipe", choices=("none", *get_args(RecipeName)), default="balanced",
        help="settings for little, usual or much time, which the file's and the options here win over; none: the defaults "
        "below as they stand (default: balanced)",
    )  # fmt: skip
    unfinished = parser.add_mutually_exclusive_group()
    unfinished.add_argument(
        "--resume", action="store_true", help="go on from the saved state of the same run if there is one"
    )
    unfinished.add_argument(
        "--restart", action="store_true", help="begin anew, whatever state or trained LoRA is there"
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail on a photo that cannot be read, instead of skipping it"
    )
    add_sidecars_option(parser)
    add_face_network(parser, default=None)
    add_judge(parser)
    add_dry_run(parser)
    add_device(parser)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per report on stdout instead of a progress bar"
    )
    add_settings(parser)
    show_first(
        parser,
        ("--base", "--output", "--recipe", "--trigger", "--class-word", "--steps", "--rank", "--learning-rate", "--method",
         "--resolution", "--memory-limit", "--dry-run", "--resume", "--restart"),
    )  # fmt: skip


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s PHOTOS [PHOTOS ...] --base BASE --output DIR [OPTIONS] (--help-all lists them)"
    parser.add_argument("photos", type=Path, nargs="+", metavar="PHOTOS", help="a folder for each person")
    add_base(parser, required=True)
    parser.add_argument(
        "--methods", default="lora,textual-inversion,dreambooth", metavar="A,B,...", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=output_folder, required=True, metavar="DIR", help="what is there is not made again"
    )
    parser.add_argument("--held-out", type=int, default=2, metavar="N", help="photos of each person (default: 2)")
    parser.add_argument(
        "--rate", action="append", default=[], metavar="METHOD=X",
        help="learning rate of a method; default: the settings' times what suits the method; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--scene", action="append", type=unicode_text, default=[], metavar="TEXT",
        help="what pictures are asked for beside the person, to measure adherence; give two or more (default: left, front and "
        "right view)",
    )  # fmt: skip
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="settings; options given here win over the file's"
    )
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_settings(parser)
    show_first(
        parser,
        ("--base", "--output", "--methods", "--held-out", "--rate", "--scene", "--steps", "--rank", "--resolution"),
    )


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=output_folder, default=Path("demo_output"), metavar="DIR")
    parser.add_argument("--person", type=int, default=35, help="which of the unseen people, 35 to 40 (default: 35)")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: the demo's own")


def add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", choices=tuple(SHAPES), default=next(iter(SHAPES)), help="default: %(default)s")
    parser.add_argument("--resolution", type=int, metavar="PIXELS", help="default: the family's own")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures in a forward pass (default: 1)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (default: 16)")
    parser.add_argument("--targets", choices=get_args(Targets), default="transformer", help="default: transformer")
    parser.add_argument("--precision", choices=get_args(Precision), default="auto", help="default: auto")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of our loop")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each loop (default: 20)")
    parser.add_argument("--comfyui", type=Path, metavar="FOLDER", help="also time the trainer of the ComfyUI there")
    parser.add_argument(
        "--comfyui-python", type=Path, metavar="FILE", default=Path(sys.executable), help="default: this one"
    )
    parser.add_argument("--append", type=output_file, metavar="FILE", help="also add the report to this Markdown file")
    parser.add_argument(
        "--channels", type=int, default=REAL_CHANNELS, help=f"of the first level; real size: {REAL_CHANNELS} (default)"
    )
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--measure", action="store_true",
        help="spend about a minute on computing: loss and gradient against the CPU, memory and time of steps by plan",
    )  # fmt: skip
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `completion`."""
    parser.add_argument(
        "shell", choices=("bash", "zsh", "tcsh"), help='for bash: eval "$(facelora completion bash)" in ~/.bashrc'
    )


def add_clear_cache(parser: argparse.ArgumentParser) -> None:
    """Adds nothing, since the command has no arguments."""
