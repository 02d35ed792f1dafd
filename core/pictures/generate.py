"""Pictures from a base model and LoRAs."""

import math
import operator
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from PIL import Image
from torch import nn

from ..config import Precision, TrainConfig
from ..device import (
    device_and_dtype,
    explained_memory_error,
    free_memory,
    in_parts_that_fit,
    is_out_of_memory,
    release_memory,
)
from ..errors import BadConfig, check_length
from ..lora.apply import LOW_RANK, apply
from ..lora.embeddings import new_words
from ..lora.file import LoraFile
from ..models.base import Base
from ..models.memory_plan import MemoryPlan, MemorySaver, drawing_plan
from ..models.spec import Pair, stacked_with
from ..storage.files import is_text
from ..storage.safetensors_file import SafetensorsFile
from .parameters import Parameters, save_png
from .sampling import (
    FLOW_SAMPLERS,
    SAMPLER_TITLES,
    SAMPLERS,
    decode_latents,
    encode_pairs,
    encode_pictures,
    load_vae,
    predictions_per_step,
    sample_latents,
    sampler_name,
)
from .sizes import SMALLEST_SIDE, checked_size
from .style_pack import StyledPrompt

_Item = TypeVar("_Item", bound=Hashable)


@dataclass(frozen=True)
class Job:
    """One picture to make."""

    prompt: str
    seed: int
    negative: str = ""
    size: tuple[int, int] | None = None
    """The width and height in pixels; None means the square that the base model was trained at."""
    steps: int = 25
    guidance: float = 6.0
    """The scale of classifier-free guidance (CFG), 0 to 100."""
    strength: float = 1.0
    """The factor by which the strengths of all LoRAs are multiplied."""
    style: str = ""
    """The name of the style that the prompt is from, if any."""

    @classmethod
    def from_style(cls, styled: StyledPrompt) -> "Job":
        """The job that a style pack's prompt stands for."""
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

    def on(self, base: Base) -> "Job":
        """The job with the steps and the guidance of a base model that was distilled to a few steps; for others as it is."""
        return replace(self, steps=base.steps, guidance=base.guidance) if base.few_steps else self

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", operator.index(self.seed))  # also numpy's
        for name in ("prompt", "negative"):
            if not is_text(getattr(self, name)):
                raise BadConfig(f"{name} = {getattr(self, name)!r}: has half a character in it")
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


@dataclass(frozen=True)
class GenerateConfig:
    """The settings that are common to the pictures of all jobs."""

    sampler: str | None = None
    """A name in `sampling.SAMPLERS`, for FLUX.1 and later in `FLOW_SAMPLERS`; None means the one that suits the family."""
    clip_skip: int = 1
    batch_size: int = 1
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        known = SAMPLERS | FLOW_SAMPLERS
        if self.sampler is not None and self.sampler not in known:
            raise BadConfig(f"sampler = {self.sampler!r}: choose one of {', '.join(known)}")
        for name in ("batch_size", "clip_skip"):
            if getattr(self, name) < 1:
                raise BadConfig(f"{name} = {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class Picture:
    """A generated picture and what it takes to make it again."""

    image: Image.Image
    job: Job
    parameters: str
    """The text that A1111 writes into a PNG, which ComfyUI, Forge and Civitai read."""

    def save(self, path: str | os.PathLike[str], texts: Mapping[str, str] | None = None) -> None:
        """Writes a PNG, whole or not at all, with the parameters and the `texts` (text by name) in it.

        Raises BadFile when it cannot be written.
        """
        save_png(path, self.image, {"parameters": self.parameters, **(texts or {})})


def generate(
    base: Base,
    loras: Sequence[tuple[LoraFile, float]],
    jobs: Sequence[Job],
    config: GenerateConfig | None = None,
    *,
    starts: Mapping[Job, Image.Image] | None = None,
    denoise: float = 1.0,
    device: torch.device | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[Picture]:
    """The pictures of all jobs, one by one as each batch is done; jobs of equal strength are drawn together.

    `loras` are LoRAs with their strengths. A picture depends on its own job alone, not on its neighbours in a batch (up
    to rounding). With `starts`, a picture of the job's size for each job, these are drawn again: only the last `denoise`
    (above 0 to 1) of the steps is taken. `on_step(done, total)` is called in each sampling step of a batch and may raise
    to cancel. Raises BadConfig for a strength that is not finite and for a size, sampler or clip_skip that the base model
    does not have, OutOfMemory when the device has too little memory.
    """
    config = config or GenerateConfig()
    check_drawing(base, loras, config)
    jobs = [replace(job, size=checked_size(base, job.size)) for job in jobs]
    device, dtype = device_and_dtype(TrainConfig(precision=config.precision), device, base.family.overflows_in_fp16)
    groups = by_strength(jobs)
    with explained_memory_error("batch_size 1, smaller pictures or the device cpu"):
        encoded = _encode(base, loras, groups, config, device)
        denoiser, memory = load_denoiser(base, device, dtype, [lora for lora, _ in loras])
        vae = load_vae(base, device, dtype)
        for strength, group in groups.items():
            with applied(base, loras, strength, {"denoiser": denoiser}):
                texts = [encoded[strength, texts_of(job, base)] for job in group]
                for batch, pairs in in_batches(group, texts, config.batch_size, _settings):

                    def draw(part: Sequence[tuple[Job, Pair]], first: Job = batch[0]) -> list[Image.Image]:
                        assert first.size is not None
                        begin = encode_pictures(base, vae, [starts[job] for job, _ in part]) if starts else None
                        latents = sample_latents(
                            base, denoiser,
                            [prompt for _, (prompt, _) in part], [negative for _, (_, negative) in part],
                            device=device, dtype=dtype, seeds=[job.seed for job, _ in part], size=first.size,
                            steps=first.steps, guidance=first.guidance, sampler=config.sampler, start=begin,
                            denoise=denoise, on_step=on_step,
                        )  # fmt: skip
                        return decode_latents(base, vae, latents)

                    images = within_memory(
                        memory, partial(in_parts_that_fit, draw, list(zip(batch, pairs, strict=True)))
                    )
                    for job, image in zip(batch, images, strict=True):
                        yield Picture(image, job, parameters_text(base, loras, job, config))


def check_drawing(base: Base, loras: Sequence[tuple[LoraFile, float]], config: GenerateConfig) -> None:
    """Raises BadConfig for what is no loaded base model or LoRA with a strength, and for a clip_skip that the base lacks."""
    if not isinstance(base, Base):
        raise BadConfig(f"base = {base!r}: expected a Base, as load_base(path) gives it")
    for pair in loras:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], LoraFile)):
            raise BadConfig(
                f"loras: {pair!r}: expected a pair of a LoraFile, as LoraFile.read(path) gives it, and a strength"
            )
        lora, strength = pair
        if not math.isfinite(strength):
            raise BadConfig(f"{lora.name}: strength = {strength}: must be finite")
    if config.clip_skip > 1 and not base.family.has_clip_skip:
        raise BadConfig(f"clip_skip = {config.clip_skip}: {base.family.title} has no choice of layers; leave it at 1")


def by_strength(jobs: Sequence[Job]) -> dict[float, list[Job]]:
    """The jobs of each strength of the LoRAs."""
    groups: dict[float, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.strength, []).append(job)
    return groups


def are_low_rank(loras: Iterable[LoraFile], parts: Collection[str]) -> bool:
    """Whether what LoRAs change in these parts can be added to weights that are kept as they are stored."""
    return all(entry.kind in LOW_RANK for lora in loras for entry in lora.of_parts(parts).entries)


def load_denoiser(
    base: Base, device: torch.device, dtype: torch.dtype, loras: Sequence[LoraFile], copies: int = 1
) -> tuple[nn.Module, MemorySaver]:
    """The denoiser, and the holder of the plan by which it draws with these LoRAs, for a GPU's free memory.

    `copies` is how many times its weights will be in memory at most. Quantised weights stay as they are, unless a LoRA is of a
    kind whose changes are as large as the weights.
    """
    free = free_memory(device) if device.type == "cuda" else None
    as_stored = are_low_rank(loras, {"denoiser"})
    size = copies * base.weight_bytes("denoiser", dtype, as_stored)
    plan = drawing_plan(size, free)
    denoiser = base.load("denoiser", torch.device("cpu") if plan.offload else device, dtype, as_stored)
    memory = MemorySaver(denoiser, device)
    memory.adopt(plan)
    return denoiser, memory


def within_memory(memory: MemorySaver, draw: Callable[[], list[Image.Image]]) -> list[Image.Image]:
    """What `draw` makes; where memory runs out, it is called again with half of the blocks brought in, and then with all."""
    while True:
        try:
            return draw()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or memory.plan.offload == 1:
                raise
        memory.adopt(MemoryPlan(offload=0.5 if memory.plan.offload < 0.5 else 1))
        release_memory()


def _encode(
    base: Base,
    loras: Sequence[tuple[LoraFile, float]],
    groups: Mapping[float, Sequence[Job]],
    config: GenerateConfig,
    device: torch.device,
) -> dict[tuple[float, tuple[str, str]], Pair]:
    """The conditioning of each (strength, (prompt, negative prompt)).

    The text encoders are gone from memory when this returns, before the denoiser is loaded.
    """
    as_stored = are_low_rank([lora for lora, _ in loras], base.text_encoders)
    encoders = base.load_text_encoders(device, torch.float32, as_stored)
    return {
        (strength, texts): pair
        for strength, group in groups.items()
        for texts, pair in encode_texts(
            base, encoders, loras, strength, {texts_of(job, base) for job in group}, config
        ).items()
    }


def encode_texts(
    base: Base,
    encoders: Mapping[str, nn.Module],
    loras: Sequence[tuple[LoraFile, float]],
    strength: float,
    texts: Collection[tuple[str, str]],
    config: GenerateConfig,
) -> dict[tuple[str, str], Pair]:
    """The conditioning of each (prompt, negative prompt), as the encoders read it with the LoRAs at that strength."""
    with applied(base, loras, strength, encoders):
        return encode_pairs(base, encoders, texts, config.clip_skip)


def _settings(job: Job) -> tuple:
    """The settings that must be equal for all pictures of a batch."""
    return job.size, job.steps, job.guidance


def texts_of(job: Job, base: Base) -> tuple[str, str]:
    """The prompt and the negative prompt; the latter is "" where it is not used, so that not even its length matters."""
    return job.prompt, job.negative if predictions_per_step(base, job.guidance) == 2 else ""


@contextmanager
def applied(
    base: Base, loras: Sequence[tuple[LoraFile, float]], strength: float, networks: Mapping[str, nn.Module]
) -> Iterator[None]:
    """A context in which the networks have the LoRAs applied, and know the words that the files bring along."""
    with ExitStack() as contexts:
        for lora, factor in loras:
            present = lora.of_parts(networks)
            contexts.enter_context(apply(present, {"family": base.family.name, **networks}, factor * strength))
        contexts.enter_context(new_words(networks, [lora for lora, _ in loras]))
        yield


def in_batches(
    items: Sequence[_Item], texts: Sequence[Pair], size: int, alike: Callable[[_Item], Hashable] = lambda item: ()
) -> Iterator[tuple[tuple[_Item, ...], tuple[Pair, ...]]]:
    """The items and their texts in batches of at most `size`.

    The items of a batch have equal values of `alike`, and their texts are of equal length.
    """
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
    job: Job,
    config: GenerateConfig,
    more: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The text in which A1111 describes a picture, and from which the picture can be made again.

    The LoRAs stand in the prompt as `<lora:file name:strength>`, which A1111 and ComfyUI load them by; an embedding is in
    the prompt already, by its word. `more` are settings for which A1111 has no name.
    """
    width, height = checked_size(base, job.size)
    embeddings = [lora for lora, _ in loras if lora.embedding_keys and not lora.entries]
    loras = [(lora, factor) for lora, factor in loras if lora.entries]
    names = [Path(lora.name).stem for lora, _ in loras]
    used = [f"<lora:{name}:{factor * job.strength:g}>" for name, (_, factor) in zip(names, loras, strict=True)]
    guidance = {"CFG scale": f"{job.guidance:g}"}
    if base.embeds_guidance:  # these are Forge's names
        guidance = {"CFG scale": "1", "Distilled CFG Scale": f"{job.guidance:g}"}
    settings = {
        "Steps": f"{job.steps}",
        "Sampler": SAMPLER_TITLES[sampler_name(config.sampler, base)],
        **guidance,
        "Seed": f"{job.seed}",
        "Size": f"{width}x{height}",
        "Model": base.name.removesuffix(".safetensors"),
    }
    if base.sha256:
        settings["Model hash"] = base.sha256[:10]
    if base.vae_file and base.vae_sha256:
        settings |= {"VAE hash": base.vae_sha256[:10], "VAE": base.vae_file.path.name}
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
        hashes = [f"{Path(lora.name).stem}: {_embedding_hash(lora)[:12]}" for lora in embeddings]
        settings["TI hashes"] = ", ".join(hashes)
    return str(Parameters(" ".join([job.prompt, *used]), texts_of(job, base)[1], settings | dict(more)))


def _embedding_hash(lora: LoraFile) -> str:
    """The hash by which A1111 tells embeddings apart: the SHA-256 of the whole file, or of the tensors without a file."""
    return lora.tensors.sha256() if isinstance(lora.tensors, SafetensorsFile) else lora.model_hash
