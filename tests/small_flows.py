"""Small rectified flows with random weights: the sizes of their denoisers, VAEs and texts.

Tests train them, and `python -m lab.gpu correctness` compares a GPU with the CPU on them.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from core.models.base import Base, CaptionEncoder
from core.models.families import FAMILIES
from core.models.spec import Component, Conditioning
from tests.random_models import random_component


@dataclass(frozen=True)
class SmallFlow:
    """The configs of a small model of a rectified flow's family, and the shapes of its encoded captions."""

    denoiser: dict[str, Any]
    vae: dict[str, Any]
    context: int
    """The width of the text's states."""
    pooled: int = 0
    """The width of the pooled text; 0 without one."""
    masked: bool = False
    """Whether texts keep their length, and a mask marks the padding."""
    unused: str = r"$^"
    """The pattern of the layers that don't affect the prediction: the text part of the last block."""
    shift: Callable[[int], float] = lambda positions: 1.0
    """The shift that other trainers train with, or the authors' for drawing where it leaves enough pictures."""


def _line(positions: int, mu: float) -> Callable[[int], float]:
    """The shift exp(mu), whose mu is on the line from 0.5 at 256 positions to this one."""
    return lambda count: math.exp(0.5 + (mu - 0.5) / (positions - 256) * (count - 256))


_FLUX1_SHIFT = _line(4096, 1.15)
"""Black Forest Labs' for FLUX.1, with which OneTrainer and musubi-tuner train FLUX.2 too."""
_QWEN_SHIFT = _line(8192, 0.9)


def _kl_config(scale: float, shift: float) -> dict[str, Any]:
    return {
        "block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "latent_channels": 16,
        "scaling_factor": scale, "shift_factor": shift, "use_quant_conv": False, "use_post_quant_conv": False,
    }  # fmt: skip


_FLUX1_VAE = _kl_config(0.3611, 0.1159)
_FLUX2_VAE = {
    "block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1,
}  # fmt: skip
_QWEN_VAE = {"base_dim": 8, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}

SMALL_FLOWS = {
    "sd3": SmallFlow(
        {"sample_size": 32, "in_channels": 16, "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 1,
         "joint_attention_dim": 32, "caption_projection_dim": 64, "pooled_projection_dim": 24, "pos_embed_max_size": 48,
         "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        _kl_config(1.5305, 0.0609), context=32, pooled=24, shift=lambda positions: 3.0,
    ),
    "flux1": SmallFlow(
        {"in_channels": 64, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1,
         "joint_attention_dim": 32, "pooled_projection_dim": 24, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56)},
        _FLUX1_VAE, context=32, pooled=24, shift=_FLUX1_SHIFT,
    ),
    "chroma": SmallFlow(
        {"in_channels": 64, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1,
         "joint_attention_dim": 32, "axes_dims_rope": (16, 56, 56), "approximator_hidden_dim": 64,
         "approximator_layers": 2},
        _FLUX1_VAE, context=32, masked=True,
    ),
    "flux2": SmallFlow(
        {"in_channels": 128, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1,
         "joint_attention_dim": 32, "axes_dims_rope": (32, 32, 32, 32), "guidance_embeds": False},
        _FLUX2_VAE, context=32, shift=_FLUX1_SHIFT,
    ),
    "flux3": SmallFlow(
        {"in_channels": 128, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1,
         "joint_attention_dim": 32, "flow_map": False},
        _FLUX2_VAE, context=32, masked=True, shift=lambda positions: 3.0,
    ),
    "zimage": SmallFlow(
        {"in_channels": 16, "dim": 128, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 1,
         "cap_feat_dim": 32, "axes_dims": (32, 48, 48), "axes_lens": (1536, 512, 512)},
        _FLUX1_VAE, context=32, masked=True, shift=lambda positions: 2.0,
    ),
    "qwen-image": SmallFlow(
        {"in_channels": 64, "num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1,
         "joint_attention_dim": 32, "axes_dims_rope": (16, 56, 56)},
        _QWEN_VAE, context=32, masked=True,
        unused=r"transformer_blocks\.1\.(attn\.(add_q_proj|to_add_out)|txt_mlp\..+)", shift=_QWEN_SHIFT,
    ),
    "qwen-image-21": SmallFlow(
        {"in_channels": 64, "num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1, "context_in_dim": 32},
        {"base_dim": 8, "decoder_base_dim": 12, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False],
         "scale_factor_spatial": 2},
        context=32, masked=True, shift=_QWEN_SHIFT,
    ),
    "krea2": SmallFlow(
        {"in_channels": 64, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96, "timestep_embed_dim": 32, "text_hidden_dim": 32, "num_text_layers": 3,
         "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 48,
         "axes_dims_rope": (8, 12, 12)},
        _QWEN_VAE, context=3 * 32, masked=True, shift=_line(6400, 1.15),
    ),
    "ernie-image": SmallFlow(
        {"in_channels": 128, "hidden_size": 128, "num_attention_heads": 1, "num_layers": 2, "ffn_hidden_size": 192,
         "text_in_dim": 32},
        _FLUX2_VAE, context=32, masked=True, shift=lambda positions: 2.0,
    ),
    "longcat-image": SmallFlow(
        {"in_channels": 64, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1,
         "joint_attention_dim": 32, "axes_dims_rope": (16, 56, 56)},
        _FLUX1_VAE, context=32, shift=_FLUX1_SHIFT,
    ),
    "ideogram4": SmallFlow(
        {"in_channels": 128, "num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1,
         "intermediate_size": 192, "adaln_dim": 32, "llm_features_dim": 13 * 8},
        _FLUX2_VAE, context=13 * 8, masked=True, shift=lambda positions: math.sqrt(positions) / 32,
    ),
    "moss-image": SmallFlow(
        {"dim": 128, "ffn_dim": 192, "num_heads": 1, "num_layers": 2, "text_dim": 32, "freq_dim": 32, "latent_channels": 128,
         "rope_base": 10000.0},
        _FLUX2_VAE, context=32, masked=True,
    ),
}  # fmt: skip

FLOW = "flux1"
"""The family of WIDE_FLOW."""
WIDE_FLOW = replace(
    SMALL_FLOWS[FLOW],
    denoiser={
        **SMALL_FLOWS[FLOW].denoiser, "num_layers": 5, "num_single_layers": 10, "num_attention_heads": 24,
        "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    },
    context=4096, pooled=768,
)  # fmt: skip
"""FLOW in its published width, with a quarter of its blocks."""


def random_flow(family: str, sizes: SmallFlow, device: torch.device, dtype: torch.dtype) -> Base:
    """Return a rectified flow with random weights on the device in that dtype."""
    configs = {"denoiser": sizes.denoiser, "vae": sizes.vae}
    parts = {part: random_component(FAMILIES[family], part, configs[part], device, dtype) for part in configs}
    return flow_base(family, sizes, parts)


def flow_base(family: str, sizes: SmallFlow, components: Mapping[str, Component]) -> Base:
    """Return a rectified flow with these weights, which encodes captions into random values."""

    def encode(caption: str) -> Conditioning:
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "big"))
        length = 4 + len(caption.split()) if sizes.masked else 16
        conditioning = {"context": torch.randn(1, length, sizes.context, generator=generator)}
        if sizes.pooled:
            conditioning["pooled"] = torch.randn(1, sizes.pooled, generator=generator)
        if sizes.masked:
            conditioning["context_mask"] = torch.ones(1, length)
        return conditioning

    return Base(
        family=FAMILIES[family],
        name=f"small-{family}.safetensors",
        components=components,
        prediction_type="flow",
        zero_terminal_snr=False,
        resolution=64,
        caption_encoder=CaptionEncoder(encode, "random"),
    )
