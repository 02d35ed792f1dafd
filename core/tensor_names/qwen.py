"""Names of Qwen-Image, the same in the original model and in diffusers, and of Qwen-Image 2.1."""

from .table import TRANSFORMER_IN_COMFYUI, Fusion, Listing, LoadedNames, NameTable, Sign, by_rules

_of_original, _of_diffusers = by_rules()

_ANY = "lora_A lora_A+ lora_down lora_down+ named named+"
_IN_INVOKEAI = "lora_A lora_A+~ lora_down lora_down+ named named+~"
_FORMS = {"kohya": _ANY, "comfy": _ANY, "diffusers": "lora_A lora"}

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
    of_original=_of_original,
    of_diffusers=_of_diffusers,
    listings={"Qwen-Image": Listing("Qwen", "Apache-2.0")},
    loaded=LoadedNames(
        TRANSFORMER_IN_COMFYUI | {("bare", "diffusers"), ("kohya", "diffusers"), ("comfy", "diffusers")},
        diffusers=frozenset({"kohya", "diffusers", "comfy"}),
        diffusers_forms=_FORMS,
        invokeai={
            ("kohya", "diffusers"): r"^transformer_blocks\.",
            ("diffusers", "diffusers"): "",
            ("bare", "diffusers"): "",
        },
        invokeai_forms={"diffusers": _IN_INVOKEAI, "bare": _IN_INVOKEAI},
        invokeai_skips=frozenset({"kohya"}),
        others={
            "SD.Next": "kohya diffusers comfy",
            "stable-diffusion.cpp": "kohya diffusers comfy",
            "mflux": "kohya comfy",
            "OneTrainer": "kohya diffusers comfy",
            "ai-toolkit": "diffusers comfy",
            "musubi-tuner": "kohya",
        },
    ),
)

# ComfyUI fuses two layers of an MLP, the gate first. They are separate in LoRAs and in the published model.
_of_original_21, _of_diffusers_21 = by_rules(
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
    of_original=_of_original_21,
    of_diffusers=_of_diffusers_21,
    original_in_kohya=False,
    original_in_comfy=False,
    listings={"Qwen-Image 2.1": Listing("Qwen 2.1", "Qwen Research License")},
    loaded=LoadedNames(
        comfyui=frozenset(),
        diffusers=frozenset({"kohya", "diffusers", "comfy"}),
        diffusers_forms=_FORMS,
        diffusers_lacks={"kohya": r"gate_(layer|up)$"},
        diffusers_refuses={"kohya": r"^(txt_in|modulation)\."},
    ),
)
