"""The places to which commands write. All of them are checked here, before a command begins."""

import argparse
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import BadFile
from ..storage.files import check_output, clean_place
from .common import DEMO, checkpoint


def output_file(text: str) -> Path:
    """The type of an option that names a file to write."""
    return _named(text)


def edited_file(text: str) -> Path:
    """The type of an argument that names a file to change in place, where no output is given."""
    return _named(text)


def output_folder(text: str) -> Path:
    """The type of an option that names a folder to write into."""
    return _named(text)


def _named(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="Replace the output if it exists")


@contextmanager
def checked_outputs(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Iterator[None]:
    """A context in which no other command writes the output files of these options, all of which can be written.

    Temporary files of a killed command are deleted. Raises BadFile for a file that this command reads, for a device, pipe or
    folder in place of a file, and for a file that is there without --overwrite, where the command has that option. InUse
    while another command writes the file.
    """
    kinds = {action.dest: action for action in parser._actions}
    given = {name: value for name, value in vars(options).items() if name in kinds and value is not None}
    outputs = {name: path for name, path in given.items() if kinds[name].type in (output_file, output_folder)}
    inputs = [value for name, value in given.items() if name not in outputs]
    edited = [path for name, path in given.items() if kinds[name].type is edited_file and os.path.isfile(path)]
    with ExitStack() as held:
        for name, path in {} if getattr(options, "dry_run", False) else outputs.items():
            if kinds[name].type is output_folder:
                _check_folder(path, inputs)
                continue
            check_output(path, Path(str(kinds[name].metavar)).suffix)
            _check_file(path, inputs, options)
            edited.append(path)
        for path in map(Path, map(os.path.realpath, edited)):
            from ..storage.locks import locked  # loads filelock

            held.enter_context(locked(path))
            clean_place(path)
        yield


def _check_folder(path: Path, inputs: Sequence[Any]) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = 0
    except OSError as error:
        raise BadFile(f"{path}: cannot be written there: {error.strerror or error}") from None
    if os.path.lexists(path) and not stat.S_ISDIR(mode):
        raise BadFile(f"{path}: is not a folder; give the name of a folder to write into")
    if mode and any(one.samefile(path) for one in _paths(inputs)):
        raise BadFile(f"{path}: is a folder that this command reads; choose another output")


def _check_file(path: Path, inputs: Sequence[Any], options: argparse.Namespace) -> None:
    from ..photos import is_sheet  # loads what decodes photos

    if not os.path.lexists(path) or is_sheet(path):
        return
    if path.exists() and any(one.samefile(path) for one in _files(_paths(inputs))):
        raise BadFile(f"{path}: is a file that this command reads; choose another output")
    if not getattr(options, "overwrite", True):
        raise BadFile(f"{path}: is there already; choose another output, or have it replaced with --overwrite")


def _paths(inputs: Sequence[Any]) -> Iterator[Path]:
    """Everything that is there of what the values may name, as in FILE, FILE:STRENGTH and NAME=FILE:STRENGTH."""
    for value in inputs:
        if isinstance(value, (list, tuple)):
            yield from _paths(value)
        elif isinstance(value, (str, Path)):
            text = str(checkpoint(Path(value)) if str(value) == DEMO else value)
            for part in (text, text.partition("=")[2]):
                yield from (Path(name) for name in (part, part.rpartition(":")[0]) if name and os.path.exists(name))


def _files(paths: Iterator[Path]) -> Iterator[Path]:
    """The files, and of folders those in them and in folders below: photos lie no deeper, nor do parts of a base model."""
    for path in paths:
        if path.is_dir():
            yield from (one for pattern in ("*", "*/*") for one in path.glob(pattern) if os.path.isfile(one))
        else:
            yield path
