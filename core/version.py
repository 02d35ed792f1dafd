"""The version of the project, from pyproject.toml."""

import re
from importlib.metadata import version
from pathlib import Path

_PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def _version() -> str:
    # A clone's files may differ from an installed package, whose metadata would be wrong.
    if _PROJECT.exists() and (found := re.search(r'^version = "(.+)"', _PROJECT.read_text("utf-8"), re.MULTILINE)):
        return found[1]
    return version("comfyui-facelora")


__version__ = _version()
