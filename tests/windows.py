"""The rules of Windows for files, on Linux: what this process has open or mapped is not replaced, renamed or deleted."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def in_use() -> set[str]:
    """The paths of the files that this process has open or mapped."""
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    found = {fields[5] for fields in maps if len(fields) > 5}
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the listing's own
            continue
    return found


@contextmanager
def windows_rules() -> Iterator[None]:
    """A context in which renaming, replacing and deleting files obeys Windows' rules."""

    def guarded(function: Callable[..., Any], *, replaces: bool) -> Callable[..., Any]:
        def call(path: Any, *others: Any, dir_fd: int | None = None, **options: Any) -> Any:
            folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            places = [os.path.realpath(os.path.join(folder, os.fspath(place))) for place in (path, *others)]
            if not replaces and others and os.path.exists(places[1]):
                raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", path)
            used = in_use()
            for place in (
                place for place in places if not place.endswith(".lock")
            ):  # filelock deletes those on Windows
                if any(one == place or one.startswith(f"{place}{os.sep}") for one in used if os.path.isfile(one)):
                    raise PermissionError(errno.EACCES, "The file is in use", place)
            return function(path, *others, **({} if dir_fd is None else {"dir_fd": dir_fd}), **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", guarded(os.replace, replaces=True))
        patch.setattr(os, "rename", guarded(os.rename, replaces=False))
        for name in ("unlink", "remove"):
            patch.setattr(os, name, guarded(getattr(os, name), replaces=True))
        yield
