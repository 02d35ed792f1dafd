"""Files that are written whole or not at all: a reader never finds half of one, whatever happens meanwhile."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .errors import BadFile


def write_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Puts what `write` writes into a file of that name, in place of one that is there. BadFile when that cannot be."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise BadFile(f"{path}: cannot be written: {error.strerror or error}") from None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """The same with text, as UTF-8."""
    write_file(path, lambda file: file.write(text.encode()))


def check_writable(path: Path) -> None:
    """BadFile, before hours are spent, when `write_file` cannot write a file of that name."""
    if path.is_dir():
        raise BadFile(f"{path}: is a folder; give the name of a file in it")
    probe = path.with_name(f".{path.name}.probe")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadFile(f"{path}: cannot be written there: {error.strerror}") from None


def remove_leftovers(folder: Path, name: str) -> None:
    """Deletes what `write_file` was writing under that name (a glob pattern) when its process was killed."""
    for leftover in folder.glob(f".{name}.????????.tmp"):
        leftover.unlink(missing_ok=True)
