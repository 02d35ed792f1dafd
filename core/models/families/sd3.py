"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206): a rectified flow with joint blocks of image and text streams; 1024 px.

The text encoders are CLIP ViT-L/14, OpenCLIP ViT-bigG/14 and T5-XXL. T5 is optional, because it was dropped at random in the
models' own training.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...tensor_names.sd3 import SD3 as NAMES
from .. import clip, text, transformer
from ..ldm import count_children, vae_component
from ..recipe import Recipe, short, usual
from ..spec import Conditioning, FamilySpec, FewSteps, Networks

TEXT_TOKENS = 256
"""The number of T5 tokens that captions are padded to, as in diffusers and sd-scripts."""
CONTEXT_WIDTH = 4096
"""The width of T5-XXL. The states of CLIP are padded to it with zeros."""

TEXT = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
HEAD_WIDTH = 64

_VAE = partial(vae_component, latent_scale=1.5305, latent_shift=0.0609, quant_conv=False)
_BLOCK = r"transformer_blocks\.\d+"
_ATTENTION = rf"{_BLOCK}\.(attn2?\.(to_[qkv]|to_out\.0)|attn\.(add_[qkv]_proj|to_add_out))"
_TRANSFORMER = rf"{_ATTENTION}|{_BLOCK}\.(ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"


def config_of(names: transformer.Names, shape: transformer.Shapes) -> dict[str, Any]:
    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    layers = count_children(names, "joint_blocks")
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape("final_layer.linear.weight")[0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": HEAD_WIDTH,
        "num_attention_heads": width // HEAD_WIDTH,
        "joint_attention_dim": shape("context_embedder.weight")[1],
        "caption_projection_dim": shape("context_embedder.weight")[0],
        "pooled_projection_dim": shape("y_embedder.mlp.0.weight")[1],
        "pos_embed_max_size": round(shape("pos_embed", 2, 3)[-2] ** 0.5),
        # The first blocks of SD3.5 Medium have a second attention, on the image alone.
        "dual_attention_layers": tuple(
            layer for layer in range(layers) if f"joint_blocks.{layer}.x_block.attn2.qkv.weight" in names
        ),
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in names else None,
    }


def build_denoiser(config: dict[str, Any]) -> nn.Module:
    denoiser = transformer.build("SD3Transformer2DModel", (0, 29), config)
    transformer.activate_once(denoiser)
    return denoiser


def encode_text(encoders: Networks, captions: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    # Both CLIPs use the second to last layer, as in the models' training. The second CLIP pads with 0.
    states, pooled = [], []
    for part, padding in (("text_encoder", clip.END), ("text_encoder_2", 0)):
        tokens = clip.token_chunks(captions, chunks, padding)
        of_clip, output = clip.encode_chunks(encoders[part], tokens, layer=2, final_norm=False)
        states.append(of_clip)
        pooled.append(clip.pooled(output).reshape(len(captions), chunks, -1)[:, 0])
    clips = torch.cat(states, dim=-1)
    if "text_encoder_3" in encoders:
        of_t5 = text.encode_t5(encoders["text_encoder_3"], captions, TEXT_TOKENS).to(clips)
    else:
        of_t5 = clips.new_zeros(len(captions), TEXT_TOKENS, CONTEXT_WIDTH)
    clips = F.pad(clips, (0, of_t5.shape[2] - clips.shape[2]))
    return {"context": torch.cat([clips, of_t5], dim=1), "pooled": torch.cat(pooled, dim=-1)}


def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    return denoiser(
        noisy_latents,
        encoder_hidden_states=conditioning["context"].to(noisy_latents.dtype),
        pooled_projections=conditioning["pooled"].to(noisy_latents.dtype),
        timestep=timesteps,
        return_dict=False,
    )[0]


SD3 = FamilySpec(
    names=NAMES,
    title="Stable Diffusion 3",
    guidance=4.5,  # from SD3.5 Medium's model card, as are the steps
    steps=40,
    recipes={
        # diffusers takes 1e-4 at 1024 px and 4e-4 at 512 px, ai-toolkit 1e-4.
        "fast": short(2e-4, 32, least=500, resolution=768),
        "balanced": usual(2e-4, 32, resolution=768),
        "best": Recipe(2000, 1e-4, 32),
    },
    pipeline_class="StableDiffusion3Pipeline",
    text_encoders=TEXT,
    context_from={"text_encoder_3": 1},
    pooled_from={"text_encoder": 1, "text_encoder_2": 1},
    optional_encoders=("text_encoder_3",),
    usual_tokens=2 * 77,
    denoiser_targets=transformer.targets(_ATTENTION, _TRANSFORMER),
    in_channels=16,
    denoiser_has=("joint_blocks.0.x_block.attn.qkv.weight",),
    split=transformer.splitter(config_of, NAMES, TEXT, _VAE, renames=(("pos_embed", "pos_embed.pos_embed"),)),
    build=text.builder(build_denoiser, TEXT),
    latent_shape=transformer.patch_latent_shape,
    encode_text=encode_text,
    predict=predict,
    # The authors' for 1024 px (arXiv:2403.03206, section 5.3.2), for all sizes as in SD3.5's scheduler and sd-scripts.
    flow_shift=lambda positions: 3.0,
    few_steps=FewSteps(4),
)
