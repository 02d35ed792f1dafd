"""Training pictures made from the photo report: close-ups of the face, crops without other people, and masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from PIL import Image, ImageDraw, ImageFilter

from ..errors import BadConfig
from ..faces import Face
from .captions import view_caption
from .dataset import Box, Region
from .reading import Photo
from .report import CROP, FRAMINGS, PhotoReport, SetReport, framing

MASK_SIDE = 1024
"""The long side of a drawn mask, in pixels: finer than any latent."""
SMALL_FACE, CROPPED_UP_TO = 1 / 3, 768
"""The height of the median face, as a share of the photo's, and the training resolution: below both, close-ups are added."""
FEW_PIXELS = 192
"""The height of a face, in pixels, below which it is hardly learned: 24 latents of most families. An estimate."""


def face_regions(
    report: SetReport,
    resolution: int,
    trigger: str,
    class_word: str,
    *,
    captioner: Callable[[Image.Image], str] | None = None,
) -> Callable[[Photo], list[Region]]:
    """Return a function for `prepare`'s `regions`. It selects the whole of a reported photo and a close-up of the face.

    Where the face is small or other people are near, a chest-up part replaces the whole photo. Crops are never enlarged: a
    region has at least `resolution`² pixels, unless the photo is smaller or other people leave less room. Captions name
    framing and view. A `captioner` (takes a picture, returns words) can add what else is visible. Sidecar captions are kept.
    """
    reports = {item.photo.digest: item for item in report.photos}

    def regions(photo: Photo) -> list[Region]:
        item = reports.get(photo.digest)
        if item is None or item.face is None:
            return [Region((0, 0, *photo.size))]
        return [Region(box, caption(photo, item, item.face, box)) for box in _boxes(item, item.face, resolution)]

    def caption(photo: Photo, item: PhotoReport, face: Face, box: Box) -> str:
        shown = framing(face, box[3])
        if photo.caption is not None:
            closer = shown == FRAMINGS[0] and item.framing != FRAMINGS[0]
            return f"{photo.caption}, {shown}" if closer else photo.caption
        assert item.view is not None, "a photo with a face has a view"
        text = view_caption(trigger, class_word, shown, item.view)
        if captioner is None:
            return text
        image = photo.image()
        left, top, right, bottom = map(round, photo.box_in(image, box))
        return f"{text}, {captioner(image.crop((left, top, right, bottom)))}"

    return regions


def suggests_crops(photos: Sequence[PhotoReport], resolution: int) -> bool:
    """Return whether faces are too small for training at a resolution, in pixels, and a photo has room for a close-up."""
    if resolution > CROPPED_UP_TO or _height(photos) >= SMALL_FACE:
        return False
    return any(item.face and len(_boxes(item, item.face, resolution)) > 1 for item in photos)


def about_small_faces(photos: Sequence[PhotoReport], resolution: int) -> str:
    """Return a sentence if training at a resolution adds close-ups, or if faces are too small for it; else ""."""
    height, then = _height(photos) * resolution, ""
    if suggests_crops(photos, resolution):
        then = "training adds close-ups of it"
    elif height < min(SMALL_FACE * resolution, FEW_PIXELS):
        then = f"{FEW_PIXELS} px are better. Add close-ups, or raise the resolution"
    return then and f"in most photos the face is only {height:.0f} px high when trained at {resolution} px: {then}"


def _height(photos: Sequence[PhotoReport]) -> float:
    """Return the median height of the person's face as a share of the photo's; 1 if no photo shows a face."""
    return median([(r.face.box[3] - r.face.box[1]) / r.photo.size[1] for r in photos if r.face] or [1.0])


def with_masks(
    photos: Sequence[Photo], report: SetReport, *, part: str = "person", background: float = 0.1
) -> list[Photo]:
    """Return the photos with masks for the masked loss.

    The person's head and shoulders count fully (with part="face", only the head). Other people's heads count nothing, and
    the rest counts `background`, 0 to 1. With 0, masked training fills the background with noise. A mask is drawn from the
    face's box with soft edges: it covers the person roughly, not hair by hair. Photos that already have a mask, or
    show no face, are unchanged. Raises BadConfig for an unknown `part`.
    """
    reports = {item.photo.digest: item for item in report.photos}

    def masked(photo: Photo) -> Photo:
        item = reports.get(photo.digest)
        if item is None or item.face is None or photo.mask() is not None:
            return photo
        return photo.with_mask(draw_mask(photo.size, item.face, item.other_faces, part, background))

    return [masked(photo) for photo in photos]


def draw_mask(
    size: tuple[int, int], face: Face, other_faces: Sequence[Face], part: str = "person", background: float = 0.1
) -> Image.Image:
    """Return a mask for a photo of that size: mode L, the photo's aspect, at most MASK_SIDE pixels long, white for the person.

    `face` and `other_faces` are in pixels of the photo. Other people's heads are black, and `background` (0 to 1) is the
    brightness of the rest. Raises BadConfig unless `part` is "person" or "face".
    """
    if part not in ("person", "face"):
        raise BadConfig(f"the part of a mask must be 'person' or 'face', not {part!r}")
    scale = min(1.0, MASK_SIDE / max(size))
    mask = Image.new("L", (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))), round(255 * background))
    draw = ImageDraw.Draw(mask)
    left, top, right, bottom = (value * scale for value in face.box)
    width, height = right - left, bottom - top
    if part == "person":
        # The shape runs from the neck to shoulders three faces wide, and straight down from there.
        shoulders = bottom + 0.9 * height
        outline = [
            (left + 0.1 * width, bottom - 0.2 * height), (right - 0.1 * width, bottom - 0.2 * height),
            (right + width, shoulders), (right + width, mask.height), (left - width, mask.height), (left - width, shoulders),
        ]  # fmt: skip
        draw.polygon(outline, fill=255)
    for other in other_faces:
        draw.ellipse(_head(other, scale), fill=0)
    draw.ellipse(_head(face, scale), fill=255)
    return mask.filter(ImageFilter.GaussianBlur(0.06 * height))


def _head(face: Face, scale: float) -> tuple[float, float, float, float]:
    """Return the box around a head with its hair: a quarter wider than the face's box on each side, and higher."""
    left, top, right, bottom = (value * scale for value in face.box)
    width, height = right - left, bottom - top
    return left - 0.25 * width, top - 0.4 * height, right + 0.25 * width, bottom + 0.1 * height


def _boxes(report: PhotoReport, face: Face, resolution: int) -> list[Box]:
    """Return the regions of one photo: the whole or a chest-up part, then a close-up if that differs enough."""
    wide = whole = (0, 0, *report.photo.size)
    close_up = _around(face, (0.6, 0.5), 1.0, whole, resolution)  # includes hair and the top of the shoulders
    if any(finding.verdict == CROP for finding in report.findings):
        wide = _around(face, (0.8, 2.0), 0.8, whole, resolution)  # down to the chest
    boxes = [_without(box, face, report.other_faces, resolution) for box in (wide, close_up)]
    # A close-up of at most half the area adds detail; a larger one repeats the same picture.
    return boxes if _area(boxes[1]) <= _area(boxes[0]) / 2 else boxes[:1]


def _around(face: Face, margins: tuple[float, float], aspect: float, whole: Box, resolution: int) -> Box:
    """Return the part of the photo around a face, with margins above and below in face heights, grown to resolution²."""
    left, top, right, bottom = face.box
    height = (bottom - top) * (1 + sum(margins))
    width = height * aspect
    growth = max(1.0, resolution / math.sqrt(width * height))
    width, height = math.ceil(min(width * growth, whole[2])), math.ceil(min(height * growth, whole[3]))
    # The margins keep their proportion as the part grows; at the photo's edge, the part moves inwards.
    eye_level = top + (bottom - top) / 2
    above = (margins[0] + 0.5) / (1 + sum(margins))
    x = round(min(max(0, (left + right) / 2 - width / 2), whole[2] - width))
    y = round(min(max(0, eye_level - above * height), whole[3] - height))
    return x, y, x + width, y + height


def _without(box: Box, face: Face, others: Sequence[Face], resolution: int) -> Box:
    """Return the largest part of `box` with the whole face but without the others, cutting one side for each other person.

    The cut is beside the other person's hair if possible, else beside the face. If even that would cut the person's face, or
    leave a side below half the resolution, the other person stays in the crop and is left to the mask.
    """

    def keeps(part: Box) -> bool:
        is_large = min(part[2] - part[0], part[3] - part[1]) >= resolution / 2
        starts = part[0] <= max(face.box[0], box[0]) and part[1] <= max(face.box[1], box[1])
        return is_large and starts and part[2] >= min(face.box[2], box[2]) and part[3] >= min(face.box[3], box[3])

    for other in others:
        for left, top, right, bottom in (_head(other, 1.0), other.box):
            x0, y0, x1, y1 = box
            if left >= x1 or right <= x0 or top >= y1 or bottom <= y0:
                break
            parts = [
                (x0, y0, int(left), y1),
                (math.ceil(right), y0, x1, y1),
                (x0, y0, x1, int(top)),
                (x0, math.ceil(bottom), x1, y1),
            ]
            if parts := list(filter(keeps, parts)):
                box = max(parts, key=_area)
                break
    return box


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
