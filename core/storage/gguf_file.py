"""Read GGUF files, the quantised format of llama.cpp and ComfyUI-GGUF, through the package gguf."""

import os
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadFile, MissingPackage
from ..progress import silent
from .files import map_file
from .header import MAX_NAME
from .safetensors_file import CHUNK_BYTES, sha256_of, tensor_bytes
from .stored import LazyTensors, QuantisedTensor, Stored, outline, scaled

SUFFIX = ".gguf"
_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
"""The unquantised types that numpy supports too, by GGUF's names."""
_MOST_SIDES = 16
"""Longer lists are skipped, because the only lists that are needed are the shapes of tensors."""
_MOST_VALUES, _TEXTS_PER_VALUE = 40_000, 64
"""The most values in a header that are read, eight for each tensor. Skipping a list of so many texts takes as long as one."""


class GgufTensors(LazyTensors):
    """The tensors of a GGUF file."""

    path: Path
    architecture: str
    """The architecture that the file states, such as "flux" or "qwen3"; empty if it states none."""
    content: Tensor
    """The bytes of the file."""

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return len(self.content)

    def sha256(self, *, on_chunk: Callable[[], None] = silent) -> str:
        """Compute the SHA-256 of the file, as 64 hex digits. `on_chunk` is called after each MiB, and may raise to cancel."""
        return sha256_of(map(tensor_bytes, self.content.split(CHUNK_BYTES)), on_chunk)


def open_gguf(path: str | os.PathLike[str]) -> GgufTensors:
    """Open a GGUF file as a mapping from names to tensors, which are read and dequantised (to bf16) on access.

    Raises BadFile when the file cannot be read as GGUF, MissingPackage without the package gguf.
    """
    try:
        import gguf
    except ImportError:
        raise MissingPackage(f"{path}: reading GGUF files requires the package gguf: pip install gguf") from None
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadFile(f"{path}: is not a regular file")

        class Reader(gguf.GGUFReader):
            left = _MOST_VALUES

            def _spend(self, values: int) -> None:
                self.left -= values
                if self.left < 0:
                    raise ValueError(f"its header has more than {_MOST_VALUES:,} values")

            def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Any:
                self._spend(1)
                if dtype is np.uint64 and count > _MOST_SIDES:
                    raise ValueError(f"a tensor has {count:,} sides (limit {_MOST_SIDES})")
                # Past the end of the file numpy returns too few values, and the package would loop over missing arrays.
                found = super()._get(offset, dtype, count, *order, **named)
                if len(found) < count:
                    raise ValueError("the file is truncated")
                return found

            def _get_str(self, offset: int) -> Any:
                if (size := self._get(offset, np.uint64)[0]) > MAX_NAME:
                    raise ValueError(f"a name has {size:,} bytes (limit {MAX_NAME:,})")
                return super()._get_str(offset)

            def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
                if raw_type == gguf.GGUFValueType.STRING and (size := self._get(orig_offs, np.uint64)[0]) > MAX_NAME:
                    return 8 + int(size), [], [], [gguf.GGUFValueType.STRING]  # such as a whole tokenizer
                # The package would create one array for each of a tokenizer's hundreds of thousands of words and numbers.
                if raw_type == gguf.GGUFValueType.ARRAY:
                    (kind,), (count,) = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
                    if kind == gguf.GGUFValueType.ARRAY:
                        raise ValueError("its header has lists of lists")
                    if count > _MOST_SIDES and kind == gguf.GGUFValueType.STRING and self.byte_order == "I":
                        self._spend(int(count) // _TEXTS_PER_VALUE)
                        size = _size_of_texts(self.data[orig_offs + 12 :].data, int(count))
                        return 12 + size, [], [], [gguf.GGUFValueType.ARRAY]
                    if count > _MOST_SIDES and (number := self.gguf_scalar_to_np.get(kind)):
                        return 12 + int(count) * np.dtype(number).itemsize, [], [], [gguf.GGUFValueType.ARRAY]
                return super()._get_field_parts(orig_offs, raw_type)

        reader = Reader(path)
        with path.open("rb") as file:
            whole = torch.frombuffer(map_file(file), dtype=torch.uint8)
        tensors = GgufTensors({tensor.name: _GgufTensor.of(reader, tensor, whole) for tensor in reader.tensors})
        tensors.path, tensors.content = path, whole
        architecture = reader.get_field("general.architecture")
        tensors.architecture = "" if architecture is None else str(architecture.contents())
        return tensors
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, MemoryError) as error:
        # The package uses values from the file without checking them.
        raise BadFile(f"{path}: cannot be read as GGUF: {error or type(error).__name__}") from None


def _size_of_texts(data: memoryview, count: int) -> int:
    """Return the size in bytes of the length-prefixed texts at the start of `data`. Raises ValueError when they are cut off."""
    at = 0
    for _ in range(count):
        if at + 8 > len(data):
            raise ValueError("the file is truncated")
        at += 8 + int.from_bytes(data[at : at + 8], sys.byteorder)
    return at


@dataclass(frozen=True, eq=False)
class _GgufTensor(Stored):
    """A tensor that is dequantised when it is read."""

    stored: Any
    """The tensor as the package describes it."""
    shape: tuple[int, ...]
    file: Tensor
    """The bytes of the file."""

    @classmethod
    def of(cls, reader: Any, stored: Any, file: Tensor) -> "_GgufTensor":
        field = reader.get_field(f"comfy.gguf.orig_shape.{stored.name}")  # of a tensor that was saved as a matrix
        sides = reversed(stored.shape.tolist()) if field is None else field.contents()
        made = cls({}, stored.name, stored, tuple(int(side) for side in sides), file)
        if torch.Size(made.shape).numel() != stored.n_elements:
            raise ValueError(f"{stored.name[:80]!r} has {stored.n_elements} values but the shape {list(made.shape)}")
        return made

    def __call__(self) -> Tensor:
        if quantised := self.quantised():
            return quantised.dequantised(torch.bfloat16)
        return dequantised_array(self.stored.data, self.stored.tensor_type, self.shape, self.name)

    def layout(self) -> tuple[torch.dtype, tuple[int, ...]]:
        return dtype_of(self.stored.tensor_type), self.shape

    def quantised(self, read: bool = True) -> QuantisedTensor | None:
        stored = self.stored
        if stored.tensor_type.name not in _BLOCKS:
            return None
        data = self.file[stored.data_offset : stored.data_offset + stored.n_bytes].reshape(stored.data.shape)
        return quantised_gguf(data if read else outline(data), stored.tensor_type.name, self.shape)


def dtype_of(kind: Any) -> torch.dtype:
    """Return the dtype that tensors of the package's type `kind` are read as."""
    return _PLAIN.get(kind.name, torch.bfloat16)


def dequantised_array(data: Any, kind: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """Dequantise a numpy array of the package's type `kind` to bf16. Unquantised arrays keep their type.

    Raises BadFile, with the tensor's `name`, for a quantisation that the package does not support.
    """
    if kind.name in _PLAIN:
        return torch.tensor(data, dtype=_PLAIN[kind.name]).reshape(shape)
    if kind.name == "BF16":
        return torch.tensor(data).view(torch.bfloat16).reshape(shape)
    from gguf.quants import dequantize

    try:
        return torch.from_numpy(dequantize(data, kind)).bfloat16().reshape(shape)
    except NotImplementedError:
        raise BadFile(f"{name}: is quantised as {kind.name}, which the package gguf does not support") from None


def quantised_gguf(data: Tensor, kind: str, shape: tuple[int, ...]) -> QuantisedTensor | None:
    """Return a quantised weight that torch can dequantise. `kind` is GGUF's name of the quantisation.

    `data` are bytes, (rows, bytes per row). The result is None for other quantisations, and for a `shape` whose rows are not
    those of `data`.
    """
    if kind not in _BLOCKS or data.ndim != 2 or len(shape) != 2 or len(data) != shape[0]:
        return None
    return QuantisedTensor((data,), partial(_dequantise, kind=kind), shape)


def _dequantise(parts: Sequence[Tensor], dtype: torch.dtype, kind: str) -> Tensor:
    size, numbers_of = _BLOCKS[kind]
    return numbers_of(parts[0].unflatten(1, (-1, size))).flatten(1).to(dtype)


def _half(blocks: Tensor, place: int) -> Tensor:
    """Return the fp16 number at byte `place` of each block as float32, (..., 1)."""
    return blocks[..., place : place + 2].contiguous().view(torch.float16).float()


def _nibbles(blocks: Tensor) -> Tensor:
    """Return the lower halves of bytes (..., n), followed by the upper halves: (..., 2, n)."""
    numbers = blocks.new_empty(*blocks.shape[:-1], 2, blocks.shape[-1])
    torch.bitwise_and(blocks, 15, out=numbers[..., 0, :])
    torch.bitwise_right_shift(blocks, 4, out=numbers[..., 1, :])
    return numbers


def _add_bits(numbers: Tensor, blocks: Tensor, width: int = 1) -> None:
    """Add 16 times the numbers of `width` bits in bytes (..., n) to `numbers` (..., 8 / width, n), the lowest bits first."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=blocks.device)
    numbers.add_((blocks[..., None, :] >> shifts[:, None]).bitwise_and_(2**width - 1), alpha=16)


def _q45(blocks: Tensor, has_minimum: bool, has_fifth: bool) -> Tensor:
    """Dequantise blocks of 32 numbers: a scale, a minimum if there is one, the fifth bits if there are any, four bits."""
    start = 4 if has_minimum else 2
    numbers = _nibbles(blocks[..., start + 4 * has_fifth :]).flatten(-2)
    if has_fifth:
        _add_bits(numbers.unflatten(-1, (4, 8)).mT, blocks[..., start : start + 4])
    if has_minimum:
        return scaled(numbers, _half(blocks, 0), _half(blocks, 2))
    return scaled(numbers.view(torch.int8).sub_(16 if has_fifth else 8), _half(blocks, 0))


def _q45_k(blocks: Tensor, has_fifth: bool) -> Tensor:
    """Dequantise blocks of eight parts: two factors, the scale and minimum of each part, fifth bits if any, four bits."""
    numbers = _nibbles(blocks[..., 16 + 32 * has_fifth :].unflatten(-1, (4, 32))).flatten(-3, -2)
    if has_fifth:
        _add_bits(numbers, blocks[..., 16:48])
    first, second, third = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=-1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=-1)
    scale, minimum = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return scaled(numbers, scale[..., None], -minimum[..., None]).flatten(-2)


def _q6_k(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[..., :128].unflatten(-1, (2, 64))).flatten(-2).unflatten(-1, (4, 32))
    _add_bits(numbers, blocks[..., 128:192].unflatten(-1, (2, 32)), 2)
    scales = _half(blocks, 208) * blocks[..., 192:208].view(torch.int8)
    return scaled(numbers.view(torch.int8).sub_(32).flatten(-3).unflatten(-1, (16, 16)), scales[..., None]).flatten(-2)


_BLOCKS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "Q8_0": (34, lambda blocks: scaled(blocks[..., 2:].view(torch.int8), _half(blocks, 0))),
    "Q4_0": (18, partial(_q45, has_minimum=False, has_fifth=False)),
    "Q4_1": (20, partial(_q45, has_minimum=True, has_fifth=False)),
    "Q5_0": (22, partial(_q45, has_minimum=False, has_fifth=True)),
    "Q5_1": (24, partial(_q45, has_minimum=True, has_fifth=True)),
    "Q4_K": (144, partial(_q45_k, has_fifth=False)),
    "Q5_K": (176, partial(_q45_k, has_fifth=True)),
    "Q6_K": (210, _q6_k),
}
"""The size of a block in bytes, and the function that dequantises blocks (..., bytes) to bf16."""
