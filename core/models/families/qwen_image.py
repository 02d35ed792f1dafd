"""Qwen-Image (Alibaba, 2025, arXiv:2508.02324): a rectified flow with blocks of a text and an image stream; 1328 px.

The text encoder is Qwen2.5-VL-7B. The VAE is Wan 2.1's video VAE, and a picture is a video of one frame.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnmatchedKeys
from ...storage.stored import LazyTensors, Stored
from ...tensor_names.qwen import QWEN_IMAGE as NAMES
from .. import attention, text, transformer
from ..ldm import count_children, shapes_in
from ..objective import linear_shift
from ..recipe import STARTING_POINTS, Recipe
from ..spec import DENOISER_PREFIX, Component, Conditioning, FamilySpec, FewSteps, LatentShape, Networks

TEXT = {"text_encoder": "qwen25_7b"}
TEXT_TOKENS = 1024
"""The most tokens of a caption, as in the authors' pipeline."""
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_TOKENS = 34
"""The number of tokens in the template before the caption, whose states are dropped."""
ROTARY_AXES = (16, 56, 56)
"""The widths of the parts of an attention head that are rotated by a position's number, row and column."""

_BLOCK = r"transformer_blocks\.\d+"
_ATTENTION = rf"{_BLOCK}\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
# Modulation layers are not adapted, as in musubi-tuner.
_TRANSFORMER = rf"{_ATTENTION}|{_BLOCK}\.(img|txt)_mlp\.net\.(0\.proj|2)"


def config_of(names: transformer.Names, shape: transformer.Shapes) -> dict[str, Any]:
    width, channels = shape("img_in.weight")
    return {
        "in_channels": channels,
        "out_channels": channels // 4,
        "num_layers": count_children(names, "transformer_blocks"),
        "attention_head_dim": sum(ROTARY_AXES),
        "num_attention_heads": width // sum(ROTARY_AXES),
        "joint_attention_dim": shape("txt_in.weight")[1],
        "axes_dims_rope": ROTARY_AXES,
    }


_VAE_RENAMES = (
    (r"conv1\.", "quant_conv."),
    (r"conv2\.", "post_quant_conv."),
    (r"(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
    (r"(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
    (r"(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
    (r"encoder\.downsamples\.", "encoder.down_blocks."),
)
_VAE_RESNET = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
               "shortcut": "conv_shortcut"}  # fmt: skip


def diffusers_vae_path(path: str, resnets: int) -> str:
    """Return the diffusers name of a tensor of the original VAE. diffusers names are unchanged.

    `resnets` is the number of residual blocks at a resolution of the encoder.
    """
    for pattern, new in _VAE_RENAMES:
        path = re.sub(rf"^{pattern}", new, path)
    if match := re.match(r"decoder\.upsamples\.(\d+)\.(.+)", path):
        # A level of the decoder has one more residual block, and the upsampler.
        level, index = divmod(int(match[1]), resnets + 2)
        block = f"resnets.{index}" if index <= resnets else "upsamplers.0"
        path = f"decoder.up_blocks.{level}.{block}.{match[2]}"
    for original, new in _VAE_RESNET.items():
        path = path.replace(f".{original}.", f".{new}.")
    return path


def vae_component(tensors: Mapping[str, Tensor]) -> Component:
    """Build the VAE, in original or diffusers naming, with a config that follows from the shapes of its tensors."""
    halving = r"encoder\.(?:downsamples|down_blocks)\.(\d+)\.resample\.1\.weight"
    samplers = sorted(int(match[1]) for name in tensors if (match := re.fullmatch(halving, name)))
    if not samplers:
        raise UnmatchedKeys("the VAE is not Qwen-Image's: it lacks encoder.downsamples.….resample.1.weight")
    resnets = samplers[0]
    of_vae = LazyTensors({diffusers_vae_path(name, resnets): Stored(tensors, name) for name in tensors})
    shape = shapes_in(of_vae, "the VAE")

    def width(name: str) -> int:
        return shape(f"{name}.weight", 4, 5)[0]

    base, blocks = width("encoder.conv_in"), count_children(of_vae, "encoder.down_blocks")
    config: dict[str, Any] = {
        "base_dim": base,
        "z_dim": width("post_quant_conv"),
        "dim_mult": [width(f"encoder.down_blocks.{i - 1}.conv2") // base for i in (*samplers, blocks)],
        "num_res_blocks": resnets,
        "temperal_downsample": [f"encoder.down_blocks.{i}.time_conv.weight" in of_vae for i in samplers],
    }
    return Component(config, of_vae)


def build_denoiser(config: dict[str, Any]) -> nn.Module:
    denoiser = transformer.build("QwenImageTransformer2DModel", (0, 37), config)
    with torch.device("cpu"):
        # Files don't contain the rotary embeddings, so they must not stay on the meta device.
        denoiser.pos_embed = type(denoiser.pos_embed)(theta=10000, axes_dim=list(ROTARY_AXES), scale_rope=True)
    attention.use_attention(denoiser, attention.JointAttention())
    denoiser.pos_embed.register_forward_hook(_tables)
    transformer.activate_once(denoiser)
    return denoiser


def _tables(_: nn.Module, __: object, rotations: tuple[Tensor, Tensor]) -> attention.Tables:
    """Build the tables of a text and a picture from their complex rotations."""
    picture, text = rotations
    both = torch.cat([text, picture])
    return attention.tables_of_pairs(both.real, both.imag)


build_vae: Callable[[dict[str, Any]], nn.Module] = partial(transformer.build, "AutoencoderKLQwenImage", (0, 35))


def latent_shape(components: Mapping[str, Component]) -> LatentShape:
    pixels = 2 ** len(components["vae"].config["temperal_downsample"]) if "vae" in components else 8
    channels = components["denoiser"].config["in_channels"] // 4
    return LatentShape(channels, pixels, multiple=2, positions_side=2)


def statistics(vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the deviation (1, C, 1, 1) of the VAE's latents over its training pictures."""
    config: Any = vae.config
    mean, deviation = (
        like.new_tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std)
    )
    return mean, deviation


def encode_image(vae: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    distribution = vae.encode(pixels.unsqueeze(2)).latent_dist  # pyright: ignore
    mean, deviation = statistics(vae, pixels)
    return (distribution.mean.squeeze(2) - mean) / deviation, distribution.std.squeeze(2) / deviation


def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    mean, deviation = statistics(vae, latents)
    return vae.decode((latents * deviation + mean).unsqueeze(2)).sample.squeeze(2)  # pyright: ignore


def encode_text(encoders: Networks, captions: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    texts = [TEMPLATE.format(caption) for caption in captions]
    limit = TEMPLATE_TOKENS + TEXT_TOKENS
    conditioning = text.encode_qwen(encoders["text_encoder"], TEXT["text_encoder"], texts, limit)
    return {name: value[:, TEMPLATE_TOKENS:] for name, value in conditioning.items()}


def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    height, width = noisy_latents.shape[2:]
    mask = conditioning["context_mask"].bool()
    return transformer.predicted(
        denoiser,
        noisy_latents,
        timesteps,
        conditioning,
        encoder_hidden_states_mask=mask.to(noisy_latents.device) if not mask.all() else None,
        img_shapes=[(1, height // 2, width // 2)] * len(noisy_latents),
    )


QWEN_IMAGE = FamilySpec(
    names=NAMES,
    title="Qwen-Image",
    overflows_in_fp16=True,
    resolution=1328,  # the model card's squares
    guidance=4.0,  # diffusers' default, as are the steps
    steps=50,
    # No trainer has a preset for 1328 px, which takes 1.7 times as long.
    recipes={**STARTING_POINTS, "best": Recipe(2400, 1e-4, 32, settings={"resolution": 1024})},
    pipeline_class="QwenImagePipeline",
    text_encoders=TEXT,
    denoiser_targets=transformer.targets(_ATTENTION, _TRANSFORMER),
    in_channels=64,
    denoiser_has=("txt_norm.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
    lookalikes={
        DENOISER_PREFIX + "__index_timestep_zero__": "Qwen-Image-Edit",
        DENOISER_PREFIX + "time_text_embed.addition_t_embedding.weight": "Qwen-Image-Layered",
    },
    split=transformer.splitter(config_of, NAMES, TEXT, vae_component),
    build=text.builder(build_denoiser, TEXT, vae=build_vae),
    latent_shape=latent_shape,
    encode_text=encode_text,
    predict=predict,
    flow_shift=linear_shift(8192, 0.9),  # from the authors' scheduler
    few_steps=FewSteps(8, shift=3.0, lora="lightx2v/Qwen-Image-Lightning/Qwen-Image-Lightning-8steps-V2.0.safetensors"),
    encode_image=encode_image,
    decode_latents=decode_latents,
)
