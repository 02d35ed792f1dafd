"""The command `completion`, which prints a shell completion script for commands, options and files, made by shtab."""

import argparse

from ..errors import MissingPackage
from . import COMMANDS, build_parser
from .common import HelpAll


def run_completion(options: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError:
        raise MissingPackage("completion requires the package shtab: pip install shtab") from None
    parser, _ = build_parser(*COMMANDS)
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    commands.help = None  # Hidden commands are not completed either.
    for one in commands.choices.values():
        for action in list(one._actions):
            if isinstance(action, HelpAll):
                action.show()
            if action.nargs != 0 and not action.choices:
                action.complete = shtab.FILE  # pyright: ignore
    print(shtab.complete(parser, options.shell))
