"""Check the places that a command writes to, before it starts."""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .. import photos  # Its modules load only when a name is used.
from ..errors import BadFile
from ..storage.files import check_ending, check_replaceable, check_writable, remove_leftovers_of
from .common import DEMO, checkpoint
from .options import Options, given_values
from .values import EditedFile, WrittenFile, WrittenFolder


@contextmanager
def checked_outputs(options: Options) -> Iterator[None]:
    """Lock the output files of a command within the context, after checking that all can be written.

    Temporary files of a killed command are deleted. Raises BadFile for a file that this command reads, and for a device, pipe
    or folder instead of a file. It is also raised for an existing file without --overwrite, if the command has that option.
    Raises InUse while another command writes the file. For a dry run, nothing is locked or written.
    """
    given = list(given_values(options))
    inputs = [value for kind, value in given if not isinstance(kind, WrittenFile | WrittenFolder)]
    to_lock = [path for kind, path in given if isinstance(kind, EditedFile) and os.path.isfile(path)]
    with ExitStack() as held:
        for kind, path in given:
            if isinstance(kind, WrittenFolder):
                _check_folder(path, inputs)
            elif isinstance(kind, WrittenFile):
                check_ending(path, Path(kind.metavar).suffix)
                if not options.dry_run:
                    check_replaceable(path)
                _check_file(path, inputs, options.overwrite)
                if not options.dry_run:
                    check_writable(path)  # This makes its folder, so it comes last.
                    to_lock.append(path)
        for path in map(Path, map(os.path.realpath, to_lock)):
            from ..storage.locks import locked  # Loads filelock.

            held.enter_context(locked(path))
            remove_leftovers_of(path)
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


def _check_file(path: Path, inputs: Sequence[Any], overwrite: bool) -> None:
    if not os.path.lexists(path) or photos.is_sheet(path):
        return
    if path.exists() and any(one.samefile(path) for one in _files(_paths(inputs))):
        raise BadFile(f"{path}: this command reads this file; choose another output")
    if not overwrite:
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
