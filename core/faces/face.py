"""A face in a picture, and what a network must do to find faces and tell people apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from ..errors import BadPhoto


@dataclass(frozen=True, eq=False)
class Face:
    """A face in a picture, in pixels of that picture."""

    box: tuple[float, float, float, float]
    """(left, top, right, bottom), from ear to ear and from forehead to chin; may extend beyond the picture's edge."""
    landmarks: np.ndarray
    """The (5, 2) x and y of eyes, nose tip and mouth corners; of each pair, the one on the picture's left is first."""
    score: float
    """The detector's confidence, 0 to 1."""

    @property
    def size(self) -> float:
        """The size of the face in pixels: the square root of the box's area."""
        left, top, right, bottom = self.box
        return math.sqrt((right - left) * (bottom - top))

    def share_of(self, picture: tuple[int, int]) -> float:
        """Return the face's size as a share of a picture of that width and height, as if it were a square."""
        return self.size / math.sqrt(math.prod(picture))


class FaceNetwork(Protocol):
    """A pair of networks that finds faces and tells people apart."""

    name: str
    """The name for reports and metadata: values of different networks cannot be compared."""

    def detect(self, image: Image.Image) -> list[Face]:
        """Return the faces in an RGB picture, the largest first."""
        ...

    def embed(self, images: Sequence[Image.Image], faces: Sequence[Face]) -> np.ndarray:
        """Return the identity vectors, float32 (N, D) with rows of length 1: row i is for faces[i] in images[i]."""
        ...


def check_open(name: str, image: Image.Image) -> None:
    """Raise BadPhoto for a picture in memory that has been closed, or whose file has."""
    try:
        image.load()
    except (ValueError, AssertionError, AttributeError):  # Which one depends on when it was closed.
        raise BadPhoto(f"{name}: it is closed, so it has no pixels; copy it before you close it or its file") from None
