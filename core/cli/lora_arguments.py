"""The arguments of the commands that work on LoRA files. Importing this loads no torch, so that --help answers at once."""

import argparse
from pathlib import Path
from typing import get_args

from ..tensor_names import NAME_TABLES, SCHEMES
from .common import unicode_text
from .outputs import add_overwrite, edited_file, output_file, output_folder

EDITABLE = ("title", "author", "description", "trigger_phrase", "license", "usage_hint")
"""The texts in a LoRA's metadata that the command `metadata` can change."""
_SCHEMES_HELP = (
    "naming of the tensors: kohya is what most programs load for SD1.5, SDXL and FLUX.1, diffusers what its pipelines and peft "
    "load, comfy (the original model's names) what most load for later models"
)


def _add_output(parser: argparse.ArgumentParser) -> None:
    from ..config import SavePrecision  # inspect does without: it is called for one file after another

    parser.add_argument(
        "--output", type=output_file, required=True, metavar="FILE.safetensors", help="the file to write"
    )
    parser.add_argument(
        "--precision", choices=get_args(SavePrecision), default="fp16", help="of the tensors (default: fp16)"
    )
    add_overwrite(parser)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE|FOLDER",
        help="a LoRA; of several, and of a folder of them, a line for each",
    )  # fmt: skip
    parser.add_argument("--fast", action="store_true", help="read no tensors: without the norms of the blocks")
    parser.add_argument("--json", action="store_true", help="as JSON, with everything that is known")


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a LoRA")
    parser.add_argument("--base", type=Path, metavar="CHECKPOINT", help="the model that it should fit")


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="IN", help="a LoRA of any naming")
    _add_output(parser)
    naming = parser.add_mutually_exclusive_group(required=True)
    naming.add_argument("--to", choices=SCHEMES, help=_SCHEMES_HELP)
    naming.add_argument(
        "--for", dest="readers", metavar="PROGRAM,...",
        help="or: the naming with which all of these programs load it (comfyui, diffusers, peft, sd-scripts, invokeai, a1111, "
        "forge, sd.next, stable-diffusion.cpp, mflux, onetrainer, ai-toolkit, musubi-tuner)",
    )  # fmt: skip
    parser.add_argument(
        "--family", choices=NAME_TABLES, metavar="NAME",
        help=f"what it is for, where it fits several families, as text encoders do: {', '.join(NAME_TABLES)}",
    )  # fmt: skip
    parser.add_argument("--plain-rank", type=int, metavar="N", help="make LoHa, LoKr, ... a plain LoRA of that rank")
    parser.add_argument("--base", type=Path, metavar="CHECKPOINT", help="what a DoRA or OFT was trained on, to do that")


def add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE[:STRENGTH]", help="the LoRAs; without a strength it is 1")
    _add_output(parser)
    parser.add_argument(
        "--to", choices=SCHEMES, help=f"{_SCHEMES_HELP} (default: what most programs load for the model)"
    )
    parser.add_argument("--rank", type=int, metavar="N", help="of the result; default: exact, the ranks add up")
    parser.add_argument(
        "--into", type=Path, metavar="CHECKPOINT", help="merge into a copy of this checkpoint instead, in its own types"
    )


def add_resize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="IN", help="a LoRA")
    _add_output(parser)
    parser.add_argument("--rank", type=int, metavar="N", help="the most that a module may have")
    parser.add_argument(
        "--energy", type=float, metavar="X", help="or: share of the squared singular values to keep, to 1"
    )


def add_extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("original", type=Path, metavar="ORIGINAL", help="checkpoint")
    parser.add_argument("tuned", type=Path, metavar="TUNED", help="checkpoint that was trained from it")
    _add_output(parser)
    parser.add_argument("--rank", type=int, default=64, metavar="N", help="of the LoRA (default: 64)")


def add_metadata(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=edited_file, metavar="FILE", help="a LoRA, changed in place unless --output is given"
    )
    parser.add_argument("--output", type=output_file, metavar="FILE.safetensors", help="the file to write instead")
    add_overwrite(parser)
    for name in EDITABLE:
        parser.add_argument("--" + name.replace("_", "-"), type=unicode_text, metavar="TEXT", help='"" deletes it')
    parser.add_argument(
        "--tag", action="append", type=unicode_text, metavar="TEXT", help="may be repeated; replaces all tags"
    )
    parser.add_argument("--thumbnail", type=Path, metavar="PICTURE", help="a small copy of it is put into the file")
    parser.add_argument(
        "--remove", action="append", default=[], metavar="KEY", help="a metadata key to remove; may be repeated"
    )


def add_sidecars(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a LoRA; what is beside it already is left as it is")
    parser.add_argument(
        "--picture", type=Path, metavar="PICTURE",
        help="also write a copy as NAME.png and NAME.preview.png; it shows the person: only where they agree",
    )  # fmt: skip


def add_publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="LORA", help="the LoRA, which stays as it is")
    parser.add_argument("--output", type=output_folder, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--pictures", nargs="+", type=Path, default=[], metavar="FILE|FOLDER",
        help="example pictures; what they were drawn from stays in them, everything else in their metadata goes",
    )  # fmt: skip
    parser.add_argument(
        "--title", type=unicode_text, metavar="TEXT", help="default: the title in the LoRA's metadata; names the files"
    )
    parser.add_argument(
        "--description", type=unicode_text, metavar="TEXT", help="default: the description in the LoRA's metadata"
    )
    parser.add_argument(
        "--agreed",
        action="store_true",
        help="the person shown has agreed to it, which the page says; else nothing is made",
    )
    parser.epilog = (
        "Civitai takes no models of real people since May 2025, whoever agrees; read the rules of the site first."
    )
