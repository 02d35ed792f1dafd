"""Reads weights that are quantised, in the formats of ComfyUI's files, as the weights that they stand for.

The formats and their names are those of comfy-kitchen: fp8 with scales, whole numbers (also rotated, as in ConvRot), MXFP8 and
NVFP4. All is widened to bf16 when it is read: bit for bit as ComfyUI does, but for fp8, whose scale it rounds to bf16 before.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import BadFile
from ..storage.lazy import LazyTensors, Stored, dtype_and_shape
from ..storage.safetensors_file import SafetensorsFile
from .spec import UNQUANTISED

Shape = tuple[int, ...]
_WEIGHT_SCALES = (".scale_weight", ".weight_scale")
_WHOLE_SCALE = ".weight_scale_2"
"""The end of the name of NVFP4's scale of a whole weight, whose blocks have `.weight_scale`."""
_NOT_WEIGHTS = (*_WEIGHT_SCALES, _WHOLE_SCALE, ".scale_input", ".input_scale", ".comfy_quant")
_MARKER = "scaled_fp8"
"""An empty tensor by which ComfyUI marked its first scaled files."""
_PACKED = (".absmax", ".qweight", ".SCB", "._data", ".pre_quant_scale")
"""Endings of tensors beside weights in 4 or 8 bits, by bitsandbytes, GPTQ and Nunchaku, quanto, and AWQ."""
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
    """The tensors with the weights that quantised ones stand for (bf16), on demand; the same mapping where none is quantised.

    A layer's format is in `X.comfy_quant` or in the metadata; one that only has `X.scale_weight` or `X.weight_scale` is fp8.
    Raises BadFile, with `what` in the message, for other formats and for scales that do not fit their weight.
    """
    plain: dict[str, Any] = {"format": "float8"}
    layers = {name.removesuffix(end): plain for name in tensors for end in _WEIGHT_SCALES if name.endswith(end)}
    layers |= _descriptions(tensors, what)
    for layer, said in layers.items():
        if _format(said) is None:
            raise BadFile(f"{what}: {layer} is quantised as {said['format']}, which cannot be read here; {UNQUANTISED}")
    quantised = {
        f"{layer}.weight": _Quantised(tensors, f"{layer}.weight", layer, found, said)
        for layer, said in layers.items()
        if f"{layer}.weight" in tensors and (found := _format(said))
    }
    ends = _PACKED if any(said["format"] == "nvfp4" for said in layers.values()) else (*_PACKED, _WHOLE_SCALE)
    if packed := next((name for name in tensors if name.endswith(ends)), None):
        raise BadFile(f"{what}: is quantised in a way that cannot be read here, e.g. {packed!r}; {UNQUANTISED}")
    if isinstance(tensors, SafetensorsFile):
        whole = next((name for name in tensors if _is_whole(tensors, name) and name not in quantised), None)
        if whole:
            raise BadFile(f"{what}: is quantised, e.g. {whole!r} to {tensors.dtypes[whole]}; {UNQUANTISED}")
    for reader in quantised.values():
        reader.check(what)
    if not quantised and not any(name.endswith(_NOT_WEIGHTS) for name in tensors):
        return tensors
    return LazyTensors(
        {
            name: quantised[name] if name in quantised else Stored(tensors, name)
            for name in tensors
            if not name.endswith(_NOT_WEIGHTS) and not name.endswith(_MARKER)
        }
    )


@dataclass(frozen=True)
class _Format:
    """A way in which weights are stored."""

    fits: Callable[[torch.dtype, Shape, Mapping[str, Shape], Mapping[str, Any]], bool]
    """Whether a stored weight's dtype and shape fit the shapes of its scales and what is said of the layer."""
    widen: Callable[[Tensor, Mapping[str, Tensor], Mapping[str, Any]], Tensor]
    """The weight for (what is stored, its scales by the ends of their names, what is said of the layer)."""
    scales: tuple[str, ...] = ()
    """The ends of the names of its scales; for none it is one of _WEIGHT_SCALES."""
    numbers: int = 1
    """How many numbers of the weight a stored one holds."""


@dataclass(frozen=True, eq=False)
class _Quantised(Stored):
    """A weight that is widened when it is read."""

    layer: str
    format: _Format
    said: Mapping[str, Any]

    def _scales(self) -> dict[str, str]:
        """The names of its scales, by their ends."""
        ends = self.format.scales or [end for end in _WEIGHT_SCALES if self.layer + end in self.tensors]
        return {end: self.layer + end for end in ends}

    def __call__(self) -> Tensor:
        scales = {end: self.tensors[name] for end, name in self._scales().items()}
        return self.format.widen(self.tensors[self.name], scales, self.said).to(torch.bfloat16)

    def layout(self) -> tuple[torch.dtype, Shape]:
        *rows, columns = dtype_and_shape(self.tensors, self.name)[1]
        return torch.bfloat16, (*rows, columns * self.format.numbers)

    def check(self, what: str) -> None:
        """Raises BadFile where scales are missing, or do not fit the weight."""
        scales = self._scales()
        missing = [name for name in scales.values() if name not in self.tensors]
        if missing or not scales:
            raise BadFile(
                f"{what}: {self.name} is quantised as {self.said['format']} and lacks its scales; {UNQUANTISED}"
            )
        dtype, shape = dtype_and_shape(self.tensors, self.name)
        shapes = {end: dtype_and_shape(self.tensors, name)[1] for end, name in scales.items()}
        if not self.format.fits(dtype, shape, shapes, self.said):
            sides = " and ".join(str(list(shape)) for shape in shapes.values())
            raise BadFile(
                f"{what}: {self.name} of {list(shape)} in {dtype} has scales of {sides}, which do not fit it as "
                f"{self.said['format']}; {UNQUANTISED}"
            )


# --- one scale for a weight, or one for each row ---


def _has_scale_of_rows(shape: Shape, scales: Mapping[str, Shape]) -> bool:
    (scale,) = scales.values()
    return math.prod(scale) == 1 or (scale[:1] == shape[:1] and math.prod(scale) == shape[0])


def _fits_fp8(dtype: torch.dtype, shape: Shape, scales: Mapping[str, Shape], said: Mapping[str, Any]) -> bool:
    return dtype.is_floating_point and _has_scale_of_rows(shape, scales)


def _times_scale(weight: Tensor, scales: Mapping[str, Tensor], said: Mapping[str, Any]) -> Tensor:
    (scale,) = scales.values()
    return weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))


def _rotated_in(said: Mapping[str, Any]) -> int:
    """The number of inputs that are rotated together; 0 where none is, and -1 for one that cannot be."""
    inner = said.get("params")
    said = {**(inner if isinstance(inner, dict) else {}), **said}
    if not said.get("convrot"):
        return 0
    size = said.get("convrot_groupsize", 256)
    is_power = isinstance(size, int) and size in [4**power for power in range(1, 9)]
    return size if is_power else -1


def _fits_int8(dtype: torch.dtype, shape: Shape, scales: Mapping[str, Shape], said: Mapping[str, Any]) -> bool:
    size = _rotated_in(said)
    can_be_rotated = not size or (size > 0 and len(shape) == 2 and shape[1] % size == 0)
    return dtype == torch.int8 and can_be_rotated and _has_scale_of_rows(shape, scales)


def _widen_int8(weight: Tensor, scales: Mapping[str, Tensor], said: Mapping[str, Any]) -> Tensor:
    widened = _times_scale(weight, scales, said)
    if size := _rotated_in(said):
        # ConvRot turns the inputs in groups before it rounds, by a matrix that is its own inverse.
        return (widened.reshape(len(widened), -1, size) @ _rotation(size)).reshape(widened.shape)
    return widened


@lru_cache(maxsize=4)
def _rotation(size: int) -> Tensor:
    """The symmetric orthogonal matrix (size, size) of ConvRot: a Kronecker power of a regular Hadamard matrix of order 4."""
    of_four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    matrix = of_four
    while len(matrix) < size:
        matrix = torch.kron(matrix, of_four)
    return matrix / math.sqrt(size)


# --- a scale for each block of a row ---

_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The numbers that E2M1's 16 codes stand for."""


def _fits_blocks(shape: Shape, blocks: Shape, size: int) -> bool:
    """Whether there is a scale for each block of `size` numbers in a row, in the layout of `_in_rows`."""
    if len(shape) != 2 or shape[1] % size:
        return False
    return math.prod(blocks) == math.ceil(shape[0] / 128) * 128 * math.ceil(shape[1] / size / 4) * 4


def _in_rows(scales: Tensor, rows: int, columns: int) -> Tensor:
    """The scales (rows, columns) of blocks, which cuBLAS wants in tiles of 128 rows and 4 columns.

    The layout is in cuBLAS' documentation, "1D block scaling factors layout": in a tile of 512 numbers those of rows r,
    r + 32, r + 64 and r + 96 are next to each other.
    """
    down, across = math.ceil(rows / 128), math.ceil(columns / 4)
    tiles = scales.reshape(down, across, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(down * 128, across * 4)[:rows, :columns]


def _fits_mxfp8(dtype: torch.dtype, shape: Shape, scales: Mapping[str, Shape], said: Mapping[str, Any]) -> bool:
    (blocks,) = scales.values()
    return dtype == torch.float8_e4m3fn and _fits_blocks(shape, blocks, 32)


def _widen_mxfp8(weight: Tensor, scales: Mapping[str, Tensor], said: Mapping[str, Any]) -> Tensor:
    rows, columns = weight.shape
    (scale,) = scales.values()
    exponents = _in_rows(scale.view(torch.uint8), rows, columns // 32)
    powers = (exponents.int() << 23).view(torch.float32)  # an exponent of float32, of which 0 is the number 0
    return (weight.float().reshape(rows, -1, 32) * powers[..., None]).reshape(rows, columns)


def _fits_nvfp4(dtype: torch.dtype, shape: Shape, scales: Mapping[str, Shape], said: Mapping[str, Any]) -> bool:
    blocks, whole = scales.values()
    return dtype == torch.uint8 and math.prod(whole) == 1 and _fits_blocks((*shape[:-1], 2 * shape[-1]), blocks, 16)


def _widen_nvfp4(weight: Tensor, scales: Mapping[str, Tensor], said: Mapping[str, Any]) -> Tensor:
    rows, columns = len(weight), 2 * weight.shape[1]
    blocks, whole = scales.values()
    codes = torch.stack([weight >> 4, weight & 15], dim=-1).reshape(rows, -1, 16)
    of_blocks = _in_rows(blocks.view(torch.uint8), rows, columns // 16).contiguous().view(torch.float8_e4m3fn)
    # In bf16, as ComfyUI has it.
    scale = whole.reshape(()).bfloat16() * of_blocks.bfloat16()
    return (_FP4.bfloat16()[codes.int()] * scale[..., None]).reshape(rows, columns)


_FORMATS = {
    "float8": _Format(_fits_fp8, _times_scale),
    "int8_tensorwise": _Format(_fits_int8, _widen_int8, (".weight_scale",)),
    "mxfp8": _Format(_fits_mxfp8, _widen_mxfp8, (".weight_scale",)),
    "nvfp4": _Format(_fits_nvfp4, _widen_nvfp4, (".weight_scale", _WHOLE_SCALE), numbers=2),
}


def _format(said: Mapping[str, Any]) -> _Format | None:
    """The format of a layer, None for an unknown one; "float8_e4m3fn" and "float8_e5m2" are "float8"."""
    name = said["format"]
    return _FORMATS.get("float8" if name.startswith("float8") else name)


def _descriptions(tensors: Mapping[str, Tensor], what: str) -> dict[str, dict[str, Any]]:
    """What tensors or the metadata say of each quantised layer, by layer. Raises BadFile when they are damaged."""
    ending = ".comfy_quant"
    try:
        layers = {
            name.removesuffix(ending): json.loads(bytes(tensors[name].tolist()))
            for name in tensors
            if name.endswith(ending)
        }
        if isinstance(tensors, SafetensorsFile):
            layers |= json.loads(tensors.metadata.get(_HEADERS_FORMATS, '{"layers": {}}'))["layers"]
        return {layer: {**description, "format": str(description["format"])} for layer, description in layers.items()}
    except (ValueError, TypeError, LookupError, RecursionError):
        raise BadFile(f"{what}: what it says of how its layers are quantised cannot be read; {UNQUANTISED}") from None
