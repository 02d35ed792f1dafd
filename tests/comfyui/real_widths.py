"""Checkpoints that ComfyUI recognises by itself: it knows the older families by some of their widths and depths."""

from dataclasses import replace

from tests.tooling import FULL_SD15, FULL_SDXL

# Two levels of one residual block are enough (314 million values).
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
# Of SDXL only the width can shrink: 1.1 billion values.
COMFY_SDXL = replace(
    FULL_SDXL, unet={**FULL_SDXL.unet, "block_out_channels": (320, 320, 320), "attention_head_dim": (5, 5, 5)}
)
