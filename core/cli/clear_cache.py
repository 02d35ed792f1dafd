"""The command `clear-cache`, which deletes the cache folder's files."""

from dataclasses import dataclass

from ..storage.cache_folder import cache_folder, clear_cache
from .options import Options


@dataclass(frozen=True)
class ClearCacheOptions(Options):
    """The command has none."""


def run(options: ClearCacheOptions) -> None:
    print(f"{clear_cache()} files deleted from {cache_folder()}")
