"""The arguments of the commands for LoRA files. Importing this doesn't load torch, which keeps --help fast."""

import argparse
from pathlib import Path
from typing import get_args

from ..tensor_names import NAME_TABLES, SCHEMES
from .common import unicode_text
from .outputs import add_overwrite, edited_file, output_file, output_folder

EDITABLE = ("title", "author", "description", "trigger_phrase", "license", "usage_hint")
"""The texts in a LoRA's metadata that the command `metadata` can change."""
_SCHEMES_HELP = (
    "Tensor names. Use diffusers for diffusers and peft. For most other programs, use kohya for SD1.5, SDXL and FLUX.1, and "
    "comfy (the original model's names) for later models"
)


def _add_output(parser: argparse.ArgumentParser) -> None:
    from ..config import SavePrecision  # inspect doesn't need this, and is called for many files.

    parser.add_argument("--output", type=output_file, required=True, metavar="FILE.safetensors", help="File to write")
    parser.add_argument(
        "--precision", choices=get_args(SavePrecision), default="fp16", help="Precision of the tensors (default: fp16)"
    )
    add_overwrite(parser)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE|FOLDER",
        help="A LoRA. Several files, or a folder, print one line each",
    )  # fmt: skip
    parser.add_argument("--fast", action="store_true", help="Read no tensors. The norms of the blocks are left out")
    parser.add_argument("--json", action="store_true", help="Print everything as JSON")


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="LoRA to check")
    parser.add_argument("--base", type=Path, metavar="CHECKPOINT", help="Base model that the LoRA should fit")


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="IN", help="LoRA with any tensor names")
    _add_output(parser)
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
        type=Path,
        metavar="CHECKPOINT",
        help="For --plain-rank: the base model that a DoRA or OFT was trained on",
    )


def add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE[:STRENGTH]", help="LoRAs with their strengths (default: 1)")
    _add_output(parser)
    parser.add_argument(
        "--to", choices=SCHEMES, help=f"{_SCHEMES_HELP} (default: what most programs load for the model)"
    )
    parser.add_argument(
        "--rank", type=int, metavar="N", help="Rank of the result (default: the sum of the ranks, which is exact)"
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="CHECKPOINT",
        help="Merge into a copy of this checkpoint instead, and keep its precision",
    )


def add_resize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="IN", help="LoRA to resize")
    _add_output(parser)
    parser.add_argument("--rank", type=int, metavar="N", help="Largest rank of a module")
    parser.add_argument(
        "--energy",
        type=float,
        metavar="X",
        help="Instead of --rank: fraction of the squared singular values to keep, up to 1",
    )


def add_extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("original", type=Path, metavar="ORIGINAL", help="Original checkpoint")
    parser.add_argument("tuned", type=Path, metavar="TUNED", help="Checkpoint that was trained from it")
    _add_output(parser)
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
        "--thumbnail", type=Path, metavar="PICTURE", help="Picture to put into the file as a small copy"
    )
    parser.add_argument(
        "--remove", action="append", default=[], metavar="KEY", help="Metadata key to remove; may be repeated"
    )


def add_sidecars(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="LoRA. Existing files beside it stay, except unedited ones that this command wrote",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="PICTURE",
        help="Also write a copy as NAME.png and NAME.preview.png. It shows the person: use it only if they agree",
    )  # fmt: skip


def add_publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="LORA", help="LoRA to publish. The file stays unchanged")
    parser.add_argument("--output", type=output_folder, required=True, metavar="DIR", help="Folder to make")
    parser.add_argument(
        "--pictures", nargs="+", type=Path, default=[], metavar="FILE|FOLDER",
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
