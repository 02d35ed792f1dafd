"""Reads quantised weights that are stored with scales (fp8 "scaled" files) as the weights that they stand for."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadFile
from ..storage.lazy import LazyTensors, Stored, dtype_and_shape, shape_of
from ..storage.safetensors_file import SafetensorsFile
from .spec import UNQUANTISED

_WEIGHT_SCALES = (".scale_weight", ".weight_scale")
_NOT_WEIGHTS = (*_WEIGHT_SCALES, ".scale_input", ".input_scale", ".comfy_quant")
_MARKER = "scaled_fp8"
"""An empty tensor by which ComfyUI marked its first scaled files."""
_PACKED = (".absmax", ".weight_scale_2", ".qweight", ".SCB", "._data")
"""Endings of tensors beside weights in 4 or 8 bits, by bitsandbytes, NVFP4, GPTQ and Nunchaku, and quanto."""
_HEADERS_FORMATS = "_quantization_metadata"
"""The key in the metadata under which ComfyUI names the format of each layer, when no tensors do."""


def sign_of_quantisation(file: SafetensorsFile) -> str | None:
    """The name of a tensor or metadata key that shows that a file is quantised; None when it is not."""
    endings = (*_NOT_WEIGHTS, *_PACKED, _MARKER)
    tensors = (name for name in file if name.endswith(endings) or _is_whole(file, name))
    return next(tensors, _HEADERS_FORMATS if _HEADERS_FORMATS in file.metadata else None)


def _is_whole(file: SafetensorsFile, name: str) -> bool:
    """Whether a tensor is a weight stored as whole numbers."""
    return name.endswith(".weight") and not file.dtypes[name].is_floating_point


def dequantised(tensors: Mapping[str, Tensor], what: str) -> Mapping[str, Tensor]:
    """The tensors with weights multiplied by their scales (bf16), on demand; the same mapping when there are no scales.

    It reads fp8 with a scale for each tensor or output row, in ComfyUI's two layouts: `X.scale_weight`, and `X.weight_scale`
    with `X.comfy_quant`. Raises BadFile, with `what` in the message, for any other quantisation.
    """
    scaled = {
        name.removesuffix(suffix) + ".weight": name
        for name in tensors
        for suffix in _WEIGHT_SCALES
        if name.endswith(suffix) and name.removesuffix(suffix) + ".weight" in tensors
    }
    for layer, layout in _formats(tensors, what).items():
        if not layout.startswith("float8"):
            raise BadFile(f"{what}: {layer} is quantised as {layout}, which cannot be read here; {UNQUANTISED}")
    if packed := next((name for name in tensors if name.endswith(_PACKED)), None):
        raise BadFile(f"{what}: is quantised in a way that cannot be read here, e.g. {packed!r}; {UNQUANTISED}")
    if isinstance(tensors, SafetensorsFile) and (whole := next((n for n in tensors if _is_whole(tensors, n)), None)):
        raise BadFile(f"{what}: is quantised, e.g. {whole!r} to {tensors.dtypes[whole]}; {UNQUANTISED}")
    if not scaled and not any(name.endswith(_NOT_WEIGHTS) for name in tensors):
        return tensors
    for name, scale in scaled.items():
        (dtype, shape), scale_shape = dtype_and_shape(tensors, name), shape_of(tensors, scale)
        per_row = scale_shape[:1] == shape[:1] and math.prod(scale_shape) == shape[0]
        if not dtype.is_floating_point or not (per_row or math.prod(scale_shape) == 1):
            raise BadFile(
                f"{what}: {name} of {list(shape)} in {dtype} has a scale of {list(scale_shape)}, and only fp8 with "
                f"one scale, or one for each row, can be read; {UNQUANTISED}"
            )

    readers = {
        name: _Scaled(tensors, name, scaled[name]) if name in scaled else Stored(tensors, name)
        for name in tensors
        if not name.endswith(_NOT_WEIGHTS) and not name.endswith(_MARKER)
    }
    return LazyTensors(readers)


@dataclass(frozen=True, eq=False)
class _Scaled(Stored):
    """A weight that is multiplied by its scale when it is read."""

    scale: str

    def __call__(self) -> Tensor:
        weight, scale = self.tensors[self.name].float(), self.tensors[self.scale].float()
        return (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).to(torch.bfloat16)

    def layout(self) -> tuple[torch.dtype, tuple[int, ...]]:
        return torch.bfloat16, shape_of(self.tensors, self.name)


def _formats(tensors: Mapping[str, Tensor], what: str) -> dict[str, str]:
    """The format of each layer that tensors or the metadata name one for, by layer. Raises BadFile when they are damaged."""
    ending = ".comfy_quant"
    try:
        layers = {
            name.removesuffix(ending): json.loads(bytes(tensors[name].tolist()))
            for name in tensors
            if name.endswith(ending)
        }
        if isinstance(tensors, SafetensorsFile):
            layers |= json.loads(tensors.metadata.get(_HEADERS_FORMATS, '{"layers": {}}'))["layers"]
        return {layer: str(description["format"]) for layer, description in layers.items()}
    except (ValueError, TypeError, LookupError, RecursionError):
        raise BadFile(f"{what}: what it says of how its layers are quantised cannot be read; {UNQUANTISED}") from None
