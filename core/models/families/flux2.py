"""FLUX.2 (Black Forest Labs, 2025): a rectified flow with FLUX.1's blocks and one modulation for all of a kind; 1024 px.

Three layers of the text encoder are used side by side: of Qwen3 for klein, of Mistral Small 3.2 for dev. dev also takes its
guidance scale as an input.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...storage.stored import LazyTensors, Stored
from ...tensor_names.flux import FLUX2 as NAMES
from .. import attention, text, transformer
from ..ldm import kl_pixels, shapes_in, vae_component
from ..recipe import Recipe, short, usual
from ..spec import Component, Conditioning, FamilySpec, FewSteps, LatentShape, Networks
from . import flux1

TEXT_TOKENS = 512
"""The number of tokens that the whole chat is padded to. The denoiser sees the padding."""
TEXT_LAYERS = (9, 18, 27)
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""The form of a chat with one question in Qwen3, with thinking turned off."""
DEV_CHAT = (
    "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation.[/SYSTEM_PROMPT][INST]{}[/INST]"
)
"""The form of a chat with one question in Mistral Small 3.2, with the system prompt of dev's training."""

TEXT, LARGER_TEXT, DEV_TEXT = {"text_encoder": "qwen3_4b"}, "qwen3_8b", "mistral3_24b"
"""The text encoders of klein 4B, of klein 9B (a larger network of the same form), and of dev."""
ROTARY_AXES = (32, 32, 32, 32)
"""The widths of the parts of an attention head that are rotated by a position's picture, row, column and word."""
PATCH = 2
"""The number of the VAE's latents along a side of one of the denoiser's."""

_BLOCK, _SINGLE = r"transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"
_ATTENTION = (
    rf"{_BLOCK}\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|{_SINGLE}\.attn\.(to_qkv_mlp_proj|to_out)"
)
_TRANSFORMER = rf"{_ATTENTION}|{_BLOCK}\.ff(_context)?\.linear_(in|out)"


def config_of(names: transformer.Names, shape: transformer.Shapes) -> dict[str, Any]:
    width, inner = shape("double_blocks.0.img_mlp.2.weight")
    return flux1.blocks_config(names, shape, ROTARY_AXES) | {
        "mlp_ratio": inner / width,
        "guidance_embeds": "guidance_in.in_layer.weight" in names,
    }


def split(tensors: Mapping[str, Tensor]) -> dict[str, Component]:
    kinds = next(({"text_encoder": kind} for kind in (LARGER_TEXT, DEV_TEXT) if text.has(tensors, kind)), TEXT)
    return transformer.splitter(config_of, NAMES, kinds, vae)(tensors)


def vae(tensors: Mapping[str, Tensor]) -> Component:
    """Return the KL VAE, with the mean and variance (128,) for normalising its latents: 32 channels of two by two latents."""
    # In some files the names of the convolutions between encoder and decoder are nested in these.
    readers = {
        re.sub(r"^(encoder|decoder)\.((post_)?quant_conv\.)", r"\2", name): Stored(tensors, name) for name in tensors
    }
    plain = vae_component(LazyTensors(readers), latent_scale=1.0)
    config = {name: value for name, value in plain.config.items() if name not in ("scaling_factor", "shift_factor")}
    # The widths of the decoder are read separately, since one version has a narrower decoder.
    levels = reversed(range(len(config["block_out_channels"])))
    firsts = [f"decoder.up_blocks.{level}.resnets.0.conv1.weight" for level in levels]
    shape = shapes_in(plain.tensors, "the VAE")
    config["decoder_block_out_channels"] = tuple(shape(name, 4)[0] for name in firsts)
    tensors_of_vae = {name: Stored(plain.tensors, name) for name in plain.tensors}
    statistics = {name: readers[name] for name in ("bn.running_mean", "bn.running_var") if name in readers}
    counter = {"bn.num_batches_tracked": lambda: torch.tensor(0)}
    return Component(config, LazyTensors(tensors_of_vae | statistics | counter))


def build_denoiser(config: dict[str, Any]) -> nn.Module:
    denoiser = transformer.build("Flux2Transformer2DModel", (0, 37), config)
    attention.use_attention(denoiser.transformer_blocks, attention.JointAttention())
    attention.use_attention(denoiser.single_transformer_blocks, _SingleAttention())
    denoiser.pos_embed.register_forward_hook(attention.tables_of_flux)
    return denoiser


class _SingleAttention:
    """Attention of a single block, parallel to its feed-forward layers. It replaces diffusers'."""

    def __call__(self, layers: Any, states: Tensor, mask: Tensor | None, tables: attention.Tables) -> Tensor:
        both = layers.to_qkv_mlp_proj(states)
        *parts, wide = both.split([layers.inner_dim] * 3 + [both.shape[-1] - 3 * layers.inner_dim], -1)
        query, key, value = (part.unflatten(-1, (layers.heads, -1)) for part in parts)
        query, key = layers.norm_q(query), layers.norm_k(key)
        mixed = attention.attend([query], [key], [value], tables, mask)
        return layers.to_out(torch.cat([mixed, layers.mlp_act_fn(wide)], -1))


build_vae: Callable[[dict[str, Any]], nn.Module] = partial(transformer.build, "AutoencoderKLFlux2", (0, 37))


def latent_shape(components: Mapping[str, Component]) -> LatentShape:
    return LatentShape(components["denoiser"].config["in_channels"], PATCH * kl_pixels(components), multiple=1)


def statistics(vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the deviation (1, C, 1, 1) of the latents over the VAE's training pictures."""
    bn: Any = vae.bn
    return bn.running_mean.view(1, -1, 1, 1), torch.sqrt(bn.running_var + bn.eps).view(1, -1, 1, 1)


_Statistics = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


def encode_image(vae: nn.Module, pixels: Tensor, statistics: _Statistics = statistics) -> tuple[Tensor, Tensor]:
    distribution = vae.encode(pixels).latent_dist  # pyright: ignore
    mean, deviation = statistics(vae, pixels)
    means, deviations = (F.pixel_unshuffle(part, PATCH) for part in (distribution.mean, distribution.std))
    return (means - mean) / deviation, deviations / deviation


def decode_latents(vae: nn.Module, latents: Tensor, statistics: _Statistics = statistics) -> Tensor:
    mean, deviation = statistics(vae, latents)
    return vae.decode(F.pixel_shuffle(latents * deviation + mean, PATCH)).sample  # pyright: ignore


def encode_text(encoders: Networks, captions: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    encoder: Any = encoders["text_encoder"]
    if encoder.config.model_type == "mistral":
        chats = [DEV_CHAT.format(caption) for caption in captions]
        return text.encode_qwen(encoder, DEV_TEXT, chats, TEXT_TOKENS, layers=(10, 20, 30))
    chats = [CHAT.format(caption) for caption in captions]
    states = text.encode_qwen(
        encoder, TEXT["text_encoder"], chats, TEXT_TOKENS, layers=TEXT_LAYERS, multiple=TEXT_TOKENS
    )
    return {"context": states["context"]}


def texts_at_the_end(conditioning: Conditioning) -> Tensor:
    """Return the states (B, 512, D) of texts moved to the end of 512 tokens, with zeros before them, as ComfyUI draws dev.

    Texts that already have this length, like klein's, or that have no mask, are unchanged.
    """
    context = conditioning["context"]
    room = TEXT_TOKENS - context.shape[1]
    if room <= 0 or "context_mask" not in conditioning:
        return context
    lengths = transformer.text_lengths(conditioning["context_mask"])
    return torch.stack(
        [F.pad(row[:length], (0, 0, TEXT_TOKENS - length, 0)) for row, length in zip(context, lengths, strict=True)]
    )


def predicted(
    denoiser: nn.Module, latents: Tensor, timesteps: Tensor, context: Tensor, picture_scale: float = 1.0, **more: Any
) -> Tensor:
    """Predict with the text's states (B, L, D). `picture_scale` is the distance between a picture's rows as positions.

    `more` are other arguments of diffusers' network.
    """
    size, device = (latents.shape[2], latents.shape[3]), latents.device
    positions = denoiser(
        latents.flatten(2).transpose(1, 2),
        encoder_hidden_states=context.to(latents.dtype),
        timestep=timesteps / 1000,
        img_ids=F.pad(picture_scale * transformer.grid_positions(*size, device), (0, 1)),
        txt_ids=F.pad(torch.arange(float(context.shape[1]), device=device)[:, None], (3, 0)),
        return_dict=False,
        **more,
    )[0]
    return positions.transpose(1, 2).unflatten(2, size)


def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    guidance = conditioning["guidance"] if denoiser.config.guidance_embeds else None  # pyright: ignore
    return predicted(denoiser, noisy_latents, timesteps, texts_at_the_end(conditioning), guidance=guidance)


STEPS = 50


def flow_shift(positions: int) -> float:
    """Return the shift exp(mu), with the mu that Black Forest Labs fitted to positions and sampling steps, for STEPS steps."""
    of_10, of_200 = 8.73809524e-05 * positions + 1.89833333, 0.00016927 * positions + 0.45666666
    if positions > 4300:
        return math.exp(of_200)
    return math.exp(of_200 + (of_10 - of_200) * (200 - STEPS) / 190)


FLUX2 = FamilySpec(
    names=NAMES,
    title="FLUX.2",
    guidance=4.0,  # diffusers' default, as are the steps
    steps=STEPS,
    # A workshop on faces takes rank 32 and 2e-4 for klein 4B; ai-toolkit and musubi-tuner 1e-4 for larger ones too.
    recipes={
        "fast": short(1.5e-4, 32, resolution=512),
        "balanced": usual(1.5e-4, 32, resolution=512),
        "best": Recipe(2400, 1e-4, 32),
    },
    pipeline_class="Flux2KleinPipeline",
    other_pipelines=("Flux2Pipeline",),
    other_folders=("Flux2Pipeline",),
    text_encoders=TEXT,
    other_text_kinds=(LARGER_TEXT, DEV_TEXT),
    context_from={"text_encoder": len(TEXT_LAYERS)},
    usual_tokens=TEXT_TOKENS,
    denoiser_targets=transformer.targets(_ATTENTION, _TRANSFORMER),
    in_channels=128,
    denoiser_has=("double_stream_modulation_img.lin.weight", "single_blocks.0.linear1.weight"),
    split=split,
    build=text.builder(build_denoiser, TEXT, vae=build_vae),
    latent_shape=latent_shape,
    encode_text=encode_text,
    image_conditioning=flux1.FLUX1.image_conditioning,  # the guidance input of dev during training
    predict=predict,
    flow_shift=flow_shift,
    # That of OneTrainer and musubi-tuner. With the authors', 4 % of the steps would see more picture than noise.
    training_shift=flux1.FLUX1.flow_shift,
    encode_image=encode_image,
    decode_latents=decode_latents,
    embeds_guidance=flux1.FLUX1.embeds_guidance,
    distilled_names="klein(?!.*base)",
    few_steps=FewSteps(4),
)
