"""Ideogram 4 (Ideogram, 2026): a rectified flow with one stream of text and picture, for sizes from 256 to 2048 px.

The text encoder is Qwen3-VL-8B, and the denoiser takes thirteen of its layers side by side. The VAE is FLUX.2's, with a
different normalisation of the latents. The published model has a second denoiser of the same form that sees no text. The
authors draw with it instead of predicting without the prompt. Here only the first one is trained and drawn with, and it
predicts for the negative prompt too. It was trained on captions in JSON, and also understands plain sentences.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...tensor_names.ideogram import IDEOGRAM4 as NAMES
from .. import attention, text, transformer
from ..ldm import count_children
from ..recipe import STARTING_POINTS, short, usual
from ..spec import Conditioning, FamilySpec, Networks
from . import flux2

TEXT = {"text_encoder": "qwen3vl_8b"}
TEXT_LAYERS = (1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 36)
"""The layers of the text encoder whose states the denoiser takes. 1 is the first. Those of 36 are without the norm."""
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_ENDING_TOKENS = 5
"""The number of tokens in the template after the caption."""
TEXT_TOKENS = 2048
"""The most tokens of a caption and of the template, as in the authors' pipeline."""
ROTARY_SECTIONS = (24, 20, 20)
"""The numbers of frequencies for a position's place in the text, its row and its column."""
PICTURE_POSITION = 65536
"""The number at which a picture's rows and columns begin, so that they differ from a text's."""

_ATTENTION = r"layers\.\d+\.attention\.to_([qkv]|out\.0)"
# The modulations are not adapted, as in the other families.
_TRANSFORMER = rf"{_ATTENTION}|layers\.\d+\.feed_forward\.w[123]"

_MEANS, _DEVIATIONS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
"""The mean and the deviation of each channel of the latents, for the authors' normalisation, from their code.

The statistics in FLUX.2's VAE are for FLUX.2.
"""


def config_of(names: transformer.Names, shape: transformer.Shapes) -> dict[str, Any]:
    width, channels = shape("input_proj.weight")
    (head,) = shape("layers.0.attention.norm_q.weight", 1)
    return {
        "in_channels": channels,
        "num_layers": count_children(names, "layers"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "intermediate_size": shape("layers.0.feed_forward.w1.weight")[0],
        "adaln_dim": shape("adaln_proj.weight")[0],
        "llm_features_dim": shape("llm_cond_proj.weight")[1],
        "rope_theta": 5_000_000,
        "mrope_section": ROTARY_SECTIONS,
    }


def build_denoiser(config: dict[str, Any]) -> nn.Module:
    denoiser = transformer.build("Ideogram4Transformer2DModel", (0, 39), config)
    attention.use_attention(denoiser, _Attention())
    del denoiser.rotary_emb  # files don't contain its frequencies
    return denoiser


def _forward(
    denoiser: Any, latents: Tensor, context: Tensor, times: Tensor, size: tuple[int, int], mask: Tensor | None
) -> Tensor:
    """Predict (B, H W, C) for latents (B, H W, C) of `size` (H, W), times from 0 (noise) to 1 and texts (B, L, D).

    This is the forward pass of diffusers for texts followed by pictures. The original also has a text's states for each
    position of the picture, half a gigabyte of zeros at 1024 px, and rounds times and rotations to 16 bits. `mask`
    (B, L + H W) is False for the padding of a text.
    """
    length = context.shape[1]
    for_text, for_picture = denoiser.embed_image_indicator(torch.arange(2, device=latents.device))
    text_states = denoiser.llm_cond_proj(denoiser.llm_cond_norm(context)) + for_text
    states = torch.cat([text_states, denoiser.input_proj(latents) + for_picture], 1)
    time = denoiser.t_embedding
    embedded = time.mlp_out(F.silu(time.mlp_in(_waves(times, states.shape[-1]).to(states.dtype))))
    modulation = F.silu(denoiser.adaln_proj(embedded.unsqueeze(1)))
    keys = None if mask is None else mask[:, None, None]
    inputs = keys, _rotations(length, size, denoiser.config, states.device), modulation
    states = transformer.through_blocks(denoiser, denoiser.layers, states, *inputs)
    return denoiser.final_layer(states[:, length:], modulation)


def _waves(times: Tensor, width: int) -> Tensor:
    """Return the sines and cosines (B, width) of times from 0 to 1, float32."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=times.device)
    angles = 1e4 * times.float().unsqueeze(1) * torch.exp(steps * -(math.log(1e4) / (half - 1)))
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


def _rotations(length: int, size: tuple[int, int], config: Any, device: torch.device) -> attention.Tables:
    """Return the tables (L + H W, D) that rotate an attention head by each position's place in the text, row and column.

    A text's tokens have their number on all three axes. The rows and columns of a picture are counted from PICTURE_POSITION,
    which is its place too. Such numbers need float32.
    """
    head = config.attention_head_dim
    tokens = torch.arange(float(length), device=device).unsqueeze(1).expand(-1, 3)
    positions = torch.cat([tokens, transformer.grid_positions(*size, device) + PICTURE_POSITION])
    place, row, column = positions.unsqueeze(2).unbind(1)
    _, rows, columns = config.mrope_section
    # The first frequencies alternate between place, row and column. The last are for the place alone.
    numbers = torch.arange(head // 2, device=device)
    is_row, is_column = ((numbers % 3 == axis) & (numbers < 3 * count) for axis, count in ((1, rows), (2, columns)))
    frequencies = 1 / config.rope_theta ** (2 * numbers.float() / head)
    angles = torch.where(is_row, row, torch.where(is_column, column, place)) * frequencies
    return attention.tables_of_halves(torch.cat([angles, angles], 1))


class _Attention:
    """Attention of a block. It replaces diffusers'."""

    def __call__(self, layers: Any, states: Tensor, mask: Tensor | None, tables: attention.Tables) -> Tensor:
        query, key, value = attention.heads(states, layers.num_heads, layers.to_q, layers.to_k, layers.to_v)
        query, key = layers.norm_q(query), layers.norm_k(key)
        mixed = attention.attend([query], [key], [value], tables, mask, halves=True)
        return layers.to_out[0](mixed)


def _statistics(_: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, deviation = (torch.tensor(values).to(like).view(1, -1, 1, 1) for values in (_MEANS, _DEVIATIONS))
    return mean, deviation


def encode_text(encoders: Networks, captions: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    conditioning = text.encode_qwen(
        encoders["text_encoder"],
        TEXT["text_encoder"],
        captions,
        TEXT_TOKENS - _ENDING_TOKENS,
        layers=TEXT_LAYERS,
        template=TEMPLATE,
    )
    states = conditioning["context"]
    # The denoiser takes the layers' states number by number, and not layer by layer.
    by_number = states.unflatten(2, (len(TEXT_LAYERS), -1)).transpose(2, 3).flatten(2)
    return conditioning | {"context": by_number}


def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    size, device = (noisy_latents.shape[2], noisy_latents.shape[3]), noisy_latents.device
    lengths = transformer.text_lengths(conditioning["context_mask"])
    context = conditioning["context"][:, : max(lengths)].to(noisy_latents.dtype)
    mask = None
    if len(set(lengths)) > 1:
        # Created on the device, so that nothing is copied to it in a step.
        places = torch.arange(max(lengths) + math.prod(size), device=device)
        mask = torch.stack([(places < length) | (places >= max(lengths)) for length in lengths])
    # The denoiser orders channels by the place in a patch first, FLUX.2's latents by the VAE's channel.
    patches = noisy_latents.unflatten(1, (-1, flux2.PATCH**2)).transpose(1, 2).flatten(1, 2)
    times = 1 - timesteps.float() / 1000
    velocity = _forward(denoiser, patches.flatten(2).transpose(1, 2), context, times, size, mask)
    channels = velocity.transpose(1, 2).unflatten(1, (flux2.PATCH**2, -1)).transpose(1, 2).flatten(1, 2)
    return -channels.unflatten(2, size)  # the denoiser's velocity is from noise to picture


_SLOW = "Half the usual rate: none was found that somebody has tried on it."


def flow_shift(positions: int) -> float:
    """Return the shift exp(mu), with mu derived from a picture's size by the authors' schedule: 1 for 512 px."""
    return math.sqrt(positions) * flux2.PATCH * 8 / 512


IDEOGRAM4 = FamilySpec(
    names=NAMES,
    title="Ideogram 4",
    overflows_in_fp16=True,  # ComfyUI only computes it in bf16 or float32
    resolution=1024,  # that of most drawn pictures; it was trained for 256 to 2048
    guidance=7.0,  # the authors', as are the steps
    steps=20,
    recipes={
        "fast": replace(short(1e-4, 16, resolution=512), reason=_SLOW),
        "balanced": replace(usual(1e-4, 16, resolution=512), reason=_SLOW),
        "best": STARTING_POINTS["best"],
    },
    pipeline_class="Ideogram4Pipeline",
    text_encoders=TEXT,
    context_from={"text_encoder": len(TEXT_LAYERS)},
    denoiser_targets=transformer.targets(_ATTENTION, _TRANSFORMER),
    in_channels=128,
    denoiser_has=("embed_image_indicator.weight", "layers.0.attention.qkv.weight"),
    split=transformer.splitter(config_of, NAMES, TEXT, flux2.vae),
    build=text.builder(build_denoiser, TEXT, vae=flux2.build_vae, last_norm=False),
    latent_shape=flux2.latent_shape,
    encode_text=encode_text,
    predict=predict,
    flow_shift=flow_shift,
    encode_image=partial(flux2.encode_image, statistics=_statistics),
    decode_latents=partial(flux2.decode_latents, statistics=_statistics),
)
