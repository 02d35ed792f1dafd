"""The command line: `facelora <command>`, or `python -m facelora <command>`.

Each command is a module of this package with its name (`clear_cache` for clear-cache), which is loaded when the command is
called. Its function `run` takes the command's options, and returns the exit code, or None for 0. The type of that parameter is
a dataclass that declares the options (see options.py).
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence

from ..errors import FaceLoraError
from .parser import Parser, did_you_mean
from .streams import standard_streams

GROUPS = {
    "from photos to pictures": {
        "page": "do the whole job on a page in your browser",
        "demo": "run the whole job on the small base model of the package, without GPU or download",
        "headshots": "turn photos of one person into a gallery of headshots; run it again to continue",
        "studio": "make LoRAs and headshots of many people on one base model, with a report on all",
        "train": "train a LoRA on a folder of photos of one person",
        "generate": "draw pictures with a base model and LoRAs, from prompts or the styles of a pack",
    },
    "check photos and pictures": {
        "consent": "write down who has agreed, to what and until when, or that they no longer agree",
        "check": "check the photos: which ones help, which ones don't, and what to add",
        "score": "measure how much pictures look like the person in your photos",
    },
    "LoRA files": {
        "inspect": "show what is in a LoRA file, or whether a picture is marked as drawn",
        "verify": "check a LoRA file for faults",
        "convert": "write a LoRA with the tensor names that another program needs",
        "merge": "merge LoRAs into one LoRA or into a checkpoint",
        "resize": "reduce the rank of a LoRA",
        "extract": "make a LoRA from the difference between two checkpoints",
        "metadata": "change title, author, trigger phrase, thumbnail and other metadata of a LoRA file",
        "sidecars": "write files beside a LoRA that tell other programs its words and picture",
        "publish": "make a folder to upload: a LoRA, a page of text and pictures, without personal data",
    },
    "this machine": {
        "forget": "delete everything that a studio keeps of a person",
        "doctor": "show what this machine has for training and what is missing",
        "completion": "print a shell completion script",
        "clear-cache": "delete everything in the cache folder that was kept of photos and captions",
    },
}
"""The commands and what they do, in the groups and the order of `--help`."""
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}
NVIDIA = "/dev/nvidiactl"
"""A file of NVIDIA's driver for Linux. WSL 2 doesn't have it."""


def grow_segments() -> None:
    """On Linux with an NVIDIA driver, make torch extend its blocks of GPU memory instead of adding others.

    Photos of many sizes would otherwise leave gaps between tensors. Must be called before torch is loaded. Settings in the
    environment take precedence. torch before 2.9 knows only the second name.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if os.path.exists(NVIDIA) and not any(name in os.environ for name in names):
        os.environ.update(dict.fromkeys(names, "expandable_segments:True"))


def allow_fast_attention() -> None:
    """Make torch use its fast attention on AMD's consumer cards too, as ComfyUI does. Must be called before torch is loaded."""
    os.environ.setdefault("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", "1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit code: 0 for success, 1 for a failure with a message on stderr, 2 for wrong usage."""
    grow_segments()
    allow_fast_attention()
    with standard_streams():
        code = _answered(lambda: _run(sys.argv[1:] if arguments is None else arguments))
        return _answered(sys.stdout.flush) or code


def _answered(function: Callable[[], int | None]) -> int:
    """Call the function, and return its exit code, or 1 for an error, with its message on stderr."""
    try:
        return function() or 0
    except (FaceLoraError, KeyboardInterrupt, EOFError) as error:  # EOFError: Ctrl-D at a question.
        from .common import end_bars

        end_bars()
        text = str(error) if isinstance(error, FaceLoraError) else "stopped"
        print(f"facelora: {text.replace('anyway: check_photos = false', 'anyway: --no-check-photos')}", file=sys.stderr)
    except BrokenPipeError:
        pass
    return 1


def _run(words: Sequence[str]) -> int:
    parser = main_parser()
    parser.add_argument("call", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parsed = parser.read(words)
    if parsed.version:
        from ..version import __version__  # Looking it up can take a tenth of a second.

        print(f"facelora {__version__}")
        return 0
    call: list[str] = parsed.call
    if not call:
        parser.print_help()
        return 2
    name, *rest = call
    if name not in COMMANDS:
        parser.error(f"unknown command {name!r}{did_you_mean(name, COMMANDS)} (--help lists the commands)")
    from .command import run_command

    return run_command(name, description_of(name), rest)


def description_of(name: str) -> str:
    """Return what a command does, as a sentence."""
    return COMMANDS[name][0].upper() + COMMANDS[name][1:] + "."


def main_parser() -> Parser:
    """Return the parser of the options before the command, whose help lists the commands."""
    lines = []
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"]
        for name, text in commands.items():
            lines += textwrap.wrap(text, 79, initial_indent=f"  {name:13}", subsequent_indent=" " * 15)
    parser = Parser(
        prog="facelora",
        usage="facelora [-h] [--version] COMMAND ...",
        description="Train a small LoRA from 10 to 20 photos of a person, and draw pictures with it.\n"
        "Train only people who have agreed to it.",
        epilog="\n".join(lines).strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="Show the version and exit")
    return parser
