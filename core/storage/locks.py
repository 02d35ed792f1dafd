"""Locks that keep two runs from writing the same file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import InUse

WAIT = 1.0
"""The number of seconds to wait for a lock, since some are held only for a moment."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A context for writing the file at `path`, which only one thread of one process can be in at a time.

    Raises InUse while another is in it. The same thread may enter it again.

    The lock is the file `.NAME.lock` beside the other one, and is deleted at the end. The operating system releases the lock
    of a killed process; the empty file that stays behind locks nothing. On a file system without locks nothing is locked.
    """
    path = Path(os.path.realpath(path))  # a file has one lock, whatever name it is called by
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=WAIT, is_singleton=True)
    if lock.is_locked or not _acquire(lock, path):
        yield
        return
    try:
        yield
    finally:
        # Deleted while it is held, since afterwards it may be the next run's. On Windows filelock itself deletes it.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def _acquire(lock: FileLock, path: Path) -> bool:
    """Whether the lock was acquired; False on a file system without locks. Raises InUse while another run holds it."""
    while True:
        try:
            lock.acquire()
        except Timeout:
            raise InUse(f"{path}: another run is writing it (its lock: {lock.lock_file}); wait for its end") from None
        except (OSError, NotImplementedError):
            return False
        if Path(lock.lock_file).exists():
            return True
        lock.release()  # the run before deleted this file after it was opened here
