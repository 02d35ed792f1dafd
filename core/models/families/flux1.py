"""FLUX.1 (Black Forest Labs, 2024): a rectified flow with double blocks (image and text streams), then single blocks; 1024 px.

FLUX.1-dev has guidance distilled into it, and takes its scale as an input. The text encoders are T5-XXL and, for pooled text,
CLIP ViT-L/14.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...tensor_names.flux import FLUX1 as NAMES
from .. import attention, clip, text, transformer
from ..ldm import count_children
from ..objective import linear_shift
from ..recipe import Recipe, short, usual
from ..spec import DENOISER_PREFIX, Conditioning, FamilySpec, FewSteps, Networks

TEXT_TOKENS = 512
"""The number of T5 tokens that FLUX.1-dev was trained with. Captions are padded to it."""
TEXT = {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}
ROTARY_AXES = (16, 56, 56)
"""The widths of the parts of an attention head that are rotated by a position's number, row and column."""

BLOCK_WEIGHTS = (
    "double_blocks.0.img_mod.lin.weight",
    "double_blocks.0.img_mlp.0.weight",
    "single_blocks.0.linear1.weight",
)
"""Tensors of its blocks, which LongCat-Image has too."""
TEXT_WEIGHT = "vector_in.in_layer.weight"
"""A tensor of the pooled text's embedding."""

_BLOCK, _SINGLE = r"transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"
_ATTENTION = (
    rf"{_BLOCK}\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|{_SINGLE}\.(attn\.to_[qkv]|proj_mlp|proj_out)"
)
_TRANSFORMER = (
    rf"{_ATTENTION}|{_BLOCK}\.(ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)|{_SINGLE}\.norm\.linear"
)


def blocks_config(names: transformer.Names, shape: transformer.Shapes, axes: tuple[int, ...]) -> dict[str, Any]:
    """Return the part of the denoiser's config that follows from its blocks, which Chroma and FLUX.2 share.

    `axes` are the widths of the parts of an attention head, each rotated by one number of a position.
    """
    width, channels = shape("img_in.weight")
    return {
        "in_channels": channels,
        "num_layers": count_children(names, "double_blocks"),
        "num_single_layers": count_children(names, "single_blocks"),
        "attention_head_dim": sum(axes),
        "num_attention_heads": width // sum(axes),
        "joint_attention_dim": shape("txt_in.weight")[1],
        "axes_dims_rope": axes,
    }


def config_of(names: transformer.Names, shape: transformer.Shapes) -> dict[str, Any]:
    return blocks_config(names, shape, ROTARY_AXES) | {
        "pooled_projection_dim": shape(TEXT_WEIGHT)[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in names,
    }


def build_denoiser(
    config: dict[str, Any],
    name: str = "FluxTransformer2DModel",
    version: tuple[int, int] = (0, 30),
    embedding: str = "time_text_embed",
) -> nn.Module:
    denoiser = transformer.build(name, version, config)
    attention.use_attention(denoiser, attention.JointAttention())
    denoiser.pos_embed.register_forward_hook(attention.tables_of_flux)
    transformer.activate_once(denoiser, embedding)
    return denoiser


def encode_text(encoders: Networks, captions: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    tokens = clip.token_chunks(captions, 1, clip.END)  # pooled text is that of the first 75 tokens
    _, output = clip.encode_chunks(encoders["text_encoder"], tokens, layer=1, final_norm=True)
    context = text.encode_t5(encoders["text_encoder_2"], captions, TEXT_TOKENS)
    return {"context": context, "pooled": output.pooler_output}


def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    return transformer.predicted(
        denoiser,
        noisy_latents,
        timesteps,
        conditioning,
        pooled_projections=conditioning["pooled"].to(noisy_latents.dtype),
        img_ids=transformer.patch_positions(noisy_latents),
        txt_ids=torch.zeros(conditioning["context"].shape[1], 3, device=noisy_latents.device),
        guidance=conditioning["guidance"] if denoiser.config.guidance_embeds else None,  # pyright: ignore
    )


FLUX1 = FamilySpec(
    names=NAMES,
    title="FLUX.1",
    guidance=3.5,  # diffusers' default, as are the steps
    steps=28,
    recipes={
        # Replicate's trainer: 1,000 steps of one photo at 4e-4, 512 to 1024 px. ai-toolkit, for `best`: 2,000 at 1e-4.
        "fast": short(4e-4, 16, resolution=512),
        "balanced": usual(4e-4, 16, resolution=512),
        "best": Recipe(1600, 2e-4, 32),
    },
    pipeline_class="FluxPipeline",
    other_pipelines=(
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlPipeline",
    ),
    text_encoders=TEXT,
    context_from={"text_encoder_2": 1},
    pooled_from={"text_encoder": 1},
    usual_tokens=256,
    denoiser_targets=transformer.targets(_ATTENTION, _TRANSFORMER),
    in_channels=64,
    # The modulation in its blocks distinguishes it from FLUX.2 and Chroma, the pooled text from models derived from it.
    denoiser_has=(*BLOCK_WEIGHTS, TEXT_WEIGHT),
    lookalikes={DENOISER_PREFIX + "txt_in.individual_token_refiner.blocks.0.norm1.weight": "HunyuanVideo"},
    split=transformer.splitter(config_of, NAMES, TEXT, transformer.flux1_vae),
    build=text.builder(build_denoiser, TEXT),
    latent_shape=partial(transformer.patch_latent_shape, patched=True),
    encode_text=encode_text,
    # At a guidance of 1 it predicts what its teacher did without guidance, so a LoRA does not undo the distillation.
    # sd-scripts and ai-toolkit train with 1 too.
    image_conditioning=lambda *sizes: {"guidance": torch.tensor([1.0])},
    predict=predict,
    flow_shift=linear_shift(4096, 1.15),  # from FLUX.1-dev's scheduler
    embeds_guidance=lambda config: config["guidance_embeds"],
    is_distilled=lambda config: not config["guidance_embeds"],  # schnell, distilled to four steps, takes no guidance
    training_adapter="ostris/FLUX.1-schnell-training-adapter",
    few_steps=FewSteps(4, shift=1.0, model="black-forest-labs/FLUX.1-schnell"),
)
