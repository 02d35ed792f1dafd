"""Locks that prevent two processes from writing the same file."""

import glob
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import InUse

WAIT = 1.0
"""Seconds to wait for a lock. Some are held only for a moment."""


@contextmanager
def locked(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Lock the file at `path` for writing. Only one thread of one process can be in this context.

    Raises InUse if another one is, for longer than WAIT and `wait` seconds. The same thread may enter the context again.

    The lock is the file `.NAME.lock` beside the file, and is deleted at the end. The operating system releases the lock of a
    killed process; the empty file that remains locks nothing. On a file system without locks, this does nothing.
    """
    path = Path(os.path.realpath(path))  # All links to a file share one lock.
    lock = _lock(lock_of(path))
    if lock.is_locked or not _acquire(lock, path, time.monotonic() + wait):
        yield
        return
    try:
        yield
    finally:
        # Delete the file before releasing it: afterwards, another process may hold it. On Windows, filelock deletes it.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


@contextmanager
def at_work(path: Path) -> Iterator[None]:
    """Make `alone` raise InUse within the context. Any number of threads and processes can be in it at the same time.

    Raises InUse while another one is in `alone`.
    """
    path = Path(os.path.realpath(path))
    with ExitStack() as held:
        with locked(path):
            held.enter_context(locked(path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")))
        yield


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Lock the file at `path`. Raises InUse while another one is in `locked` or `at_work`, or this thread is in `at_work`."""
    path = Path(os.path.realpath(path))
    with locked(path):
        for one in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.lock"):
            if _lock(one).is_locked:
                raise InUse(f"{path}: this thread is still at work on it (lock: {one})")
            with locked(path.with_name(one.stem[1:])):  # Afterwards the lock of a killed process is deleted.
                pass
        yield


def lock_of(path: Path) -> Path:
    """Return the path of a file's lock."""
    return path.with_name(f".{path.name}.lock")


def _lock(place: Path) -> FileLock:
    return FileLock(place, timeout=WAIT, is_singleton=True)


def _acquire(lock: FileLock, path: Path, until: float) -> bool:
    """Acquire the lock; return False on a file system without locks. Raises InUse if another process holds it `until` then."""
    while True:
        try:
            lock.acquire()
        except Timeout:
            if time.monotonic() < until:
                continue
            raise InUse(
                f"{path}: another process is writing this file (lock: {lock.lock_file}); wait until it has finished"
            ) from None
        except (OSError, NotImplementedError):
            return False
        if Path(lock.lock_file).exists():
            return True
        lock.release()  # The previous holder deleted this file after it was opened here.
