"""The demo's base model at the widths at which ComfyUI recognises SD1.5: the same function, so pictures show faces.

Every channel is there several times, and whatever reads the copies takes their mean: norms, activations and attention then
compute what they did before. Blocks and layers that only the larger shape has pass on what they get.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from core.demo import BASE_FILE
from core.safetensors_file import write_safetensors
from tests.tooling import FULL_SD15, original_shapes

# ComfyUI knows the families by some widths and depths, and has the text encoders and the VAE at one size only: of SD1.5
# two levels of one residual block are enough (314 million values).
COMFY_SD15 = replace(
    FULL_SD15,
    unet={
        **FULL_SD15.unet,
        "block_out_channels": (320, 640),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    },
)
PICTURE_SIZE = (64, 80)
"""Width and height of the pictures that the demo base knows. Its VAE has 4 pixels a latent where SD1.5 has 8."""


def write_demo_checkpoint(path: Path) -> Path:
    """A checkpoint for ComfyUI that draws what `core/demo/base.safetensors` draws."""
    from safetensors.torch import load_file

    source = load_file(BASE_FILE)
    shapes = original_shapes(replace(COMFY_SD15, vae_widths=(128, 256, 512)))
    layout = {name: (torch.float16, shape) for name, shape in shapes.items()}
    write_safetensors(path, layout, lambda name: widened(name, source, shapes[name]).half())
    return path


def widened(name: str, source: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """A tensor of that shape for the original name."""
    if name not in source:
        if name.endswith("nin_shortcut.weight"):
            width = 64  # of both levels that the demo base goes between without a shortcut
            return spread(torch.eye(width).reshape(width, width, 1, 1), shape, tiled=(False, False))
        return torch.zeros(shape)  # a residual branch that adds nothing
    tensor = source[name].float()
    if name.endswith("time_embed.0.weight"):
        # Each frequency of the narrow embedding is one of the wide, where it stands at five times the place.
        result = torch.zeros(shape)
        result[:, :: shape[1] // tensor.shape[1]] = spread(tensor, (shape[0], tensor.shape[1]), tiled=(False, False))
        return result
    if ".embeddings." in name:
        return tensor.repeat(1, shape[1] // tensor.shape[1])
    text = name.startswith("cond_stage_model.")
    # In the text encoder the copies are whole heads; elsewhere the number of heads stays and each head grows.
    result = spread(tensor, shape, tiled=(text, text or re.search(r"attn2\.to_[kv]\.", name) is not None))
    if not text and re.search(r"(to_q|attn_1\.q)\.(weight|bias)$", name):
        result /= math.sqrt(shape[0] / tensor.shape[0])
    return result


def spread(tensor: Tensor, shape: tuple[int, ...], tiled: tuple[bool, bool]) -> Tensor:
    """Copies of each output beside each other, or of all in turn if `tiled`; inputs likewise, divided by their number."""
    for axis in range(min(tensor.ndim, 2)):
        times = shape[axis] // tensor.shape[axis]
        tensor = torch.cat([tensor] * times, dim=axis) if tiled[axis] else tensor.repeat_interleave(times, dim=axis)
        if axis == 1:
            tensor = tensor / times
    return tensor
