"""The pictures to train on: regions of photos, each cropped to its bucket and captioned."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import BadConfig, BadPhoto
from .captions import class_caption, default_caption, names_trigger, tag_counts
from .reading import Photo

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels of the upright photo; right and bottom are the first pixels outside."""


@dataclass(frozen=True)
class Region:
    """A part of a photo that becomes its own training picture: the whole photo, or a close-up of the face."""

    box: Box
    caption: str | None = None
    """The region's caption, which replaces the photo's. None keeps the photo's caption, or the default one."""


@dataclass(frozen=True)
class TrainingImage:
    """One picture to train on: `crop` of the photo, scaled to `bucket`."""

    photo: Photo
    caption: str
    bucket: tuple[int, int]
    """The width and height in pixels at which the model sees the picture."""
    region: Box
    """The area that the crop is cut from: the whole photo, or the selected part of it."""
    crop: Box
    """The part of `region` that has the bucket's aspect."""
    flip: bool
    """Whether the picture is mirrored left to right."""
    repeats: int
    """How often the picture is used in an epoch."""
    is_class: bool
    """Whether the picture shows the class instead of the person, for prior preservation."""

    def pixels(self) -> Tensor:
        """Return the pixels, float32 (3, height, width) in [-1, 1], scaled by Lanczos resampling."""
        return _to_tensor(self._resized(self.photo.image())) * 2 - 1

    def mask(self) -> Tensor | None:
        """Return the mask, float32 (1, height, width) in [0, 1], 1 where the loss counts; None if it counts everywhere."""
        mask = self.photo.mask()
        return None if mask is None else _to_tensor(self._resized(mask))

    @property
    def original_size(self) -> tuple[int, int]:
        """The (width, height) of the picture before scaling: SDXL's size conditioning c_size (arXiv:2307.01952, 2.2)."""
        left, top, right, bottom = self.region
        return right - left, bottom - top

    @property
    def crop_top_left(self) -> tuple[int, int]:
        """The (x, y) of the crop's top left corner in the scaled picture: SDXL's c_crop (arXiv:2307.01952, 2.2).

        SDXL was trained with the number of pixels cut off after scaling to the training size, so the offsets in the photo are
        scaled too. In a mirrored picture, the right margin is used as the left one.
        """
        left, top, right, _ = self.crop
        margin = self.region[2] - right if self.flip else left - self.region[0]
        scale = self.bucket[0] / (right - left)
        return round(margin * scale), round((top - self.region[1]) * scale)

    def _resized(self, image: Image.Image) -> Image.Image:
        box = self.photo.box_in(image, self.crop)
        resized = image.resize(self.bucket, Image.Resampling.LANCZOS, box=box)
        return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else resized


@dataclass(frozen=True)
class Dataset:
    """The pictures of a training run, and warnings about them for the user."""

    images: tuple[TrainingImage, ...]
    warnings: tuple[str, ...] = ()

    def bucket_counts(self) -> dict[tuple[int, int], int]:
        """Return the number of pictures, with repeats, in each bucket (width, height)."""
        counts: Counter[tuple[int, int]] = Counter()
        for image in self.images:
            counts[image.bucket] += image.repeats
        return dict(sorted(counts.items()))

    def tag_counts(self) -> dict[str, int]:
        """The number of pictures of the person, without repeats, that have each tag: Kohya's `ss_tag_frequency`."""
        return tag_counts(image.caption for image in self.images if not image.is_class)


def prepare(
    photos: Sequence[Photo],
    *,
    resolution: int,
    size_multiple: int,
    trigger: str,
    class_word: str,
    upscale: bool = False,
    flip: bool = False,
    class_photos: Sequence[Photo] = (),
    regions: Callable[[Photo], Sequence[Region]] | None = None,
    more_resolutions: Sequence[int] = (),
) -> Dataset:
    """Return the Dataset of the photos: each photo, or each of its `regions`, cropped around its centre to a bucket.

    The caption is the region's, else the sidecar's, else "a photo of TRIGGER CLASS". `flip` adds a mirrored copy of each
    picture of the person. `class_photos` use their sidecar captions, else "a photo of CLASS". Regions that are large enough
    are also added at each of `more_resolutions`.

    Raises BadPhoto if a photo is too small for any bucket and `upscale` is off.
    """
    images, notes = [], []
    for photo in photos:
        if photo.caption is not None and not names_trigger(photo.caption, trigger):
            notes.append(f"{photo.name}: the caption lacks the trigger word {trigger!r}: {photo.caption!r}")
        for region in regions(photo) if regions else (_whole(photo),):
            caption = region.caption or photo.caption or default_caption(trigger, class_word)
            sides = (resolution, *more_resolutions)
            fits = dict.fromkeys(_fit(photo, region.box, side, size_multiple, upscale) for side in sides)
            for (bucket, crop), mirrored in product(fits, (False, True) if flip else (False,)):
                images.append(
                    TrainingImage(photo, caption, bucket, region.box, crop, mirrored, photo.repeats, is_class=False)
                )
    for photo in class_photos:
        box = _whole(photo).box
        bucket, crop = _fit(photo, box, resolution, size_multiple, upscale)
        caption = photo.caption or class_caption(class_word)
        images.append(TrainingImage(photo, caption, bucket, box, crop, False, photo.repeats, is_class=True))
    return Dataset(tuple(images), tuple(notes))


def _whole(photo: Photo) -> Region:
    return Region((0, 0, *photo.size))


def _fit(photo: Photo, box: Box, resolution: int, multiple: int, upscale: bool) -> tuple[tuple[int, int], Box]:
    """Return the bucket for a box of the photo, and the largest central part of the box with the bucket's aspect."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    try:
        bucket = assign_bucket((width, height), resolution, multiple, upscale)
    except BadPhoto as problem:
        raise BadPhoto(f"{photo.name}: {problem}") from problem
    scale = min(width / bucket[0], height / bucket[1])
    crop_width, crop_height = round(bucket[0] * scale), round(bucket[1] * scale)
    left += (width - crop_width) // 2
    top += (height - crop_height) // 2
    return bucket, (left, top, left + crop_width, top + crop_height)


def _to_tensor(image: Image.Image) -> Tensor:
    array = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(np.atleast_3d(array).transpose(2, 0, 1).copy())


MAX_ASPECT = 2.0
"""The largest ratio of longer to shorter side. Base models are trained up to about this: most of SDXL's sizes are below 2."""

SMALLEST_SIDE = 16
"""The shortest side of a photo in pixels, even when it is enlarged."""

Size = tuple[int, int]
"""(width, height) in pixels."""


def bucket_sizes(resolution: int, multiple: int, within: Size | None = None) -> list[Size]:
    """Return the sizes (width, height) to choose from, in pixels: multiples of `multiple`, at most resolution² in area.

    These are the largest sizes with an aspect of at most 2:1 and within `within`, if given: none of them could grow in any
    direction. One area with many aspects is the idea of NovelAI's aspect-ratio bucketing.
    """
    area = resolution * resolution
    max_width, max_height = within or (math.inf, math.inf)
    sizes = []
    for width in range(multiple, int(min(max_width, resolution * math.sqrt(MAX_ASPECT))) + 1, multiple):
        height = int(min(area // width, max_height, width * MAX_ASPECT)) // multiple * multiple
        if height * MAX_ASPECT >= width and height > 0:
            sizes.append((width, height))
    return [a for a in sizes if not any(a != b and a[0] <= b[0] and a[1] <= b[1] for b in sizes)]


def assign_bucket(size: Size, resolution: int, multiple: int, upscale: bool = False) -> Size:
    """Return the bucket (width, height) whose aspect is closest to the photo's `size`; the larger one of a tie.

    The bucket is never larger than the photo, unless `upscale` is set. Raises BadPhoto when a side of the photo is
    shorter than SMALLEST_SIDE (without `upscale`, also than `multiple`), and BadConfig for a resolution below that.
    """
    if resolution < multiple:
        raise BadConfig(f"resolution {resolution} is below {multiple}, the smallest that this model family can draw")
    sizes = bucket_sizes(resolution, multiple, within=None if upscale else size)
    if not sizes or min(size) < SMALLEST_SIDE:
        least = SMALLEST_SIDE if upscale else max(multiple, SMALLEST_SIDE)
        raise BadPhoto(f"{size[0]}x{size[1]} pixels are too few: each side needs at least {least}")
    aspect = math.log(size[0] / size[1])
    return min(sizes, key=lambda bucket: (round(abs(math.log(bucket[0] / bucket[1]) - aspect), 9), -math.prod(bucket)))
