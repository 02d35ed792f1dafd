"""Parse and run one command, whose module is loaded for it."""

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, get_type_hints

from ..threads import set_threads
from .bus_error import explained_bus_error
from .common import DEMO
from .options import Options, add_options, filled, show_first
from .outputs import checked_outputs
from .parser import CommandParser


class Command(NamedTuple):
    """What a command's module has."""

    run: Callable[[Any], int | None]
    options: type[Options]
    """The type of the parameter of `run`."""


def run_command(name: str, description: str, words: Sequence[str]) -> int:
    """Run the command with these words, and return its exit code."""
    parser, command = command_parser(name, description)
    parsed = parser.read(words)
    options = filled(command.options, parsed)
    set_threads(few=DEMO in (name, vars(parsed).get("base")))
    with explained_bus_error(), checked_outputs(options):
        return command.run(options) or 0


def command_parser(name: str, description: str = "") -> tuple[CommandParser, Command]:
    """Return the parser of the command's options, and the command."""
    parser = CommandParser(prog=f"facelora {name}", description=description)
    return parser, add_command(parser, name)


def add_command(parser: argparse.ArgumentParser, name: str) -> Command:
    """Add the command's options to the parser, and return the command."""
    run = import_module(f".{name.replace('-', '_')}", __package__).run
    options: type[Options] = get_type_hints(run)["options"]
    parser.usage, parser.epilog = options.usage, options.epilog
    add_options(parser, options)
    if options.first:
        show_first(parser, options.first)
    return Command(run, options)
