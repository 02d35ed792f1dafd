"""The version of the project, which stands in pyproject.toml."""

import re
from importlib.metadata import version
from pathlib import Path

_PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def _version() -> str:
    # A clone may have other files than the package whose metadata are installed, if any are.
    if _PROJECT.exists() and (found := re.search(r'^version = "(.+)"', _PROJECT.read_text("utf-8"), re.MULTILINE)):
        return found[1]
    return version("comfyui-facelora")


__version__ = _version()
