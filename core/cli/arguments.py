"""The arguments of each command. Importing this doesn't load torch, which keeps --help fast."""

import argparse
import math
from pathlib import Path
from typing import get_args, get_type_hints

from .. import photos  # Its modules load only when a name is used.
from ..config import RecipeName, SavePrecision
from ..tensor_names import NAME_TABLES, SCHEMES
from .common import unicode_text
from .options import (
    add_base,
    add_config,
    add_device,
    add_dry_run,
    add_face_network,
    add_json,
    add_judge,
    add_precision,
    add_seed,
    add_sidecars_option,
    add_style_folder,
    add_training_adapter,
    show_first,
)
from .outputs import add_overwrite, edited_file, given_name, given_path, output_file, output_folder
from .settings import SCHEDULE, add_settings


def add_train(parser: argparse.ArgumentParser) -> None:
    # Without this, argparse would list every setting in each message about wrong usage.
    parser.usage = "%(prog)s PHOTOS --base BASE --output FILE.safetensors [OPTIONS] (--help-all lists them)"
    parser.add_argument(
        "photos", type=given_path, metavar="PHOTOS", help="Folder of photos (jpg, png, webp, heic, ...)"
    )
    add_base(parser, required=True)
    parser.add_argument("--output", type=output_file, required=True, metavar="FILE.safetensors", help="LoRA to write")
    parser.add_argument(
        "--class-photos", type=given_path, metavar="DIR", help="Photos of the class, for prior preservation"
    )
    parser.add_argument("--continue-from", type=given_path, metavar="FILE", help="LoRA to continue from")
    add_training_adapter(parser)
    add_config(parser)
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


def add_doctor(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    add_json(parser)


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `completion`."""
    parser.add_argument(
        "shell",
        choices=("bash", "zsh", "tcsh"),
        help='Shell. For bash, put this in ~/.bashrc: eval "$(facelora completion bash)"',
    )


def add_clear_cache(parser: argparse.ArgumentParser) -> None:
    """Do nothing, since the command has no arguments."""


def add_headshots(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s PHOTOS --base BASE [--output DIR] [OPTIONS] (--help lists them)"
    parser.add_argument("photos", type=given_path, metavar="PHOTOS", help="Folder of 10 to 20 photos of one person")
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
        "people", type=given_path, metavar="PEOPLE",
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
    add_style_folder(parser)
    parser.add_argument("--count", type=int, help="Pictures to draw (default: 20)")
    add_seed(parser)
    parser.add_argument(
        "--recipe",
        choices=get_args(RecipeName),
        default="balanced",
        help="Preset for a quick, normal or thorough training run (default: balanced)",
    )
    parser.add_argument(
        "--config", type=given_path, metavar="FILE.toml", help="File with other settings of the training run"
    )
    add_training_adapter(parser)
    parser.add_argument(
        "--draw-on", type=given_name, metavar="BASE",
        help="Base model to draw on, instead of the one trained on: another of its family, such as SDXL-Lightning",
    )  # fmt: skip
    add_sidecars_option(parser)
    add_settings(parser, ("trigger_word", "class_word", "steps", "check_photos", *SCHEDULE))


def add_generate(parser: argparse.ArgumentParser) -> None:
    add_base(parser, required=False)
    add_settings(parser, SCHEDULE)
    parser.add_argument(
        "--lora",
        type=given_name,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA to draw with; may be repeated",
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
    add_style_folder(parser)
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
    add_seed(parser)
    parser.add_argument(
        "--size", type=_size, metavar="WxH", help="Size in pixels (default: what the base model was trained at)"
    )
    parser.add_argument("--steps", type=int, help="Sampling steps (default: what suits the base model or the style)")
    parser.add_argument(
        "--guidance",
        type=float,
        help="Guidance, the CFG scale (default: what suits the base model or the style)",
    )
    parser.add_argument(
        "--sampler",
        help="Sampler; an unknown name lists them (default: dpmpp_2m_karras for SD1.5 and SDXL, euler for other "
        "and for distilled models)",
    )
    parser.add_argument(
        "--clip-skip", type=int, default=1, help="Layer of the text encoder to use; 1 is the last (default: 1)"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="Pictures drawn at once (default: 1)")
    add_precision(parser)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 512x640")
    return int(width), int(height)


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", type=given_path, metavar="PHOTOS", help="Folder of photos of one person")
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
    add_json(parser)


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
    parser.add_argument("images", type=given_path, metavar="IMAGES", help="Folder of pictures")
    parser.add_argument(
        "--reference", type=given_path, required=True, metavar="PHOTOS", help="Folder of photos of the person"
    )
    parser.add_argument(
        "--sheet", type=output_file, metavar="FILE.png", help="Also write a sheet of the sorted pictures"
    )
    add_overwrite(parser)
    add_face_network(parser)
    add_judge(parser)
    add_json(parser)


EDITABLE = ("title", "author", "description", "trigger_phrase", "license", "usage_hint")
"""The texts in a LoRA's metadata that the command `metadata` can change."""
_SCHEMES_HELP = (
    "Tensor names: kohya, comfy (the original model's), diffusers or others. Which ones a program loads depends on the model: "
    "docs/formats.md lists them, and convert --for PROGRAM chooses"
)


def _add_lora_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=output_file, required=True, metavar="FILE.safetensors", help="File to write")
    parser.add_argument(
        "--precision", choices=get_args(SavePrecision), default="fp16", help="Precision of the tensors (default: fp16)"
    )
    add_overwrite(parser)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", type=given_path, metavar="FILE|FOLDER",
        help="A LoRA or a picture. Several files, or a folder of LoRAs, print one line each",
    )  # fmt: skip
    parser.add_argument("--fast", action="store_true", help="Read no tensors. The norms of the blocks are left out")
    parser.add_argument("--json", action="store_true", help="Print everything as JSON")


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=given_path, metavar="FILE", help="LoRA to check")
    parser.add_argument("--base", type=given_path, metavar="CHECKPOINT", help="Base model that the LoRA should fit")


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=given_path, metavar="IN", help="LoRA with any tensor names")
    _add_lora_output(parser)
    naming = parser.add_mutually_exclusive_group(required=True)
    naming.add_argument("--to", choices=SCHEMES, help=_SCHEMES_HELP)
    naming.add_argument(
        "--for", dest="readers", metavar="PROGRAM,...",
        help="Instead of --to: names that all of these programs load (comfyui, diffusers, peft, sd-scripts, invokeai, a1111, "
        "forge, sd.next, stable-diffusion.cpp, mflux, onetrainer, ai-toolkit, musubi-tuner)",
    )  # fmt: skip
    parser.add_argument(
        "--family", choices=NAME_TABLES, metavar="NAME",
        help=f"Model family, if the LoRA fits several, as text encoders do: {', '.join(NAME_TABLES)}",
    )  # fmt: skip
    parser.add_argument(
        "--plain-rank", type=int, metavar="N", help="Turn LoHa, LoKr, ... into a plain LoRA of this rank"
    )
    parser.add_argument(
        "--base",
        type=given_path,
        metavar="CHECKPOINT",
        help="For --plain-rank: the base model that a DoRA or OFT was trained on",
    )


def add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", type=given_name, metavar="FILE[:STRENGTH]", help="LoRAs with their strengths (default: 1)"
    )
    _add_lora_output(parser)
    parser.add_argument(
        "--to", choices=SCHEMES, help=f"{_SCHEMES_HELP} (default: what most programs load for the model)"
    )
    parser.add_argument(
        "--rank", type=int, metavar="N", help="Rank of the result (default: the sum of the ranks, which is exact)"
    )
    parser.add_argument(
        "--into",
        type=given_path,
        metavar="CHECKPOINT",
        help="Merge into a copy of this checkpoint instead, and keep its precision",
    )


def add_resize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=given_path, metavar="IN", help="LoRA to resize")
    _add_lora_output(parser)
    parser.add_argument("--rank", type=int, metavar="N", help="Largest rank of a module")
    parser.add_argument(
        "--energy",
        type=float,
        metavar="X",
        help="Instead of --rank: fraction of the squared singular values to keep, up to 1",
    )


def add_extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("original", type=given_path, metavar="ORIGINAL", help="Original checkpoint")
    parser.add_argument("tuned", type=given_path, metavar="TUNED", help="Checkpoint that was trained from it")
    _add_lora_output(parser)
    parser.add_argument("--rank", type=int, default=64, metavar="N", help="Rank of the LoRA (default: 64)")


def add_metadata(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=edited_file, metavar="FILE", help="LoRA to change, in place unless you give --output"
    )
    parser.add_argument("--output", type=output_file, metavar="FILE.safetensors", help="File to write instead")
    add_overwrite(parser)
    for name in EDITABLE:
        parser.add_argument(
            "--" + name.replace("_", "-"), type=unicode_text, metavar="TEXT", help='New text; "" deletes it'
        )
    parser.add_argument(
        "--tag",
        action="append",
        type=unicode_text,
        metavar="TEXT",
        help="New tag, which replaces all tags; may be repeated",
    )
    parser.add_argument(
        "--thumbnail", type=given_path, metavar="PICTURE", help="Picture to put into the file as a small copy"
    )
    parser.add_argument(
        "--remove", action="append", default=[], metavar="KEY", help="Metadata key to remove; may be repeated"
    )


def add_sidecars(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=given_path,
        metavar="FILE",
        help="LoRA. Existing files beside it stay, except unedited ones that this command wrote",
    )
    parser.add_argument(
        "--picture", type=given_path, metavar="PICTURE",
        help="Also write a copy as NAME.png and NAME.preview.png. It shows the person: use it only if they agree",
    )  # fmt: skip


def add_publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=given_path, metavar="LORA", help="LoRA to publish. The file stays unchanged")
    parser.add_argument("--output", type=output_folder, required=True, metavar="DIR", help="Folder to make")
    parser.add_argument(
        "--pictures", nargs="+", type=given_path, default=[], metavar="FILE|FOLDER",
        help="Example pictures. Their metadata is removed, except for how they were drawn",
    )  # fmt: skip
    parser.add_argument(
        "--title",
        type=unicode_text,
        metavar="TEXT",
        help="Title, which also names the files (default: the one in the LoRA's metadata)",
    )
    parser.add_argument(
        "--description", type=unicode_text, metavar="TEXT", help="Description (default: the one in the LoRA's metadata)"
    )
    parser.add_argument(
        "--agreed",
        action="store_true",
        help="Confirm that the person shown has agreed to be published. Required, and stated on the page",
    )
    parser.epilog = (
        "Since May 2025, Civitai does not accept models of real people, even if they agree. "
        "Read the rules of the site first."
    )
