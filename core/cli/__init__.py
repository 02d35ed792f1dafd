"""The command line: `facelora <command>`, or `python -m facelora <command>`. Only modules of the called command are loaded."""

import argparse
import io
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from ..errors import FaceLoraError


class Command(NamedTuple):
    """A command of `facelora`. Its two functions are named as `module:function` in this package, to be loaded when called."""

    help: str
    arguments: str
    """The function that adds its arguments to a parser. Its module loads no heavy library, so that `--help` answers at once."""
    run: str
    """The function that runs it with the parsed options; it returns the exit code, or None for 0."""


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "the whole job on the small base model that comes with the package, without GPU or download",
        "training_arguments:add_demo",
        "demo:run_demo",
    ),
    "headshots": Command(
        "from photos to a gallery of headshots in one command, which goes on where it was interrupted",
        "picture_arguments:add_headshots",
        "headshots:run_headshots",
    ),
    "train": Command(
        "train a LoRA on a folder of photos of one person",
        "training_arguments:add_train",
        "train:run_train",
    ),
    "compare": Command(
        "train several methods on the same photos, and measure what each gives and costs",
        "training_arguments:add_compare",
        "compare:run_compare",
    ),
    "generate": Command(
        "make pictures with a base model and LoRAs, from prompts or in the styles of a pack",
        "picture_arguments:add_generate",
        "pictures:run_generate",
    ),
    "check": Command(
        "say which photos will teach the person well, which not, and what is missing",
        "picture_arguments:add_check",
        "pictures:run_check",
    ),
    "score": Command(
        "measure how much pictures look like the person on photos",
        "picture_arguments:add_score",
        "pictures:run_score",
    ),
    "inspect": Command("say what is in a LoRA file", "lora_arguments:add_inspect", "inspect:run_inspect"),
    "verify": Command("look for what is wrong with a LoRA file", "lora_arguments:add_verify", "lora:run_verify"),
    "convert": Command(
        "write a LoRA with the names that another tool wants", "lora_arguments:add_convert", "lora:run_convert"
    ),
    "merge": Command("add LoRAs up, to one LoRA or into a checkpoint", "lora_arguments:add_merge", "lora:run_merge"),
    "resize": Command("make the rank of a LoRA smaller", "lora_arguments:add_resize", "lora:run_resize"),
    "extract": Command(
        "make a LoRA of the difference of two checkpoints", "lora_arguments:add_extract", "lora:run_extract"
    ),
    "metadata": Command(
        "change title, author, trigger phrase, thumbnail, ... of a LoRA file",
        "lora_arguments:add_metadata",
        "lora:run_metadata",
    ),
    "bench": Command(
        "time training steps on a full-size denoiser, beside a plain diffusers and peft loop",
        "training_arguments:add_bench",
        "bench:run_bench",
    ),
    "clear-cache": Command(
        "delete everything that was kept of photos and captions",
        "training_arguments:add_clear_cache",
        "clear_cache:run_clear_cache",
    ),
}
"""The commands by name, in the order in which `--help` lists them."""


def function_of(place: str) -> Callable[..., Any]:
    """The function that `module:function` names, after loading its module."""
    module, _, function = place.partition(":")
    return getattr(import_module(f".{module}", __name__), function)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. The exit code: 0 when it is done, 1 when it failed with a message on stderr, 2 for wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Before the command there are only --help and --version, which end the program, so the first name of a command is the
    # command.
    parser = build_parser(called=next((argument for argument in arguments if argument in COMMANDS), None))
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name with characters that the terminal's encoding lacks is escaped, as on stderr, and does not end the program.
        sys.stdout.reconfigure(errors="backslashreplace")
    if not hasattr(options, "command"):
        parser.print_help()
        return 2
    # Where bitsandbytes is installed, peft imports it, and it then warns about kernels that are not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return function_of(options.command.run)(options) or 0
    except FaceLoraError as error:
        print(f"facelora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("facelora: stopped", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1


class _ShowVersion(argparse.Action):
    """Looks the version up only when it is asked for, since that can take a tenth of a second."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"facelora {import_module('.version', __name__).__version__}")
        parser.exit()


def build_parser(called: str | None) -> argparse.ArgumentParser:
    """A parser that knows the names of all commands, and the arguments of the called one alone (None: of no command)."""
    parser = argparse.ArgumentParser(
        prog="facelora",
        description="10-20 photos of a person in, a small LoRA in Kohya's format out, and pictures of the person from it. "
        "Train only people who have agreed to it.",
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the program's version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        text = command.help
        below = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        below.set_defaults(command=command)
        if name == called:
            function_of(command.arguments)(below)
    return parser
