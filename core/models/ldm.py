"""The UNet and the VAE of SD1.x and SDXL, from an original (LDM) checkpoint."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import UnknownFamily, UnmatchedKeys
from ..storage.stored import LazyTensors, Stored, shape_of, stored_under
from ..tensor_names.unet import diffusers_unet_path, inverse, ldm_unet_path, replace_head
from .attention import heads, mixed
from .packages import import_diffusers
from .spec import DENOISER_PREFIX, Component, FewSteps, LatentShape

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_OUTSIDE_BLOCKS = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
}


def ldm_vae_path(path: str, levels: int = 4) -> str:
    """Return the original name of a VAE module or tensor. `levels` is the number of resolutions (4 in SD1.x and SDXL)."""
    side, _, rest = path.partition(".")
    if side not in ("encoder", "decoder"):
        return path
    if match := re.match(r"(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)", rest):
        level, kind, index, tail = int(match[1]), *match.groups()[1:]
        block = f"down.{level}" if side == "encoder" else f"up.{levels - 1 - level}"
        if kind == "resnets":
            return f"{side}.{block}.block.{index}.{replace_head(tail, {'conv_shortcut': 'nin_shortcut'})}"
        return f"{side}.{block}.{kind.removesuffix('rs')}.{tail}"
    rest = replace_head(rest, _VAE_OUTSIDE_BLOCKS)
    if rest.startswith("mid.attn_1."):
        rest = "mid.attn_1." + replace_head(rest.removeprefix("mid.attn_1."), _VAE_ATTENTION)
    return f"{side}.{rest}"


def diffusers_vae_path(path: str, levels: int = 4) -> str:
    """Return the diffusers name of an original VAE module or tensor. It inverts `ldm_vae_path`, and keeps diffusers names."""
    side, _, rest = path.partition(".")
    if side not in ("encoder", "decoder"):
        return path
    if match := re.match(r"(?:down|up)\.(\d+)\.(?:block\.(\d+)|(downsample|upsample))\.(.+)", rest):
        level, index, sampler, tail = int(match[1]), *match.groups()[1:]
        block = f"down_blocks.{level}" if side == "encoder" else f"up_blocks.{levels - 1 - level}"
        if sampler:
            return f"{side}.{block}.{sampler}rs.0.{tail}"
        return f"{side}.{block}.resnets.{index}.{replace_head(tail, {'nin_shortcut': 'conv_shortcut'})}"
    if rest.startswith("mid.attn_1."):
        rest = "mid.attn_1." + replace_head(rest.removeprefix("mid.attn_1."), inverse(_VAE_ATTENTION))
    return f"{side}.{replace_head(rest, inverse(_VAE_OUTSIDE_BLOCKS))}"


def current_vae_path(path: str) -> str:
    """Return today's diffusers name of a VAE's tensor, which may have the name of an old diffusers version."""
    head, attention, tail = path.rpartition(".attentions.0.")
    current = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return head + attention + replace_head(tail, current)


def count_children(names: Iterable[str], prefix: str) -> int:
    """Count the numbered children of `prefix`: 1 + the largest n in `<prefix>.<n>.…`, or 0 without any."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    numbers = [int(match[1]) for name in names if (match := pattern.match(name))]
    return max(numbers, default=-1) + 1


def shapes_in(tensors: Mapping[str, Tensor], what: str) -> Callable[..., tuple[int, ...]]:
    """Return a function that looks up a tensor's shape by its name and the allowed numbers of dimensions, 2 by default.

    It raises UnmatchedKeys, about `what`, if the tensor is missing, has another number of dimensions, or is empty.
    """

    def shape(name: str, *dimensions: int) -> tuple[int, ...]:
        if name not in tensors:
            raise UnmatchedKeys(f"{what} lacks {name}")
        if len(found := shape_of(tensors, name)) not in (dimensions or (2,)) or 0 in found:
            expected = " or ".join(map(str, dimensions or (2,)))
            raise UnmatchedKeys(
                f"{what}: {name} has shape {list(found)}, expected {expected} dimensions, none of them 0"
            )
        return found

    return shape


FIRST_WEIGHT, POOLED_WEIGHT = "input_blocks.0.0.weight", "label_emb.0.0.weight"
"""A tensor of every Stable Diffusion UNet, and one of UNets with pooled text and sizes as inputs (SDXL)."""
VAE_PREFIXES = ("first_stage_model.", "vae.")


def unet_component(tensors: Mapping[str, Tensor], head_width: int | None) -> Component:
    """Build the denoiser of an original checkpoint, with a diffusers config that follows from the shapes of its tensors.

    `head_width` is the width of an attention head (64 in SDXL). None means eight heads whatever the width (SD1.x). Raises
    UnmatchedKeys or UnknownFamily for other UNets.
    """
    stored = stored_under(tensors, DENOISER_PREFIX)
    names, shape_in_file = stored.keys(), shapes_in(tensors, "the denoiser")

    def shape(name: str, *dimensions: int) -> tuple[int, ...]:
        return shape_in_file(DENOISER_PREFIX + name, *dimensions)

    widths, resnets, depths = [], [], []
    started = False
    for number in range(1, count_children(names, "input_blocks")):
        if f"input_blocks.{number}.0.op.weight" in names:
            started = False
            continue
        if not started:
            widths.append(shape(f"input_blocks.{number}.0.out_layers.3.weight", 4)[0])
            depths.append(count_children(names, f"input_blocks.{number}.1.transformer_blocks"))
            resnets.append(0)
            started = True
        resnets[-1] += 1
    if not widths or len(set(resnets)) != 1:
        raise UnmatchedKeys(
            f"the denoiser's input_blocks are not those of a Stable Diffusion UNet: {resnets} per level"
        )
    if "middle_block.1.proj_in.weight" not in names:
        raise UnknownFamily(
            "this is a pruned UNet, like SSD-1B or Segmind-Vega, which is not supported as a single file"
        )
    mid_depth = count_children(names, "middle_block.1.transformer_blocks")
    config: dict[str, Any] = {
        "in_channels": shape(FIRST_WEIGHT, 4)[1],
        "out_channels": shape("out.2.weight", 4)[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": resnets[0],
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        # The last entry also sets the number of blocks in the middle.
        "transformer_layers_per_block": tuple([*(max(depth, 1) for depth in depths[:-1]), mid_depth]),
        "cross_attention_dim": shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        "attention_head_dim": 8 if head_width is None else tuple(width // head_width for width in widths),
        "use_linear_projection": len(shape("middle_block.1.proj_in.weight", 2, 4)) == 2,
    }
    if POOLED_WEIGHT in names:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shape(POOLED_WEIGHT)[1],
        }
    if "time_embed.cond_proj.weight" in names:
        config["time_cond_proj_dim"] = shape("time_embed.cond_proj.weight")[1]
    readers = {diffusers_unet_path(name, resnets[0]): read for name, read in stored.items()}
    return Component(config, LazyTensors(readers))


def original_unet_names(names: Collection[str]) -> dict[str, str]:
    """Return the original names of a UNet's tensors by diffusers name. Empty unless it is a UNet in diffusers naming."""
    layers = count_children(names, "down_blocks.0.resnets")
    if not layers:
        return {}

    def attention_above(level: int) -> bool:
        return any(name.startswith(f"up_blocks.{level}.attentions.") for name in names)

    return {name: ldm_unet_path(name, layers, attention_above) for name in names}


def vae_component(
    tensors: Mapping[str, Tensor], latent_scale: float, latent_shift: float | None = None, quant_conv: bool = True
) -> Component:
    """Build a KL VAE, in original or diffusers naming, with a config that follows from the shapes of its tensors.

    `quant_conv` is whether it has the convolutions around its latents. Raises UnmatchedKeys when it is not such a VAE.
    """
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    levels = count_children(tensors, "encoder.down") or count_children(tensors, "encoder.down_blocks")
    names = {current_vae_path(diffusers_vae_path(name, levels)): name for name in tensors if name.startswith(parts)}
    if not levels or ("quant_conv.weight" in names) != quant_conv:
        odd = "has" if levels and not quant_conv else "lacks"
        raise UnmatchedKeys(f"the VAE {odd} {'quant_conv.weight' if levels else 'encoder.down'}")
    shape = shapes_in(LazyTensors({name: Stored(tensors, given) for name, given in names.items()}), "the VAE")
    widths = tuple(shape(f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in range(levels))
    config: dict[str, Any] = {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": count_children(names, "encoder.down_blocks.0.resnets"),
        "latent_channels": shape("decoder.conv_in.weight", 4)[1],
        "scaling_factor": latent_scale,
        "shift_factor": latent_shift,
        "use_quant_conv": quant_conv,
        "use_post_quant_conv": quant_conv,
    }

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        # The original attention has 1x1 convolutions, and that of diffusers linear layers.
        return tensor.flatten(1) if ".attn_1." in name and tensor.ndim == 4 else tensor

    return Component(config, LazyTensors({name: partial(read, full) for name, full in names.items()}))


def other_model(config: dict[str, Any]) -> str | None:
    """Name another model whose diffusers folder has the pipeline of SD1.x or SDXL, by its UNet's config, or return None."""
    if config.get("cross_attention_dim") == 1024:
        return "Stable Diffusion 2.x"
    return "a latent consistency model, distilled to a few steps" if config.get("time_cond_proj_dim") else None


def unet_latent_shape(components: Mapping[str, Component]) -> LatentShape:
    """Return the shape of a UNet's latents. Every level but the last halves them, so their sides must be divisible by that."""
    config = components["denoiser"].config
    return LatentShape(config["in_channels"], kl_pixels(components), 2 ** (len(config["block_out_channels"]) - 1))


def kl_pixels(components: Mapping[str, Component]) -> int:
    """Return the pixels along a side of one latent of AutoencoderKL. Without a VAE it is 8, as in the published models."""
    return 2 ** (len(components["vae"].config["block_out_channels"]) - 1) if "vae" in components else 8


def build_unet(config: dict[str, Any]) -> nn.Module:
    unet = import_diffusers().UNet2DConditionModel.from_config(config)
    unet.set_attn_processor(UnetAttention())
    return unet


class UnetAttention:
    """The attention of these UNets, for diffusers' layers.

    diffusers' own also divides each output, and its gradient again, by a factor. In these networks that factor is 1.
    """

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert attention_mask is None and attention.rescale_output_factor == 1 and not attention.residual_connection
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        (query,) = heads(hidden_states, attention.heads, attention.to_q)
        key, value = heads(context, attention.heads, attention.to_k, attention.to_v)
        return attention.to_out[1](attention.to_out[0](mixed(query, key, value)))


def build_vae(config: dict[str, Any]) -> nn.Module:
    return import_diffusers().AutoencoderKL.from_config(config)


_UNET_ATTENTION = r"(down_blocks|up_blocks)\.\d+\.attentions\.\d+|mid_block\.attentions\.\d+"
UNET_TARGETS = {
    "attention": rf"({_UNET_ATTENTION})\.transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)",
    "transformer": rf"({_UNET_ATTENTION})\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)))",
}
UNET_TARGETS["transformer+conv"] = (
    rf"{UNET_TARGETS['transformer']}|((down_blocks|up_blocks)\.\d+|mid_block)\."
    r"(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|(downsamplers|upsamplers)\.\d+\.conv)"
)
"""The modules that sd-scripts adapts with `conv_dim`. The tests compare their names with lists made by sd-scripts."""
DISTILLED_NAMES = r"turbo|lightning|hyper(?![-_ ]?(?!sd|vae|fp|bf)[a-z])|(lcm|dmd2?)(?![a-z])"
"""File names of checkpoints distilled to a few steps, as people share them. "Hyper" also begins other words."""
FEW_STEPS = FewSteps(8)
"""The most steps of SDXL-Lightning (arXiv:2402.13929), and of Hyper-SD (arXiv:2404.13686) without guidance."""
