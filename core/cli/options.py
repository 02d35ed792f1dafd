"""Options that several commands have, and the option --help-all. Importing this doesn't load torch."""

import argparse
from collections.abc import Collection, Sequence
from typing import Any, get_args

from ..config import Precision
from .outputs import given_name, given_path


class HelpAll(argparse.Action):
    """The option --help-all, which shows all options, including those that `show_first` has hidden."""

    hidden: Sequence[tuple[argparse.Action, str | None]] = ()

    def show(self) -> None:
        """Restore the hidden options."""
        for action, text in self.hidden:
            action.help = text

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        self.show()
        parser.print_help()
        parser.exit()


def show_first(parser: argparse.ArgumentParser, first: Collection[str]) -> None:
    """Show only the options of these names in --help, and add --help-all, which shows every option."""
    shown = {"--help", *first}
    hidden = [action for action in parser._actions if action.option_strings and not shown & {*action.option_strings}]
    more = parser.add_argument("--help-all", action=HelpAll, nargs=0, help=f"Show {len(hidden)} more options")
    assert isinstance(more, HelpAll)
    more.hidden = [(action, action.help) for action in hidden]
    for action in hidden:
        action.help = argparse.SUPPRESS


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="Device: cpu, cuda, cuda:1, mps, ... (default: the best available)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print JSON")


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=given_path, metavar="FILE.toml", help="File with settings. Options override it"
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="auto",
        help="Precision of weights and arithmetic (default: auto)",
    )


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=int, default=1, help="Seed of the first picture; the next ones count up (default: 1)"
    )


def add_style_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--style-folder",
        action="append",
        default=[],
        type=given_path,
        metavar="DIR",
        help="Folder with your own style packs; may be repeated",
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="Print the work of each part, the time and the memory, then exit"
    )


def add_base(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--base", type=given_name, required=required,
        help="Base model: checkpoint file, diffusers folder, hub id, or demo, the small one of the package",
    )  # fmt: skip
    parser.add_argument(
        "--vae", type=given_name, metavar="FILE", help="VAE, if the base model's file has only the denoiser"
    )
    parser.add_argument(
        "--text-encoder", type=given_name, action="append", default=[], metavar="FILE",
        help="Text encoder, if the base model's file has none; repeat it for each (FLUX.1: CLIP-L and T5)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=given_name, metavar="DIR",
        help="Folder with the tokenizer of T5 or Qwen (FLUX.1 and later), from a diffusers folder or ComfyUI's "
        "comfy/text_encoders",
    )  # fmt: skip


def add_face_network(parser: argparse.ArgumentParser, default: str | None = "sface") -> None:
    parser.add_argument(
        "--face-network", default=default, metavar="NAME|FILE.onnx",
        help="Face network that tells people apart: sface, dlib, or a file in ArcFace's format (default: sface)",
    )  # fmt: skip


def add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--judge", metavar="NAME|FILE.onnx",
        help="Second face network. It only reports likeness, and selects or sorts nothing",
    )  # fmt: skip


def add_training_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--training-adapter", type=given_path, metavar="FILE",
        help="LoRA that undoes the distillation of a base model (Turbo, schnell). Used only during training steps",
    )  # fmt: skip


def add_sidecars_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sidecars", action="store_true", help="Also write files that tell other programs the LoRA's words"
    )
