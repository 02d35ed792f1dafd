"""Parse and run one command, whose module is loaded for it."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import Any, get_type_hints

from ..threads import set_threads
from .bus_error import explained_bus_error
from .common import DEMO
from .options import Options, add_options, filled, show_first
from .outputs import checked_outputs
from .parser import CommandParser


def run_command(name: str, description: str, words: Sequence[str]) -> int:
    """Run the command with these words, and return its exit code."""
    parser = command_parser(name, description)
    parsed = parser.read(words)
    options = filled(options_type(name), parsed)
    set_threads(few=DEMO in (name, vars(parsed).get("base")))
    with explained_bus_error(), checked_outputs(options):
        return _module(name).run(options) or 0


def command_parser(name: str, description: str = "") -> CommandParser:
    """Return the parser of the command's options."""
    parser = CommandParser(prog=f"facelora {name}", description=description)
    add_command(parser, name)
    return parser


def add_command(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the command's options to the parser."""
    options = options_type(name)
    parser.usage, parser.epilog = options.usage, options.epilog
    add_options(parser, options)
    if options.first:
        show_first(parser, options.first)


def options_type(name: str) -> type[Options]:
    """Return the dataclass of the command's options."""
    return get_type_hints(_module(name).run)["options"]


def _module(name: str) -> Any:
    return import_module(f".{name.replace('-', '_')}", __package__)
