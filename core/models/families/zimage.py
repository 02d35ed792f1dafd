"""Z-Image (Alibaba, 2025): a rectified flow with one stream of text and image after a refiner for each; 1024 px.

The text encoder is Qwen3-4B. Z-Image-Turbo is distilled to eight steps without guidance. It has the same tensors, so only its
name distinguishes it from the base model. A LoRA trained on Turbo undoes the distillation. Train on the base model, or on
Turbo with a training adapter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...tensor_names.lumina import ZIMAGE as NAMES
from .. import attention, text, transformer
from ..ldm import count_children
from ..spec import DENOISER_PREFIX, Conditioning, FamilySpec, FewSteps, Networks

TEXT = {"text_encoder": "qwen3_4b"}
TEXT_TOKENS = 512
"""The most tokens of a caption and its template, as in the authors' pipeline."""
_TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
ROTARY_AXES, ROTARY_LENGTHS = (32, 48, 48), (1536, 512, 512)
"""The widths of the parts of an attention head rotated by a position's number, row and column, and the maximum of each."""

_ATTENTION = r"layers\.\d+\.attention\.to_([qkv]|out\.0)"
# Refiners and modulation layers are not adapted, as in musubi-tuner.
_TRANSFORMER = rf"{_ATTENTION}|layers\.\d+\.feed_forward\.w[123]"


def config_of(names: transformer.Names, shape: transformer.Shapes) -> dict[str, Any]:
    width, patch = shape("x_embedder.weight")
    heads = width // sum(ROTARY_AXES)
    return {
        "in_channels": patch // 4,
        "dim": width,
        "n_layers": count_children(names, "layers"),
        "n_refiner_layers": count_children(names, "noise_refiner"),
        "n_heads": heads,
        "n_kv_heads": heads,
        "cap_feat_dim": shape("cap_embedder.1.weight")[1],
        "axes_dims": ROTARY_AXES,
        "axes_lens": ROTARY_LENGTHS,
    }


def build_denoiser(config: dict[str, Any]) -> nn.Module:
    denoiser = transformer.build("ZImageTransformer2DModel", (0, 36), config)
    attention.use_attention(denoiser, attention.StreamAttention())
    rotations_of = denoiser.rope_embedder

    def tables_of(positions: Tensor) -> Tensor:
        """Return the tables (S, 2, D) of positions (S, 3), instead of diffusers' complex numbers."""
        rotations = rotations_of(positions)
        return torch.stack(attention.tables_of_pairs(rotations.real, rotations.imag), -2)

    denoiser.rope_embedder = tables_of
    return denoiser


def encode_text(encoders: Networks, captions: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    texts = [_TEMPLATE.format(caption) for caption in captions]
    return text.encode_qwen(encoders["text_encoder"], TEXT["text_encoder"], texts, TEXT_TOKENS, layers=(-2,))


def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    context = conditioning["context"].to(noisy_latents.dtype)
    lengths = transformer.text_lengths(conditioning["context_mask"])
    # Its time runs from 0 (noise) to 1 (picture), so the velocity has the opposite sign.
    velocities = denoiser(
        list(noisy_latents.unsqueeze(2)),
        1 - timesteps / 1000,
        [states[:length] for states, length in zip(context, lengths, strict=True)],
        return_dict=False,
    )[0]
    return -torch.stack(velocities).squeeze(2)


ZIMAGE = FamilySpec(
    names=NAMES,
    title="Z-Image",
    overflows_in_fp16=True,
    guidance=5.0,  # diffusers' default, as are the steps
    steps=50,
    draws_slowly=True,
    pipeline_class="ZImagePipeline",
    text_encoders=TEXT,
    denoiser_targets=transformer.targets(_ATTENTION, _TRANSFORMER),
    in_channels=16,
    # Lumina 2 has an activation instead of this modulation layer, and no padding token.
    denoiser_has=("layers.0.adaLN_modulation.0.weight", "layers.0.attention.qkv.weight", "cap_pad_token"),
    lookalikes={
        DENOISER_PREFIX + "noise_refiner.0.adaLN_modulation.1.weight": "Lumina 2",
        DENOISER_PREFIX + "siglip_embedder.1.weight": "Z-Image-Omni",
    },
    # Some files have an unused norm from Lumina 2.
    split=transformer.splitter(config_of, NAMES, TEXT, transformer.flux1_vae, left_out=r"^norm_final\."),
    build=text.builder(build_denoiser, TEXT),
    latent_shape=transformer.patch_latent_shape,
    encode_text=encode_text,
    predict=predict,
    # The shift in ComfyUI and in Turbo's scheduler. The base model's scheduler has 6.
    flow_shift=lambda positions: 3.0,
    training_shift=lambda positions: 2.0,  # between musubi-tuner's users, who don't shift, and the authors
    training_adapter="ostris/zimage_turbo_training_adapter",
    # No model to draw on: users report that a LoRA of the base model needs twice the strength on Turbo.
    few_steps=FewSteps(8),
)
