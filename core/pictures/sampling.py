"""Sample pictures from a base model: the denoising loop with common samplers, and the VAE's decoder.

The samplers come from diffusers; conditioning and prediction come from the model family, as in training.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..device import whole_or_in_tiles
from ..errors import BadConfig
from ..models.base import Base
from ..models.clip import chunk_count, words_of
from ..models.frozen_layers import FrozenLayers
from ..models.objective import TIMESTEPS, FlowSchedule
from ..models.packages import import_diffusers
from ..models.spec import Conditioning, Pair, on_device, placed, stack_conditioning
from ..progress import OnProgress

ENCODED_TOGETHER = 16
"""The number of texts that are encoded together."""


class Sampler(NamedTuple):
    """A sampler on SD's noise schedule."""

    title: str
    """Its name in A1111."""
    scheduler: str
    """The name of its class in diffusers."""
    options: Mapping[str, Any]


_KARRAS = {"use_karras_sigmas": True}
SAMPLERS = {
    "dpmpp_2m_karras": Sampler("DPM++ 2M Karras", "DPMSolverMultistepScheduler", _KARRAS),
    "dpmpp_2m": Sampler("DPM++ 2M", "DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde_karras": Sampler(
        "DPM++ 2M SDE Karras", "DPMSolverMultistepScheduler", _KARRAS | {"algorithm_type": "sde-dpmsolver++"}
    ),
    "euler": Sampler("Euler", "EulerDiscreteScheduler", {}),
    "euler_ancestral": Sampler("Euler a", "EulerAncestralDiscreteScheduler", {}),
    "unipc": Sampler("UniPC", "UniPCMultistepScheduler", {}),
    "ddim": Sampler("DDIM", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
}
"""The samplers by name."""
FLOW_SAMPLERS = ("euler", "dpmpp_2m", "unipc")
"""The names of the samplers for rectified flows. Euler's method is then our `FlowEuler`."""


class FlowEuler:
    """Euler's method along a rectified flow's velocity, with the interface of diffusers' schedulers."""

    init_noise_sigma: float = 1.0

    def __init__(self, times: Tensor):
        """Take the `times` (steps + 1,) between steps, falling from 1, which is noise, to 0."""
        self.timesteps: Tensor = TIMESTEPS * times[:-1]
        self._times = times
        self._index = 0

    def set_begin_index(self, index: int) -> None:
        """Set the index of the step at which sampling begins."""
        self._index = index

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Return the latents unchanged: a rectified flow's model takes them unscaled."""
        return latents

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the latents (N, C, h, w) with noise at these timesteps: (1 - t) * latents + t * noise."""
        time = timesteps.view(-1, 1, 1, 1) / TIMESTEPS
        return (1 - time) * latents + time * noise

    def step(self, velocity: Tensor, timestep: Tensor, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        """Return the latents at the next time along the velocity, in a tuple of one like diffusers' schedulers."""
        now, then = self._times[self._index], self._times[self._index + 1]
        self._index += 1
        return (latents + (then - now) * velocity,)


def sampler_name(name: str | None, base: Base) -> str:
    """Return the sampler's name; for None, the default of the base model's family.

    Raises BadConfig for a sampler that the family doesn't support, or that doesn't simply take a flow map's steps.
    """
    known = SAMPLERS if base.family.predicts_noise else FLOW_SAMPLERS
    usual = "euler" if base.few_steps or not base.family.predicts_noise else "dpmpp_2m_karras"
    if name is None:
        return usual
    if name not in known:
        raise BadConfig(f"sampler = {name!r}: choose one that {base.family.title} supports: {', '.join(known)}")
    if base.is_flow_map and name != usual:
        raise BadConfig(f"sampler = {name!r}: {base.name} is a flow map, which only supports {usual}")
    return name


def build_sampler(name: str | None, base: Base, steps: int, latents: Tensor) -> Any:
    """Return a diffusers scheduler or `FlowEuler` on the base model's noise schedule, with steps set for the latents' size.

    Raises BadConfig for a sampler that the family doesn't support.
    """
    diffusers = import_diffusers()
    name = sampler_name(name, base)
    schedule = base.sampling_schedule()
    if isinstance(schedule, FlowSchedule):
        if name == "euler":
            return FlowEuler(schedule.sampling_times(steps, latents))
        shift = schedule.shift_for(latents)
        settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    else:
        # The leading steps of SD's own configs are a whole number of timesteps apart, so many of them would start far below
        # pure noise. Distilled models draw from pure noise, at evenly spaced timesteps.
        from_noise = base.zero_terminal_snr or base.few_steps or steps > 150
        settings = {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": base.prediction_type,
            "timestep_spacing": "trailing" if from_noise else "leading",
            "steps_offset": 1,
        }
        if base.zero_terminal_snr:
            settings["rescale_betas_zero_snr"] = True
    scheduler = getattr(diffusers, SAMPLERS[name].scheduler)(**settings, **SAMPLERS[name].options)
    scheduler.set_timesteps(steps, device=latents.device)
    return scheduler


def encode_prompts(
    base: Base,
    encoders: Mapping[str, nn.Module],
    prompts: Sequence[str],
    clip_skip: int = 1,
    chunks: int | None = None,
) -> list[Conditioning]:
    """Return the conditioning of each prompt, a batch of 1 on the CPU. `chunks` defaults to what the longest prompt needs."""
    if base.caption_encoder:
        return [base.caption_encoder.encode(prompt) for prompt in prompts]
    chunks = chunks or _chunks_of(prompts, encoders)
    parts = []
    for start in range(0, len(prompts), ENCODED_TOGETHER):
        some = prompts[start : start + ENCODED_TOGETHER]
        with torch.inference_mode():
            joined = base.family.encode_text(encoders, some, clip_skip, chunks)
        parts += [{name: value[i : i + 1].cpu() for name, value in joined.items()} for i in range(len(some))]
    return parts


def encode_pairs(
    base: Base, encoders: Mapping[str, nn.Module], pairs: Iterable[tuple[str, str]], clip_skip: int = 1
) -> dict[tuple[str, str], Pair]:
    """Return the conditioning of each (prompt, negative prompt), independent of the other pairs' length."""
    chunks = {pair: _chunks_of(pair, encoders) for pair in pairs}
    encoded = {}
    for count in set(chunks.values()):
        texts = sorted({text for pair, needed in chunks.items() if needed == count for text in pair})
        parts = encode_prompts(base, encoders, texts, clip_skip, count)
        encoded |= {(text, count): part for text, part in zip(texts, parts, strict=True)}
    return {pair: (encoded[pair[0], count], encoded[pair[1], count]) for pair, count in chunks.items()}


def _chunks_of(texts: Sequence[str], encoders: Mapping[str, nn.Module]) -> int:
    """Return the number of chunks that the longest text needs; an added word may take many tokens."""
    return max((chunk_count(texts, words_of(encoder)) for encoder in encoders.values()), default=1)


class Sampling(NamedTuple):
    """How latents are sampled; for the fields, see `sample_latents`."""

    size: tuple[int, int]
    steps: int
    sampler: str | None = None
    start: Tensor | None = None
    denoise: float = 1.0
    on_step: OnProgress | None = None


Prediction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A denoiser's prediction for latents (N, C, h, w), scaled as the sampler requires, in a step between two timesteps: float32 of
the same shape."""


def sample_latents(
    base: Base,
    denoiser: nn.Module,
    positive: Sequence[Conditioning],
    negative: Sequence[Conditioning],
    *,
    device: torch.device,
    dtype: torch.dtype,
    autocast: bool = False,
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int,
    guidance: float,
    sampler: str | None = None,
    start: Tensor | None = None,
    denoise: float = 1.0,
    on_step: OnProgress | None = None,
) -> Tensor:
    """Return the latents (N, C, h, w) of one picture per seed, float32; a picture's noise depends only on its seed.

    The denoiser computes on `device` in `dtype`; between passes its tensors may be elsewhere, and in 8 bits. With `autocast` it
    may have layers with float32 weights, which torch then casts.

    `guidance` is the scale of classifier-free guidance (arXiv:2207.12598); at 1 the negative prompt is not evaluated. A
    distilled base model takes the scale as an input, and no negative prompt. `size` is (width, height) in pixels.

    With `start`, latents (N, C, h, w) of pictures, these are redrawn. They are noised to the start of the last `denoise` share
    (above 0 to 1) of the steps, and only those steps are taken. `on_step(done, total)` may raise to cancel.
    """
    predict = guided_prediction(
        base, denoiser, positive, negative, device=device, dtype=dtype, size=size, guidance=guidance
    )
    with (
        FrozenLayers(denoiser, device).in_use(),
        torch.autocast(device.type, dtype, enabled=autocast and dtype != torch.float32),
    ):
        return denoised(base, predict, Sampling(size, steps, sampler, start, denoise, on_step), seeds, device)


def predictions_per_step(base: Base, guidance: float) -> int:
    """Return the denoiser's predictions per sampling step: two if guidance needs the negative prompt too, else one."""
    return 1 if base.embeds_guidance or guidance == 1 else 2


def guided_prediction(
    base: Base,
    denoiser: nn.Module,
    positive: Sequence[Conditioning],
    negative: Sequence[Conditioning],
    *,
    device: torch.device,
    dtype: torch.dtype,
    size: tuple[int, int],
    guidance: float,
) -> Prediction:
    """Return the denoiser's prediction for pictures of that size with these texts and guidance, as in `sample_latents`."""
    picture = base.family.image_conditioning(size, (0, 0), size)
    scale = guidance
    if base.embeds_guidance:
        picture, scale = picture | {"guidance": torch.tensor([guidance])}, 1.0
    conditioning = _stack(positive, picture, device, dtype)
    if scale != 1:
        without = _stack(negative, picture, device, dtype)
        conditioning = stack_conditioning([without, conditioning])
        if base.family.marks_negative:
            conditioning |= {
                "is_negative": torch.cat([torch.full((len(positive),), one, device=device) for one in (1, 0)])
            }

    def predict(latents: Tensor, timestep: Tensor, following: Tensor) -> Tensor:
        model_input = (torch.cat([latents, latents]) if scale != 1 else latents).to(dtype)
        at, target = (time.expand(len(model_input)).to(device) for time in (timestep, following))
        given = conditioning | {"target": target} if base.is_flow_map else conditioning
        prediction = base.family.predict(denoiser, model_input, at, given).float()
        if scale == 1:
            return prediction
        negative_part, positive_part = prediction.chunk(2)
        return negative_part + scale * (positive_part - negative_part)

    return predict


@torch.no_grad()
def denoised(base: Base, predict: Prediction, sampling: Sampling, seeds: Sequence[int], device: torch.device) -> Tensor:
    """Return the latents (N, C, h, w) that the sampler reaches with the predictions, one for each seed."""
    shape, start = base.latent_shape, sampling.start
    width, height = (side // shape.pixels for side in sampling.size)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(shape.channels, height, width, generator=generator) for generator in generators])
    noise = noise.to(device)
    scheduler = build_sampler(sampling.sampler, base, sampling.steps, noise)
    timesteps = scheduler.timesteps
    first = 0 if start is None else len(timesteps) - max(1, round(sampling.denoise * len(timesteps)))
    timesteps = timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):  # DDIM only uses the timesteps.
        scheduler.set_begin_index(first)
    if start is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(start.to(device), noise, timesteps[:1])
    takes_generator = any(word in sampler_name(sampling.sampler, base) for word in ("ancestral", "sde"))
    extra = {"generator": generators} if takes_generator else {}
    following = torch.cat([timesteps[1:], timesteps.new_zeros(1)])
    for index, timestep in enumerate(timesteps):
        prediction = predict(scheduler.scale_model_input(latents, timestep), timestep, following[index])
        latents = scheduler.step(prediction, timestep, latents, return_dict=False, **extra)[0]
        if sampling.on_step:
            sampling.on_step(index + 1, len(timesteps))
    return latents.float()


def _stack(
    parts: Sequence[Conditioning], picture: Conditioning, device: torch.device, dtype: torch.dtype
) -> Conditioning:
    expanded = {name: value.expand(len(parts), *value.shape[1:]) for name, value in picture.items()}
    return placed(stack_conditioning(parts), device, dtype) | on_device(expanded, device)


def load_vae(base: Base, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Load the VAE for pictures drawn in `dtype`: in bf16 if the denoiser uses it on a GPU, else in float32.

    bf16 halves the memory, and no family's VAE overflows in it. In fp16 SDXL's does.
    """
    narrow = device.type == "cuda" and dtype == torch.bfloat16
    return base.load("vae", device, dtype if narrow else torch.float32)


@torch.no_grad()
def encode_pictures(base: Base, vae: nn.Module, images: Sequence[Image.Image]) -> Tensor:
    """Encode RGB pictures of one size into latents (N, C, h, w), float32: the mean of the encoder's distribution."""
    parameter = next(vae.parameters())
    latents = []
    for image in images:
        pixels = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        mean, _ = whole_or_in_tiles(vae, partial(base.family.encode_image, vae, pixels.to(parameter)))
        latents.append(mean.float())
    return torch.cat(latents)


@torch.no_grad()
def decode_latents(base: Base, vae: nn.Module, latents: Tensor) -> list[Image.Image]:
    """Decode latents (N, C, h, w) into RGB pictures, one by one, since the decoder needs the most memory of all."""
    parameter = next(vae.parameters())
    images = []
    for latent in latents:
        pixels = whole_or_in_tiles(vae, partial(base.family.decode_latents, vae, latent[None].to(parameter)))[0]
        array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        images.append(Image.fromarray(array))
    return images
