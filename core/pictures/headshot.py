"""A headshot in a batch, and the face pass, which draws a small face again."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image, ImageDraw, ImageFilter

from ..errors import BadConfig
from ..faces import Face, Reference
from ..lora.file import LoraFile
from ..models.base import Base
from .drawing_model import DrawingModel
from .generate import GenerateConfig, PictureJob, generate
from .sizes import size_near


@dataclass(frozen=True)
class FaceOutcome:
    """The outcome of the face pass on a picture, written into the PNG so that the pass runs only once."""

    below: float
    denoise: float
    before: float
    """The likeness of the picture as it was first drawn."""
    after: float | None
    """The likeness with the new face; None if no face is found in the picture any more."""
    taken: bool = True
    """Whether any of a group picture's new faces is used."""

    @property
    def kept(self) -> bool:
        """Whether the new face is used: it is if likeness didn't fall."""
        return self.taken and self.after is not None and self.after >= self.before

    @property
    def settings(self) -> "FacePass":
        """The settings of the pass. Raises BadConfig if they are invalid."""
        return FacePass(self.below, self.denoise)


@dataclass(frozen=True)
class Headshot:
    """A picture of a batch of headshots."""

    path: Path
    job: PictureJob
    likeness: float | None = None
    """The cosine to the person's photos; None without a reference, or without a face in the picture."""
    kept: bool = False
    """Whether the picture is among the most alike, which are also copied to the folder `kept`."""
    face_pass: FaceOutcome | None = None


_Key = TypeVar("_Key", bound=Hashable)

FACE_SHARES = (0.4, 0.85)
"""The smallest and largest share of its cut-out that a face fills, as a ratio of the square roots of the areas."""
FEATHER = 0.12
"""The blur of the mask's edge: its standard deviation as a share of the face's size."""


@dataclass(frozen=True)
class FacePass:
    """The settings of the face pass: which faces are redrawn, and how strongly."""

    below: float = 0.25
    """Faces smaller than this share of the base model's resolution are redrawn, 0 to 1; 0 means never."""
    denoise: float = 0.35
    """The share of the sampling steps used to redraw a face, above 0 and up to 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.below <= 1:
            raise BadConfig(f"face pass: below = {self.below}: must be between 0 and 1")
        if not 0 < self.denoise <= 1:
            raise BadConfig(f"face pass: denoise = {self.denoise}: must be above 0, up to 1")

    def wants(self, face: Face, resolution: int) -> bool:
        """Return whether to redraw a face, on a base model of that resolution in pixels."""
        return face.size < self.below * resolution


@dataclass(frozen=True)
class CutOut:
    """The part of a picture that is redrawn."""

    image: Image.Image
    """The part, enlarged to a size that the base model draws well."""
    box: tuple[int, int, int, int]
    """The (left, top, right, bottom) of the part in pixels of the picture."""
    face: Face
    """The face in pixels of the picture."""


def redrawn_of(pictures: int) -> int:
    """Return in how many of a person's pictures small faces are redrawn: in the more alike half. A quarter is kept."""
    return -(-pictures // 2)


def face_share(person: Reference) -> float:
    """Return the share of its cut-out that a face should fill: the share in the person's photos, limited to FACE_SHARES."""
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
    """Cut out a part of a picture so that the face fills `share` of it, enlarged to the base model's trained area.

    It has the `aspect`, by default the picture's, and sides that are multiples of `size_multiple` pixels. Returns None if
    nothing would be enlarged. With `also_large`, it then returns the face at its own size.
    """
    size = size_near(aspect or f"{picture.width}:{picture.height}", resolution, size_multiple)
    scale = face.size / share / (size[0] * size[1]) ** 0.5
    width, height = (min(round(side * scale), limit) for side, limit in zip(size, picture.size, strict=True))
    if width >= size[0] or height >= size[1]:
        if not also_large:
            return None
        width, height = size = (width // size_multiple * size_multiple, height // size_multiple * size_multiple)
    left, top, right, bottom = face.box
    # At the picture's edge the part is moved instead of cut, which keeps its aspect.
    x = min(max(round((left + right - width) / 2), 0), picture.width - width)
    y = min(max(round((top + bottom - height) / 2), 0), picture.height - height)
    box = (x, y, x + width, y + height)
    return CutOut(picture.crop(box).resize(size, Image.Resampling.LANCZOS), box, face)


def drawn_again(
    base: Base,
    loras: Sequence[tuple[LoraFile, float]],
    parts: Mapping[_Key, tuple[PictureJob, CutOut]],
    config: GenerateConfig,
    denoise: float,
    device: torch.device | None,
    model: DrawingModel | None = None,
) -> Iterator[tuple[_Key, Image.Image]]:
    """Yield each cut-out's key and picture, after its job's last `denoise` share of steps. `model` is as in `generate`."""
    keys, starts = {}, {}
    for number, (key, (job, part)) in enumerate(parts.items()):
        # Without the number, the same prompt and seed at two sizes would be one job here.
        job = replace(job, size=part.image.size, style=str(number))
        keys[job], starts[job] = key, part.image
    if keys:
        drawn = generate(base, loras, list(keys), config, starts=starts, denoise=denoise, device=device, model=model)
        yield from ((keys[picture.job], picture.image) for picture in drawn)


def blend(picture: Image.Image, part: CutOut, drawn: Image.Image) -> Image.Image:
    """Blend the cut-out, as redrawn in `drawn`, into the picture around the face. All else is unchanged."""
    left, top, right, bottom = part.box
    small = drawn.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    mask = Image.new("L", picture.size)
    x0, y0, x1, y1 = part.face.box
    grow_x, grow_y = (side / 8 for side in (x1 - x0, y1 - y0))  # With hairline and chin.
    ImageDraw.Draw(mask).ellipse((x0 - grow_x, y0 - grow_y, x1 + grow_x, y1 + grow_y), fill=255)
    mask = mask.filter(ImageFilter.GaussianBlur(FEATHER * part.face.size))
    result = picture.copy()
    result.paste(small, (left, top), mask.crop(part.box))
    return result
