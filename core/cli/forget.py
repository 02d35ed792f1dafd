"""The command `forget`, which deletes everything that a studio keeps of a person."""

from dataclasses import dataclass

from .. import studio  # Its modules load only when a name is used.
from .options import Options, argument, option
from .values import Folder


@dataclass(frozen=True)
class ForgetOptions(Options):
    name: str = argument("Name of the person's folder in the studio's output", "NAME")
    output: Folder = option("The studio's output")


def run(options: ForgetOptions) -> None:
    count = studio.forget(options.name, options.output)
    print(f"{count} files of {options.name} deleted from {options.output}")
