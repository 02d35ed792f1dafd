"""Pictures from a base model: the denoising loop with the samplers that people know, and the VAE's decoder.

The samplers are diffusers'; conditioning and prediction are the family's, the same as in training.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents (N, C, h, w) of one picture per seed, float32; the noise of a picture depends on its own seed alone.

    `guidance` is classifier-free guidance's scale (arXiv:2207.12598); at 1 the negative prompt is not evaluated.
    `size` is (width, height) in pixels.
    """
    parameter = next(denoiser.parameters())
    device, dtype = parameter.device, parameter.dtype
    scheduler = build_sampler(sampler, base)
    scheduler.set_timesteps(steps, device=device)
    width, height = (side // base.latent_size for side in size)
    channels = base.components["denoiser"].config["in_channels"]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(channels, height, width, generator=generator) for generator in generators])
    latents = noise.to(device) * scheduler.init_noise_sigma
    picture = base.family.image_conditioning(size, (0, 0), size)
    conditioning = _stack(positive, picture, device)
    if guidance != 1:
        without = _stack(negative, picture, device)
        conditioning = {name: torch.cat([without[name], conditioning[name]]) for name in conditioning}
    takes_generator = "ancestral" in sampler or "sde" in sampler
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for index, timestep in enumerate(scheduler.timesteps):
            model_input = torch.cat([latents, latents]) if guidance != 1 else latents
            model_input = scheduler.scale_model_input(model_input, timestep).to(dtype)
            timesteps = timestep.expand(len(model_input)).to(device)
            prediction = base.family.predict(denoiser, model_input, timesteps, conditioning).float()
            if guidance != 1:
                negative_part, positive_part = prediction.chunk(2)
                prediction = negative_part + guidance * (positive_part - negative_part)
            extra = {"generator": generators} if takes_generator else {}
            latents = scheduler.step(prediction, timestep, latents, return_dict=False, **extra)[0]
            if on_step:
                on_step(index + 1, len(scheduler.timesteps))
    return latents.float()


def _stack(parts: Sequence[Conditioning], picture: Conditioning, device: torch.device) -> Conditioning:
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    joined |= {name: value.expand(len(parts), *value.shape[1:]) for name, value in picture.items()}
    return {name: value.to(device) for name, value in joined.items()}


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
