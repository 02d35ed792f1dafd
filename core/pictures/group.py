"""Draw several people in one picture, each with their own LoRA and words in their own region.

At every sampling step the denoiser is called once for the scene, without anyone's LoRA, and once for each person. A person's
call covers that person's part of the latents, with only that person's LoRA. Soft masks blend the predictions. Blending
predictions is MultiDiffusion (arXiv:2302.08113); separate words per region are Mixture of Diffusers (arXiv:2302.02412). Adding
two LoRAs up would blend the two faces instead.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from ..device import explained_memory_error
from ..errors import BadConfig, LoraMisfit, one_line
from ..lora.file import LoraFile
from ..models.base import Base
from ..models.spec import Pair
from ..progress import OnProgress
from .drawing_model import AppliedAt, DrawingModel, Texts
from .generate import (
    GenerateConfig,
    Picture,
    PictureJob,
    applied_at,
    by_strength,
    check_drawing,
    finished,
    parameters_text,
    texts_of,
)
from .parameters import Parameters
from .sampling import Prediction, Sampling, denoised, guided_prediction
from .sizes import checked_size

RelativeBox = tuple[float, float, float, float]
"""A part of a picture: left, top, right and bottom as shares of its width and height, 0 to 1."""
_Loras = Sequence[tuple[LoraFile, float]]
FEATHER = 0.2
"""The share of a region's shorter side over which it fades into the scene."""
MOST_PEOPLE = 8
_NAME = re.compile(r"\{([^{}]*)\}")
_LISTED = re.compile(r"\{[^{}]*\}(?:(?:\s*,\s*|\s+)(?:(?:and|with|next to|beside)\s+)?\{[^{}]*\})*")
"""People named one after another, as in "{anna}, {ben} and {carl}"."""
_REGION = re.compile(r"(?:^|; )[\d.e-]+(?: [\d.e-]+){3}(?: mask \w+)?: ")
"""The start of a person's region in the parameters of a picture."""


@dataclass(frozen=True, eq=False)
class Mask:
    """A part of a picture of any shape: white where the person is, black elsewhere, grey where the person fades."""

    image: Image.Image
    """Any size: it is stretched over the picture."""

    @cached_property
    def box(self) -> RelativeBox:
        """The smallest box around all pixels that aren't black; of width 0 if all are."""
        left, top, right, bottom = self.image.convert("L").getbbox() or (0, 0, 0, 0)
        width, height = self.image.size
        return left / width, top / height, right / width, bottom / height

    @cached_property
    def digest(self) -> str:
        """Identifies the mask in the parameters of pictures."""
        return hashlib.sha256(f"{self.image.size}".encode() + self.image.convert("L").tobytes()).hexdigest()[:10]

    def weights(self, size: tuple[int, int]) -> Tensor:
        """Return the weights (h, w), 0 to 1, for a picture of `size` (w, h)."""
        stretched = self.image.convert("L").resize(size, Image.Resampling.BOX)
        return torch.frombuffer(bytearray(stretched.tobytes()), dtype=torch.uint8).view(size[1], size[0]) / 255


Area = RelativeBox | Mask


@dataclass(frozen=True)
class GroupMember:
    """A person in a group: the LoRA, and the words that it was trained with."""

    name: str
    """The name for the person in prompts, in braces: {anna}."""
    lora: LoraFile
    phrase: str
    """The words for the person in their own prompt: trigger word and class word, "sks woman"."""
    strength: float = 1.0

    @property
    def class_words(self) -> str:
        """The words for any person of this kind, without the trigger word: "woman"."""
        return self.phrase.partition(" ")[2] or "person"


def read_box(name: str, text: str) -> RelativeBox:
    """Return a person's region from the text LEFT,TOP,RIGHT,BOTTOM. Raises BadConfig for an invalid text."""
    try:
        left, top, right, bottom = (float(share) for share in text.split(","))
    except ValueError:
        raise BadConfig(f"region of {name}: {text!r}: must be LEFT,TOP,RIGHT,BOTTOM, each from 0 to 1") from None
    return left, top, right, bottom


def side_by_side(count: int) -> tuple[RelativeBox, ...]:
    """Return the regions of `count` people side by side, from left to right, of equal width and the picture's height."""
    return tuple((number / count, 0.0, (number + 1) / count, 1.0) for number in range(count))


@dataclass(frozen=True)
class Group:
    """People and their places in the picture.

    Raises BadConfig for a name that is given twice or cannot be used in braces, for more than MOST_PEOPLE people, and for a
    layout with the wrong number of regions. A region must not be empty or extend outside the picture.
    """

    people: tuple[GroupMember, ...]
    layout: tuple[Area, ...] = ()
    """The region of each person; by default, people are side by side in the order given."""

    def __post_init__(self) -> None:
        names = [person.name for person in self.people]
        for name in names:
            if not name or re.search(r"[{}\s]", name):
                raise BadConfig(f"person {name[:80]!r}: a name must be one word without braces")
            if names.count(name) > 1:
                raise BadConfig(f"person {name[:80]!r} is given twice")
        if not 1 <= len(names) <= MOST_PEOPLE:
            raise BadConfig(f"{len(names)} people: a picture can have 1 to {MOST_PEOPLE}")
        if not self.layout:
            object.__setattr__(self, "layout", side_by_side(len(names)))
        if len(self.layout) != len(names):
            raise BadConfig(f"{len(self.layout)} regions for {len(names)} people: give one for each person")
        for name, place, (left, top, right, bottom) in zip(names, self.layout, self.boxes, strict=True):
            if isinstance(place, Mask) and right == 0:
                raise BadConfig(f"region of {name}: the mask is black everywhere; it must be white where {name} is")
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise BadConfig(
                    f"region of {name}: {left:g},{top:g},{right:g},{bottom:g}: must be left,top,right,bottom "
                    "as shares of the picture from 0 to 1, left before right and top before bottom"
                )

    # --- words ---

    @property
    def listed(self) -> str:
        """All names as a list in a prompt: "{anna}, {ben} and {carl}"."""
        *others, last = (f"{{{person.name}}}" for person in self.people)
        return f"{', '.join(others)} and {last}" if others else last

    def check_prompt(self, prompt: str) -> None:
        """Raise BadConfig if the prompt has an unknown name in braces, or doesn't name everyone."""
        known, named = [person.name for person in self.people], _NAME.findall(prompt)
        for name in named:
            if name not in known:
                raise BadConfig(f"prompt {prompt[:80]!r}: {{{name[:80]}}} is not in the group; use {_in_braces(known)}")
        if missing := [name for name in known if name not in named]:
            raise BadConfig(f"prompt {prompt[:80]!r}: {_in_braces(missing)} is missing; name everyone in the prompt")

    def scene_words(self, prompt: str) -> str:
        """Return the prompt for the surroundings: each name is replaced with the person's class words."""
        return self._filled(prompt, {person.name: person.class_words for person in self.people})

    def everyones_words(self, prompt: str) -> str:
        """Return the prompt with everyone's own words, as used when the LoRAs are simply added up."""
        return self._filled(prompt, {person.name: person.phrase for person in self.people})

    def words_of(self, person: GroupMember, prompt: str) -> str:
        """Return the prompt for the person's region, without other people: a list of names is reduced to this one.

        "{anna} and {ben} in an office" becomes "sks woman in an office".
        """
        own = f"{{{person.name}}}"
        alone = _LISTED.sub(lambda found: own if own in found[0] else found[0], prompt)
        return self._filled(alone, {one.name: one.phrase if one is person else one.class_words for one in self.people})

    def _filled(self, prompt: str, words: Mapping[str, str]) -> str:
        return _NAME.sub(lambda found: words[found[1]], prompt)

    # --- places ---

    @property
    def boxes(self) -> list[RelativeBox]:
        """The region of each person; for a mask, the box around it."""
        return [place.box if isinstance(place, Mask) else place for place in self.layout]

    def size(self, resolution: int, multiple: int) -> tuple[int, int]:
        """Return the default size of a picture in pixels: wide enough for each region to be a portrait.

        It is for a base model of that resolution, with picture sides that are multiples of `multiple`.
        """
        narrowest = min(right - left for left, _, right, _ in self.boxes)
        # A portrait is three quarters as wide as the base model's square.
        width, of_all = max(resolution, 0.75 * resolution / narrowest), multiple * len(self.people)
        # People side by side then have regions of equal width.
        return round(width / of_all) * of_all, resolution // multiple * multiple

    def regions(self, size: tuple[int, int], multiple: int) -> list[tuple[int, int, int, int]]:
        """Return each person's region in pixels, in multiples of `multiple`: boxes rounded, boxes around masks enlarged."""
        regions = []
        for person, place, box in zip(self.people, self.layout, self.boxes, strict=True):
            roundings = (math.floor, math.floor, math.ceil, math.ceil) if isinstance(place, Mask) else (round,) * 4
            sides = [size[axis % 2] / multiple for axis in range(4)]
            left, top, right, bottom = (
                to_whole(share * side) * multiple for to_whole, share, side in zip(roundings, box, sides, strict=True)
            )
            if left >= right or top >= bottom:
                raise BadConfig(f"region of {person.name}: is empty in {size[0]}x{size[1]} pixels; make it larger")
            regions.append((left, top, right, bottom))
        return regions

    def soft_masks(self, regions: Sequence[tuple[int, int, int, int]], size: tuple[int, int]) -> Tensor:
        """Return the weights (N + 1, h, w) of these regions of a picture of `size` (w, h); the scene is last.

        They add up to 1. A box has weight 1 in its middle and fades towards its edges, except at the picture's edges. A mask is
        used directly. Overlapping regions share the weight.
        """
        width, height = size
        weights = torch.zeros(len(regions) + 1, height, width)
        for weight, place, (left, top, right, bottom) in zip(weights, self.layout, regions, strict=False):
            if isinstance(place, Mask):
                own = place.weights(size)[top:bottom, left:right]
            else:
                feather = FEATHER * min(right - left, bottom - top)
                across, down = _ramp(left, right, width, feather), _ramp(top, bottom, height, feather)
                own = torch.minimum(down[:, None], across[None])
            weight[top:bottom, left:right] = own
        weights /= weights.sum(dim=0).clamp(min=1)
        weights[-1] = (1 - weights.sum(dim=0)).clamp(min=0)
        return weights


def _in_braces(names: Sequence[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)


def _ramp(start: int, end: int, side: int, feather: float) -> Tensor:
    """Return the weights (end - start,) along one side: they fall towards its ends, but not at the picture's edge."""
    places = torch.arange(start, end) + 0.5
    rising = torch.ones(end - start) if start == 0 else (places - start) / feather
    falling = torch.ones(end - start) if end == side else (end - places) / feather
    return torch.minimum(rising, falling).clamp(max=1)


def generate_group(
    base: Base,
    group: Group,
    jobs: Sequence[PictureJob],
    config: GenerateConfig | None = None,
    *,
    loras: Sequence[tuple[LoraFile, float]] = (),
    device: torch.device | str | None = None,
    model: DrawingModel | None = None,
    on_step: OnProgress | None = None,
) -> Iterator[Picture]:
    """Draw the pictures of all jobs, one by one; prompts name everyone in braces: "{anna} and {ben} in an office".

    `loras` are LoRAs with strengths that everything is drawn with, such as a style's. A job's strength multiplies the strengths
    of all LoRAs. `on_step(done, total)` is called in each sampling step and may raise to cancel. No person's LoRA stays applied
    afterwards, even after an error. Each person's changed weights are kept in memory beside the denoiser's own. `model` is as
    in `generate`.

    Raises BadConfig for a prompt with an unknown name or without everyone, and as `generate` does. Raises LoraMisfit for a LoRA
    of another family, and OutOfMemory if the device has too little memory.
    """
    config = config or GenerateConfig()
    check_group(base, group, jobs, loras, config)
    jobs = [sized(base, group, job) for job in jobs]
    with ExitStack() as stack:
        model = model or stack.enter_context(DrawingModel(base, config.precision, config.clip_skip, device))
        stack.enter_context(explained_memory_error("smaller pictures or the device cpu"))
        encoded = _encode(model, group, loras, jobs)
        for strength, some in by_strength(jobs).items():
            model.apply_only(
                applied_at(strength, loras), at_hand=applied_at(strength, [(p.lora, p.strength) for p in group.people])
            )
            for job in some:

                def draw(job: PictureJob = job) -> list[Image.Image]:
                    assert job.size is not None
                    predict = _blended(model, group, encoded[job], job)
                    sampling = Sampling(job.size, job.steps, config.sampler, on_step=on_step)
                    return finished(
                        base, model.vae, denoised(base, predict, sampling, [job.seed], model.device_and_dtype[0])
                    )

                (image,) = model.draw(draw)
                yield Picture(image, job, group_parameters(base, group, loras, job, config))


def check_group(base: Base, group: Group, jobs: Sequence[PictureJob], loras: _Loras, config: GenerateConfig) -> None:
    """Raise the errors of `generate_group` for invalid arguments, before anything is loaded."""
    check_drawing(base, loras, config)
    check_drawing(base, [(person.lora, person.strength) for person in group.people], config)
    for person in group.people:
        if person.lora.family != base.family.name:
            raise LoraMisfit(
                f"{person.name}: {person.lora.name} is for {person.lora.family}, "
                f"but the base model {base.name} is {base.family.name}"
            )
    for job in jobs:
        group.check_prompt(job.prompt)
        group.regions(sized(base, group, job).size or (0, 0), base.size_multiple)


def sized(base: Base, group: Group, job: PictureJob) -> PictureJob:
    """Return the job with a size that the base model can draw; without a size, with the group's own."""
    return replace(job, size=checked_size(base, job.size or group.size(base.resolution, base.size_multiple)))


def group_parameters(base: Base, group: Group, loras: _Loras, job: PictureJob, config: GenerateConfig) -> str:
    """Return the text that A1111 uses to describe the picture, with everyone's words and LoRA.

    A1111 draws a different picture from it, since it adds the LoRAs up. Our own setting `Regions` describes the regions. The
    people's names are left out.
    """
    places = []
    for person, place, box in zip(group.people, group.layout, group.boxes, strict=True):
        mask = f" mask {place.digest}" if isinstance(place, Mask) else ""
        places.append(f"{' '.join(f'{share:g}' for share in box)}{mask}: {group.words_of(person, job.prompt)}")
    everyone = [*loras, *((person.lora, person.strength) for person in group.people)]
    named = replace(job, prompt=group.everyones_words(job.prompt))
    return parameters_text(base, everyone, named, config, {"Regions": one_line("; ".join(places))})


def shows_several(parameters: Parameters) -> bool:
    """Return whether a picture was drawn of several people, by the setting `Regions` of `group_parameters`."""
    return len(_REGION.findall(parameters.settings.get("Regions", ""))) > 1


def _encode(
    model: DrawingModel, group: Group, loras: _Loras, jobs: Sequence[PictureJob]
) -> dict[PictureJob, list[Pair]]:
    texts: dict[PictureJob, list[tuple[AppliedAt, Texts]]] = {}
    wanted: dict[AppliedAt, set[Texts]] = {}
    for job in jobs:
        for person in (None, *group.people):
            words = group.words_of(person, job.prompt) if person else group.scene_words(job.prompt)
            applied = applied_at(job.strength, [*loras, (person.lora, person.strength)] if person else loras)
            texts.setdefault(job, []).append((applied, texts_of(replace(job, prompt=words), model.base)))
            wanted.setdefault(applied, set()).add(texts[job][-1][1])
    model.encode(wanted)
    return {job: [model.encoded(*one) for one in ones] for job, ones in texts.items()}


def _blended(model: DrawingModel, group: Group, texts: Sequence[Pair], job: PictureJob) -> Prediction:
    assert job.size is not None
    base, (device, dtype) = model.base, model.device_and_dtype
    regions = group.regions(job.size, base.size_multiple)
    cell = base.latent_shape.pixels
    cells = [tuple(side // cell for side in region) for region in regions]
    masks = group.soft_masks(cells, (job.size[0] // cell, job.size[1] // cell))  # pyright: ignore
    has_scene, weights = bool(masks[-1].any()), masks.to(device)
    sizes = [job.size, *((right - left, bottom - top) for left, top, right, bottom in regions)]
    scene, *others = (
        guided_prediction(
            base, model.denoiser, [positive], [negative], device=device, dtype=dtype, size=size, guidance=job.guidance
        )
        for size, (positive, negative) in zip(sizes, texts, strict=True)
    )

    def predict(latents: Tensor, timestep: Tensor, following: Tensor) -> Tensor:
        blended = weights[-1] * scene(latents, timestep, following) if has_scene else torch.zeros_like(latents)
        for weight, own, lora, (left, top, right, bottom) in zip(weights, others, model.at_hand, cells, strict=False):
            part = (..., slice(top, bottom), slice(left, right))
            lora.swap()
            try:
                blended[part] += weight[part] * own(latents[part], timestep, following)
            finally:
                lora.swap()
        return blended

    return predict
