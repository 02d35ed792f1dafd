"""The command line: `facelora <command>`, or `python -m facelora <command>`. Only the called command's modules are loaded."""

import argparse
import difflib
import io
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from itertools import takewhile
from typing import Any, NamedTuple, NoReturn

from ..errors import FaceLoraError
from ..threads import set_threads
from .common import DEMO, Shown, end_bars
from .outputs import checked_outputs


class Command(NamedTuple):
    """A command of `facelora`. Its two functions are given as `module:function` in this package, and loaded when called."""

    group: str
    """The heading for the command in `facelora --help`."""
    help: str
    arguments: str
    """The function that adds its arguments to a parser. Its module loads no heavy library, which keeps `--help` fast."""
    run: str
    """The function that runs it with the parsed options. It returns the exit code, or None for 0."""


PICTURES, JUDGING = "from photos to pictures", "check and compare"
FILES, MACHINE = "LoRA files", "this machine"

COMMANDS: dict[str, Command] = {
    "demo": Command(
        PICTURES,
        "run the whole job on the small base model of the package, without GPU or download",
        "training_arguments:add_demo",
        "demo:run_demo",
    ),
    "headshots": Command(
        PICTURES,
        "turn photos of one person into a gallery of headshots; run it again to continue",
        "picture_arguments:add_headshots",
        "headshots:run_headshots",
    ),
    "studio": Command(
        PICTURES,
        "make LoRAs and headshots of many people on one base model, with a report on all",
        "picture_arguments:add_studio",
        "studio:run_studio",
    ),
    "train": Command(
        PICTURES,
        "train a LoRA on a folder of photos of one person",
        "training_arguments:add_train",
        "train:run_train",
    ),
    "compare": Command(
        JUDGING,
        "train several methods on the same photos, and measure likeness and cost of each",
        "training_arguments:add_compare",
        "compare:run_compare",
    ),
    "generate": Command(
        PICTURES,
        "draw pictures with a base model and LoRAs, from prompts or the styles of a pack",
        "picture_arguments:add_generate",
        "pictures:run_generate",
    ),
    "check": Command(
        JUDGING,
        "check the photos: which ones help, which ones don't, and what to add",
        "picture_arguments:add_check",
        "pictures:run_check",
    ),
    "score": Command(
        JUDGING,
        "measure how much pictures look like the person in your photos",
        "picture_arguments:add_score",
        "pictures:run_score",
    ),
    "inspect": Command(FILES, "show what is in a LoRA file", "lora_arguments:add_inspect", "inspect:run_inspect"),
    "verify": Command(FILES, "check a LoRA file for faults", "lora_arguments:add_verify", "lora:run_verify"),
    "convert": Command(
        FILES,
        "write a LoRA with the tensor names that another program needs",
        "lora_arguments:add_convert",
        "lora:run_convert",
    ),
    "merge": Command(
        FILES, "merge LoRAs into one LoRA or into a checkpoint", "lora_arguments:add_merge", "lora:run_merge"
    ),
    "resize": Command(FILES, "reduce the rank of a LoRA", "lora_arguments:add_resize", "lora:run_resize"),
    "extract": Command(
        FILES,
        "make a LoRA from the difference between two checkpoints",
        "lora_arguments:add_extract",
        "lora:run_extract",
    ),
    "metadata": Command(
        FILES,
        "change title, author, trigger phrase, thumbnail and other metadata of a LoRA file",
        "lora_arguments:add_metadata",
        "lora:run_metadata",
    ),
    "sidecars": Command(
        FILES,
        "write files beside a LoRA that tell other programs its words and picture",
        "lora_arguments:add_sidecars",
        "lora:run_sidecars",
    ),
    "publish": Command(
        FILES,
        "make a folder to upload: a LoRA, a page of text and pictures, without personal data",
        "lora_arguments:add_publish",
        "publish:run_publish",
    ),
    "bench": Command(
        MACHINE,
        "time training steps on a full-size denoiser, compared with a plain diffusers and peft loop",
        "training_arguments:add_bench",
        "bench:run_bench",
    ),
    "forget": Command(
        MACHINE,
        "delete everything that a studio keeps of a person",
        "picture_arguments:add_forget",
        "studio:run_forget",
    ),
    "doctor": Command(
        MACHINE,
        "show what this machine has for training and what is missing; --measure also tests it",
        "training_arguments:add_doctor",
        "doctor:run_doctor",
    ),
    "completion": Command(
        MACHINE,
        "print a shell completion script",
        "training_arguments:add_completion",
        "completion:run_completion",
    ),
    "clear-cache": Command(
        MACHINE,
        "delete everything in the cache folder that was kept of photos and captions",
        "training_arguments:add_clear_cache",
        "clear_cache:run_clear_cache",
    ),
}
"""The commands by name, in the order of `--help`."""


def function_of(place: str) -> Callable[..., Any]:
    """Load the module in `module:function`, and return the function."""
    module, _, function = place.partition(":")
    return getattr(import_module(f".{module}", __name__), function)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit code: 0 for success, 1 for a failure with a message on stderr, 2 for wrong usage."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Escape characters in names that the terminal's encoding lacks, as on stderr, instead of ending the program.
        sys.stdout.reconfigure(errors="backslashreplace")
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
    if not hasattr(options, "command"):
        parser.print_help()
        return 2
    set_threads(few=DEMO in (called, getattr(options, "base", None)))
    try:
        with redirect_stdout(Shown(sys.stdout)), checked_outputs(below, options):
            return function_of(options.command.run)(options) or 0
    except (FaceLoraError, KeyboardInterrupt, EOFError) as error:  # EOFError: Ctrl-D at a question.
        end_bars()
        print(f"facelora: {error if isinstance(error, FaceLoraError) else 'stopped'}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1


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
        one.set_defaults(command=command)
        if name in called:
            below = one
            function_of(command.arguments)(below)
    return parser, below


def _listed_commands() -> str:
    lines = []
    for title in (PICTURES, JUDGING, FILES, MACHINE):
        lines += ["", f"{title}:"]
        for name, command in COMMANDS.items():
            if command.group == title:
                lines += textwrap.wrap(command.help, 79, initial_indent=f"  {name:13}", subsequent_indent=" " * 15)
    return "\n".join(lines).strip()
