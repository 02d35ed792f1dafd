"""The command `completion`, which prints what makes a shell complete commands, options and files."""

from dataclasses import dataclass
from typing import Literal

from ..errors import MissingPackage
from . import COMMANDS, description_of, main_parser
from .command import add_command
from .options import HelpAll, Options, argument


@dataclass(frozen=True)
class CompletionOptions(Options):
    shell: Literal["bash", "zsh", "tcsh"] = argument(
        'Shell. For bash, put this in ~/.bashrc: eval "$(facelora completion bash)"'
    )


def run(options: CompletionOptions) -> None:
    try:
        import shtab
    except ImportError:
        raise MissingPackage("completion requires the package shtab: pip install shtab") from None
    parser = main_parser()
    commands = parser.add_subparsers(prog="facelora")
    for name, text in COMMANDS.items():
        one = commands.add_parser(name, help=text, description=description_of(name))
        add_command(one, name)
        for action in list(one._actions):
            if isinstance(action, HelpAll):
                action.show()
            if action.nargs != 0 and not action.choices:
                action.complete = shtab.FILE  # pyright: ignore
    print(shtab.complete(parser, options.shell))
