"""The model families. A new one is a file beside these, and its entry in FAMILIES."""

from collections.abc import Mapping

from torch import Tensor

from ..errors import UnknownFamily
from .sd15 import SD15
from .sdxl import SDXL
from .spec import FamilySpec

FAMILIES: dict[str, FamilySpec] = {family.name: family for family in (SD15, SDXL)}

_UNET = "model.diffusion_model."
_TEXT_LDM = "cond_stage_model.transformer."
# Tensors by which checkpoints of other kinds are known, so that they can be refused by name. The first match counts.
_NOT_SUPPORTED = (
    ("conditioner.embedders.0.model.transformer.resblocks.0.ln_1.weight", "the SDXL refiner"),
    ("cond_stage_model.model.transformer.resblocks.0.ln_1.weight", "Stable Diffusion 2.x"),
    ("double_stream_modulation_img.lin.weight", "FLUX.2"),
    ("distilled_guidance_layer.layers.0.in_layer.weight", "Chroma"),
    ("double_blocks.0.img_attn.norm.key_norm.scale", "FLUX.1"),
    ("joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
    ("noise_refiner.0.attention.qkv.weight", "Lumina 2 or Z-Image"),
    ("transformer_blocks.0.attn.add_q_proj.weight", "Qwen-Image"),
    ("blocks.0.self_attn.q.weight", "Wan"),
    ("clip_mapper.weight", "Stable Cascade"),
)


def detect_family(tensors: Mapping[str, Tensor]) -> FamilySpec:
    """The family of a checkpoint in original naming, by its tensors alone; UnknownFamily names what else it is."""
    if not tensors:
        raise UnknownFamily("there is not a single tensor in it")
    first = next(iter(tensors))
    if any(name.endswith((".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight")) for name in tensors):
        raise UnknownFamily("this is a LoRA, not a base model")
    supported = f"supported: {', '.join(family.title for family in FAMILIES.values())}"
    for marker, title in _NOT_SUPPORTED:
        if any(prefix + marker in tensors for prefix in ("", _UNET, "diffusion_model.", "model.")):
            raise UnknownFamily(f"this is {title}, which is not supported yet; {supported}")
    if _UNET + "input_blocks.0.0.weight" not in tensors:
        if any(name.startswith(("down_blocks.", "unet.down_blocks.")) for name in tensors):
            raise UnknownFamily("this is a denoiser in diffusers naming; give the whole diffusers folder instead")
        raise UnknownFamily(f"no family matches its {len(tensors)} tensors, e.g. {first!r}; {supported}")
    channels = tensors[_UNET + "input_blocks.0.0.weight"].shape[1]
    if channels != 4:
        kinds = {9: "an inpainting model", 8: "an InstructPix2Pix model"}
        raise UnknownFamily(
            f"this is {kinds.get(channels, 'an unknown variant')} (its denoiser takes {channels} channels), "
            "which is not supported; train on the model that it was made from"
        )
    if any(name.startswith("conditioner.embedders.1.model.") for name in tensors):
        return SDXL
    if any(name.startswith(_TEXT_LDM) for name in tensors):
        return SD15
    raise UnknownFamily("it holds a Stable Diffusion UNet but no text encoder; give a checkpoint with all three parts")
