"""Chroma (lodestones, 2025): an undistilled FLUX.1-schnell whose modulations are made by one small network; 1024 px.

The text encoder is T5-XXL alone.
"""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...tensor_names.flux import CHROMA as NAMES
from .. import attention, text, transformer
from ..ldm import count_children
from ..recipe import STARTING_POINTS, Recipe
from ..spec import DENOISER_PREFIX, Conditioning, Networks, stack_conditioning
from . import flux1

TEXT = {"text_encoder": "t5xxl"}
TEXT_TOKENS = 512
_MODULATOR = "distilled_guidance_layer"
_RENAMES = ((rf"{_MODULATOR}\.norms\.(\d+)\.scale", rf"{_MODULATOR}.norms.\1.weight"),)


def config_of(names: transformer.Names, shape: transformer.Shapes) -> dict[str, Any]:
    width, channels = shape(f"{_MODULATOR}.in_proj.weight")
    return flux1.blocks_config(names, shape, flux1.ROTARY_AXES) | {
        "approximator_num_channels": channels,
        "approximator_hidden_dim": width,
        "approximator_layers": count_children(names, f"{_MODULATOR}.layers"),
    }


def build_denoiser(config: dict[str, Any]) -> nn.Module:
    denoiser = transformer.build("ChromaTransformer2DModel", (0, 34), config)
    attention.use_attention(denoiser, attention.JointAttention())
    denoiser.pos_embed.register_forward_hook(attention.tables_of_flux)
    numbers = denoiser.time_text_embed
    with torch.device("cpu"):
        # Files don't contain the buffers of the modulations, so they must not stay on the meta device.
        numbers = denoiser.time_text_embed = type(numbers)(numbers.time_proj.num_channels, len(numbers.mod_proj))

    def zeros_there(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        """Create the guidance, which is 0, on the right device. diffusers copies it from the computer's memory in each pass."""
        modules = parent()
        assert modules is not None, "it runs within a pass of its parent"
        return torch.zeros_like(inputs[0], device=modules.mod_proj.device)

    parent = weakref.ref(numbers)  # its own part must not keep it alive
    numbers.guidance_proj.register_forward_pre_hook(zeros_there)
    return denoiser


def encode_text(encoders: Networks, captions: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    """Return the states of T5 for each caption and one token of padding, which is masked in T5 but not in the denoiser."""
    encoder = encoders["text_encoder"]
    tokenizer = text.load_tokenizer(encoder.tokenizer_folder, "t5xxl")  # pyright: ignore
    device = next(encoder.parameters()).device
    parts = []
    for caption in captions:
        row = tokenizer(caption, add_special_tokens=True).input_ids[:TEXT_TOKENS]
        tokens, mask = (torch.tensor([values], device=device) for values in ([*row, 0], [1] * len(row) + [0]))
        states = encoder(tokens, attention_mask=mask).last_hidden_state
        parts.append({"context": states, "context_mask": torch.ones_like(tokens)})
    return stack_conditioning(parts)


@transformer.without_padding  # whose mask diffusers' single blocks drop when activations are recomputed
def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    positions = {
        "img_ids": transformer.patch_positions(noisy_latents),
        "txt_ids": torch.zeros(conditioning["context"].shape[1], 3, device=noisy_latents.device),
    }
    return transformer.predicted(denoiser, noisy_latents, timesteps, conditioning, **positions)


CHROMA = replace(
    flux1.FLUX1,
    names=NAMES,
    title="Chroma",
    guidance=5.0,  # diffusers' default, as are the steps
    steps=35,
    # SimpleTuner takes 2e-4, and 1e-4 if that diverges; ai-toolkit 2,000 steps at 1e-4. It isn't distilled as FLUX.1-dev is.
    recipes={**STARTING_POINTS, "best": Recipe(2000, 1e-4, 32)},
    pipeline_class="ChromaPipeline",
    other_pipelines=(),
    text_encoders=TEXT,
    context_from={"text_encoder": 1},
    pooled_from={},
    # img_in distinguishes it from Chroma Radiance, which works on pixels.
    denoiser_has=("img_in.weight", f"{_MODULATOR}.in_proj.weight", "single_blocks.0.linear1.weight"),
    lookalikes={DENOISER_PREFIX + "nerf_blocks.0.norm.scale": "Chroma Radiance"},
    split=transformer.splitter(config_of, NAMES, TEXT, transformer.flux1_vae, _RENAMES),
    build=text.builder(build_denoiser, TEXT),
    encode_text=encode_text,
    image_conditioning=lambda *sizes: {},
    predict=predict,
    training_shift=lambda positions: 1.0,  # sd-scripts doesn't shift it either
    embeds_guidance=lambda config: False,
    is_distilled=lambda config: False,
    distilled_names="flash",
    few_steps=None,
)
