"""Weights that are stored with scales (fp8 "scaled" files), given as the weights that they stand for."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadFile
from .spec import LazyTensors, Stored, shape_of

_WEIGHT_SCALES = (".scale_weight", ".weight_scale")
_NOT_WEIGHTS = (*_WEIGHT_SCALES, ".scale_input", ".input_scale", ".comfy_quant")
_MARKER = "scaled_fp8"
"""An empty tensor that ComfyUI's first scaled files are known by."""


def dequantised(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors with scales multiplied in (bf16), each when it is asked for; the same mapping where there are no scales.

    Reads ComfyUI's two layouts of fp8 with a scale a tensor: `X.scale_weight`, and `X.weight_scale` with `X.comfy_quant`.
    BadFile names a layout that is not read.
    """
    scaled = {
        name.removesuffix(suffix) + ".weight": name
        for name in tensors
        for suffix in _WEIGHT_SCALES
        if name.endswith(suffix)
    }
    packed = next((name for name in tensors if name.endswith((".absmax", ".weight_scale_2", ".qweight"))), None)
    if packed is not None:
        raise BadFile(
            f"quantised in a way that cannot be read here, e.g. {packed!r}; give the model in bf16, fp16 or fp8"
        )
    if not scaled and not any(name.endswith(_NOT_WEIGHTS) for name in tensors):
        return tensors
    for name in tensors:
        if name.endswith(".comfy_quant"):
            layout = json.loads(bytes(tensors[name].tolist()))["format"]
            if not layout.startswith("float8"):
                raise BadFile(f"{name}: is quantised as {layout}; give the model in bf16, fp16 or fp8")

    readers = {
        name: _Scaled(tensors, name, scaled[name]) if name in scaled else Stored(tensors, name)
        for name in tensors
        if not name.endswith(_NOT_WEIGHTS) and not name.endswith(_MARKER)
    }
    return LazyTensors(readers)


@dataclass(frozen=True, eq=False)
class _Scaled(Stored):
    scale: str

    def __call__(self) -> Tensor:
        return (self.tensors[self.name].float() * self.tensors[self.scale].float()).to(torch.bfloat16)

    def layout(self) -> tuple[torch.dtype, tuple[int, ...]]:
        return torch.bfloat16, shape_of(self.tensors, self.name)
