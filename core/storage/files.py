"""Write files atomically, so that a reader never finds half of one. Create folders, and read JSON."""

import io
import itertools
import mmap
import os
import re
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import BadFile, FaceLoraError, counted
from .plain_values import parse_json

EARLIER = "earlier"
"""The folder that `set_aside` moves files to."""
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Linux's MAP_NORESERVE, which Python's mmap module only defines since version 3.13."""
IS_WINDOWS = sys.platform == "win32"
MOST_READ, MOST_READ_ON_WINDOWS = 64 << 20, 512 << 20
"""Files of up to this many bytes are read, not mapped, so that another program can't truncate them while they are in use. On
Windows a mapped file can't be replaced or deleted either."""


def map_file(file: BinaryIO) -> mmap.mmap | bytearray:
    """Map an open file into memory, or read it if it is small.

    torch requires writable memory, so writes stay private to this process. Raises BadFile for a file that becomes shorter.
    """
    size = os.fstat(file.fileno()).st_size
    if size <= (MOST_READ_ON_WINDOWS if IS_WINDOWS else MOST_READ):
        content = bytearray(size)
        if cast(io.RawIOBase, file).readinto(content) != size:
            raise BadFile(f"{file.name}: another program has truncated the file while it was read")
        return content
    if sys.platform == "linux":
        # Otherwise Linux would reserve memory for every writable page, perhaps more than the machine has.
        flags, protection = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=protection)
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


LONGEST_ON_WINDOWS = 259 - len(".01234567.tmp")
"""The length of the longest path that can be written on Windows where long paths aren't enabled."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise BadFile for any OSError within the context, with the message that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        hint = ""  # On Windows the text of an error doesn't give these reasons.
        if IS_WINDOWS and len(os.path.abspath(path)) > LONGEST_ON_WINDOWS:
            hint = (
                f"; its path has more than {LONGEST_ON_WINDOWS} characters: choose a shorter one, or enable long paths"
            )
        elif IS_WINDOWS and isinstance(error, PermissionError):
            hint = "; close the programs that have it open"
        raise BadFile(f"{path}: cannot be written: {error.strerror or error}{hint}") from None


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder at `path`, creating it and its parents if needed. Raises BadFile when it cannot be created."""
    with writing(path := Path(path)):
        path.mkdir(parents=True, exist_ok=True)
        os.stat(f"{path}/.")  # Raises PermissionError for a folder that may not be entered.
    return path


def write_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Create or replace the file at `path` with what `write` puts into the stream. Raises BadFile when that fails.

    If `path` is a link, its target is replaced. A replaced file keeps its permissions. In a folder that only its owner can
    enter, only the owner can read a new file. A folder, device or pipe is never replaced.
    """
    with writing(Path(path)):
        path, before = _resolved(path)
        temporary = _temporary(path)
        mode = 0o666 if path.parent.stat().st_mode & 0o077 else 0o600
        try:
            with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if before is not None:
                temporary.chmod(before)
            # Virus scanners and indexers open new files for a moment.
            for wait in (0.1, 0.2, 0.4, 0.8, 0.5) if IS_WINDOWS else ():
                with suppress(PermissionError):
                    return os.replace(temporary, path)
                time.sleep(wait)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _resolved(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """Return the path with links resolved, and the permissions of its file, or None if the file doesn't exist.

    Raises BadFile for anything but a regular file, such as a folder or a device.
    """
    place = Path(os.path.realpath(path))
    try:
        mode = place.stat().st_mode
    except FileNotFoundError:
        return place, None
    if stat.S_ISDIR(mode):
        raise BadFile(f"{path}: is a folder; give the name of a file in it")
    if not stat.S_ISREG(mode):
        raise BadFile(f"{path}: is not a regular file")
    return place, stat.S_IMODE(mode)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def set_aside(path: Path) -> None:
    """Move the file at `path`, if it exists, to the folder `earlier` beside it, without replacing another file."""
    if not path.exists():
        return
    folder = make_folder(path.parent / EARLIER)
    with writing(folder):
        names = (f"{path.stem}{f' ({number})' if number > 1 else ''}{path.suffix}" for number in itertools.count(1))
        path.rename(next(place for name in names if not (place := folder / name).exists()))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Create or replace the file at `path` with the text, as UTF-8. Raises BadFile when that fails.

    Characters that are not valid Unicode, which file names may contain, become question marks.
    """
    write_file(path, lambda file: file.write(text.encode("utf-8", "replace")))


@contextmanager
def opened_file(
    path: Path, limit: int, *, name: str | None = None, error: type[FaceLoraError] = BadFile
) -> Iterator[BinaryIO]:
    """Open a regular file of at most `limit` bytes to read it.

    Raises `error` for any other file, since a pipe may wait forever and a device may never end. `name` is the file's name in
    the message; None means its path.
    """
    name = str(path) if name is None else name
    try:
        # A pipe is opened without waiting for a writer. Windows has no named pipes in folders.
        with open(path, "rb", opener=lambda place, flags: os.open(place, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise error(f"{name}: is not a regular file")
            if about.st_size > limit:
                raise error(f"{name}: the file is larger than {limit >> 20} MiB, the maximum")
            yield file
    except OSError as problem:
        raise error(f"{name}: cannot be read: {problem.strerror or problem}") from None


def read_bytes(path: Path, limit: int, *, name: str | None = None, error: type[FaceLoraError] = BadFile) -> bytes:
    """Read a file that `opened_file` opens."""
    with opened_file(path, limit, name=name, error=error) as file:
        return file.read(os.fstat(file.fileno()).st_size)  # read() allocates as many bytes as it is asked for.


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises BadFile when it cannot be read, is larger than 64 MiB or is not JSON."""
    try:
        return parse_json(read_bytes(path, 64 << 20))
    except ValueError as error:
        raise BadFile(f"{path}: cannot be read: {error}") from None


def fill_page(path: Path, parts: Mapping[str, str]) -> str:
    """Return the HTML of a file of this package, with the part of that name for each `<!--NAME-->`."""
    return re.sub(r"<!--(\w+)-->", lambda mark: parts[mark[1]], _read_page(path))


@cache
def _read_page(path: Path) -> str:
    return path.read_text("utf-8")


RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""The names that no file or folder can have on Windows, with any ending."""


def check_replaceable(path: Path) -> Path:
    """Return the path with links resolved. Raises BadFile for anything that `write_file` does not replace."""
    try:
        return _resolved(path)[0]
    except OSError as error:
        raise BadFile(f"{path}: cannot be written there: {error.strerror or error}") from None


def check_writable(path: Path) -> None:
    """Create the file's folder. Raises BadFile when `write_file` could not write to `path`, before hours of training."""
    try:
        place, _ = _resolved(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        probe = _temporary(place)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadFile(f"{path}: cannot be written there: {error.strerror or error}") from None


def check_ending(path: Path, ending: str) -> None:
    if ending and path.suffix.lower() != ending:
        raise BadFile(f"{path}: the name of the output file must end in {ending}")


def remove_leftovers(folder: Path, names: str) -> None:
    """Delete the temporary files and folders that a killed process left in `folder`.

    `names` is a regular expression for the names of the finished files. The caller must hold their lock, so that the files
    of a running process are kept.
    """
    with suppress(OSError):  # A folder may be writable, but not readable.
        for path in leftovers(folder, names):
            delete(path, [])


def leftovers(folder: Path, names: str) -> list[Path]:
    """Return the temporary files and folders in `folder` of files whose names match `names`, a regular expression."""
    pattern = re.compile(rf"\.(?:{names})\.[0-9a-f]{{8}}\.tmp")
    return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]


def remove_leftovers_of(path: Path) -> None:
    """Delete a killed process's temporary files of the file or folder at `path`. The caller must hold its lock."""
    remove_leftovers(path.parent, re.escape(path.name))


def delete(path: Path, failures: list[str]) -> int:
    """Delete a file, or a folder with everything in it, and return the number of deleted files.

    Links are deleted, not what they lead to. What cannot be deleted is added to `failures` with the reason.
    """
    count, before = 0, len(failures)
    try:
        if path.is_dir() and not path.is_symlink():
            for inner in list(path.iterdir()):
                count += delete(inner, failures)
            if len(failures) == before:
                path.rmdir()
        elif os.path.lexists(path):
            path.unlink()
            count = 1
    except OSError as error:
        failures.append(f"{path}: cannot be deleted: {error.strerror or error}")
    return count


def check_deleted(count: int, failures: list[str]) -> None:
    """Raise BadFile with the first of the faults from `delete`, if there are any."""
    if failures:
        others = counted(len(failures), "file or folder was", "files or folders were")
        raise BadFile(f"{failures[0]} ({counted(count, 'file was', 'files were')} deleted, {others} not)")
