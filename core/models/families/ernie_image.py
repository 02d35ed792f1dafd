"""ERNIE-Image (Baidu, 2026): a rectified flow with one stream of image and text, modulated alike in all layers; 1024 px.

The text encoder is Ministral 3 3B, and the VAE is FLUX.2's. ERNIE-Image-Turbo is distilled to eight steps without guidance. It
has the same tensors, so only its name distinguishes it from the base model. Train on the base model, and draw with either.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...tensor_names.ernie import ERNIE_IMAGE as NAMES
from .. import attention, text, transformer
from ..ldm import count_children
from ..spec import Conditioning, FamilySpec, FewSteps, Networks
from . import flux2

TEXT = {"text_encoder": "ministral3_3b"}
TEXT_TOKENS = 2048
"""The most tokens of a caption: as many as the authors' prompt enhancer writes in ComfyUI."""
ROTARY_AXES = (32, 48, 48)
"""The widths of the parts of an attention head that are rotated by a position's word, row and column."""

_ATTENTION = r"layers\.\d+\.self_attention\.to_([qkv]|out\.0)"
_TRANSFORMER = rf"{_ATTENTION}|layers\.\d+\.mlp\.(gate_proj|up_proj|linear_fc2)"


def config_of(names: transformer.Names, shape: transformer.Shapes) -> dict[str, Any]:
    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    return {
        "hidden_size": width,
        "num_attention_heads": width // sum(ROTARY_AXES),
        "num_layers": count_children(names, "layers"),
        "ffn_hidden_size": shape("layers.0.mlp.gate_proj.weight")[0],
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": patch,
        "text_in_dim": shape("text_proj.weight")[1],
        "rope_axes_dim": ROTARY_AXES,
    }


def build_denoiser(config: dict[str, Any]) -> nn.Module:
    denoiser = transformer.build("ErnieImageTransformer2DModel", (0, 38), config)
    attention.use_attention(denoiser, attention.StreamAttention(halves=True))
    # Both tables as one (B, S, 2, D), from angles (B, S, 1, D).
    denoiser.pos_embed.register_forward_hook(lambda _, __, angles: torch.cat(attention.tables_of_halves(angles), -2))
    return denoiser


def encode_text(encoders: Networks, captions: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    texts = [f"<s>{caption}" for caption in captions]
    return text.encode_qwen(encoders["text_encoder"], TEXT["text_encoder"], texts, TEXT_TOKENS, layers=(-2,))


def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    lengths = transformer.text_lengths(conditioning["context_mask"])
    return denoiser(
        noisy_latents,
        timesteps,
        conditioning["context"].to(noisy_latents.dtype),
        # Created on the device, so that nothing is copied to it in a step.
        torch.cat([torch.full((1,), length, device=noisy_latents.device) for length in lengths]),
        return_dict=False,
    )[0]


ERNIE_IMAGE = FamilySpec(
    names=NAMES,
    title="ERNIE-Image",
    overflows_in_fp16=True,  # ComfyUI only computes it in bf16 or float32
    guidance=4.0,  # diffusers' default, as are the steps
    steps=50,
    pipeline_class="ErnieImagePipeline",
    text_encoders=TEXT,
    denoiser_targets=transformer.targets(_ATTENTION, _TRANSFORMER),
    in_channels=128,
    denoiser_has=("layers.0.mlp.linear_fc2.weight", "x_embedder.proj.weight"),
    split=transformer.splitter(config_of, NAMES, TEXT, flux2.vae),
    build=text.builder(build_denoiser, TEXT, vae=flux2.build_vae),
    latent_shape=flux2.latent_shape,
    encode_text=encode_text,
    predict=predict,
    flow_shift=lambda positions: 3.0,  # that of ComfyUI and ai-toolkit
    training_shift=lambda positions: 2.0,  # as for Z-Image
    few_steps=FewSteps(8, model="baidu/ERNIE-Image-Turbo"),
    encode_image=flux2.encode_image,
    decode_latents=flux2.decode_latents,
)
