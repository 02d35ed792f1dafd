"""Krea 2 (Krea AI, 2026): a rectified flow with one stream of text and image; 1024 px.

The text encoder is Qwen3-VL-4B. A small transformer of the denoiser joins twelve of its layers. The VAE is Qwen-Image's. Krea
2 Turbo is distilled to eight steps without guidance. It has the same tensors as Krea 2 Raw, so only its name, or
`is_distilled` in a diffusers folder, distinguishes them. Train on Raw, and draw with Turbo.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...storage.stored import LazyTensors, Stored
from ...tensor_names.krea import KREA2 as NAMES
from .. import attention, text, transformer
from ..ldm import count_children
from ..objective import linear_shift
from ..recipe import STARTING_POINTS, short, usual
from ..spec import Component, Conditioning, FamilySpec, FewSteps, Networks
from . import qwen_image

TEXT = {"text_encoder": "qwen3vl_4b"}
TEXT_LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""The layers of the text encoder whose states the denoiser takes."""
_ENDING_TOKENS = 5
"""The number of tokens in the template after the caption, which count as part of it."""
TEXT_TOKENS = 512
"""The most tokens of a caption and of the template after it, as in diffusers' pipeline."""

_RENAMES = (
    (r"blocks\.(\d+)\.mod\.lin", r"transformer_blocks.\1.scale_shift_table"),
    (r"last\.modulation\.lin", "final_layer.scale_shift_table"),
)
_ATTENTION = r"transformer_blocks\.\d+\.attn\.to_([qkv]|gate|out\.0)"
# The layers that read the text, and those of the time, are not adapted, as in the other families.
_TRANSFORMER = rf"{_ATTENTION}|transformer_blocks\.\d+\.ff\.(gate|up|down)"


def config_of(names: transformer.Names, shape: transformer.Shapes) -> dict[str, Any]:
    width, channels = shape("first.weight")
    (head,) = shape("blocks.0.attn.qknorm.qnorm.scale", 1)
    side_axis = 6 * (head // 16)  # as in ComfyUI, for a position's row and for its column
    fusion = "txtfusion.layerwise_blocks.0"
    (text_head,) = shape(f"{fusion}.attn.qknorm.qnorm.scale", 1)
    text_width = shape(f"{fusion}.attn.wq.weight")[1]
    return {
        "in_channels": channels,
        "num_layers": count_children(names, "blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "num_key_value_heads": shape("blocks.0.attn.wk.weight")[0] // head,
        "intermediate_size": shape("blocks.0.mlp.gate.weight")[0],
        "timestep_embed_dim": shape("tmlp.0.weight")[1],
        "text_hidden_dim": text_width,
        "num_text_layers": shape("txtfusion.projector.weight", 1, 2)[-1],
        "text_num_attention_heads": text_width // text_head,
        "text_num_key_value_heads": shape(f"{fusion}.attn.wk.weight")[0] // text_head,
        "text_intermediate_size": shape(f"{fusion}.mlp.gate.weight")[0],
        "num_layerwise_text_blocks": count_children(names, "txtfusion.layerwise_blocks"),
        "num_refiner_text_blocks": count_children(names, "txtfusion.refiner_blocks"),
        "axes_dims_rope": (head - 2 * side_axis, side_axis, side_axis),
    }


_SPLIT = transformer.splitter(config_of, NAMES, TEXT, qwen_image.vae_component, _RENAMES)


def split(tensors: Mapping[str, Tensor]) -> dict[str, Component]:
    parts = _SPLIT(tensors)
    plain = parts["denoiser"]
    readers = {name: Stored(plain.tensors, name) for name in plain.tensors}
    # The original has the six modulations of a block in one row.
    tables = {
        name: partial(_in_rows, plain.tensors, name)
        for name in readers
        if name.startswith("transformer_blocks.") and name.endswith(".scale_shift_table")
    }
    return parts | {"denoiser": Component(plain.config, LazyTensors(readers | tables))}


def _in_rows(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    whole = tensors[name]
    fits = whole.numel() and whole.numel() % 6 == 0  # Loading the network reports another size.
    return whole.reshape(6, -1) if fits else whole


def build_denoiser(config: dict[str, Any]) -> nn.Module:
    denoiser = transformer.build("Krea2Transformer2DModel", (0, 42), config)
    for module in denoiser.modules():
        if type(module).__name__ == "Krea2RMSNorm":
            # The weight is the difference of a scale from 1. Rounding their sum to 16 bits would lose most of it.
            module.register_load_state_dict_post_hook(_in_float32)
    attention.use_attention(denoiser.transformer_blocks, _Attention())
    denoiser.rotary_emb.register_forward_hook(attention.tables_of_flux)
    return denoiser


class _Attention:
    """Attention of a block where several heads of queries share one of keys and values. It replaces diffusers'."""

    def __call__(self, layers: Any, states: Tensor, mask: Tensor | None, tables: attention.Tables) -> Tensor:
        counts = layers.num_heads, layers.num_kv_heads
        (query,) = attention.heads(states, counts[0], layers.to_q)
        key, value = attention.heads(states, counts[1], layers.to_k, layers.to_v)
        gate = layers.to_gate(states)
        both = torch.cat([layers.norm_q(query), layers.norm_k(key)], 2)
        query, key = attention.rotated(both, tables).split(counts, 2)
        if counts[0] > counts[1]:
            key, value = (part.repeat_interleave(counts[0] // counts[1], 2) for part in (key, value))
        mixed = attention.mixed(query, key, value, mask)
        return layers.to_out[0](mixed * torch.sigmoid(gate))


def _in_float32(module: Any, _: object) -> None:
    module.weight = nn.Parameter(module.weight.detach().float(), requires_grad=False)


def encode_text(encoders: Networks, captions: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    conditioning = text.encode_qwen(
        encoders["text_encoder"],
        TEXT["text_encoder"],
        captions,
        qwen_image.TEMPLATE_TOKENS + TEXT_TOKENS - _ENDING_TOKENS,
        layers=TEXT_LAYERS,
        template=qwen_image.TEMPLATE,
    )
    return {name: value[:, qwen_image.TEMPLATE_TOKENS :] for name, value in conditioning.items()}


def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    mask = conditioning["context_mask"].bool()
    layers: int = denoiser.config.num_text_layers  # pyright: ignore
    context = conditioning["context"].unflatten(2, (layers, -1))
    positions = transformer.patch_positions(noisy_latents)
    return transformer.predicted(
        denoiser,
        noisy_latents,
        timesteps,
        {"context": context},
        position_ids=F.pad(positions, (0, 0, context.shape[1], 0)),  # all of the text is at 0
        encoder_attention_mask=mask.to(noisy_latents.device) if not mask.all() else None,
    )


KREA2 = FamilySpec(
    names=NAMES,
    title="Krea 2",
    # diffusers' default, as are the steps. diffusers writes 4.5, which is added to a guidance of 1.
    guidance=5.5,
    steps=28,
    draws_slowly=True,  # Krea advises 52 steps
    # diffusers' example takes rank 32 and 3e-4, and calls up to 7e-4 good; fal takes 5e-4.
    recipes={
        "fast": short(4e-4, 32, resolution=512),
        "balanced": usual(3e-4, 32, resolution=512),
        "best": STARTING_POINTS["best"],
    },
    pipeline_class="Krea2Pipeline",
    text_encoders=TEXT,
    context_from={"text_encoder": len(TEXT_LAYERS)},
    denoiser_targets=transformer.targets(_ATTENTION, _TRANSFORMER),
    in_channels=64,
    denoiser_has=("txtfusion.projector.weight", "blocks.0.attn.wq.weight"),
    split=split,
    build=text.builder(build_denoiser, TEXT, vae=qwen_image.build_vae),
    latent_shape=qwen_image.latent_shape,
    encode_text=encode_text,
    predict=predict,
    flow_shift=linear_shift(6400, 1.15),  # from the authors' scheduler
    few_steps=FewSteps(
        8,
        shift=math.exp(1.15),
        model="krea/Krea-2-Turbo",
        lora="Comfy-Org/Krea-2/krea2_turbo_lora_rank_64_bf16.safetensors",
    ),
    encode_image=qwen_image.encode_image,
    decode_latents=qwen_image.decode_latents,
)
