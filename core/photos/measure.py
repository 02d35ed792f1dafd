"""Measure one photo and the faces in it, and define the values at which its verdict changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ..errors import BadConfig
from ..faces import Face, FaceNetwork
from .reading import Photo


@dataclass(frozen=True)
class Thresholds:
    """The values at which verdicts change: starting points, each with its source. docs/photos.md shows their effect."""

    face_pixels_reject: float = 200
    """The face size, in pixels of the photo, below which a face is rejected: half of what headshot services ask for."""
    face_pixels_review: float = 410
    """The face size, in pixels, below which a face is reviewed: HeadshotPro's minimum, 40 % of a 1024 pixel picture."""
    in_frame_review: float = 0.95
    """The share of the face's box inside the picture below which it is reviewed. Two photos cut beside an eye (package
    face_recognition) have 0.87 and 0.92, whole faces 0.98 or more. A photo with an eye or the mouth cut off is rejected."""
    sharpness_side: float = 256
    """The face size, in pixels, at which sharpness is judged, whatever the camera: 40 % of the resolution, the size at which a
    close-up is trained, and at most this."""
    sharpness_reject: float = 0.015
    """The `measure.sharpness` below which a face is rejected. Blurring by 2 pixels or enlarging 6 times gives 0.006 to
    0.015."""
    sharpness_review: float = 0.05
    """The sharpness below which a face is reviewed. Sharp portraits and ORL have 0.06 to 1.4, soft group pictures 0.01 to
    0.09."""
    highlights_reject: float = 40
    """The `measure.highlights` below which a face is rejected as dark: portraits darkened to 15 % have 24 to 29."""
    highlights_review: float = 80
    """The highlights below which a face is reviewed: portraits darkened to 30 % have 54 to 59, all of ORL is above 130."""
    midtone_review: float = 225
    """The `measure.midtone` above which a face is reviewed as bright: ordinary faces have 50 to 175."""
    midtone_reject: float = 245
    """The midtone above which a face is rejected: portraits brightened 2.5 times have 234 to 255."""
    flatness_reject: float = 0.3
    """The lowest `measure.flatness` of a drawing. Photos have 0.01 to 0.04, at a JPEG quality of 10 up to 0.25.
    Photos turned into flat colours have 0.17 to 0.58, and a cartoon 0.75."""
    likeness_reject: float = 0.40
    """The cosine to the set's most typical photo below which a face is someone else's: SFace's equal-error threshold."""
    likeness_review: float = 0.55
    """The cosine below which a face is reviewed: 98.7 % of ORL's photos reach it, and no photo of someone else does."""
    same_picture: int = 2
    """The bits, of 64, by which hashes of copies differ: 0 to 2 when scaled, recompressed or recoloured, rarely 4."""
    similar_picture: int = 6
    """The bits by which hashes of similar pictures differ: 2 to 6 for copies cropped by 2 % or turned by 1 degree."""
    same_picture_likeness: float = 0.85
    """The lowest cosine of the faces at which pictures with equal hashes count as copies: copies have 0.90 to 0.99."""
    face_share_crop: float = 0.12
    """The share of the picture (square roots of the areas) below which a face is small: 120 of 1024 pixels are too few."""
    other_face: float = 0.3
    """The share of the largest face's size below which a face counts as background."""
    turned: float = 0.12
    """The yaw (`measure.pose`) at which a face counts as half-turned: about 15 degrees. Nine in ten ORL photos are below."""
    side: float = 0.35
    """The yaw at which a face counts as a side view: about 38 degrees."""
    photos_needed: int = 1
    """The fewest usable photos to train on. docs/likeness.md shows what one to five photos reach."""
    photos_measured: int = 8
    """With this many usable photos or more, some are held out, so that likeness can be measured."""
    photos_wanted: int = 10
    """The number of usable photos that is enough: headshot services ask for 6 to 20, and 8 to 15 work best."""
    turned_wanted: int = 3
    """The number of usable photos with a turned head, so that the LoRA learns the person and not the view."""
    chest_up_wanted: int = 3
    """The number of usable photos that show more than the face."""
    lights_wanted: int = 3
    """The number of kinds of light (`measure.light`) among the usable photos."""
    backgrounds_wanted: int = 3
    """The number of kinds of background (`measure.background`), so that no wall becomes part of the person."""

    @classmethod
    def for_resolution(cls, resolution: int, network: str = "sface") -> Thresholds:
        """Return the thresholds for training at a resolution, in pixels, with likeness measured by a face network.

        The defaults are for 1024 pixels; face sizes grow in proportion. A photo that is soft at its own size can be sharp at
        the size at which it is trained. A network that is not in LIKENESS_LIMITS is treated like SFace. Raises BadConfig for a
        resolution below 1.
        """
        if resolution < 1:
            raise BadConfig(f"resolution = {resolution}: must be at least 1")
        reject, review, same_picture = LIKENESS_LIMITS.get(network, LIKENESS_LIMITS["sface"])
        return cls(
            face_pixels_reject=cls.face_pixels_reject * resolution / 1024,
            face_pixels_review=cls.face_pixels_review * resolution / 1024,
            # Below 48 pixels sharpness says little: detail and edges of the face are the same.
            sharpness_side=min(cls.sharpness_side, max(48, 0.4 * resolution)),
            likeness_reject=reject,
            likeness_review=review,
            same_picture_likeness=same_picture,
        )

    @classmethod
    def for_reference(cls, network: str = "sface") -> Thresholds:
        """Return the thresholds for photos that pictures are only compared with, by a face network.

        A face must be as large and sharp as in the crop that the network sees. One photo is enough, and it needs no variety.
        """
        return replace(
            cls.for_resolution(round(112 / 0.4), network),  # SFace sees a face in a crop of 112 pixels
            photos_measured=1,
            photos_wanted=1,
            turned_wanted=0,
            chest_up_wanted=0,
            lights_wanted=0,
            backgrounds_wanted=0,
        )


LIKENESS_LIMITS = {
    "sface": (Thresholds.likeness_reject, Thresholds.likeness_review, Thresholds.same_picture_likeness),
    "dlib": (0.93, 0.95, 0.985),
}
"""The (likeness_reject, likeness_review, same_picture_likeness) measured for each face network.

On ORL, dlib's equal-error threshold is 0.925. 98.0 % of the photos reach 0.95, and no photo of someone else exceeds 0.942.
Copies that are scaled, recompressed, cropped by 2 % or turned by 1 degree have 0.992 or more.
"""


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """Return the perceptual hash, bool (64,): which of the 8 x 8 lowest frequencies of the 32 x 32 picture exceed the median.

    Copies in other sizes, formats and brightness differ in a few bits; unrelated pictures differ in about 32. The method is
    "pHash" of Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010), as in package ImageHash.
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    positions, frequencies = np.arange(32), np.arange(8)[:, None]
    cosines = np.cos(np.pi * (2 * positions + 1) * frequencies / 64)  # the DCT-II of 32 points, its first 8 rows
    spectrum = (cosines @ grey @ cosines.T).ravel()
    return spectrum > np.median(spectrum)


def hash_distance(a: np.ndarray, b: np.ndarray) -> int:
    """Return the number of differing bits, of 64, between two perceptual hashes."""
    return int((a != b).sum())


def face_luma(image: Image.Image, face: Face, side: float) -> np.ndarray:
    """Return the brightness of a face, float64 (h, w) in 0 to 255.

    It covers the part of the face's box inside the picture, shrunk to at most `side` pixels on the long side.
    """
    crop = image.crop(_inside(image, face)).convert("L")
    crop.thumbnail((max(1, side), max(1, side)), Image.Resampling.LANCZOS)
    return np.asarray(crop, np.float64)


def sharpness(luma: np.ndarray) -> float:
    """Return the variance of the Laplacian over the variance of `luma` (h, w): how much of the contrast is fine detail.

    Unlike the plain variance of the Laplacian (Pech-Pacheco 2000), the ratio doesn't depend on exposure. It is 0 for a
    picture without contrast or with a side below 3 pixels.
    """
    if min(luma.shape) < 3 or luma.var() == 0:
        return 0.0
    return float(_laplacian(luma).var() / luma.var())


def flatness(luma: np.ndarray) -> float:
    """Return the share of the face without any texture, 0 to 1: where the Laplacian of `luma` (h, w) is below one grey level.

    A camera's noise and the skin leave little of it, while drawings have areas of one colour. Overexposed and very dark parts
    don't count, since they are flat in photos too. It is 0 without other parts, or with a side below 3 pixels.
    """
    if min(luma.shape) < 3:
        return 0.0
    middle = luma[1:-1, 1:-1]
    lit = (middle > 15) & (middle < 250)
    return float((np.abs(_laplacian(luma)[lit]) < 1).mean()) if lit.any() else 0.0


def _laplacian(luma: np.ndarray) -> np.ndarray:
    return luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * luma[1:-1, 1:-1]


def highlights(luma: np.ndarray) -> float:
    """Return the brightness that 5 % of the face exceeds, 0 to 255. Low means underexposed, for light and dark skin alike."""
    return float(np.percentile(luma, 95))


def midtone(luma: np.ndarray) -> float:
    """Return the median brightness of the face, 0 to 255. A very high one means overexposed."""
    return float(np.median(luma))


def share_in_frame(image_size: tuple[int, int], face: Face) -> float:
    """Return the share of the face's box that is inside the picture, 0 to 1."""
    left, top, right, bottom = face.box
    width = min(right, image_size[0]) - max(left, 0)
    height = min(bottom, image_size[1]) - max(top, 0)
    return max(0.0, width) * max(0.0, height) / ((right - left) * (bottom - top))


def features_in_frame(image_size: tuple[int, int], face: Face, max_aspect: float = math.inf) -> bool:
    """Return whether both eyes, the nose and both ends of the mouth are inside the picture, cut to at most that aspect.

    The detector places features that are cut off outside the picture: it did so on every ORL face cut in half.
    """
    size = np.array(image_size)
    cut_off = np.maximum(0, size - max_aspect * size[::-1]) / 2
    return bool(((face.landmarks >= cut_off) & (face.landmarks <= size - cut_off)).all())


def pose(face: Face) -> tuple[float, float]:
    """Return the (yaw, pitch) of a head, without units, from the position of the nose tip between eyes and mouth.

    Yaw is the nose's offset from the line between the middles of eyes and mouth, in eye distances: 0 in a frontal view,
    negative towards the picture's left. It is 0.44 times the tangent of the angle, for eyes 63 mm apart (Dodgson 2004, mean
    of adults) and a nose about 28 mm long. Pitch is the nose's position between eyes (0) and mouth (1): about 0.55 for a
    level look, less when looking up, more when looking down. Tilting the head changes neither.
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
    """Return the light on a face as a vector (3,) of brightness, side and warmth; two lights look different at a distance of 1.

    Each is in units of a visible difference: 15 % of brightness, 10 % between the halves of the face, 6 % of red against
    blue.
    """
    rgb = np.asarray(image.crop(_inside(image, face)).resize((32, 32), Image.Resampling.BOX), np.float64) / 255
    halves = rgb[:, :16].mean(), rgb[:, 16:].mean()
    red, green, blue = rgb.mean((0, 1))
    total = max(1e-6, red + green + blue)
    side = (halves[1] - halves[0]) / max(1e-6, halves[0] + halves[1])
    return np.array([rgb.mean() / 0.15, side / 0.10, (red - blue) / total / 0.06])


def background(image: Image.Image, face: Face) -> np.ndarray:
    """Return the background beside and above the head as a vector (4,): mean colour (3) and spread of brightness.

    Two backgrounds look different at a distance of 1.
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
    """Return the number of kinds among the vectors: a vector starts a new kind if it is over 1 away from all earlier kinds."""
    kept: list[np.ndarray] = []
    for vector in vectors:
        if all(np.linalg.norm(vector - other) > 1 for other in kept):
            kept.append(vector)
    return len(kept)


def _inside(image: Image.Image, face: Face) -> tuple[int, int, int, int]:
    """Return the face's box, cut at the picture's edges, never empty."""
    left, top = (max(0, min(round(v), side - 1)) for v, side in zip(face.box[:2], image.size, strict=True))
    right, bottom = (min(side, round(v)) for v, side in zip(face.box[2:], image.size, strict=True))
    return left, top, max(left + 1, right), max(top + 1, bottom)


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
class MeasuredPhoto:
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


def measure_photo(photo: Photo, network: FaceNetwork, thresholds: Thresholds) -> MeasuredPhoto:
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
    return MeasuredPhoto(
        photo,
        perceptual_hash(image),
        turn,
        [_scaled(face, image, photo.size) for face in faces],
        network.embed([image] * len(faces), faces),
        [face_luma(image, face, side) for face in faces],
        [light(image, face) for face in faces],
        [background(image, face) for face in faces],
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
    factors = np.array(size) / image.size
    left, top, right, bottom = (np.array(face.box) * np.tile(factors, 2)).tolist()
    return Face((left, top, right, bottom), (face.landmarks * factors).astype(np.float32), face.score)
