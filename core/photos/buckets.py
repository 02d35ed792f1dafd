"""Aspect buckets: the sizes that photos are scaled and cropped to, so that little of each is lost."""

from __future__ import annotations

import math

from ..errors import BadConfig, BadPhoto

MAX_ASPECT = 2.0
"""The largest ratio of longer to shorter side. Families are trained up to about this: SDXL's sizes are mostly under 2."""

SMALLEST_SIDE = 16
"""The shortest side of a photo in pixels, however much it may be enlarged."""

Size = tuple[int, int]


def bucket_sizes(resolution: int, multiple: int, within: Size | None = None) -> list[Size]:
    """The sizes (width, height) to choose from, in pixels: multiples of `multiple`, with an area of at most resolution².

    Of all such sizes with an aspect of at most 2:1, and no larger than `within` where it is given, these are the ones
    that could not grow in any direction. The idea of one area and many aspects is NovelAI's aspect-ratio bucketing.
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
    """The bucket (width, height) whose aspect is closest to the photo's `size`; the larger of two equally close.

    The bucket is never larger than the photo, unless `upscale` is set. Raises BadPhoto when a side of the photo is
    shorter than `multiple`, with `upscale` than SMALLEST_SIDE, BadConfig when the resolution is below `multiple`.
    """
    if resolution < multiple:
        raise BadConfig(f"resolution {resolution} is below {multiple}, the smallest that this model family can draw")
    sizes = bucket_sizes(resolution, multiple, within=None if upscale else size)
    if not sizes or min(size) < SMALLEST_SIDE:
        least = SMALLEST_SIDE if upscale else multiple
        raise BadPhoto(f"{size[0]}x{size[1]} pixels are too few: each side needs at least {least}")
    aspect = math.log(size[0] / size[1])
    return min(sizes, key=lambda bucket: (round(abs(math.log(bucket[0] / bucket[1]) - aspect), 9), -math.prod(bucket)))
