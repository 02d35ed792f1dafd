"""Say why the process ends when a file that is mapped into memory becomes shorter: the signal SIGBUS ends it without a word."""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def explained_bus_error() -> Iterator[None]:
    """End the process with a message and exit code 1 for SIGBUS within the context, on systems that have it."""
    if not hasattr(signal, "SIGBUS"):
        yield
        return
    # Python's own handlers run after the instruction that fails, which is repeated forever.
    library = ctypes.CDLL(None)
    library.signal.restype, library.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end)
    before = library.signal(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        library.signal(signal.SIGBUS, before)


def _end(_number: int) -> None:
    name = _truncated() or "a file in use"
    message = f"facelora: {name}: another program has truncated this file, or its disk has failed; restore it, and try again\n"
    with suppress(OSError):
        os.write(2, message.encode("utf-8", "replace"))
    os._exit(1)


def _truncated() -> str | None:
    """Return the path of a mapped file that is shorter than what is mapped of it. None where only the system knows."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
            place, rights, offset, _, _, *names = line.split(maxsplit=5)
            start, end = (int(part, 16) for part in place.split("-"))
            last_page = int(offset, 16) + end - start - os.sysconf("SC_PAGE_SIZE")
            with suppress(OSError):
                if names and rights.startswith("r") and os.stat(names[0]).st_size <= last_page:
                    return names[0]
    return None
