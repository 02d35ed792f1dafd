"""The sizes that a picture can have."""

import math

from ..errors import BadConfig
from ..models.base import Base

SMALLEST_SIDE, LARGEST_SIDE = 16, 16384
"""The shortest and the longest side of a picture in pixels, as in ComfyUI."""


def checked_size(base: Base, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the size (width, height) in pixels; for None, the base model's own square.

    Raises BadConfig, with the nearest valid size, unless the denoiser can halve both sides as often as it needs to. Raises it
    for a side above LARGEST_SIDE too.
    """
    multiple = base.size_multiple
    if size is None:
        side = base.resolution // multiple * multiple
        return side, side
    if any(side < multiple or side % multiple for side in size):
        near = tuple(max(multiple, round(side / multiple) * multiple) for side in size)
        raise BadConfig(
            f"size {size[0]}x{size[1]}: width and height must be multiples of {multiple}, e.g. {near[0]}x{near[1]}"
        )
    if max(size) > LARGEST_SIDE:
        raise BadConfig(f"size {size[0]}x{size[1]}: width and height must be at most {LARGEST_SIDE}")
    return size


def size_near(aspect: str, resolution: int, size_multiple: int) -> tuple[int, int]:
    """Return the (width, height) in pixels of a picture near the aspect, with an area of at most resolution².

    Both are multiples of `size_multiple`. The shorter side is rounded, and the longer one takes the remaining area. At 1024 and
    64 these are the sizes that SDXL was trained on (appendix I of arXiv:2307.01952).
    """
    across, down = (int(part) for part in aspect.split(":"))
    side = resolution // size_multiple  # Sides are in multiples of size_multiple from here on.
    shorter = max(1, round(side * math.sqrt(min(across, down) / max(across, down))))
    longer = side * side // shorter
    width, height = (shorter, longer) if across < down else (longer, shorter)
    return width * size_multiple, height * size_multiple
