"""The types of the values that options take: inputs, outputs and text. Importing this doesn't load torch."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from ..storage.plain_values import is_text


def input_path(text: str) -> Path:
    """Convert an argument to the path of a file or folder. Raises an error for argparse if it is empty."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    path = Path(text)
    try:
        return path.expanduser() if path.parts[:1] == ("~",) else path  # Bash leaves it in --output=~/FILE.
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: this user has no home folder; give the whole path") from None


def input_name(text: str) -> str:
    """Return the name of a file, a folder or a model. Raises an error for argparse if it is empty."""
    input_path(text)
    return text


def unicode_text(text: str) -> str:
    """Return the argument if it is valid Unicode, else raise an error for argparse: file names may be any bytes."""
    if not is_text(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not valid UTF-8")
    return text


@dataclass(frozen=True)
class Output:
    """Where a command writes. Calling it converts an argument to the path."""

    metavar: str

    def __call__(self, text: str) -> Path:
        return input_path(text)


class WrittenFile(Output):
    """A file to write, whose name has the ending of `metavar`."""


class WrittenFolder(Output):
    """A folder to write into."""


class EditedFile(Output):
    """A file that is changed in place, unless an output is given."""


InputPath = Annotated[Path, input_path]
InputName = Annotated[str, input_name]
Text = Annotated[str, unicode_text]
Folder = Annotated[Path, WrittenFolder("DIR")]
LoraOutput = Annotated[Path, WrittenFile("FILE.safetensors")]
HtmlOutput = Annotated[Path, WrittenFile("FILE.html")]
PngOutput = Annotated[Path, WrittenFile("FILE.png")]
LoraEdited = Annotated[Path, EditedFile("FILE")]


def values_of(hint: Any) -> tuple[Any, Sequence[Any], bool]:
    """Return what converts the text of a value of that type, the choices for it, and whether there are several values."""
    if has_none(hint):
        (hint,) = (one for one in get_args(hint) if one is not NoneType)
    if is_list := get_origin(hint) in (list, tuple):
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        return str, get_args(hint), is_list
    return get_args(hint)[1] if get_origin(hint) is Annotated else hint, (), is_list


def has_none(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)
