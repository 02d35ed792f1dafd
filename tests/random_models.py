"""Base models of published or smaller size with random weights, and random inputs for them, for measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from core.config import TrainConfig
from core.errors import BadConfig
from core.models.base import Base
from core.models.families import FAMILIES
from core.models.spec import Component, FamilySpec
from core.photos.dataset import Size
from core.training.encode import EncodedImage, LatentCache

CAPTION, CLASS_CAPTION = "a photo of sks person", "a photo of person"
TOKENS = 77


@dataclass(frozen=True)
class UnetShape:
    """The shape of a family's denoiser in its published size."""

    config: Mapping[str, Any]
    """The arguments of the UNet that differ between families, apart from its widths."""
    widths: tuple[int, ...]
    """The channels of each level, as multiples of the first level's."""
    heads: tuple[int, ...] | int
    """The attention heads of each level, as multiples of the first level's channels / 64; or one number for all levels."""
    pooled: int | None
    """The width of the pooled text that the denoiser takes beside the context; None if it doesn't use one."""


REAL_CHANNELS = 320
"""The channels of the first level in the published models."""
SHAPES = {
    "sd15": UnetShape(
        config={
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            "cross_attention_dim": 768,
        },
        widths=(1, 2, 4, 4),
        heads=8,
        pooled=None,
    ),
    "sdxl": UnetShape(
        config={
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,
        },
        widths=(1, 2, 4),
        heads=(1, 2, 4),
        pooled=1280,
    ),
}


def denoiser_config(family: str, channels: int = REAL_CHANNELS) -> dict[str, Any]:
    """Return the diffusers config of the family's denoiser; fewer `channels` in its first level make it smaller.

    Raises BadConfig unless `channels` is a multiple of 64, since group norm needs 32 and SDXL's heads are 64 wide.
    """
    if channels < 64 or channels % 64:
        raise BadConfig(f"--channels {channels}: must be a multiple of 64 (the published models have {REAL_CHANNELS})")
    shape = SHAPES[family]
    heads = shape.heads if isinstance(shape.heads, int) else tuple(n * channels // 64 for n in shape.heads)
    widths = tuple(n * channels for n in shape.widths)
    return {**shape.config, "in_channels": 4, "block_out_channels": widths, "attention_head_dim": heads}


def random_base(family: str, channels: int, device: torch.device, dtype: torch.dtype) -> Base:
    """Return a base model with only a denoiser, with random weights on the device in that dtype."""
    spec, config = FAMILIES[family], denoiser_config(family, channels)
    return Base(
        family=spec,
        name="random weights",
        components={"denoiser": random_component(spec, "denoiser", config, device, dtype)},
        prediction_type="epsilon",
        zero_terminal_snr=False,
        resolution=spec.resolution,
    )


def random_component(
    family: FamilySpec, part: str, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Component:
    """Return a part of a base model with random weights, on the device in that dtype.

    Weights have a deviation of 1 / sqrt(fan in), so that activations keep their size and don't overflow in fp16.
    """
    shapes = family.build_empty(part, config).state_dict()
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, place in shapes.items():
        tensor = torch.empty(place.shape, device=device, dtype=dtype)
        if place.ndim < 2:
            tensor.fill_(1.0 if name.endswith(("weight", "running_var")) else 0.0)  # Weights of norms, and all biases.
        else:
            tensor.normal_(std=place[0].numel() ** -0.5, generator=generator)
        tensors[name] = tensor
    return Component(config, tensors)


def random_cache(base: Base, config: TrainConfig, sizes: Sequence[Size] = ()) -> LatentCache:
    """Return random latents and a random conditioning of the captions, in the shapes of the family's encoders.

    There is a batch of pictures of each size (width, height) in pixels, by default of the square.
    """
    side = config.resolution or base.resolution
    generator = torch.Generator().manual_seed(0)
    images = [_random_image(base, size, generator) for size in sizes or [(side, side)]]
    if base.caption_encoder:
        text = base.caption_encoder.encode(CAPTION)
    else:
        width = base.components["denoiser"].config["cross_attention_dim"]
        text = {"context": torch.randn(1, TOKENS, width, generator=generator)}
        if pooled := SHAPES[base.family.name].pooled:
            text["pooled"] = torch.randn(1, pooled, generator=generator)
    every = tuple(image for image in images for _ in range(config.batch_size))
    return LatentCache(every, dict.fromkeys((CAPTION, CLASS_CAPTION), text), chunks=1, digest="random")


def _random_image(base: Base, size: Size, generator: torch.Generator) -> EncodedImage:
    shape = base.latent_shape
    latent = (shape.channels, size[1] // shape.pixels, size[0] // shape.pixels)
    return EncodedImage(
        name="random",
        mean=torch.randn(latent, generator=generator),
        deviation=torch.full(latent, 0.1),
        mask=None,
        conditioning=base.family.image_conditioning(size, (0, 0), size),
        caption=CAPTION,
        class_caption=CLASS_CAPTION,
        repeats=1,
        is_class=False,
    )
