"""Read quantised weights, in the formats of ComfyUI's files, as plain weights.

The formats and their names are those of comfy-kitchen: fp8 with scales, whole numbers in 8 bits and in 4 (also rotated, as in
ConvRot), MXFP8 and NVFP4. All of them are dequantised to bf16, bit for bit as ComfyUI does. That happens when they are read, or
in layers that keep them as stored and dequantise them whenever they are used (quantised_layers.py).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadFile
from ..storage.plain_values import parse_json
from ..storage.safetensors_file import SafetensorsFile
from ..storage.stored import Dequantise, LazyTensors, QuantisedTensor, Stored, dtype_and_shape, outline, scaled
from ..tensor_names.models import Shape
from .quantised_layers import Rotated, constant
from .spec import UNQUANTISED

_WEIGHT_SCALES = (".scale_weight", ".weight_scale")
_WHOLE_SCALE = ".weight_scale_2"
"""The name suffix of NVFP4's scale of a whole weight, whose blocks have `.weight_scale`."""
_NOT_WEIGHTS = (*_WEIGHT_SCALES, _WHOLE_SCALE, ".scale_input", ".input_scale", ".comfy_quant")
_OF_ROWS = ("float32", "bfloat16", "float16", "float64")
"""The dtypes that scales of rows and of whole weights may have."""
_MARKER = "scaled_fp8"
"""An empty tensor that marked ComfyUI's first scaled files."""
_PACKED = (".absmax", ".qweight", ".SCB", "._data", ".pre_quant_scale")
"""Name suffixes of tensors that go with weights in 4 or 8 bits, by bitsandbytes, GPTQ and Nunchaku, quanto, and AWQ."""
_HEADERS_FORMATS = "_quantization_metadata"
"""The metadata key under which ComfyUI names the format of each layer, if no tensors do."""


def sign_of_quantisation(file: SafetensorsFile) -> str | None:
    """Return the name of a tensor or metadata key that shows that a file is quantised, or None."""
    endings = (*_NOT_WEIGHTS, *_PACKED, _MARKER)
    tensors = (name for name in file if name.endswith(endings) or _is_whole(file, name))
    return next(tensors, _HEADERS_FORMATS if _HEADERS_FORMATS in file.metadata else None)


def _is_whole(file: SafetensorsFile, name: str) -> bool:
    return name.endswith(".weight") and not file.dtypes[name].is_floating_point


def dequantised(tensors: Mapping[str, Tensor], what: str) -> Mapping[str, Tensor]:
    """Replace quantised tensors by the weights that they represent (bf16), on demand. Without any, return the same mapping.

    A layer's format is in `X.comfy_quant` or in the metadata. A layer with only `X.scale_weight` or `X.weight_scale` is fp8.
    Raises BadFile, with `what` in the message, for other formats and for scales that do not fit their weight.
    """
    plain: dict[str, Any] = {"format": "float8"}
    layers = {name.removesuffix(end): plain for name in tensors for end in _WEIGHT_SCALES if name.endswith(end)}
    layers |= _descriptions(tensors, what)
    for layer, spec in layers.items():
        if _format(spec) is None:
            raise BadFile(f"{what}: {layer} is quantised as {spec['format']}, which cannot be read here; {UNQUANTISED}")
    quantised = {
        f"{layer}.weight": _Quantised(tensors, f"{layer}.weight", layer, found, spec)
        for layer, spec in layers.items()
        if f"{layer}.weight" in tensors and (found := _format(spec))
    }
    ends = _PACKED if any(spec["format"] == "nvfp4" for spec in layers.values()) else (*_PACKED, _WHOLE_SCALE)
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
    """A format of stored weights."""

    fits: Callable[[torch.dtype, Shape, Mapping[str, Shape], Mapping[str, Any]], bool]
    """Whether a stored weight's dtype and shape fit the shapes of its scales and the layer's spec."""
    parts: Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, ...]]
    """The parts of a QuantisedTensor for (the stored weight, its scales by name suffix)."""
    dequantise: Callable[[Mapping[str, Any]], Dequantise]
    """How these parts are dequantised, given the layer's spec."""
    scales: tuple[str, ...] = ()
    """The name suffixes of its scales. Empty means one of _WEIGHT_SCALES."""
    numbers: int = 1
    """How many numbers of the weight a stored number holds."""
    of_blocks: tuple[str, ...] = ()
    """The dtypes that the scales of blocks may have, by name (torch 2.5 lacks one). All other scales have _OF_ROWS."""


@dataclass(frozen=True, eq=False)
class _Quantised(Stored):
    """A weight that is dequantised when it is read."""

    layer: str
    format: _Format
    spec: Mapping[str, Any]

    def _scales(self) -> dict[str, str]:
        ends = self.format.scales or [end for end in _WEIGHT_SCALES if self.layer + end in self.tensors]
        return {end: self.layer + end for end in ends}

    def __call__(self) -> Tensor:
        return self.quantised().dequantised(torch.bfloat16)

    def quantised(self, read: bool = True) -> QuantisedTensor:
        scales = {end: self.tensors[name] for end, name in self._scales().items()}
        weight = self.tensors[self.name]
        if not read:
            weight, scales = outline(weight), {end: outline(scale) for end, scale in scales.items()}
        parts = self.format.parts(weight, scales)
        return QuantisedTensor(parts, self.format.dequantise(self.spec), self.layout()[1])

    def layout(self) -> tuple[torch.dtype, Shape]:
        *rows, columns = dtype_and_shape(self.tensors, self.name)[1]
        return torch.bfloat16, (*rows, columns * self.format.numbers)

    def check(self, what: str) -> None:
        """Raise BadFile if scales are missing, have another dtype, or do not fit the weight."""
        scales = self._scales()
        missing = [name for name in scales.values() if name not in self.tensors]
        if missing or not scales:
            raise BadFile(
                f"{what}: {self.name} is quantised as {self.spec['format']} and lacks its scales; {UNQUANTISED}"
            )
        dtype, shape = dtype_and_shape(self.tensors, self.name)
        layouts = {end: dtype_and_shape(self.tensors, name) for end, name in scales.items()}
        shapes = {end: of_scale for end, (_, of_scale) in layouts.items()}
        if not self.format.fits(dtype, shape, shapes, self.spec):
            sides = " and ".join(str(list(shape)) for shape in shapes.values())
            raise BadFile(
                f"{what}: {self.name} of {list(shape)} in {dtype} has scales of {sides}, which do not fit it as "
                f"{self.spec['format']}; {UNQUANTISED}"
            )
        for end, (found, _) in layouts.items():
            wanted = _OF_ROWS if end == _WHOLE_SCALE else self.format.of_blocks or _OF_ROWS
            if str(found).removeprefix("torch.") not in wanted:
                raise BadFile(
                    f"{what}: {scales[end]} is in {found}, but such scales of {self.spec['format']} must be in "
                    f"{' or '.join(wanted)}; {UNQUANTISED}"
                )


# --- one scale for a weight, or one for each row ---


def _has_scale_of_rows(shape: Shape, scales: Mapping[str, Shape]) -> bool:
    (scale,) = scales.values()
    return math.prod(scale) == 1 or (scale[:1] == shape[:1] and math.prod(scale) == shape[0])


def _with_scale_of_rows(weight: Tensor, scales: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    (scale,) = scales.values()
    ones = [1] * (weight.ndim - 1)
    return weight, scale.float().reshape([] if scale.numel() == 1 else [-1, *ones])


def dequantise_fp8(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Dequantise fp8 numbers with a scale for each row or one for all."""
    weight, scale = parts
    # In bf16, as in ComfyUI.
    return weight.to(torch.bfloat16, copy=True).mul_(scale.bfloat16()).to(dtype)


def _times_scale(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.float().mul_(scale)


def _rotated_in(spec: Mapping[str, Any]) -> int:
    """Return the number of inputs that are rotated together: 0 if none are, and -1 for an invalid number."""
    inner = spec.get("params")
    spec = {**(inner if isinstance(inner, dict) else {}), **spec}
    if not spec.get("convrot"):
        return 0
    size = spec.get("convrot_groupsize", 256)
    is_power = isinstance(size, int) and size in [4**power for power in range(1, 9)]
    return size if is_power else -1


def _fits_int8(dtype: torch.dtype, shape: Shape, scales: Mapping[str, Shape], spec: Mapping[str, Any]) -> bool:
    size = _rotated_in(spec)
    can_be_rotated = not size or (size > 0 and len(shape) == 2 and shape[1] % size == 0)
    return dtype == torch.int8 and can_be_rotated and _has_scale_of_rows(shape, scales)


def dequantise_int8(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Dequantise whole numbers with a scale for each row or one for all."""
    return scaled(*parts).to(dtype)


def dequantise_rotated(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Dequantise whole numbers with scales to a dtype directly, leaving inputs rotated."""
    return scaled(*parts) if dtype == torch.bfloat16 else _times_scale(*parts).to(dtype)


def _dequantise_rotated_int4(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    pairs, scale = parts
    # A byte holds two numbers from -8 to 7, the first in its lower half.
    return dequantise_rotated([torch.stack([pairs << 4 >> 4, pairs >> 4], dim=-1).flatten(-2), scale], dtype)


# --- a scale for each block of a row ---


def _fits_blocks(shape: Shape, blocks: Shape, size: int) -> bool:
    """Return whether there is a scale for each block of `size` numbers in a row, in the layout of `_in_rows`."""
    if len(shape) != 2 or shape[1] % size:
        return False
    return math.prod(blocks) == math.ceil(shape[0] / 128) * 128 * math.ceil(shape[1] / size / 4) * 4


def _in_rows(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Return the scales (rows, columns) of blocks, which cuBLAS requires in tiles of 128 rows and 4 columns.

    The layout is in cuBLAS' documentation, "1D block scaling factors layout". In a tile of 512 numbers, those of rows r, r +
    32, r + 64 and r + 96 are next to each other.
    """
    down, across = math.ceil(rows / 128), math.ceil(columns / 4)
    tiles = scales.reshape(down, across, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(down * 128, across * 4)[:rows, :columns].contiguous()


def _fits_mxfp8(dtype: torch.dtype, shape: Shape, scales: Mapping[str, Shape], spec: Mapping[str, Any]) -> bool:
    (blocks,) = scales.values()
    return dtype == torch.float8_e4m3fn and _fits_blocks(shape, blocks, 32)


def _mxfp8_parts(weight: Tensor, scales: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    (exponents,) = scales.values()
    return weight, _in_rows(exponents.view(torch.uint8), len(weight), weight.shape[1] // 32)


def _dequantise_mxfp8(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    weight, exponents = parts
    powers = (exponents.to(torch.int16) << 7).view(torch.bfloat16)  # as an exponent of bf16, where 0 gives the number 0
    return weight.to(torch.bfloat16).unflatten(1, (-1, 32)).mul_(powers[..., None]).flatten(1).to(dtype)


def _fits_nvfp4(dtype: torch.dtype, shape: Shape, scales: Mapping[str, Shape], spec: Mapping[str, Any]) -> bool:
    blocks, whole = scales.values()
    return dtype == torch.uint8 and math.prod(whole) == 1 and _fits_blocks((*shape[:-1], 2 * shape[-1]), blocks, 16)


def _nvfp4_parts(weight: Tensor, scales: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    blocks, whole = scales.values()
    of_blocks = _in_rows(blocks.view(torch.uint8), len(weight), weight.shape[1] // 8)
    return weight, of_blocks.view(torch.float8_e4m3fn), whole.reshape(())


def _dequantise_nvfp4(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    weight, of_blocks, whole = parts
    # In bf16, as in ComfyUI.
    scale = whole.bfloat16() * of_blocks.bfloat16()
    pairs = constant(_pairs_of_e2m1, weight).index_select(0, weight.flatten().int()).view(torch.bfloat16)
    return pairs.view(len(weight), -1, 16).mul_(scale[..., None]).flatten(1).to(dtype)


def _pairs_of_e2m1(device: torch.device) -> Tensor:
    """Return the two numbers (bf16) that each byte represents, the one in its upper half first, as one of 32 bits: (256).

    Half a byte is a sign, two bits of exponent and one of mantissa. Shifted to where fp16 has these bits, they are the same
    number divided by 2^14, the ratio of the exponents' biases.
    """
    codes = torch.arange(256, dtype=torch.int16, device=device)
    codes = torch.stack([codes >> 4, codes & 15], dim=-1)
    numbers = ((codes & 7) << 9 | (codes & 8) << 12).view(torch.float16).bfloat16() * 2.0**14
    return numbers.view(torch.int32).flatten()


_FORMATS = {
    "float8": _Format(
        lambda dtype, shape, scales, _: dtype.is_floating_point and _has_scale_of_rows(shape, scales),
        _with_scale_of_rows,
        lambda spec: dequantise_fp8,
    ),
    "int8_tensorwise": _Format(
        _fits_int8,
        _with_scale_of_rows,
        lambda spec: Rotated(dequantise_rotated, size) if (size := _rotated_in(spec)) else dequantise_int8,
        (".weight_scale",),
    ),
    "convrot_w4a4": _Format(
        lambda dtype, shape, scales, spec: _fits_int8(
            dtype, (*shape[:-1], 2 * shape[-1]), scales, {**spec, "convrot": True}
        ),
        _with_scale_of_rows,
        lambda spec: Rotated(_dequantise_rotated_int4, _rotated_in({**spec, "convrot": True})),
        (".weight_scale",),
        numbers=2,
    ),
    "mxfp8": _Format(
        _fits_mxfp8,
        _mxfp8_parts,
        lambda spec: _dequantise_mxfp8,
        (".weight_scale",),
        of_blocks=("uint8", "float8_e8m0fnu"),
    ),
    "nvfp4": _Format(
        _fits_nvfp4,
        _nvfp4_parts,
        lambda spec: _dequantise_nvfp4,
        (".weight_scale", _WHOLE_SCALE),
        numbers=2,
        of_blocks=("float8_e4m3fn", "uint8"),
    ),
}


def _format(spec: Mapping[str, Any]) -> _Format | None:
    """Return the format of a layer, None for an unknown one. "float8_e4m3fn" and "float8_e5m2" are "float8"."""
    name = spec["format"]
    return _FORMATS.get("float8" if name.startswith("float8") else name)


def _descriptions(tensors: Mapping[str, Tensor], what: str) -> dict[str, dict[str, Any]]:
    """Read each quantised layer's description from tensors or the metadata. Raises BadFile when they are damaged."""
    ending = ".comfy_quant"
    try:
        layers = {
            name.removesuffix(ending): parse_json(bytes(tensors[name].tolist()))
            for name in tensors
            if name.endswith(ending)
        }
        if isinstance(tensors, SafetensorsFile):
            layers |= parse_json(tensors.metadata.get(_HEADERS_FORMATS, '{"layers": {}}'))["layers"]
        return {layer: {**description, "format": str(description["format"])} for layer, description in layers.items()}
    except (ValueError, TypeError, LookupError):
        raise BadFile(f"{what}: the description of its quantised layers cannot be read; {UNQUANTISED}") from None
