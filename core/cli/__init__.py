"""The command line: `facelora <command>`, or `python -m facelora <command>`. Only the called command's modules are loaded."""

import argparse
import difflib
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import takewhile
from typing import Any, NamedTuple, NoReturn

from ..errors import FaceLoraError
from ..threads import set_threads
from .bus_error import explained_bus_error
from .common import DEMO, end_bars
from .outputs import checked_outputs
from .streams import standard_streams


class Command(NamedTuple):
    """A command of `facelora`. The function add_NAME of arguments.py adds its arguments to a parser."""

    group: str
    """The heading for the command in `facelora --help`."""
    help: str
    module: str
    """The module of this package with its function run_NAME, which takes the parsed options and returns the exit code, or None
    for 0. It is loaded when the command is called."""


PICTURES, JUDGING = "from photos to pictures", "check photos and pictures"
FILES, MACHINE = "LoRA files", "this machine"

COMMANDS: dict[str, Command] = {
    "demo": Command(
        PICTURES, "run the whole job on the small base model of the package, without GPU or download", "demo"
    ),
    "headshots": Command(
        PICTURES, "turn photos of one person into a gallery of headshots; run it again to continue", "headshots"
    ),
    "studio": Command(
        PICTURES, "make LoRAs and headshots of many people on one base model, with a report on all", "studio"
    ),
    "train": Command(PICTURES, "train a LoRA on a folder of photos of one person", "train"),
    "generate": Command(
        PICTURES, "draw pictures with a base model and LoRAs, from prompts or the styles of a pack", "generate"
    ),
    "check": Command(JUDGING, "check the photos: which ones help, which ones don't, and what to add", "photos"),
    "score": Command(JUDGING, "measure how much pictures look like the person in your photos", "photos"),
    "inspect": Command(FILES, "show what is in a LoRA file, or whether a picture is marked as drawn", "inspect"),
    "verify": Command(FILES, "check a LoRA file for faults", "lora"),
    "convert": Command(FILES, "write a LoRA with the tensor names that another program needs", "lora"),
    "merge": Command(FILES, "merge LoRAs into one LoRA or into a checkpoint", "lora"),
    "resize": Command(FILES, "reduce the rank of a LoRA", "lora"),
    "extract": Command(FILES, "make a LoRA from the difference between two checkpoints", "lora"),
    "metadata": Command(
        FILES, "change title, author, trigger phrase, thumbnail and other metadata of a LoRA file", "lora"
    ),
    "sidecars": Command(FILES, "write files beside a LoRA that tell other programs its words and picture", "lora"),
    "publish": Command(
        FILES, "make a folder to upload: a LoRA, a page of text and pictures, without personal data", "lora"
    ),
    "forget": Command(MACHINE, "delete everything that a studio keeps of a person", "studio"),
    "doctor": Command(MACHINE, "show what this machine has for training and what is missing", "doctor"),
    "completion": Command(MACHINE, "print a shell completion script", "machine"),
    "clear-cache": Command(
        MACHINE, "delete everything in the cache folder that was kept of photos and captions", "machine"
    ),
}
"""The commands by name, in the order of `--help`."""


def run_of(name: str) -> str:
    """Return the place, as for `function_of`, of the function that runs a command."""
    return f"{COMMANDS[name].module}:run_{name.replace('-', '_')}"


def function_of(place: str) -> Callable[..., Any]:
    """Load the module in `module:function`, and return the function."""
    module, _, function = place.partition(":")
    return getattr(import_module(f".{module}", __name__), function)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit code: 0 for success, 1 for a failure with a message on stderr, 2 for wrong usage."""
    with standard_streams():
        code = _answered(lambda: _run(arguments))
        return _answered(sys.stdout.flush) or code


def _answered(function: Callable[[], int | None]) -> int:
    """Call the function, and return its exit code, or 1 for an error, with its message on stderr."""
    try:
        return function() or 0
    except (FaceLoraError, KeyboardInterrupt, EOFError) as error:  # EOFError: Ctrl-D at a question.
        end_bars()
        print(f"facelora: {error if isinstance(error, FaceLoraError) else 'stopped'}", file=sys.stderr)
    except BrokenPipeError:
        pass
    return 1


def _run(arguments: Sequence[str] | None) -> int:
    """Run a command, and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Only --help and --version come before the command, and they end the program.
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    parser, below = build_parser(*([called] if called else ()))
    if called is not None and called not in COMMANDS:
        parser.error(f"unknown command {called!r}{did_you_mean(called, COMMANDS)} (--help lists the commands)")
    known = [name for action in below._actions for name in action.option_strings]

    def refuse(unknown: Sequence[str]) -> NoReturn:
        below.error(f"unknown: {' '.join(unknown)}{did_you_mean(unknown[0].partition('=')[0], known)}")

    # Report a mistyped option before the required option that is missing because of it.
    after = arguments[arguments.index(called) + 1 :] if called else ()
    names = [argument for argument in takewhile("--".__ne__, after) if argument.startswith("--")]
    if wrong := [name for name in names if not any(one.startswith(name.partition("=")[0]) for one in known)]:
        refuse(wrong)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        refuse(unknown)
    if called is None:
        parser.print_help()
        return 2
    set_threads(few=DEMO in (called, getattr(options, "base", None)))
    with explained_bus_error(), checked_outputs(below, options):
        return function_of(run_of(called))(options) or 0


class _Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, below a command's short usage if it has one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._actions[0].help = "Show this help and exit"

    def error(self, message: str) -> NoReturn:
        usage = self.format_usage() if self.usage else ""  # Otherwise it lists every option.
        hint = "" if usage else f" ({self.prog} --help lists the options)"
        self.exit(2, f"{usage}{self.prog}: error: {message}{hint}\n")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        values = super()._get_values(action, arg_strings)
        if values == [] and action.nargs in (None, "+"):  # Python up to 3.12 drops the value of --rank=--.
            raise argparse.ArgumentError(action, "expected one argument")
        return values


class _ShowVersion(argparse.Action):
    """Looks the version up only on request, since that can take a tenth of a second."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"facelora {import_module('..version', __name__).__version__}")
        parser.exit()


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return a question that suggests up to three similar known words; empty if none is similar."""
    alike = difflib.get_close_matches(given, known, n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(alike)}?" if alike else ""


def build_parser(*called: str) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return a parser for all commands, and the parser of the called one, which is the only one with its arguments.

    Without a called command, the second parser is the first; with several, it is the last one's.
    """
    parser = _Parser(
        prog="facelora",
        usage="facelora [-h] [--version] COMMAND ...",
        description="Train a small LoRA from 10 to 20 photos of a person, and draw pictures with it.\n"
        "Train only people who have agreed to it.",
        epilog=_listed_commands(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="Show the version and exit")
    commands = parser.add_subparsers(prog="facelora", help=argparse.SUPPRESS)
    below = parser
    for name, command in COMMANDS.items():
        text = command.help
        one = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in called:
            below = one
            function_of(f"arguments:add_{name.replace('-', '_')}")(below)
    return parser, below


def _listed_commands() -> str:
    lines = []
    for title in (PICTURES, JUDGING, FILES, MACHINE):
        lines += ["", f"{title}:"]
        for name, command in COMMANDS.items():
            if command.group == title:
                lines += textwrap.wrap(command.help, 79, initial_indent=f"  {name:13}", subsequent_indent=" " * 15)
    return "\n".join(lines).strip()
