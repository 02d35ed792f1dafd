"""Locks that prevent two processes from writing the same file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import InUse

WAIT = 1.0
"""Seconds to wait for a lock. Some are held only for a moment."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock the file at `path` for writing. Only one thread of one process can be in this context.

    Raises InUse while another one is. The same thread may enter the context again.

    The lock is the file `.NAME.lock` beside the file, and is deleted at the end. The operating system releases the lock of a
    killed process; the empty file that remains locks nothing. On a file system without locks, this does nothing.
    """
    path = Path(os.path.realpath(path))  # All links to a file share one lock.
    lock = FileLock(lock_of(path), timeout=WAIT, is_singleton=True)
    if lock.is_locked or not _acquire(lock, path):
        yield
        return
    try:
        yield
    finally:
        # Delete the file before releasing it: afterwards, another process may hold it. On Windows, filelock deletes it.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def lock_of(path: Path) -> Path:
    """Return the path of a file's lock."""
    return path.with_name(f".{path.name}.lock")


def _acquire(lock: FileLock, path: Path) -> bool:
    """Acquire the lock; return False on a file system without locks. Raises InUse while another process holds it."""
    while True:
        try:
            lock.acquire()
        except Timeout:
            raise InUse(
                f"{path}: another process is writing this file (lock: {lock.lock_file}); wait until it has finished"
            ) from None
        except (OSError, NotImplementedError):
            return False
        if Path(lock.lock_file).exists():
            return True
        lock.release()  # The previous holder deleted this file after it was opened here.
