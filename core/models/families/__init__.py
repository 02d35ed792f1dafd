"""The model families. Each other file in this folder is a family, with a FamilySpec that describes it."""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules

from torch import Tensor

from ...errors import UnknownFamily, counted
from ...storage.stored import LazyTensors, stored_under
from ...tensor_names import NAME_TABLES
from ..spec import DENOISER_PREFIX, FamilySpec

_FILES = (vars(import_module(f".{file.name}", __name__)).values() for file in iter_modules(__path__))
_FOUND = {value.name: value for values in _FILES for value in values if isinstance(value, FamilySpec)}
FAMILIES: dict[str, FamilySpec] = {name: _FOUND[name] for name in sorted(_FOUND, key=list(NAME_TABLES).index)}
"""The families by name, in the order of NAME_TABLES, where their names have to be registered."""

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
