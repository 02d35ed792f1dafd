"""Files that are written whole or not at all, so that a reader never finds half of one.

The helpers that many rooms need are here too: they make folders, read JSON and check text.
"""

import itertools
import json
import mmap
import os
import re
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import BadFile, FaceLoraError

EARLIER = "earlier"
"""The folder beside files into which `set_aside` moves them."""

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""The value of Linux's MAP_NORESERVE, which Python's mmap module has from version 3.13 on."""

IS_WINDOWS = sys.platform == "win32"
READ_ON_WINDOWS = 512 << 20
"""The size in bytes up to which a file is read on Windows, not mapped: a mapped file can't be replaced or deleted there."""


def map_file(file: BinaryIO) -> mmap.mmap | bytearray:
    """An open file as memory, in which writing is private to this process: torch wants writable memory."""
    if IS_WINDOWS and os.fstat(file.fileno()).st_size <= READ_ON_WINDOWS:
        return bytearray(file.read())
    if sys.platform == "linux":
        # Linux would else set memory aside for every page that could be written, perhaps more than there is.
        flags, protection = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=protection)
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context in which an error of the operating system raises BadFile, which says that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise BadFile(f"{path}: cannot be written: {error.strerror or error}{_hint(path, error)}") from None


LONGEST_ON_WINDOWS = 259 - len(".01234567.tmp")
"""The length of the longest path that can be written on Windows where long paths aren't enabled."""


def _hint(path: Path, error: OSError) -> str:
    """What to do about an error on Windows whose text doesn't give the reason; empty elsewhere."""
    if not IS_WINDOWS:
        return ""
    if len(os.path.abspath(path)) > LONGEST_ON_WINDOWS:
        return f"; its path has more than {LONGEST_ON_WINDOWS} characters: choose a shorter one, or enable long paths"
    return "; close the programs that have it open" if isinstance(error, PermissionError) else ""


def replace(source: Path, target: Path) -> None:
    """Renames a file, and replaces the one at `target`.

    On Windows this is tried for two seconds, since virus scanners and indexers open new files for a moment.
    """
    for wait in (0.1, 0.2, 0.4, 0.8, 0.5) if IS_WINDOWS else ():
        with suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(wait)
    os.replace(source, target)


def make_folder(path: Path) -> Path:
    """The folder at `path`, made with its parents where it is missing. Raises BadFile when it cannot be made."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Makes or replaces the file at `path` with what `write` puts into the stream. Raises BadFile when that fails.

    A link stays, and the file that it leads to is replaced. A file that is replaced keeps its permissions. In a folder that
    only its owner can enter, only the owner can read a new file. A folder, device or pipe is never replaced.
    """
    with writing(Path(path)):
        path, before = _place(path)
        temporary = _temporary(path)
        mode = 0o666 if path.parent.stat().st_mode & 0o077 else 0o600
        try:
            with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if before is not None:
                temporary.chmod(before)
            replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _place(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """The path without links, and the permissions of the file there; None where there is none.

    Raises BadFile for a folder, a device and the like.
    """
    place = Path(os.path.realpath(path))
    try:
        mode = place.stat().st_mode
    except FileNotFoundError:
        return place, None
    if stat.S_ISDIR(mode):
        raise BadFile(f"{path}: is a folder; give the name of a file in it")
    if not stat.S_ISREG(mode):
        raise BadFile(f"{path}: is no regular file")
    return place, stat.S_IMODE(mode)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def set_aside(path: Path) -> None:
    """Moves a file, if there is one at `path`, into the folder `earlier` beside it, where it replaces no other file."""
    if not path.exists():
        return
    folder = make_folder(path.parent / EARLIER)
    with writing(folder):
        names = (f"{path.stem}{f' ({number})' if number > 1 else ''}{path.suffix}" for number in itertools.count(1))
        path.rename(next(place for name in names if not (place := folder / name).exists()))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Makes or replaces the file at `path` with the text, as UTF-8. Raises BadFile when that fails.

    What is no Unicode, as the names of files may have it, becomes a question mark.
    """
    write_file(path, lambda file: file.write(text.encode("utf-8", "replace")))


def read_bytes(path: Path, limit: int, *, name: str | None = None, error: type[FaceLoraError] = BadFile) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises `error` for any other file, since a pipe may wait forever and a device may never end. `name` is what the message
    calls the file; None means its path.
    """
    name = str(path) if name is None else name
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise error(f"{name}: is no regular file")
            if about.st_size > limit:
                raise error(f"{name}: has more than {limit >> 20} MiB, the most that is read")
            return file.read(about.st_size)  # reading takes as much memory as it is asked for
    except OSError as problem:
        raise error(f"{name}: cannot be read: {problem.strerror or problem}") from None


def _open_without_waiting(path: str, flags: int) -> int:
    """Opens a file like `os.open`, but does not wait for a writer when it is a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no such pipes


_MAX_JSON_BYTES = 64 << 20


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises BadFile when it cannot be read, is larger than 64 MiB or is not JSON."""
    try:
        return json.loads(read_bytes(path, _MAX_JSON_BYTES).decode())
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: cannot be read: {error}") from None


def is_text(text: str) -> bool:
    """Whether the text can be written as UTF-8: JSON and file names can hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""The names that no file or folder can have on Windows, with any ending."""


def check_writable(path: Path) -> None:
    """Makes the file's folder. Raises BadFile when `write_file` could not write to `path`: better before hours of training."""
    try:
        place, _ = _place(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        probe = _temporary(place)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadFile(f"{path}: cannot be written there: {error.strerror or error}") from None


def check_output(path: Path, ending: str = ".safetensors") -> None:
    """Raises BadFile when no file could be written to `path`, or when its name has another ending."""
    if ending and path.suffix.lower() != ending:
        raise BadFile(f"{path}: the output's name must end in {ending}")
    check_writable(path)


def remove_leftovers(folder: Path, names: str) -> None:
    """Deletes the temporary files, or folders, that are left in `folder` by a process that was killed while it wrote.

    `names` is a regular expression for the names of the files that were to be written. The caller must hold their lock, so
    that no file of a living run is deleted.
    """
    pattern = re.compile(rf"\.(?:{names})\.[0-9a-f]{{8}}\.tmp")
    for leftover in folder.iterdir():
        if pattern.fullmatch(leftover.name):
            with suppress(OSError):
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()


def clean_place(path: Path) -> None:
    """Deletes what a killed process left of the file or folder at `path`, whose lock the caller must hold."""
    remove_leftovers(path.parent, re.escape(path.name))
