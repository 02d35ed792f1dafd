"""Measure one photo, before it is compared with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..faces import Face, FaceNetwork
from . import measure
from .reading import Photo
from .thresholds import Thresholds

TURNS = {
    90: "the picture lies on its side: turn it to the left",
    180: "the picture stands on its head: turn it round",
    270: "the picture lies on its side: turn it to the right",
}
"""The advice for a picture that isn't upright, by the counter-clockwise degrees that would make it upright."""
UPRIGHT_SCORE, UPRIGHT_MARGIN = 0.91, 0.03
"""The lowest detector score at which a face counts as upright, and the margin by which a turned picture must beat it.

On ORL, YuNet scores upright faces 0.914 or more, and at least 0.035 higher than the same faces turned.
"""


@dataclass(frozen=True, eq=False)
class Look:
    """The measurements of one photo before it is compared with the others; lists have one entry for each face."""

    photo: Photo
    hash: np.ndarray
    turn: int
    faces: list[Face]
    """The faces in pixels of the photo, largest first, without faces that are much smaller than the largest."""
    vectors: np.ndarray
    lumas: list[np.ndarray]
    lights: list[np.ndarray]
    backgrounds: list[np.ndarray]


def look_at(photo: Photo, network: FaceNetwork, thresholds: Thresholds) -> Look:
    """Return the measurements of a photo."""
    side = thresholds.sharpness_side
    # The detector works at 640 pixels, and a face is judged at `side`. Decoding more would waste time.
    image = photo.image(shorter_side=640)
    faces = network.detect(image)
    if faces and faces[0].size < side and image.size != photo.size:
        needed = min(image.size) * side / max(faces[0].size, 1)
        larger = photo.image(shorter_side=int(min(needed, *photo.size)))
        faces = [_scaled(face, image, larger.size) for face in faces]
        image = larger
    turn = _turn(image, faces, network)
    # Landmarks are wrong on a face that is not upright.
    faces = [] if turn else [face for face in faces if face.size >= thresholds.other_face * faces[0].size]
    return Look(
        photo,
        measure.perceptual_hash(image),
        turn,
        [_scaled(face, image, photo.size) for face in faces],
        network.embed([image] * len(faces), faces),
        [measure.face_luma(image, face, side) for face in faces],
        [measure.light(image, face) for face in faces],
        [measure.background(image, face) for face in faces],
    )


def _turn(image: Image.Image, faces: Sequence[Face], network: FaceNetwork) -> int:
    """Return the degrees, counter-clockwise, that would make the faces upright; 0 if they are upright or no face is found."""
    upright = _surest(faces)
    if upright >= UPRIGHT_SCORE:
        return 0
    scores = {degrees: _surest(network.detect(image.rotate(degrees, expand=True))) for degrees in TURNS}
    best = max(scores, key=lambda degrees: scores[degrees])
    return best if scores[best] > upright + UPRIGHT_MARGIN else 0


def _surest(faces: Sequence[Face]) -> float:
    return max((face.score for face in faces), default=0.0)


def _scaled(face: Face, image: Image.Image, size: tuple[int, int]) -> Face:
    """Return a face of `image` in the pixels of the same picture at another size."""
    factors = np.array(size) / image.size
    left, top, right, bottom = (np.array(face.box) * np.tile(factors, 2)).tolist()
    return Face((left, top, right, bottom), (face.landmarks * factors).astype(np.float32), face.score)
