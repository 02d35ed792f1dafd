"""The cache folder. Each result is saved under a name derived from the content it was computed from."""

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from ..errors import BadFile, InUse
from .files import check_deleted, delete, make_folder, writing

KINDS = ("base", "class", "headshots", "latents", "memory", "panels", "restarts", "runs", "speeds", "text")
"""The folders in the cache folder.

In order: the base model's own pictures, class images, unfinished batches of InvokeAI's node, encoded photos, memory predictions
(of earlier versions), contents of panels. Then: marks of files that an unfinished training run may replace, records of training
runs, speeds of this machine, captions.
"""
_OURS = re.compile(r"\.?[0-9a-f]{64}(\..*)?")
"""Matches names from `content_key`, with any ending, and the temporary files of killed processes."""
CACHE_VERSION = "2"
"""Part of every cache key. Raise it whenever the same input would be encoded differently."""
_INSTEAD: ContextVar[Path | None] = ContextVar("cache folder", default=None)
"""A person's own cache folder. As an argument it would pass through a dozen functions of `training`, and forgetting it in one
of them would leave the person's data in the usual folder."""


@contextmanager
def cache_in(folder: Path | None) -> Iterator[None]:
    """Use this folder as the cache folder within the context, so that a person's data can be deleted with it.

    None selects the usual folder, for data that isn't about a person.
    """
    token = _INSTEAD.set(folder)
    try:
        yield
    finally:
        _INSTEAD.reset(token)


def cache_folder() -> Path:
    """Return the cache folder.

    This is the folder set by `cache_in`, else $FACELORA_CACHE, else `facelora` in the user's cache folder. Raises BadFile for a
    user without a home folder.
    """
    if instead := _INSTEAD.get():
        return instead
    if folder := os.environ.get("FACELORA_CACHE"):
        return Path(folder)
    caches = Path(os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", ""))
    # By the XDG specification, a path that is not absolute counts as none.
    if not caches.is_absolute():
        try:
            caches = Path.home() / ("AppData/Local" if sys.platform == "win32" else ".cache")
        except RuntimeError:
            raise BadFile(
                "this user has no home folder; set FACELORA_CACHE to a folder that you can write to"
            ) from None
    return caches / "facelora"


def made_folder(*names: str) -> Path:
    """Return a folder inside the cache folder, creating it if needed. Raises BadFile when it cannot be created.

    The cache holds personal data, so only the owner can read the new folders and the files written to them.
    """
    folder = cache_folder()
    try:
        make_folder(folder.parent)
        for name in ("", *names):
            folder = folder / name
            with writing(folder):
                folder.mkdir(mode=0o700, exist_ok=True)
            with suppress(OSError):  # The folder belongs to another user.
                # Version 0.1.0 created these folders readable for everyone.
                if folder.stat().st_mode & 0o077 and _is_ours(folder):
                    folder.chmod(0o700)
    except BadFile as error:
        raise BadFile(f"{error}; set FACELORA_CACHE to a folder that you can write to") from None
    return folder


def _is_ours(folder: Path) -> bool:
    """Check that a cache folder holds no other program's files. A folder that the user chose may hold some."""
    if "FACELORA_CACHE" not in os.environ or _OURS.fullmatch(folder.name):
        return True
    return folder.name in KINDS and all(_OURS.fullmatch(path.name) for path in folder.iterdir())


def clear_cache() -> int:
    """Delete everything that this project has put into the cache folder, and return the number of deleted files.

    Other files in the folder are kept. If some files cannot be deleted, or are in use by a training run or a batch, the rest
    are, and then BadFile names the first one.
    """
    count, failures = 0, list[str]()
    for folder in (cache_folder() / kind for kind in KINDS):
        try:
            paths = list(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []
        except OSError as error:  # The folder belongs to another user.
            failures.append(f"{folder}: cannot be read: {error.strerror or error}")
            continue
        count += sum(_delete_unused(path, failures) for path in paths if _OURS.fullmatch(path.name))
        _remove_if_empty(folder)
    _remove_if_empty(cache_folder())
    check_deleted(count, failures)
    return count


def _delete_unused(path: Path, failures: list[str]) -> int:
    """Delete a file or folder as `delete` does, unless another process or thread holds a lock in it."""
    from .locks import locked  # Loads filelock.

    locks = [] if path.is_symlink() else list(path.glob(".*.lock"))
    try:
        with ExitStack() as held:
            for lock in locks:
                held.enter_context(locked(path / lock.stem[1:]))
            count = sum(delete(one, failures) for one in path.iterdir() if one not in locks) if locks else 0
    except InUse as error:
        failures.append(f"{path}: is in use, repeat this later: {error}")
        return 0
    return count + delete(path, failures)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # The folder is missing or not empty.
        folder.rmdir()


def content_key(*parts: object) -> str:
    """Return a file name for content made from these parts: their SHA-256 as 64 hex digits."""
    return hashlib.sha256("\0".join(map(str, (CACHE_VERSION, *parts))).encode()).hexdigest()
