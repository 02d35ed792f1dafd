"""The cache folder, which keeps results under names made from the content that they were computed from."""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from ..errors import BadFile, counted
from .files import make_folder, writing

KINDS = ("base", "class", "latents", "memory", "panels", "runs", "text")
"""The folders in the cache folder: the base model's own pictures, class images, encoded photos, memory predictions (of earlier
versions), what panels show, what is kept of runs, captions."""
_OURS = re.compile(r"\.?[0-9a-f]{64}(\..*)?")
"""What `content_key` makes, with endings, and what is left of a file whose writing was killed."""
CACHE_VERSION = "2"
"""A part of every cache key, to be raised whenever the same input would be encoded differently."""


_INSTEAD: ContextVar[Path | None] = ContextVar("cache folder", default=None)


@contextmanager
def cache_in(folder: Path | None) -> Iterator[None]:
    """A context in which this folder is the cache folder, so that what is kept of a person can be deleted with it.

    None is the usual one, for what is about nobody.
    """
    token = _INSTEAD.set(folder)
    try:
        yield
    finally:
        _INSTEAD.reset(token)


def cache_folder() -> Path:
    """The folder for encoded photos and captions.

    It is that of `cache_in`, else $FACELORA_CACHE, else `facelora` in the user's cache folder.
    """
    if instead := _INSTEAD.get():
        return instead
    if folder := os.environ.get("FACELORA_CACHE"):
        return Path(folder)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "facelora"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "facelora"


def made_folder(*names: str) -> Path:
    """A folder inside the cache folder, made where it is missing. Raises BadFile when it cannot be made.

    The cache is about a person, so only the owner can read the folders that are made, and the files that are written there.
    """
    folder = cache_folder()
    try:
        make_folder(folder.parent)
        for name in ("", *names):
            folder = folder / name
            with writing(folder):
                folder.mkdir(mode=0o700, exist_ok=True)
            with suppress(OSError):  # it belongs to another user
                # Version 0.1.0 left them readable for all.
                if folder.stat().st_mode & 0o077 and _is_ours(folder):
                    folder.chmod(0o700)
    except BadFile as error:
        raise BadFile(f"{error}; set FACELORA_CACHE to a folder for the cache") from None
    return folder


def _is_ours(folder: Path) -> bool:
    """Whether the cache folder or one in it holds nothing of other programs, which it may in a folder that the user chose."""
    if "FACELORA_CACHE" not in os.environ or _OURS.fullmatch(folder.name):
        return True
    return folder.name in KINDS and all(_OURS.fullmatch(path.name) for path in folder.iterdir())


def clear_cache() -> int:
    """The number of files that were deleted: all that this project has put into the cache folder, and nothing else.

    The cache folder may be one that holds other things. BadFile names what could not be deleted, when the rest is gone.
    """
    count, left = 0, []
    for folder in (cache_folder() / kind for kind in KINDS):
        try:
            paths = list(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []
        except OSError as error:  # it is another user's
            left.append(f"{folder}: cannot be read: {error.strerror or error}")
            continue
        for path in paths:
            if not _OURS.fullmatch(path.name):
                continue
            try:
                files = sum(inner.is_file() for inner in path.rglob("*")) if path.is_dir() else 1
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            except OSError as error:
                left.append(f"{path}: cannot be deleted: {error.strerror or error}")
            else:
                count += files
        _remove_if_empty(folder)
    _remove_if_empty(cache_folder())
    if left:
        others = counted(len(left), "file or folder was", "files or folders were")
        raise BadFile(f"{left[0]} ({counted(count, 'file was', 'files were')} deleted, {others} not)")
    return count


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not there, or holds something
        folder.rmdir()


def content_key(*parts: object) -> str:
    """A file name for content that is made from these parts: 64 hex digits of SHA-256, different for other parts."""
    return hashlib.sha256("\0".join(map(str, (CACHE_VERSION, *parts))).encode()).hexdigest()
