"""Aspect buckets: the sizes that photos are scaled and cropped to, chosen so that little of each photo is lost."""

from __future__ import annotations

import math

from ..errors import BadConfig, BadPhoto

MAX_ASPECT = 2.0
"""The largest ratio of longer to shorter side. Base models are trained up to about this: most of SDXL's sizes are below 2."""

SMALLEST_SIDE = 16
"""The shortest side of a photo in pixels, even when it is enlarged."""

Size = tuple[int, int]


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
    shorter than `multiple` (with `upscale`, shorter than SMALLEST_SIDE), and BadConfig when the resolution is.
    """
    if resolution < multiple:
        raise BadConfig(f"resolution {resolution} is below {multiple}, the smallest that this model family can draw")
    sizes = bucket_sizes(resolution, multiple, within=None if upscale else size)
    if not sizes or min(size) < SMALLEST_SIDE:
        least = SMALLEST_SIDE if upscale else multiple
        raise BadPhoto(f"{size[0]}x{size[1]} pixels are too few: each side needs at least {least}")
    aspect = math.log(size[0] / size[1])
    return min(sizes, key=lambda bucket: (round(abs(math.log(bucket[0] / bucket[1]) - aspect), 9), -math.prod(bucket)))
