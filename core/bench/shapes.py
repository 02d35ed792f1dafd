"""The shapes of the denoisers that the benchmark can time, in their published sizes. Importing this doesn't load torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadConfig


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
