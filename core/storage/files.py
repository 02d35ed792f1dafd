"""Files that are written whole or not at all: a reader never finds half of one, whatever happens meanwhile.

Also what else is done with files in many places: folders are made, JSON is read, text is checked.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import BadFile


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it an error of the system is a BadFile that says that the path cannot be written."""
    try:
        yield
    except OSError as error:
        raise BadFile(f"{path}: cannot be written: {error.strerror or error}") from None


def make_folder(path: Path) -> Path:
    """The folder, made with those above it where it is not there yet. BadFile when it cannot be."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Puts what `write` writes into a file of that name, in place of one that is there. BadFile when that cannot be."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with writing(path):
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """The same with text, as UTF-8."""
    write_file(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """What a JSON file holds. BadFile when it cannot be read."""
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: cannot be read: {error}") from None


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON and the names of files can hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
