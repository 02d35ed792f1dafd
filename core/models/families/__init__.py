"""The model families. Each other file in this folder is a family, with a FamilySpec that describes it."""

from collections.abc import Mapping

from torch import Tensor

from ...errors import UnknownFamily, counted
from ...storage.stored import LazyTensors, stored_under
from ..spec import DENOISER_PREFIX, FamilySpec
from .chroma import CHROMA
from .ernie_image import ERNIE_IMAGE
from .flux1 import FLUX1
from .flux2 import FLUX2
from .flux3 import FLUX3
from .ideogram4 import IDEOGRAM4
from .krea2 import KREA2
from .longcat_image import LONGCAT_IMAGE
from .moss_image import MOSS_IMAGE
from .qwen_image import QWEN_IMAGE
from .qwen_image21 import QWEN_IMAGE_21
from .sd3 import SD3
from .sd15 import SD15
from .sdxl import SDXL
from .zimage import ZIMAGE

_ALL = (
    SD15, SDXL, SD3, FLUX1, CHROMA, FLUX2, FLUX3, ZIMAGE, QWEN_IMAGE, QWEN_IMAGE_21, KREA2, ERNIE_IMAGE, LONGCAT_IMAGE,
    IDEOGRAM4, MOSS_IMAGE,
)  # fmt: skip
FAMILIES: dict[str, FamilySpec] = {family.name: family for family in _ALL}
"""The families by name. They are recognised and listed in this order."""

_OTHERS = {
    DENOISER_PREFIX + "blocks.0.self_attn.q.weight": "Wan",
    DENOISER_PREFIX + "patchify_proj.weight": "LTX-Video",
    DENOISER_PREFIX + "double_layers.0.attn.w1q.weight": "AuraFlow",
    DENOISER_PREFIX + "double_stream_blocks.0.block.attn1.to_q.weight": "HiDream",
    DENOISER_PREFIX + "clip_mapper.weight": "Stable Cascade",
    DENOISER_PREFIX + "double_blocks.0.img_mlp.gate_proj.weight": "Ovis-Image",
}
"""Tensors that identify checkpoints of models outside all families, so that errors can name the model."""


def detect_family(tensors: Mapping[str, Tensor]) -> FamilySpec:
    """Detect the family of a checkpoint in original naming from its tensors. UnknownFamily names the model if known."""
    supported = f"Supported: {', '.join(family.title for family in FAMILIES.values())}"
    for others in (*(family.lookalikes for family in FAMILIES.values()), _OTHERS):
        for marker, title in others.items():
            if marker in tensors:
                raise UnknownFamily(f"this is {title}, which is not supported yet. {supported}")
    denoiser = LazyTensors(stored_under(tensors, DENOISER_PREFIX))
    for family in FAMILIES.values():
        if family.recognise(denoiser):
            return family
    if any(name.removeprefix(DENOISER_PREFIX).startswith(("transformer_blocks.", "unet.")) for name in tensors):
        raise UnknownFamily("this is a denoiser in diffusers naming. Use the whole diffusers folder instead")
    example = next(iter(tensors)).removeprefix(DENOISER_PREFIX)
    raise UnknownFamily(f"no family matches its {counted(len(tensors), 'tensor')}, e.g. {example!r}. {supported}")


def family_without_class(denoiser: Mapping[str, Tensor]) -> FamilySpec | None:
    """Return the family of a denoiser, given by original names, among those that the tested ComfyUI lacks; None for others."""
    newer = (family for family in FAMILIES.values() if not family.names.comfyui_classes)
    return next((family for family in newer if family.recognise(denoiser)), None)
