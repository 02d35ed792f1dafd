"""The standard streams of a command. They may be closed or full, or a terminal that names could control."""

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

from ..errors import BadFile


@contextmanager
def standard_streams() -> Iterator[None]:
    """Make the streams ResultStream and MessageStream within the context. A closed one is opened first, on the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # In this order: otherwise files that are opened later would take their numbers.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Escape characters in names that the terminal's encoding lacks, as on stderr, instead of ending the program.
        sys.stdout.reconfigure(errors="backslashreplace")
    with redirect_stdout(ResultStream(sys.stdout)), redirect_stderr(MessageStream(sys.stderr)):
        try:
            yield
        finally:
            with suppress(BadFile, BrokenPipeError):  # Otherwise Python would print a traceback at its end.
                sys.stdout.flush()


class _Wrapped:
    """A stream whose other methods are those of the stream in it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def _drop(self) -> None:
        """Write nothing more, since Python would report the same error again at its end."""
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class ResultStream(_Wrapped):
    """A stream that replaces control characters, except tabs and line ends: names could otherwise control the terminal.

    Raises BadFile if it can't be written, such as on a full disk, and BrokenPipeError if nobody reads it any more.
    """

    def write(self, text: str) -> int:
        shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
        with self._failing():
            return self._stream.write(shown)

    def flush(self) -> None:
        with self._failing():
            self._stream.flush()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._drop()
            if isinstance(error, BrokenPipeError):
                raise
            raise BadFile(f"standard output: cannot be written: {error.strerror or error}") from None


class MessageStream(_Wrapped):
    """A stream of messages and progress. If it can't be written, they are lost, and the work continues."""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()
