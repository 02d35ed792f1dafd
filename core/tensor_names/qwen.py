"""Names of Qwen-Image, which are the same in the original model and in diffusers."""

from .table import TRANSFORMER_IN_COMFYUI, Listing, LoadedNames, NameTable, Sign, by_rules

_of_original, _of_diffusers = by_rules()

QWEN_IMAGE = NameTable(
    name="qwen-image",
    base_versions=("qwen_image",),
    architecture="qwen-image",
    signs=(
        Sign(r"^transformer_blocks\.\d+\."),
        Sign(r"^transformer_blocks\.\d+\.(img|txt)_(mlp\.net\.0\.proj|mod\.1)$", frozenset({3072})),
        Sign(r"^transformer_blocks\.\d+\.attn\.", frozenset({3072})),
    ),
    of_original=_of_original,
    of_diffusers=_of_diffusers,
    listings={"Qwen-Image": Listing("Qwen", "Apache-2.0")},
    loaded=LoadedNames(
        TRANSFORMER_IN_COMFYUI | {("bare", "diffusers"), ("kohya", "diffusers"), ("comfy", "diffusers")},
        diffusers=frozenset({"kohya", "diffusers", "comfy"}),
        invokeai={
            ("kohya", "diffusers"): r"^transformer_blocks\.",
            ("diffusers", "diffusers"): "",
            ("bare", "diffusers"): "",
        },
        invokeai_skips=frozenset({"kohya"}),
    ),
)
