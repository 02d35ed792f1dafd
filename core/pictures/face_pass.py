"""The face pass, which draws a small face again at a size at which the model knows faces.

The face is cut out with what is around it, enlarged, drawn again lightly, and blended back under a soft mask. A model
that works on latents of eight pixels has little more than ten of them for a face of a hundred.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from PIL import Image, ImageDraw, ImageFilter

from ..errors import BadConfig
from ..faces import Face, Reference
from ..lora.file import LoraFile
from ..models.base import Base
from .generate import GenerateConfig, Job, generate
from .sizes import size_near

_Key = TypeVar("_Key", bound=Hashable)

FACE_SHARES = (0.4, 0.85)
"""The least and the most of its cut-out that a face fills, as a ratio of the square roots of the areas."""
MASK_SHARE = 1.25
"""The axes of the ellipse that is blended, as a multiple of the face's box: with hairline and chin."""
FEATHER = 0.12
"""The blur of the mask's edge: its standard deviation as a share of the face's size."""


@dataclass(frozen=True)
class FacePass:
    """The settings of the face pass: which faces are drawn again, and how strongly."""

    below: float = 0.25
    """The share of the base model's resolution below which a face is drawn again, 0 to 1; 0 means never."""
    denoise: float = 0.35
    """The share of the sampling steps that is taken again, above 0 and up to 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.below <= 1:
            raise BadConfig(f"face pass: below = {self.below}: must be between 0 and 1")
        if not 0 < self.denoise <= 1:
            raise BadConfig(f"face pass: denoise = {self.denoise}: must be above 0, up to 1")

    def wants(self, face: Face, resolution: int) -> bool:
        """Whether a face is to be drawn again, on a base model of that resolution in pixels."""
        return face.size < self.below * resolution


@dataclass(frozen=True)
class CutOut:
    """The part of a picture that is drawn again."""

    image: Image.Image
    """The part, enlarged to a size that the base model draws well."""
    box: tuple[int, int, int, int]
    """The (left, top, right, bottom) of the part in pixels of the picture."""
    face: Face
    """The face in pixels of the picture."""


def face_share(person: Reference) -> float:
    """The share of its cut-out that a face should fill: that of the person's photos, which the LoRA knows, in FACE_SHARES."""
    return min(max(person.share, FACE_SHARES[0]), FACE_SHARES[1])


def cut_out(
    picture: Image.Image,
    face: Face,
    share: float,
    resolution: int,
    size_multiple: int,
    aspect: str | None = None,
    also_large: bool = False,
) -> CutOut | None:
    """The part of a picture in which the face fills `share`, enlarged to the area that the base model is trained at.

    It has the `aspect`, by default the picture's, and sides that are multiples of `size_multiple` pixels. None where that
    would enlarge nothing, unless the face is wanted `also_large`, in its own size.
    """
    size = size_near(aspect or f"{picture.width}:{picture.height}", resolution, size_multiple)
    scale = face.size / share / (size[0] * size[1]) ** 0.5
    width, height = (min(round(side * scale), limit) for side, limit in zip(size, picture.size, strict=True))
    if width >= size[0] or height >= size[1]:
        if not also_large:
            return None
        width, height = size = (width // size_multiple * size_multiple, height // size_multiple * size_multiple)
    left, top, right, bottom = face.box
    # Where the picture ends the part is moved and not cut, so that the aspect stays.
    x = min(max(round((left + right - width) / 2), 0), picture.width - width)
    y = min(max(round((top + bottom - height) / 2), 0), picture.height - height)
    box = (x, y, x + width, y + height)
    return CutOut(picture.crop(box).resize(size, Image.Resampling.LANCZOS), box, face)


def drawn_again(
    base: Base,
    loras: Sequence[tuple[LoraFile, float]],
    parts: Mapping[_Key, tuple[Job, CutOut]],
    config: GenerateConfig,
    denoise: float,
    device: torch.device | None,
) -> Iterator[tuple[_Key, Image.Image]]:
    """Each cut-out's key and picture after the last `denoise` of its job's steps have been taken again."""
    # Without the number, one prompt and seed at two sizes would be the same job here.
    keys = {
        replace(job, size=part.image.size, style=str(number)): key
        for number, (key, (job, part)) in enumerate(parts.items())
    }
    starts = {job: parts[key][1].image for job, key in keys.items()}
    if keys:
        for picture in generate(base, loras, list(keys), config, starts=starts, denoise=denoise, device=device):
            yield keys[picture.job], picture.image


def blend(picture: Image.Image, part: CutOut, drawn: Image.Image) -> Image.Image:
    """The picture with the cut-out, as `drawn` shows it, blended in place of the face; nothing changes far from the face."""
    left, top, right, bottom = part.box
    small = drawn.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    mask = Image.new("L", picture.size)
    x0, y0, x1, y1 = part.face.box
    grow_x, grow_y = ((MASK_SHARE - 1) / 2 * side for side in (x1 - x0, y1 - y0))
    ImageDraw.Draw(mask).ellipse((x0 - grow_x, y0 - grow_y, x1 + grow_x, y1 + grow_y), fill=255)
    mask = mask.filter(ImageFilter.GaussianBlur(FEATHER * part.face.size))
    result = picture.copy()
    result.paste(small, (left, top), mask.crop(part.box))
    return result
