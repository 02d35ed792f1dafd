"""The model families. A new one is a file beside these, and its entry in FAMILIES."""

from collections.abc import Mapping

from torch import Tensor

from ...errors import UnknownFamily
from ...storage.lazy import LazyTensors, Stored
from ..spec import DENOISER_PREFIX, FamilySpec
from .chroma import CHROMA
from .flux1 import FLUX1
from .flux2 import FLUX2
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .sd15 import SD15
from .sdxl import SDXL
from .zimage import ZIMAGE

FAMILIES: dict[str, FamilySpec] = {
    family.name: family for family in (SD15, SDXL, SD3, FLUX1, CHROMA, FLUX2, ZIMAGE, QWEN_IMAGE)
}

# Tensors by which checkpoints of other kinds are known, so that they can be refused by name. The first match counts.
_NOT_SUPPORTED = (
    ("conditioner.embedders.0.model.transformer.resblocks.0.ln_1.weight", "the SDXL refiner"),
    ("cond_stage_model.model.transformer.resblocks.0.ln_1.weight", "Stable Diffusion 2.x"),
    ("edm_mean", "Playground v2.5 (SDXL trained as EDM)"),
    ("edm_vpred.sigma_max", "CosXL (SDXL trained as EDM)"),
    (DENOISER_PREFIX + "nerf_blocks.0.norm.scale", "Chroma Radiance"),
    (DENOISER_PREFIX + "noise_refiner.0.adaLN_modulation.1.weight", "Lumina 2"),
    (DENOISER_PREFIX + "siglip_embedder.1.weight", "Z-Image-Omni"),
    (DENOISER_PREFIX + "__index_timestep_zero__", "Qwen-Image-Edit"),
    (DENOISER_PREFIX + "time_text_embed.addition_t_embedding.weight", "Qwen-Image-Layered"),
    (DENOISER_PREFIX + "blocks.0.self_attn.q.weight", "Wan"),
    (DENOISER_PREFIX + "txt_in.individual_token_refiner.blocks.0.norm1.weight", "HunyuanVideo"),
    (DENOISER_PREFIX + "patchify_proj.weight", "LTX-Video"),
    (DENOISER_PREFIX + "double_layers.0.attn.w1q.weight", "AuraFlow"),
    (DENOISER_PREFIX + "double_stream_blocks.0.block.attn1.to_q.weight", "HiDream"),
    (DENOISER_PREFIX + "clip_mapper.weight", "Stable Cascade"),
)


def detect_family(tensors: Mapping[str, Tensor]) -> FamilySpec:
    """The family of a checkpoint in original naming, by its tensors alone; UnknownFamily names what else it is."""
    supported = f"supported: {', '.join(family.title for family in FAMILIES.values())}"
    for marker, title in _NOT_SUPPORTED:
        if marker in tensors:
            raise UnknownFamily(f"this is {title}, which is not supported yet; {supported}")
    denoiser = LazyTensors(
        {
            name.removeprefix(DENOISER_PREFIX): Stored(tensors, name)
            for name in tensors
            if name.startswith(DENOISER_PREFIX)
        }
    )
    for family in FAMILIES.values():
        if family.recognise(denoiser):
            return family
    if any(name.removeprefix(DENOISER_PREFIX).startswith(("transformer_blocks.", "unet.")) for name in tensors):
        raise UnknownFamily("this is a denoiser in diffusers naming; give the whole diffusers folder instead")
    raise UnknownFamily(f"no family matches its {len(tensors)} tensors, e.g. {next(iter(tensors))!r}; {supported}")
