"""Names of Lumina-Image 2 and Z-Image: one stack of layers after two refiners."""

from . import loaded_names
from .signs import Sign
from .table import Fusion, Listing, NameTable, by_rules

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


_RULES = by_rules(
    *(rule for stack in _STACKS for rule in _lumina_layer(stack)),
    Fusion("final_layer.adaLN_modulation.1", ("norm_out.linear_1",)),
    Fusion("final_layer.linear", ("norm_out.linear_2",)),
    *(Fusion(f"cap_embedder.{n}", (f"time_caption_embed.caption_embedder.{n}",)) for n in (0, 1)),
    Fusion("t_embedder.mlp.0", ("time_caption_embed.timestep_embedder.linear_1",)),
    Fusion("t_embedder.mlp.2", ("time_caption_embed.timestep_embedder.linear_2",)),
)
_RULES_Z = by_rules(
    *(rule for stack in _STACKS for rule in _z_image_layer(stack)),
    # "2-1" means patches of two by two latents in one frame.
    Fusion("final_layer.linear", ("all_final_layer.2-1.linear",)),
    Fusion("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",)),
    Fusion("x_embedder", ("all_x_embedder.2-1",)),
)
_LAYER = r"^(layers|noise_refiner|context_refiner)\.\d+\."
_LUMINA_INPUTS = _LAYER + r"(attention\.(qkv|out)|attn\.to_\w+(\.0)?|feed_forward\.(w1|w3|linear_1|linear_3))$"
_Z_IMAGE_INPUTS = _LAYER + r"(attention\.(qkv|out|to_\w+(\.0)?)|feed_forward\.(w1|w3))$"

LUMINA2 = NameTable(
    name="lumina2",
    base_versions=("lumina2", "lumina-image-2"),
    architecture="lumina-2",
    signs=(Sign(_LAYER), Sign(_LUMINA_INPUTS, frozenset({2304}))),
    **_RULES,
    listings={"Lumina 2": Listing("Lumina", "Apache-2.0")},
    loaded=loaded_names.LUMINA2,
)
ZIMAGE = NameTable(
    name="zimage",
    base_versions=("zimage",),
    architecture="z-image",
    comfyui_classes=("ZImage",),
    scheme="comfy",
    signs=(Sign(_LAYER), Sign(_Z_IMAGE_INPUTS, frozenset({3840}))),
    **_RULES_Z,
    listings={"Z-Image": Listing("ZImageBase", "Apache-2.0", editions={"turbo": Listing("ZImageTurbo", "Apache-2.0")})},
    loaded=loaded_names.ZIMAGE,
    # ComfyUI, diffusers and InvokeAI all read unfused q, k and v under "diffusion_model.".
    original_in_comfy=False,
)
