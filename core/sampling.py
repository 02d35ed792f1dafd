"""Pictures from a base model: the denoising loop with the samplers that people know, and the VAE's decoder.

The samplers are diffusers'; conditioning and prediction are the family's, the same as in training.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .base import Base
from .errors import BadConfig
from .families.clip import chunk_count
from .families.spec import Conditioning

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
    ),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
}
"""Name -> diffusers scheduler and its options."""
SAMPLER_TITLES = {
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde_karras": "DPM++ 2M SDE Karras",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "unipc": "UniPC",
    "ddim": "DDIM",
}
"""Name -> what A1111 calls it."""


def build_sampler(name: str, base: Base):
    """diffusers' scheduler for the base's noise schedule. BadConfig for an unknown name."""
    import diffusers

    if name not in SAMPLERS:
        raise BadConfig(f"sampler = {name!r}: choose one of {', '.join(SAMPLERS)}")
    class_name, options = SAMPLERS[name]
    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": base.prediction_type,
        "timestep_spacing": "trailing" if base.zero_terminal_snr else "leading",
        "steps_offset": 1,
        **options,
    }
    if base.zero_terminal_snr:
        settings["rescale_betas_zero_snr"] = True
    return getattr(diffusers, class_name)(**settings)


def encode_prompts(
    base: Base, encoders: Mapping[str, nn.Module], prompts: Sequence[str], clip_skip: int = 1
) -> list[Conditioning]:
    """The conditioning of each prompt, batch of 1, all padded to the same number of chunks."""
    chunks = chunk_count(prompts)
    with torch.inference_mode():
        joined = base.family.encode_text(encoders, prompts, clip_skip, chunks)
    return [{name: value[i : i + 1] for name, value in joined.items()} for i in range(len(prompts))]


@torch.no_grad()
def sample_latents(
    base: Base,
    denoiser: nn.Module,
    positive: Sequence[Conditioning],
    negative: Sequence[Conditioning],
    *,
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int,
    guidance: float,
    sampler: str = "dpmpp_2m_karras",
    start: Tensor | None = None,
    denoise: float = 1.0,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents (N, C, h, w) of one picture per seed, float32; the noise of a picture depends on its own seed alone.

    `guidance` is classifier-free guidance's scale (arXiv:2207.12598); at 1 the negative prompt is not evaluated.
    `size` is (width, height) in pixels. With `start`, latents of pictures (N, C, h, w), these are drawn anew: noised to
    where the last `denoise` (above 0 to 1) of the steps begins, and only those steps are taken.
    """
    parameter = next(denoiser.parameters())
    device, dtype = parameter.device, parameter.dtype
    scheduler = build_sampler(sampler, base)
    scheduler.set_timesteps(steps, device=device)
    width, height = (side // base.latent_size for side in size)
    channels = base.components["denoiser"].config["in_channels"]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(channels, height, width, generator=generator) for generator in generators])
    timesteps = scheduler.timesteps
    if start is None:
        latents = noise.to(device) * scheduler.init_noise_sigma
    else:
        first = len(timesteps) - max(1, round(denoise * len(timesteps)))
        timesteps = timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):  # DDIM goes by the timesteps alone
            scheduler.set_begin_index(first)
        latents = scheduler.add_noise(start.to(device), noise.to(device), timesteps[:1])
    picture = base.family.image_conditioning(size, (0, 0), size)
    conditioning = _stack(positive, picture, device)
    if guidance != 1:
        without = _stack(negative, picture, device)
        conditioning = {name: torch.cat([without[name], conditioning[name]]) for name in conditioning}
    takes_generator = "ancestral" in sampler or "sde" in sampler
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for index, timestep in enumerate(timesteps):
            model_input = torch.cat([latents, latents]) if guidance != 1 else latents
            model_input = scheduler.scale_model_input(model_input, timestep).to(dtype)
            at = timestep.expand(len(model_input)).to(device)
            prediction = base.family.predict(denoiser, model_input, at, conditioning).float()
            if guidance != 1:
                negative_part, positive_part = prediction.chunk(2)
                prediction = negative_part + guidance * (positive_part - negative_part)
            extra = {"generator": generators} if takes_generator else {}
            latents = scheduler.step(prediction, timestep, latents, return_dict=False, **extra)[0]
            if on_step:
                on_step(index + 1, len(timesteps))
    return latents.float()


def _stack(parts: Sequence[Conditioning], picture: Conditioning, device: torch.device) -> Conditioning:
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    joined |= {name: value.expand(len(parts), *value.shape[1:]) for name, value in picture.items()}
    return {name: value.to(device) for name, value in joined.items()}


@torch.no_grad()
def encode_pictures(base: Base, vae: nn.Module, images: Sequence[Image.Image]) -> Tensor:
    """Latents (N, C, h, w) of RGB pictures of one size, float32: the mean of what the encoder gives."""
    parameter = next(vae.parameters())
    latents = []
    for image in images:
        pixels = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        latents.append(vae.encode(pixels.to(parameter)).latent_dist.mean.float() * base.latent_scale)  # pyright: ignore
    return torch.cat(latents)


@torch.no_grad()
def decode_latents(base: Base, vae: nn.Module, latents: Tensor) -> list[Image.Image]:
    """RGB pictures of latents, decoded one by one: the decoder needs the most memory of all."""
    parameter = next(vae.parameters())
    images = []
    for latent in latents:
        pixels = vae.decode((latent[None] / base.latent_scale).to(parameter)).sample[0]  # pyright: ignore
        array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        images.append(Image.fromarray(array))
    return images
