"""The base models that the page offers: the demo's, and those of a program or in folders that the user has named."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...core.errors import BadConfig, FaceLoraError
from ...core.models.base import Base
from ...core.models.opening import DEMO_FILE, load_base

DEMO = "demo"
ENDINGS = (".safetensors", ".gguf")
MOST_FILES = 5000
"""How many files are looked at in all folders."""


def check_folder(text: str) -> Path:
    """Return the folder of that path. Raises BadConfig unless it is one."""
    folder = Path(text.strip()).expanduser() if text.strip().startswith("~") else Path(text.strip())
    if "\0" in text or not folder.is_absolute() or not os.path.isdir(folder):
        raise BadConfig(f"{text}: not a folder on this computer. Give its whole path")
    return folder.resolve()


def files_in(folders: Sequence[str]) -> dict[str, str]:
    """Return the title of each model file in or below the folders."""
    return {str(path): str(path.relative_to(folder)) for folder in folders for path in _files(Path(folder))}


def find_bases(files: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return what the page shows of each base model: its name for the commands, its title, and what it lacks to be used."""
    found = [{"base": DEMO, "title": "demo", "family": "", "lacks": ""}] if DEMO_FILE.exists() else []
    for path, title in files.items():
        with suppress(OSError):
            if about := _about(path, os.stat(path).st_mtime_ns):
                family, lacks = about
                found.append({"base": path, "title": title, "family": family, "lacks": lacks})
    return found


def opened(base: str, files: Mapping[str, str]) -> Base:
    """Open a base model that is offered. Raises BadConfig for another one."""
    if base != DEMO and base not in files:
        raise BadConfig("choose a base model of the list")
    return load_base(base)


def _files(folder: Path) -> list[Path]:
    """Return the model files in or below a folder. Links that lead out of it are ignored."""
    found: list[Path] = []
    for place, _, names in os.walk(folder):
        paths = (Path(place, name) for name in sorted(names) if name.lower().endswith(ENDINGS))
        found += [path for path in paths if path.resolve().is_relative_to(folder) and path.is_file()]
        if len(found) > MOST_FILES:
            break
    return found[:MOST_FILES]


@lru_cache(MOST_FILES)
def _about(path: str, _changed: int) -> tuple[str, str] | None:
    """Return the family of the base model in a file, and what it lacks; None if there is none in it."""
    with suppress(FaceLoraError, OSError):
        base = load_base(path)
        try:
            base.require("denoiser", "vae", *base.text_encoders)
        except FaceLoraError as problem:
            return base.family.title, str(problem)
        return base.family.title, ""
    return None
