"""Names of Lumina-Image 2 and Z-Image: one stack of layers after two refiners."""

from .table import TRANSFORMER_IN_COMFYUI, Fusion, Listing, LoadedNames, NameTable, Sign, by_rules

_STACKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")


def _lumina_layer(stack: str) -> tuple[Fusion, ...]:
    return (
        # q has 24 heads; k and v have 8 each.
        Fusion(f"{stack}.attention.qkv", tuple(f"{stack}.attn.to_{x}" for x in "qkv"), (1, 1 / 3, 1 / 3)),
        Fusion(f"{stack}.attention.out", (f"{stack}.attn.to_out.0",)),
        *(Fusion(f"{stack}.feed_forward.w{n}", (f"{stack}.feed_forward.linear_{n}",)) for n in (1, 2, 3)),
        Fusion(f"{stack}.adaLN_modulation.1", (f"{stack}.norm1.linear",)),
        *(Fusion(f"{stack}.attention.{x}_norm", (f"{stack}.attn.norm_{x}",)) for x in "qk"),
        # The text's refiner is not modulated.
        Fusion(f"{stack}.attention_norm1", (f"{stack}.norm1" if "context" in stack else f"{stack}.norm1.norm",)),
        Fusion(f"{stack}.attention_norm2", (f"{stack}.norm2",)),
    )


def _z_image_layer(stack: str) -> tuple[Fusion, ...]:
    return (
        Fusion(f"{stack}.attention.qkv", tuple(f"{stack}.attention.to_{x}" for x in "qkv"), (1, 1, 1)),
        Fusion(f"{stack}.attention.out", (f"{stack}.attention.to_out.0",)),
        *(Fusion(f"{stack}.attention.{x}_norm", (f"{stack}.attention.norm_{x}",)) for x in "qk"),
    )


_of_original, _of_diffusers = by_rules(
    *(rule for stack in _STACKS for rule in _lumina_layer(stack)),
    Fusion("final_layer.adaLN_modulation.1", ("norm_out.linear_1",)),
    Fusion("final_layer.linear", ("norm_out.linear_2",)),
    *(Fusion(f"cap_embedder.{n}", (f"time_caption_embed.caption_embedder.{n}",)) for n in (0, 1)),
    Fusion("t_embedder.mlp.0", ("time_caption_embed.timestep_embedder.linear_1",)),
    Fusion("t_embedder.mlp.2", ("time_caption_embed.timestep_embedder.linear_2",)),
)
_of_original_z, _of_diffusers_z = by_rules(
    *(rule for stack in _STACKS for rule in _z_image_layer(stack)),
    # "2-1" means patches of two by two latents in one frame.
    Fusion("final_layer.linear", ("all_final_layer.2-1.linear",)),
    Fusion("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",)),
    Fusion("x_embedder", ("all_x_embedder.2-1",)),
)
_IN_A_REFINER = ("attention.qkv", "attention.out", *(f"feed_forward.w{n}" for n in (1, 2, 3)))
_IN_A_LAYER = (*_IN_A_REFINER, "adaLN_modulation.1")
_LAYER = r"^(layers|noise_refiner|context_refiner)\.\d+\."
_LUMINA_INPUTS = _LAYER + r"(attention\.(qkv|out)|attn\.to_\w+(\.0)?|feed_forward\.(w1|w3|linear_1|linear_3))$"
_Z_IMAGE_INPUTS = _LAYER + r"(attention\.(qkv|out|to_\w+(\.0)?)|feed_forward\.(w1|w3))$"

LUMINA2 = NameTable(
    name="lumina2",
    base_versions=("lumina2", "lumina-image-2"),
    architecture="lumina-2",
    signs=(
        Sign(_LAYER),
        Sign(_LUMINA_INPUTS, frozenset({2304})),
    ),
    of_original=_of_original,
    of_diffusers=_of_diffusers,
    # ComfyUI uses Z-Image's table of diffusers names for Lumina 2 too. It misses the attention, whose name differs.
    listings={"Lumina 2": Listing("Lumina", "Apache-2.0")},
    loaded=LoadedNames(
        frozenset({("kohya", "original"), ("comfy", "original")}),
        diffusers=frozenset({"diffusers", "comfy"}),
        diffusers_forms={"comfy": "lora_A"},
        diffusers_blocks={
            "comfy": {"layers": _IN_A_LAYER, "noise_refiner": _IN_A_LAYER, "context_refiner": _IN_A_REFINER}
        },
        diffusers_refuses={"comfy": r"^([xt]_embedder|cap_embedder|final_layer)\b"},
        sd_scripts=r"^(layers|noise_refiner|context_refiner|final_layer)\.",
    ),
)
ZIMAGE = NameTable(
    name="zimage",
    base_versions=("zimage",),
    architecture="z-image",
    comfyui_classes=("ZImage",),
    scheme="comfy",
    signs=(
        Sign(_LAYER),
        Sign(_Z_IMAGE_INPUTS, frozenset({3840})),
    ),
    of_original=_of_original_z,
    of_diffusers=_of_diffusers_z,
    listings={"Z-Image": Listing("ZImageBase", "Apache-2.0")},
    loaded=LoadedNames(
        TRANSFORMER_IN_COMFYUI | {("comfy", "diffusers"), ("bare", "diffusers")},
        diffusers=frozenset({"kohya", "diffusers", "comfy"}),
        diffusers_forms={
            "kohya": "lora_down lora_down+ lora lora+",
            "comfy": "lora_A lora_A+ lora_down lora_down+ lora lora+ named named+",
            "diffusers": "lora_A lora",
        },
        diffusers_lacks={"kohya": r"^(x_embedder|final_layer)\b"},
        diffusers_lokr=frozenset({("comfy", "diffusers"), ("bare", "diffusers"), ("diffusers", "diffusers")}),
        diffusers_lokr_with_alpha=frozenset({"bare"}),
        invokeai={("diffusers", "diffusers"): "", ("comfy", "diffusers"): ""},
        invokeai_forms=dict.fromkeys(("diffusers", "comfy"), "lora_A lora_A+~ lora_down lora_down+ named named+~"),
        others={
            "SD.Next": "kohya diffusers comfy",
            "stable-diffusion.cpp": "kohya diffusers comfy",
            "mflux": "kohya diffusers comfy",
            "OneTrainer": "diffusers comfy",
            "ai-toolkit": "diffusers comfy",
            "musubi-tuner": "kohya diffusers comfy",
        },
        others_lack={
            ("stable-diffusion.cpp", "kohya"): r"feed_forward",
            ("mflux", "kohya"): r"attention",
            ("musubi-tuner", "kohya"): r"attention",
        },
    ),
    # ComfyUI, diffusers and InvokeAI all read unfused q, k and v under "diffusion_model.".
    original_in_comfy=False,
)
