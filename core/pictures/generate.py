"""Draw pictures with a base model and LoRAs."""

import math
import operator
import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar, get_args

import torch
from PIL import Image
from torch import Tensor, nn

from ..config import Precision
from ..device import explained_memory_error, in_parts_that_fit
from ..errors import BadConfig, check_length
from ..lora.file import LoraFile
from ..models.base import Base
from ..models.spec import Pair, stacked_with
from ..progress import OnProgress
from ..storage.drawn import save_png
from ..storage.plain_values import is_text
from ..storage.safetensors_file import SafetensorsFile
from .drawing_model import AppliedAt, DrawingModel
from .parameters import Parameters
from .sampling import (
    SAMPLERS,
    decode_latents,
    encode_pictures,
    predictions_per_step,
    sample_latents,
    sampler_name,
)
from .sizes import SMALLEST_SIDE, checked_size
from .style_pack import StyledPrompt

_Item = TypeVar("_Item", bound=Hashable)


@dataclass(frozen=True)
class PictureJob:
    """One picture to draw."""

    prompt: str
    seed: int
    negative: str = ""
    size: tuple[int, int] | None = None
    """The width and height in pixels; None means the square that the base model was trained on."""
    steps: int = 25
    guidance: float = 6.0
    """The scale of classifier-free guidance (CFG), 0 to 100."""
    strength: float = 1.0
    """A factor that multiplies the strengths of all LoRAs."""
    style: str = ""
    """The name of the style that the prompt comes from, if any."""

    @classmethod
    def from_style(cls, styled: StyledPrompt) -> "PictureJob":
        """Return the job for a style pack's prompt."""
        return cls(
            styled.prompt,
            styled.seed,
            styled.negative,
            (styled.width, styled.height),
            styled.steps,
            styled.guidance,
            styled.strength,
            styled.style,
        )

    def on(self, base: Base) -> "PictureJob":
        """Return the job with the steps and guidance of a distilled base model; unchanged for other base models."""
        return replace(self, steps=base.steps, guidance=base.guidance) if base.few_steps else self

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", operator.index(self.seed))  # Also accepts numpy integers.
        for name in ("prompt", "negative"):
            if not is_text(getattr(self, name)):
                raise BadConfig(
                    f"{name} = {getattr(self, name)!r}: contains an invalid character (an unpaired surrogate)"
                )
            check_length(name, getattr(self, name))
        if not 1 <= self.steps <= 1000:
            raise BadConfig(f"steps = {self.steps}: must be between 1 and 1000")
        if not 0 <= self.seed < 2**64:
            raise BadConfig(f"seed = {self.seed}: must be between 0 and 2**64 - 1")
        if not 0 <= self.guidance <= 100:
            raise BadConfig(f"guidance = {self.guidance}: must be between 0 and 100")
        if not math.isfinite(self.strength):
            raise BadConfig(f"strength = {self.strength}: must be finite")
        if self.size is not None and min(self.size) < SMALLEST_SIDE:
            width, height = self.size
            raise BadConfig(f"size {width}x{height}: width and height must be at least {SMALLEST_SIDE}")


Job = PictureJob
"""Its name before 0.2, which scripts may still import."""


@dataclass(frozen=True)
class GenerateConfig:
    """The settings shared by the pictures of all jobs."""

    sampler: str | None = None
    """A name in `sampling.SAMPLERS`, for FLUX.1 and later in `FLOW_SAMPLERS`; None means the family's default."""
    clip_skip: int = 1
    batch_size: int = 1
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise BadConfig(f"sampler = {self.sampler!r}: must be one of {', '.join(SAMPLERS)}")
        if self.precision not in get_args(Precision):
            raise BadConfig(f"precision = {self.precision!r}: must be one of {', '.join(get_args(Precision))}")
        for name in ("batch_size", "clip_skip"):
            if getattr(self, name) < 1:
                raise BadConfig(f"{name} = {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class Picture:
    """A generated picture, and what is needed to make it again."""

    image: Image.Image
    job: PictureJob
    parameters: str
    """The text that A1111 writes into a PNG; ComfyUI, Forge and Civitai read it too."""

    def save(self, path: str | os.PathLike[str], texts: Mapping[str, str] | None = None) -> None:
        """Write a whole PNG or nothing, with the parameters and the `texts` (by name) in it. Raises BadFile if it cannot."""
        save_png(path, self.image, {"parameters": self.parameters, **(texts or {})})


def generate(
    base: Base,
    loras: Sequence[tuple[LoraFile, float]],
    jobs: Sequence[PictureJob],
    config: GenerateConfig | None = None,
    *,
    starts: Mapping[PictureJob, Image.Image] | None = None,
    denoise: float = 1.0,
    device: torch.device | str | None = None,
    model: DrawingModel | None = None,
    on_step: OnProgress | None = None,
) -> Iterator[Picture]:
    """Draw the pictures of all jobs, and yield them batch by batch; jobs of equal strength are drawn together.

    `loras` are LoRAs with their strengths. A picture depends only on its own job, not on others in the batch (up to rounding).
    With `starts`, a picture of the job's size for each job, these pictures are redrawn: only the last `denoise` share of the
    steps (above 0 to 1) is taken. `on_step(done, total)` is called in each sampling step of a batch and may raise to cancel.
    Calls with the same `model`, made for this base model, config and device, load its networks only once.

    Raises BadConfig for a strength that is not finite, a job without a fitting picture in `starts`, and a picture that becomes
    NaN. Raises it also for a size, sampler or clip_skip that the base model doesn't support, and OutOfMemory if the device has
    too little memory.
    """
    config = config or GenerateConfig()
    check_drawing(base, loras, config)
    if isinstance(jobs, PictureJob) or not all(isinstance(job, PictureJob) for job in jobs):
        raise BadConfig(f"jobs = {jobs!r}: expected a list of PictureJob, such as [PictureJob('a photo', seed=1)]")
    jobs = [replace(job, size=checked_size(base, job.size)) for job in jobs]
    starts = _checked_starts(base, jobs, starts, denoise) if starts else None
    groups = by_strength(jobs)
    with ExitStack() as stack:
        model = model or stack.enter_context(DrawingModel(base, config.precision, config.clip_skip, device))
        stack.enter_context(explained_memory_error("batch_size 1, smaller pictures or the device cpu"))
        device, dtype = model.device_and_dtype
        loras_at = {strength: applied_at(strength, loras) for strength in groups}
        model.encode({loras_at[strength]: {texts_of(job, base) for job in group} for strength, group in groups.items()})
        # The strength that the model has from the last batch comes first.
        strengths = sorted(groups, key=lambda strength: not model.has_applied(loras_at[strength]))
        for strength in strengths:
            group = groups[strength]
            model.apply_only(loras_at[strength], for_good=strength == strengths[-1] and not model.keeps_originals)
            texts = [model.encoded(loras_at[strength], texts_of(job, base)) for job in group]
            for batch, pairs in in_batches(
                group, texts, config.batch_size, lambda job: (job.size, job.steps, job.guidance)
            ):

                def draw(part: Sequence[tuple[PictureJob, Pair]], first: PictureJob = batch[0]) -> list[Image.Image]:
                    assert first.size is not None
                    begin = encode_pictures(base, model.vae, [starts[job] for job, _ in part]) if starts else None
                    latents = sample_latents(
                        base, model.denoiser,
                        [prompt for _, (prompt, _) in part], [negative for _, (_, negative) in part],
                        device=device, dtype=dtype, seeds=[job.seed for job, _ in part], size=first.size,
                        steps=first.steps, guidance=first.guidance, sampler=config.sampler, start=begin,
                        denoise=denoise, on_step=on_step,
                    )  # fmt: skip
                    return finished(base, model.vae, latents)

                images = model.draw(partial(in_parts_that_fit, draw, list(zip(batch, pairs, strict=True))))
                for job, image in zip(batch, images, strict=True):
                    yield Picture(image, job, parameters_text(base, loras, job, config))


def applied_at(strength: float, loras: Sequence[tuple[LoraFile, float]]) -> AppliedAt:
    """Return the LoRAs with their strengths multiplied by a job's."""
    return tuple((lora, factor * strength) for lora, factor in loras)


def finished(base: Base, vae: nn.Module, latents: Tensor) -> list[Image.Image]:
    """Return the pictures of latents. Raises BadConfig for NaN and infinity, whose pictures would be black."""
    if not latents.isfinite().all():
        raise BadConfig(
            f"{base.name}: a picture became NaN or infinite; use a lower strength of the LoRAs or the precision fp32"
        )
    return decode_latents(base, vae, latents)


def check_drawing(base: Base, loras: Sequence[tuple[LoraFile, float]], config: GenerateConfig) -> None:
    """Raise BadConfig unless these are a loaded base model and LoRAs with strengths, and the base model supports clip_skip."""
    if not isinstance(base, Base):
        raise BadConfig(f"base = {base!r}: expected a Base, as returned by load_base(path)")
    pairs = loras if isinstance(loras, Sequence) else [loras]  # an iterator, such as a zip, can be read only once
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], LoraFile)):
            expected = "a list of pairs of a LoraFile, as returned by LoraFile.read(path), and a strength"
            raise BadConfig(f"loras: {pair!r}: expected {expected}")
        lora, strength = pair
        if not isinstance(strength, Real) or not math.isfinite(strength):
            raise BadConfig(f"{lora.name}: strength = {strength!r}: must be a finite number")
    if config.clip_skip > 1 and not base.family.has_clip_skip:
        raise BadConfig(
            f"clip_skip = {config.clip_skip}: {base.family.title} does not let you choose the layer. Leave it at 1"
        )


def _checked_starts(
    base: Base, jobs: Sequence[PictureJob], starts: Mapping[PictureJob, Image.Image], denoise: float
) -> dict[PictureJob, Image.Image]:
    """Return the pictures to redraw, in RGB, by the jobs with sizes. Raises BadConfig where one is missing or doesn't fit."""
    if not 0 < denoise <= 1:
        raise BadConfig(f"denoise = {denoise}: must be above 0, up to 1")
    found = {replace(job, size=checked_size(base, job.size)): image.convert("RGB") for job, image in starts.items()}
    for job in jobs:
        if job not in found or found[job].size != job.size:
            width, height = checked_size(base, job.size)
            raise BadConfig(f"starts: {job.prompt!r} with seed {job.seed} needs a picture of {width}x{height} pixels")
    return found


def by_strength(jobs: Sequence[PictureJob]) -> dict[float, list[PictureJob]]:
    """Group the jobs by their LoRA strength."""
    groups: dict[float, list[PictureJob]] = {}
    for job in jobs:
        groups.setdefault(job.strength, []).append(job)
    return groups


def texts_of(job: PictureJob, base: Base) -> tuple[str, str]:
    """Return the prompt and the negative prompt; "" replaces an unused negative prompt, so that its length doesn't matter."""
    return job.prompt, job.negative if predictions_per_step(base, job.guidance) == 2 else ""


def in_batches(
    items: Sequence[_Item], texts: Sequence[Pair], size: int, alike: Callable[[_Item], Hashable] = lambda item: ()
) -> Iterator[tuple[tuple[_Item, ...], tuple[Pair, ...]]]:
    """Yield items and texts in batches of at most `size`, with equal values of `alike` and texts of equal length in each."""
    groups: dict[Hashable, list[tuple[_Item, Pair]]] = {}
    for item, pair in zip(items, texts, strict=True):
        groups.setdefault((alike(item), stacked_with(pair[0])), []).append((item, pair))
    for group in groups.values():
        for start in range(0, len(group), size):
            batch, pairs = zip(*group[start : start + size], strict=True)
            yield batch, pairs


def parameters_text(
    base: Base,
    loras: Sequence[tuple[LoraFile, float]],
    job: PictureJob,
    config: GenerateConfig,
    more: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return the text that A1111 uses to describe a picture; the picture can be made again from it.

    LoRAs are in the prompt as `<lora:file name:strength>`, the syntax that A1111 and ComfyUI load. Embeddings are already in
    the prompt, by their word. `more` are settings that A1111 has no name for.
    """
    width, height = checked_size(base, job.size)
    embeddings = [lora for lora, _ in loras if lora.embedding_keys and not lora.entries]
    loras = [(lora, factor) for lora, factor in loras if lora.entries]
    # These would end the tag, or the name in the hashes.
    names = [re.sub(r"[<>:\r\n]", "_", Path(lora.name).stem) for lora, _ in loras]
    used = [f"<lora:{name}:{factor * job.strength:g}>" for name, (_, factor) in zip(names, loras, strict=True)]
    if base.speed_lora:
        used.append(f"<lora:{base.speed_lora.path.stem}:1>")
    guidance = {"CFG scale": f"{job.guidance:g}"}
    if base.embeds_guidance:  # Forge uses these names.
        guidance = {"CFG scale": "1", "Distilled CFG Scale": f"{job.guidance:g}"}
    sampler = SAMPLERS[sampler_name(config.sampler, base)].title
    spaced = base.few_steps and base.family.predicts_noise and "Karras" not in sampler
    settings = {
        "Steps": f"{job.steps}",
        "Sampler": sampler,
        **({"Schedule type": "SGM Uniform"} if spaced else {}),  # Evenly spaced timesteps that begin at pure noise.
        **guidance,
        "Seed": f"{job.seed}",
        "Size": f"{width}x{height}",
        "Model": base.name.removesuffix(".safetensors"),
    }
    if base.sha256:
        settings["Model hash"] = base.sha256[:10]
    if base.vae_file and base.vae_sha256:
        settings |= {"VAE hash": base.vae_sha256[:10], "VAE": base.vae_file.path.name}
    if base.speed_lora and base.speed_lora_sha256:
        settings["Speed LoRA hash"] = base.speed_lora_sha256[:10]
    # A1111 has no names for the next two: it reads them from a file beside the checkpoint.
    if base.prediction_type == "v_prediction":
        settings["Prediction"] = "v"
    if base.zero_terminal_snr:
        settings["Zero terminal SNR"] = "True"
    if config.clip_skip > 1:
        settings["Clip skip"] = f"{config.clip_skip}"
    if loras:
        hashes = [f"{name}: {lora.model_hash[:12]}" for name, (lora, _) in zip(names, loras, strict=True)]
        settings["Lora hashes"] = ", ".join(hashes)
    if embeddings:
        hashes = []
        for lora in embeddings:  # A1111 uses the SHA-256 of the file.
            digest = lora.tensors.sha256() if isinstance(lora.tensors, SafetensorsFile) else lora.model_hash
            hashes.append(f"{Path(lora.name).stem}: {digest[:12]}")
        settings["TI hashes"] = ", ".join(hashes)
    return str(Parameters(" ".join([job.prompt, *used]), texts_of(job, base)[1], settings | dict(more)))
