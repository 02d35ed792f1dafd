"""Convert between the original (LDM) and the diffusers names of the UNets of SD1.x, SD2.x and SDXL.

The original code numbers the blocks of a UNet in one flat list, diffusers in nested lists. The conversion only needs the
number of residual blocks per level.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .table import PUBLISHED_BLOCKS

# The original names of the modules in a residual block, by their diffusers names.
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_OUTSIDE_BLOCKS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def replace_head(path: str, table: dict[str, str]) -> str:
    """Replace the first components of a path by the table. The path is unchanged if they are not in it."""
    for old, new in table.items():
        if path == old or path.startswith(old + "."):
            return new + path[len(old) :]
    return path


def inverse(table: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}


def ldm_unet_path(path: str, layers_per_block: int = 2, attention_above: Callable[[int], bool] = lambda _: True) -> str:
    """Convert the diffusers name of a UNet module or tensor to the original one.

    For example, `down_blocks.1.attentions.0.proj_in` becomes `input_blocks.4.1.proj_in`.
    `layers_per_block` is the number of residual blocks in a down level (2 in SD1.x and SDXL). `attention_above(i)` returns
    whether up level i has attention. If it does, its upsampler is entry 2 of its block instead of entry 1.
    """
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", path):
        side, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        stride = layers_per_block + 1
        if kind == "resnets":
            rest = replace_head(rest, _UNET_RESNET)
        slot = {"resnets": 0, "attentions": 1, "downsamplers": 0}.get(kind)
        if side == "down":
            number = (level + 1) * stride if kind == "downsamplers" else level * stride + index + 1
            if kind == "downsamplers":
                rest = rest.replace("conv", "op", 1)
            return f"input_blocks.{number}.{slot}.{rest}"
        if kind == "upsamplers":
            return f"output_blocks.{level * stride + layers_per_block}.{2 if attention_above(level) else 1}.{rest}"
        return f"output_blocks.{level * stride + index}.{slot}.{rest}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", path):
        if match[1] == "attentions":
            return f"middle_block.1.{match[3]}"
        return f"middle_block.{2 * int(match[2])}.{replace_head(match[3], _UNET_RESNET)}"
    return replace_head(path, _UNET_OUTSIDE_BLOCKS)


def diffusers_unet_path(path: str, layers_per_block: int = 2) -> str:
    """Convert the original name of a UNet module or tensor to diffusers' name. This is the inverse of `ldm_unet_path`."""
    stride = layers_per_block + 1
    if path.startswith("input_blocks.0."):
        return replace_head(path, inverse(_UNET_OUTSIDE_BLOCKS))
    if match := re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", path):
        number, slot, rest = int(match[2]), int(match[3]), match[4]
        if match[1] == "input":
            level, index = divmod(number - 1, stride)
            if index == layers_per_block:
                return f"down_blocks.{level}.downsamplers.0.{rest.replace('op', 'conv', 1)}"
            side = "down"
        else:
            level, index = divmod(number, stride)
            if slot == 2 or (slot == 1 and rest.partition(".")[0] == "conv"):
                return f"up_blocks.{level}.upsamplers.0.{rest}"
            side = "up"
        if slot == 0:
            return f"{side}_blocks.{level}.resnets.{index}.{replace_head(rest, inverse(_UNET_RESNET))}"
        return f"{side}_blocks.{level}.attentions.{index}.{rest}"
    if match := re.match(r"middle_block\.(\d+)\.(.+)", path):
        if match[1] == "1":
            return f"mid_block.attentions.0.{match[2]}"
        return f"mid_block.resnets.{int(match[1]) // 2}.{replace_head(match[2], inverse(_UNET_RESNET))}"
    return replace_head(path, inverse(_UNET_OUTSIDE_BLOCKS))


def shows_other_blocks(paths: Iterable[str]) -> bool:
    """Check whether module paths show that a UNet's down levels don't have PUBLISHED_BLOCKS residual blocks each.

    An up level has one more. If the paths cover only some blocks, only a number that is too high shows it.
    """
    blocks = {"down": 0, "up": 0}
    for path in paths:
        if match := re.match(r"(down|up)_blocks\.\d+\.(?:resnets|attentions)\.(\d+)\.", path):
            blocks[match[1]] = max(blocks[match[1]], int(match[2]) + 1)
        # In the original names, each level ends with a downsampler, so its number depends on the blocks per level.
        elif match := re.match(r"input_blocks\.(\d+)\.(?:0\.op|1\.|0\.in_layers\.)", path):
            is_downsampler = match[0].endswith("op")
            if (int(match[1]) % (PUBLISHED_BLOCKS + 1) == 0) != is_downsampler:
                return True
    down, up = blocks["down"], blocks["up"] - 1
    return max(down, up) > PUBLISHED_BLOCKS or 0 < down == up < PUBLISHED_BLOCKS


def blocks_in_a_level(config: Mapping[str, Any]) -> int | None:
    """Return the number of residual blocks in each down level of a network with that config; None if the levels differ.

    A transformer's config doesn't have this number, so the result is that of a published UNet.
    """
    blocks = config.get("layers_per_block", PUBLISHED_BLOCKS)
    levels = blocks if isinstance(blocks, (list, tuple)) else [blocks]
    return levels[0] if levels and isinstance(levels[0], int) and levels.count(levels[0]) == len(levels) else None
