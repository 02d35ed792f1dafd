"""Check the places that commands write to, before a command starts."""

import argparse
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import BadFile
from ..storage.files import check_ending, check_replaceable, check_writable, clean_place
from .common import DEMO, checkpoint


def output_file(text: str) -> Path:
    """Convert an option's value to the path of a file to write."""
    return _named(text)


def given_path(text: str) -> Path:
    """Convert an argument to the path of a file or folder to read."""
    return _named(text)


def given_name(text: str) -> str:
    """Convert an argument to the name of a file, a folder or a model."""
    _named(text)
    return text


def edited_file(text: str) -> Path:
    """Convert an argument to the path of a file that is changed in place, unless an output is given."""
    return _named(text)


def output_folder(text: str) -> Path:
    """Convert an option's value to the path of a folder to write into."""
    return _named(text)


def _named(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    path = Path(text)
    try:
        return path.expanduser() if path.parts[:1] == ("~",) else path  # Bash leaves it in --output=~/FILE.
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: this user has no home folder; give the whole path") from None


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="Replace the output if it exists")


@contextmanager
def checked_outputs(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Iterator[None]:
    """Lock the output files of these options within the context, after checking that all can be written.

    Temporary files of a killed command are deleted. Raises BadFile for a file that this command reads, and for a device, pipe
    or folder instead of a file. It is also raised for an existing file without --overwrite, if the command has that option.
    Raises InUse while another command writes the file. For a dry run, nothing is locked or written.
    """
    kinds = {action.dest: action for action in parser._actions}
    given = {name: value for name, value in vars(options).items() if name in kinds and value is not None}
    outputs = {name: path for name, path in given.items() if kinds[name].type in (output_file, output_folder)}
    inputs = [value for name, value in given.items() if name not in outputs]
    edited = [path for name, path in given.items() if kinds[name].type is edited_file and os.path.isfile(path)]
    dry_run = getattr(options, "dry_run", False)
    with ExitStack() as held:
        for name, path in outputs.items():
            if kinds[name].type is output_folder:
                _check_folder(path, inputs)
                continue
            check_ending(path, Path(str(kinds[name].metavar)).suffix)
            if not dry_run:
                check_replaceable(path)
            _check_file(path, inputs, options)
            if not dry_run:
                check_writable(path)  # This makes its folder, so it comes last.
                edited.append(path)
        for path in map(Path, map(os.path.realpath, edited)):
            from ..storage.locks import locked  # Loads filelock.

            held.enter_context(locked(path))
            clean_place(path)
        yield


def _check_folder(path: Path, inputs: Sequence[Any]) -> None:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            os.stat(f"{path}/.")  # Raises PermissionError for a folder that may not be entered.
    except FileNotFoundError:
        mode = 0
    except OSError as error:
        raise BadFile(f"{path}: cannot be written there: {error.strerror or error}") from None
    if os.path.lexists(path) and not stat.S_ISDIR(mode):
        raise BadFile(f"{path}: this is not a folder; choose a folder to write into")
    if mode and any(one.samefile(path) for one in _paths(inputs)):
        raise BadFile(f"{path}: this command reads this folder; choose another output")


def _check_file(path: Path, inputs: Sequence[Any], options: argparse.Namespace) -> None:
    from ..photos import is_sheet  # Loads the decoders of photos.

    if not os.path.lexists(path) or is_sheet(path):
        return
    if path.exists() and any(one.samefile(path) for one in _files(_paths(inputs))):
        raise BadFile(f"{path}: this command reads this file; choose another output")
    if not getattr(options, "overwrite", True):
        raise BadFile(f"{path}: this file already exists; choose another output, or replace it with --overwrite")


def _paths(inputs: Sequence[Any]) -> Iterator[Path]:
    """Yield every existing path that the values may name, as in FILE, FILE:STRENGTH and NAME=FILE:STRENGTH."""
    for value in inputs:
        if isinstance(value, (list, tuple)):
            yield from _paths(value)
        elif isinstance(value, (str, Path)):
            text = str(checkpoint(Path(value)) if str(value) == DEMO else value)
            for part in (text, text.partition("=")[2]):
                yield from (Path(name) for name in (part, part.rpartition(":")[0]) if name and os.path.exists(name))


def _files(paths: Iterator[Path]) -> Iterator[Path]:
    """Yield the files, and for folders the files in them and one level below, as deep as photos and base models go."""
    for path in paths:
        if path.is_dir():
            yield from (one for pattern in ("*", "*/*") for one in path.glob(pattern) if os.path.isfile(one))
        else:
            yield path
