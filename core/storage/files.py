"""Files that are written whole or not at all, so that a reader never finds half of one.

The helpers that many rooms need are here too: they make folders, read JSON and check text.
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
    """A context in which an error of the operating system raises BadFile, which says that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise BadFile(f"{path}: cannot be written: {error.strerror or error}") from None


def make_folder(path: Path) -> Path:
    """The folder at `path`, made with its parents where it is missing. Raises BadFile when it cannot be made."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Makes or replaces the file at `path` with what `write` puts into the stream. Raises BadFile when that fails."""
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
    """Makes or replaces the file at `path` with the text, as UTF-8. Raises BadFile when that fails."""
    write_file(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises BadFile when it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: cannot be read: {error}") from None


def is_text(text: str) -> bool:
    """Whether the text can be written as UTF-8: JSON and file names can hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_writable(path: Path) -> None:
    """Raises BadFile when `write_file` could not write to `path`: better before hours of training than after them."""
    probe = path.with_name(f".{path.name}.probe")
    try:
        if path.is_dir():
            raise BadFile(f"{path}: is a folder; give the name of a file in it")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadFile(f"{path}: cannot be written there: {error.strerror}") from None


def remove_leftovers(folder: Path, name: str) -> None:
    """Deletes the temporary files that `write_file` leaves in `folder` when its process is killed.

    `name` is a glob pattern for the names of the files that were to be written.
    """
    for leftover in folder.glob(f".{name}.????????.tmp"):
        leftover.unlink(missing_ok=True)
