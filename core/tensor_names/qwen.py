"""Names of Qwen-Image, the same in the original model and in diffusers, and of Qwen-Image 2.1."""

from . import loaded_names
from .signs import Sign
from .table import Fusion, Listing, NameTable, by_rules

QWEN_IMAGE = NameTable(
    name="qwen-image",
    base_versions=("qwen_image",),
    architecture="qwen-image",
    comfyui_classes=("QwenImage",),
    signs=(
        Sign(r"^transformer_blocks\.\d+\."),
        Sign(r"^transformer_blocks\.\d+\.(img|txt)_(mlp\.net\.0\.proj|mod\.1)$", frozenset({3072})),
        Sign(r"^transformer_blocks\.\d+\.attn\.", frozenset({3072})),
    ),
    listings={"Qwen-Image": Listing("Qwen", "Apache-2.0")},
    loaded=loaded_names.QWEN_IMAGE,
)

# ComfyUI fuses two layers of an MLP, the gate first. They are separate in LoRAs and in the published model.
_RULES_21 = by_rules(
    Fusion(
        "transformer_blocks.{}.img_mlp.gate_up",
        ("transformer_blocks.{}.img_mlp.gate_layer", "transformer_blocks.{}.img_mlp.proj"),
        (3, 3),
    )
)
_WIDTH_21 = frozenset({4096})

QWEN_IMAGE_21 = NameTable(
    name="qwen-image-21",
    base_versions=("qwen_image_2.1",),
    architecture="qwen-image-2.1",
    scheme="diffusers",
    signs=(
        Sign(r"^transformer_blocks\.\d+\."),
        Sign(r"^transformer_blocks\.\d+\.img_mlp\.(gate_layer|gate_up|proj|out)$"),
        Sign(r"^transformer_blocks\.\d+\.img_mlp\.(gate_layer|proj)$", _WIDTH_21),
        # FLUX.2 klein 9B has layers of these names and shapes in its eight blocks.
        Sign(r"^transformer_blocks\.([89]|[12]\d|3[01])\.attn\.to_([qkv]|out\.0)$", _WIDTH_21, ratio=1),
    ),
    **_RULES_21,
    original_in_kohya=False,
    original_in_comfy=False,
    # Civitai's list has no entry for it.
    listings={"Qwen-Image 2.1": Listing("Other", "Qwen Research License")},
    loaded=loaded_names.QWEN_IMAGE_21,
)
