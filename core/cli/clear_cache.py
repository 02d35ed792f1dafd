"""The command `clear-cache`, which deletes the files in the cache folder."""

import argparse

from ..storage.cache_folder import cache_folder, clear_cache


def run_clear_cache(options: argparse.Namespace) -> None:
    print(f"{clear_cache()} files deleted from {cache_folder()}")
