"""Measurements of a photo and of the face in it, each a number or a short vector."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..faces import Face

SHARPNESS_SIDE = 256
"""The size of a face, in pixels, at which its sharpness is judged: what a close-up is trained at, whatever the camera."""


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """The perceptual hash, bool (64,): which of the 8 x 8 lowest frequencies of the 32 x 32 picture exceed their median.

    Copies in other sizes, formats and brightness differ in few bits; unrelated pictures differ in about 32. It is "pHash"
    of Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010), and the package ImageHash.
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    positions, frequencies = np.arange(32), np.arange(8)[:, None]
    cosines = np.cos(np.pi * (2 * positions + 1) * frequencies / 64)  # the DCT-II of 32 points, its first 8 rows
    spectrum = (cosines @ grey @ cosines.T).ravel()
    return spectrum > np.median(spectrum)


def hash_distance(a: np.ndarray, b: np.ndarray) -> int:
    """The number of bits, of 64, in which two perceptual hashes differ."""
    return int((a != b).sum())


def face_luma(image: Image.Image, face: Face) -> np.ndarray:
    """The brightness of a face, float64 (h, w) in 0 to 255.

    It is that of the part of the face's box inside the picture, shrunk to at most SHARPNESS_SIDE pixels on the long side.
    """
    crop = image.crop(_inside(image, face)).convert("L")
    crop.thumbnail((SHARPNESS_SIDE, SHARPNESS_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(crop, np.float64)


def sharpness(luma: np.ndarray) -> float:
    """The variance of the Laplacian over the variance of `luma` (h, w): how much of the contrast is in fine detail.

    The division makes it independent of exposure, which the plain variance of the Laplacian (Pech-Pacheco 2000) is not.
    It is 0 for a picture without contrast or with a side below 3 pixels.
    """
    if min(luma.shape) < 3 or luma.var() == 0:
        return 0.0
    middle = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * middle
    return float(laplacian.var() / luma.var())


def highlights(luma: np.ndarray) -> float:
    """The brightness that 5 % of the face exceeds, 0 to 255. A low one means underexposed for light and dark skin alike."""
    return float(np.percentile(luma, 95))


def midtone(luma: np.ndarray) -> float:
    """The median brightness of the face, 0 to 255. A very high one means overexposed."""
    return float(np.median(luma))


def share_in_frame(image_size: tuple[int, int], face: Face) -> float:
    """The share of the face's box that is inside the picture, 0 to 1."""
    left, top, right, bottom = face.box
    width = min(right, image_size[0]) - max(left, 0)
    height = min(bottom, image_size[1]) - max(top, 0)
    return max(0.0, width) * max(0.0, height) / ((right - left) * (bottom - top))


def features_in_frame(image_size: tuple[int, int], face: Face) -> bool:
    """Whether both eyes, the nose and both ends of the mouth are inside the picture.

    The detector places features outside the picture where they are cut off: so it did on every ORL face cut in half.
    """
    return bool(((face.landmarks >= 0) & (face.landmarks <= np.array(image_size))).all())


def pose(face: Face) -> tuple[float, float]:
    """The (yaw, pitch) of a head, without units, by the place of the nose tip between eyes and mouth.

    Yaw is the nose's offset from the line between the middles of eyes and mouth, in eye distances: 0 in a frontal view,
    negative towards the picture's left. With eyes 63 mm apart (Dodgson 2004, mean of adults) and a nose tip that stands
    out by some 28 mm it is 0.44 times the tangent of the angle. Pitch is the nose's place between eyes (0) and mouth (1):
    about 0.55 for a level look, less when looking up, more when looking down. A tilt of the head changes neither.
    """
    left_eye, right_eye, nose, left_mouth, right_mouth = face.landmarks.astype(np.float64)
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    across = (right_eye - left_eye) / max(1e-6, np.linalg.norm(right_eye - left_eye))
    down = np.array([-across[1], across[0]])
    yaw = (nose - (eyes + mouth) / 2) @ across / max(1e-6, np.linalg.norm(right_eye - left_eye))
    length = (mouth - eyes) @ down
    pitch = (nose - eyes) @ down / length if abs(length) > 1e-6 else 0.5
    return float(yaw), float(pitch)


def light(image: Image.Image, face: Face) -> np.ndarray:
    """The light on a face as a vector (3,) of brightness, side and warmth; at a distance of 1 two lights look different.

    Each is in units of a visible difference: 15 % of brightness, 10 % between the halves of the face, 6 % of red
    against blue.
    """
    rgb = np.asarray(image.crop(_inside(image, face)).resize((32, 32), Image.Resampling.BOX), np.float64) / 255
    halves = rgb[:, :16].mean(), rgb[:, 16:].mean()
    red, green, blue = rgb.mean((0, 1))
    total = max(1e-6, red + green + blue)
    side = (halves[1] - halves[0]) / max(1e-6, halves[0] + halves[1])
    return np.array([rgb.mean() / 0.15, side / 0.10, (red - blue) / total / 0.06])


def background(image: Image.Image, face: Face) -> np.ndarray:
    """The background beside and above the head as a vector (4,) of mean colour (3) and spread of brightness.

    At a distance of 1 two backgrounds look different.
    """
    small = np.asarray(image.resize((64, 64), Image.Resampling.BOX), np.float64) / 255
    left, top, right, bottom = face.box
    # A head with hair is about twice as wide as the face, and half as high again above it.
    width, height = right - left, bottom - top
    x = (np.arange(64) + 0.5) * image.width / 64
    y = (np.arange(64) + 0.5) * image.height / 64
    head = ((x > left - width / 2) & (x < right + width / 2)) & (y > top - height / 2)[:, None]
    beside = ~head & (y < bottom)[:, None]
    pixels = small[beside] if beside.any() else small.reshape(-1, 3)
    return np.array([*pixels.mean(0), pixels.mean(1).std()]) / 0.12


def kinds(vectors: list[np.ndarray]) -> int:
    """The number of kinds among the vectors: a vector is of a new kind if it is further than 1 from all kinds before it."""
    kept: list[np.ndarray] = []
    for vector in vectors:
        if all(np.linalg.norm(vector - other) > 1 for other in kept):
            kept.append(vector)
    return len(kept)


def _inside(image: Image.Image, face: Face) -> tuple[int, int, int, int]:
    """The face's box, cut at the picture's edges, never empty."""
    left, top = (max(0, min(round(v), side - 1)) for v, side in zip(face.box[:2], image.size, strict=True))
    right, bottom = (min(side, round(v)) for v, side in zip(face.box[2:], image.size, strict=True))
    return left, top, max(left + 1, right), max(top + 1, bottom)
