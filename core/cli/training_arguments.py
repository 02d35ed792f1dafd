"""The arguments of the commands that train, or time training. Importing this doesn't load torch, which keeps --help fast."""

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
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="Folder of photos (jpg, png, webp, heic, ...)")
    add_base(parser, required=True)
    parser.add_argument("--output", type=output_file, required=True, metavar="FILE.safetensors", help="LoRA to write")
    parser.add_argument("--class-photos", type=Path, metavar="DIR", help="Photos of the class, for prior preservation")
    parser.add_argument("--continue-from", type=Path, metavar="FILE", help="LoRA to continue from")
    add_training_adapter(parser)
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="File with settings. Options override it")
    parser.add_argument(
        "--recipe", choices=("none", *get_args(RecipeName)), default="balanced",
        help="Preset for a quick, normal or thorough training run. Options and the config file override it. none uses the "
        "defaults listed below (default: balanced)",
    )  # fmt: skip
    unfinished = parser.add_mutually_exclusive_group()
    unfinished.add_argument(
        "--resume", action="store_true", help="Continue from the saved state of the same training run, if there is one"
    )
    unfinished.add_argument("--restart", action="store_true", help="Start again, and replace any saved state or LoRA")
    parser.add_argument(
        "--strict", action="store_true", help="Fail on a photo that cannot be read, instead of skipping it"
    )
    add_sidecars_option(parser)
    add_face_network(parser, default=None)
    add_judge(parser)
    add_dry_run(parser)
    add_device(parser)
    parser.add_argument(
        "--json", action="store_true", help="Print one JSON object per report instead of a progress bar"
    )
    add_settings(parser)
    show_first(
        parser,
        ("--base", "--output", "--recipe", "--trigger", "--class-word", "--steps", "--rank", "--learning-rate", "--method",
         "--resolution", "--memory-limit", "--dry-run", "--resume", "--restart"),
    )  # fmt: skip


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s PHOTOS [PHOTOS ...] --base BASE --output DIR [OPTIONS] (--help-all lists them)"
    parser.add_argument("photos", type=Path, nargs="+", metavar="PHOTOS", help="One folder of photos for each person")
    add_base(parser, required=True)
    parser.add_argument(
        "--methods",
        default="lora,textual-inversion,dreambooth",
        metavar="A,B,...",
        help="Methods to compare (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=output_folder,
        required=True,
        metavar="DIR",
        help="Folder for the results. Existing ones are not made again",
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=2,
        metavar="N",
        help="Photos of each person to keep back as reference photos (default: 2)",
    )
    parser.add_argument(
        "--rate", action="append", default=[], metavar="METHOD=X",
        help="Learning rate of a method; may be repeated (default: that of the settings, times what suits the method)",
    )  # fmt: skip
    parser.add_argument(
        "--scene", action="append", type=unicode_text, default=[], metavar="TEXT",
        help="What prompts ask for besides the person, to measure adherence. Give two or more (default: left, front and "
        "right view)",
    )  # fmt: skip
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="File with settings. Options override it")
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON")
    add_settings(parser)
    show_first(
        parser,
        ("--base", "--output", "--methods", "--held-out", "--rate", "--scene", "--steps", "--rank", "--resolution"),
    )


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=output_folder,
        default=Path("demo_output"),
        metavar="DIR",
        help="Folder for the results (default: demo_output)",
    )
    parser.add_argument(
        "--person", type=int, default=35, help="Person that the base model has not seen, 35 to 40 (default: 35)"
    )
    parser.add_argument("--steps", type=int, help="Optimizer steps (default: the demo's own)")


def add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--family", choices=tuple(SHAPES), default=next(iter(SHAPES)), help="Model family (default: %(default)s)"
    )
    parser.add_argument(
        "--resolution", type=int, metavar="PIXELS", help="Resolution in pixels (default: the family's own)"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="Pictures in a forward pass (default: 1)")
    parser.add_argument("--rank", type=int, default=16, help="Rank of the adapter (default: 16)")
    parser.add_argument(
        "--targets",
        choices=get_args(Targets),
        default="transformer",
        help="Layers that get an adapter (default: transformer)",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="auto",
        help="Precision of weights and arithmetic (default: auto)",
    )
    parser.add_argument("--compile", action="store_true", help="Compile the blocks of our loop")
    parser.add_argument("--steps", type=int, default=20, help="Timed steps of each loop (default: 20)")
    parser.add_argument(
        "--comfyui", type=Path, metavar="FOLDER", help="Also time the trainer of the ComfyUI in this folder"
    )
    parser.add_argument(
        "--comfyui-python",
        type=Path,
        metavar="FILE",
        default=Path(sys.executable),
        help="Python of that ComfyUI (default: this one)",
    )
    parser.add_argument(
        "--append", type=output_file, metavar="FILE", help="Also append the report to this Markdown file"
    )
    parser.add_argument(
        "--channels",
        type=int,
        default=REAL_CHANNELS,
        help=f"Channels of the first level (default: {REAL_CHANNELS}, the real size)",
    )
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON")


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--measure", action="store_true",
        help="Test this machine for about a minute: loss and gradient against the CPU, memory and time of steps by plan",
    )  # fmt: skip
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON")


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `completion`."""
    parser.add_argument(
        "shell",
        choices=("bash", "zsh", "tcsh"),
        help='Shell. For bash, put this in ~/.bashrc: eval "$(facelora completion bash)"',
    )


def add_clear_cache(parser: argparse.ArgumentParser) -> None:
    """Do nothing, since the command has no arguments."""
