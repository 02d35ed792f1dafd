"""The commands `completion` and `clear-cache`, which compute nothing and load no heavy library."""

import argparse

from ..errors import MissingPackage
from ..storage.cache_folder import cache_folder, clear_cache
from . import COMMANDS, build_parser
from .options import HelpAll


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


def run_clear_cache(options: argparse.Namespace) -> None:
    print(f"{clear_cache()} files deleted from {cache_folder()}")
