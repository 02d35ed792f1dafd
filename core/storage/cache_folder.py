"""The cache folder, which keeps results under names made from the content that they were computed from."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

from ..errors import BadFile
from .files import make_folder

CACHE_VERSION = "2"
"""A part of every cache key, to be raised whenever the same input would be encoded differently."""


def cache_folder() -> Path:
    """The folder for encoded photos and captions: $FACELORA_CACHE, else `facelora` in the user's cache folder."""
    if folder := os.environ.get("FACELORA_CACHE"):
        return Path(folder)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "facelora"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "facelora"


def made_folder(*names: str) -> Path:
    """A folder inside the cache folder, made where it is missing. Raises BadFile when it cannot be made."""
    try:
        return make_folder(cache_folder().joinpath(*names))
    except BadFile as error:
        raise BadFile(f"{error}; set FACELORA_CACHE to a folder for the cache") from None


def clear_cache() -> int:
    """The number of files that were in the cache, after all of them are deleted."""
    count = sum(1 for path in cache_folder().rglob("*") if path.is_file())
    shutil.rmtree(cache_folder(), ignore_errors=True)
    return count


def content_key(*parts: object) -> str:
    """A file name for content that is made from these parts: 64 hex digits of SHA-256, different for other parts."""
    return hashlib.sha256("\0".join(map(str, (CACHE_VERSION, *parts))).encode()).hexdigest()
