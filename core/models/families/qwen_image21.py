"""Qwen-Image 2.1 (Alibaba, 2026): a rectified flow with one stream of causal text, then picture; 1024 to 2048 px.

Each text token sees only earlier ones. The text encoder is Qwen3-VL-8B, whose last states are taken before the norm. A picture
of the VAE has a fourth channel, its opacity, and 64 channels of latents at a sixteenth of its sides. The model can also edit
pictures. Here it is trained and drawn with from texts alone.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...storage.stored import LazyTensors, Stored
from ...tensor_names.qwen import QWEN_IMAGE_21 as NAMES
from .. import attention, text, transformer
from ..ldm import count_children, shapes_in
from ..objective import linear_shift
from ..spec import Component, Conditioning, FamilySpec, LatentShape, Networks
from . import qwen_image

TEXT = {"text_encoder": "qwen3vl_8b"}
TEMPLATE = (
    "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
SYSTEM_TOKENS = 14
"""The number of tokens in the template before the user's turn, whose states are dropped."""
TEXT_TOKENS = 1024
"""The most tokens of a caption, as in Qwen-Image. The authors' pipeline sets no limit."""
_USER_TOKENS = 3
"""The number of tokens in the template between the system's turn and the caption."""

_ATTENTION = r"transformer_blocks\.\d+\.attn\.to_([qkv]|out\.0)"
# All blocks share one modulation, which is not adapted, like those of the other families.
_TRANSFORMER = rf"{_ATTENTION}|transformer_blocks\.\d+\.img_mlp\.(gate_layer|proj|out)"


def config_of(names: transformer.Names, shape: transformer.Shapes) -> dict[str, Any]:
    width, channels = shape("img_in.weight")
    (head,) = shape("transformer_blocks.0.attn.norm_q.weight", 1)
    return {
        "in_channels": channels,
        "out_channels": shape("proj_out.weight")[0],
        "num_layers": count_children(names, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "context_in_dim": shape("txt_in.in_layer.weight")[1],
        "mlp_ratio": shape("transformer_blocks.0.img_mlp.out.weight")[1] // width,
        "axes_dims_rope": qwen_image.ROTARY_AXES,
    }


def diffusers_vae_path(path: str, resnets: int) -> str:
    """Return the diffusers name of a tensor of the VAE in ComfyUI's naming. diffusers names are unchanged.

    `resnets` is the number of residual blocks at a resolution of the encoder. The decoder has one more.
    """
    nested = r"(encoder|decoder)\.(down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.+)"
    if match := re.fullmatch(nested, path):
        side, way, level, index, rest = match.groups()
        count = resnets if side == "encoder" else resnets + 1
        block = f"resnets.{index}" if int(index) < count else f"{way}sampler"
        path = f"{side}.{way}_blocks.{level}.{block}.{rest}"
    return qwen_image.diffusers_vae_path(path, resnets)


def vae_component(tensors: Mapping[str, Tensor]) -> Component:
    """Build the VAE, in ComfyUI's or diffusers' naming, with a config that follows from the shapes of its tensors."""
    first_level = r"encoder\.down(?:samples\.0\.downsamples|_blocks\.0\.resnets)\.\d+\.(?:residual\.2|conv1)\.weight"
    resnets = sum(re.fullmatch(first_level, name) is not None for name in tensors)
    stored = {diffusers_vae_path(name, resnets): Stored(tensors, name) for name in tensors}
    of_layer = shapes_in(LazyTensors(stored), "the VAE for Qwen-Image 2.1")

    def shape(layer: str) -> tuple[int, ...]:
        return of_layer(f"{layer}.weight", 4, 5)

    base, levels = shape("encoder.conv_in")[0], count_children(stored, "encoder.down_blocks")
    config: dict[str, Any] = {
        "base_dim": base,
        "decoder_base_dim": shape("decoder.conv_out")[1],
        "z_dim": shape("post_quant_conv")[0],
        "dim_mult": [shape(f"encoder.down_blocks.{level}.resnets.0.conv2")[0] // base for level in range(levels)],
        "num_res_blocks": resnets,
        "temperal_downsample": [
            f"encoder.down_blocks.{level}.downsampler.time_conv.weight" in stored for level in range(levels - 1)
        ],
        "in_channels": shape("encoder.conv_in")[1],
        "out_channels": shape("decoder.conv_out")[0],
        "scale_factor_spatial": 2 ** (levels - 1),
    }
    readers = {name: partial(_of_one_frame, read) for name, read in stored.items()}
    return Component(config, LazyTensors(readers))


def _of_one_frame(read: Stored) -> Tensor:
    """Return a weight of the VAE for pictures. ComfyUI stores weights for videos, with kernels one frame deep."""
    tensor = read()
    return tensor.squeeze(2) if tensor.ndim == 5 else tensor


def build_denoiser(config: dict[str, Any]) -> nn.Module:
    denoiser = transformer.build("QwenImage21Transformer2DModel", (0, 42), config)
    embedding = denoiser.time_text_embed
    with torch.device("cpu"):
        # Files don't contain the frequencies of the time, so they must not stay on the meta device.
        embedding.time_proj = type(embedding.time_proj)(timestep_dim=embedding.timestep_embedder.linear_1.in_features)
    attention.use_attention(denoiser, _Attention())
    return denoiser


def _forward(denoiser: Any, latents: Tensor, context: Tensor, times: Tensor, size: tuple[int, int]) -> Tensor:
    """Predict (B, H W, C) for latents (B, H W, C) of `size` (H, W) and texts (B, L, D) without padding.

    This is the forward pass of diffusers for a text followed by a picture. The original reads the order of texts and pictures
    from a mask, and would wait for a GPU at every step to get its values.
    """
    states = torch.cat([denoiser.txt_in(context), denoiser.img_in(latents)], 1)
    length = context.shape[1]
    is_picture = torch.arange(states.shape[1], device=states.device) >= length
    times = times.to(states.dtype)
    embedded = denoiser.time_text_embed(torch.cat([times, times.new_zeros(1)]), states)  # the text's time is always 0
    rotations = _rotations(length, size, denoiser.config.axes_dims_rope, states.device)
    # In addition to the states: modulation, rotations, mask, which rows are the picture's, three of a cache, texts, valid
    # keys.
    inputs = (denoiser.modulation(embedded), rotations, None, is_picture, None, None, None, [(0, length, True)], None)
    states = transformer.through_blocks(denoiser, denoiser.transformer_blocks, states, *inputs)
    return denoiser.proj_out(denoiser.norm_out(states[:, length:], embedded[:-1]))


class _Attention:
    """Attention of a block: a text attends to what is before it, a picture to everything. It replaces diffusers'."""

    def __call__(
        self,
        layers: Any,
        hidden_states: Tensor,
        *,
        rotary_emb: attention.Tables,
        segments: Sequence[tuple[int, int, bool]],
        **_: object,
    ) -> Tensor:
        length = segments[0][1]  # of the text, the only one
        query, key, value = attention.heads(hidden_states, layers.heads, layers.to_q, layers.to_k, layers.to_v)
        both = torch.cat([layers.norm_q(query), layers.norm_k(key)], 1).unflatten(1, (2, -1))
        query, key = attention.rotated(both, rotary_emb).unbind(1)
        text = attention.mixed(*(part[:, :length] for part in (query, key, value)), causal=True)
        picture = attention.mixed(query[:, length:], key, value)
        return layers.to_out[0](torch.cat([text, picture], 1))


def _rotations(length: int, size: tuple[int, int], axes: Sequence[int], device: torch.device) -> attention.Tables:
    """Return the tables (L + H W, D) that rotate an attention head by each position's frame, row and column.

    A text's tokens have their number on all three axes. A picture's frame is the next number, and its rows and columns are
    counted from its centre.
    """
    tokens = torch.arange(float(length), device=device).unsqueeze(1).expand(-1, 3)
    starts = (length, *(-((side + 1) // 2) for side in size))
    picture = torch.cartesian_prod(
        *(
            torch.arange(start, start + count, dtype=torch.float32, device=device)
            for start, count in zip(starts, (1, *size), strict=True)
        )
    )
    positions = torch.cat([tokens, picture])
    angles = [
        torch.outer(positions[:, axis], 1 / 10000 ** (torch.arange(0, width, 2, device=device) / width))
        for axis, width in enumerate(axes)
    ]
    together = torch.cat(angles, 1)
    return attention.tables_of_pairs(together.cos(), together.sin())


build_vae: Callable[[dict[str, Any]], nn.Module] = partial(transformer.build, "AutoencoderKLQwenImage21", (0, 42))


def latent_shape(components: Mapping[str, Component]) -> LatentShape:
    pixels = 2 ** len(components["vae"].config["temperal_downsample"]) if "vae" in components else 16
    return LatentShape(components["denoiser"].config["in_channels"], pixels, multiple=2)


def encode_image(vae: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    opaque = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
    return qwen_image.encode_image(vae, opaque)


def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    return qwen_image.decode_latents(vae, latents)[:, :3]


def encode_text(encoders: Networks, captions: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    conditioning = text.encode_qwen(
        encoders["text_encoder"],
        TEXT["text_encoder"],
        [caption or " " for caption in captions],
        SYSTEM_TOKENS + _USER_TOKENS + TEXT_TOKENS,
        template=TEMPLATE,
    )
    return {name: value[:, SYSTEM_TOKENS:] for name, value in conditioning.items()}


@transformer.without_padding  # since the place of a picture depends on the length of its text
def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    context = conditioning["context"].to(noisy_latents.dtype)
    height, width = noisy_latents.shape[2:]
    latents = noisy_latents.flatten(2).transpose(1, 2)
    prediction = _forward(denoiser, latents, context, timesteps / 1000, (height, width))
    return prediction.transpose(1, 2).unflatten(2, (height, width))


QWEN_IMAGE_21 = FamilySpec(
    names=NAMES,
    title="Qwen-Image 2.1",
    overflows_in_fp16=True,  # diffusers clips the states to fp16's range
    resolution=1024,  # diffusers' default; the authors recommend sizes of about 2048 x 2048
    size_multiple=32,
    guidance=1.0,  # the authors', as are the steps
    steps=40,
    pipeline_class="QwenImage21Pipeline",
    text_encoders=TEXT,
    denoiser_targets=transformer.targets(_ATTENTION, _TRANSFORMER),
    in_channels=64,
    denoiser_has=("txt_in.text_norm.weight", "transformer_blocks.0.attn.to_q.weight"),
    split=transformer.splitter(config_of, NAMES, TEXT, vae_component),
    build=text.builder(build_denoiser, TEXT, vae=build_vae, last_norm=False),
    latent_shape=latent_shape,
    encode_text=encode_text,
    predict=predict,
    flow_shift=linear_shift(8192, 0.9),  # from the authors' scheduler
    training_adapter="ShootTheSound/Fizgig-Qwen-Image-2.1-Training-Adapter",
    needs_adapter=True,  # By Fizgig's guide: LoRAs collapse into texture, or wobble part-way through.
    encode_image=encode_image,
    decode_latents=decode_latents,
)
