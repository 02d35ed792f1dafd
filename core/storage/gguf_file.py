"""The tensors of a GGUF file, the form in which llama.cpp and ComfyUI-GGUF have quantised models, through the package gguf."""

import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadFile, MissingPackage
from .files import map_file
from .gguf_types import is_narrow, narrow_gguf
from .lazy import LazyTensors, Stored
from .narrow import NarrowTensor, outline

SUFFIX = ".gguf"
_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
"""The types that are no quantisations and numpy has too, by GGUF's names."""
_MOST_SIDES = 16
"""The length of lists from which they are not a tensor's shape, which alone is read of a file's lists."""
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""The beginning of the name under which the shape stands that a tensor had before it was made a matrix."""


class GgufTensors(LazyTensors):
    """The tensors of a GGUF file."""

    architecture: str
    """What the file says that it holds, such as "flux" or "qwen3"; empty where it says nothing."""


def open_gguf(path: str | os.PathLike[str]) -> GgufTensors:
    """The tensors in a GGUF file by name, mapped and dequantised (to bf16) when they are asked for.

    Raises BadFile when it cannot be read as one, MissingPackage without the package gguf.
    """
    try:
        import gguf
    except ImportError:
        raise MissingPackage(f"{path}: to read GGUF files needs the package gguf: pip install gguf") from None
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadFile(f"{path}: is no regular file")

        class Reader(gguf.GGUFReader):
            def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Any:
                # Beyond the end numpy gives nothing, and the package would count through arrays that are not there.
                found = super()._get(offset, dtype, count, *order, **named)
                if len(found) < count:
                    raise ValueError("it ends before what it says is in it")
                return found

            def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
                # Of a tokenizer's words and numbers, which are hundreds of thousands, the package makes an array each.
                if raw_type == gguf.GGUFValueType.ARRAY and self.byte_order == "I":
                    (kind,), (count,) = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
                    if count > _MOST_SIDES and kind == gguf.GGUFValueType.STRING:
                        size = _size_of_texts(self.data[orig_offs + 12 :].data, int(count))
                        return 12 + size, [], [], [gguf.GGUFValueType.ARRAY]
                    if count > _MOST_SIDES and (number := self.gguf_scalar_to_np.get(kind)):
                        return 12 + int(count) * np.dtype(number).itemsize, [], [], [gguf.GGUFValueType.ARRAY]
                return super()._get_field_parts(orig_offs, raw_type)

        reader = Reader(path)
        with path.open("rb") as file:
            whole = torch.frombuffer(map_file(file), dtype=torch.uint8)
        tensors = GgufTensors({tensor.name: _GgufTensor.of(reader, tensor, whole) for tensor in reader.tensors})
        said = reader.get_field("general.architecture")
        tensors.architecture = "" if said is None else str(said.contents())
        return tensors
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, MemoryError) as error:
        # The package does not check what a file says before it follows it.
        raise BadFile(f"{path}: cannot be read as GGUF: {error or type(error).__name__}") from None


def _size_of_texts(data: memoryview, count: int) -> int:
    """The bytes of texts that data begin with, each after the number of its bytes. Raises ValueError where they are cut off."""
    at = 0
    for _ in range(count):
        if at + 8 > len(data):
            raise ValueError("it ends before what it says is in it")
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
        field = reader.get_field(f"{_ORIGINAL_SHAPE}{stored.name}")
        sides = reversed(stored.shape.tolist()) if field is None else field.contents()
        made = cls({}, stored.name, stored, tuple(int(side) for side in sides), file)
        if torch.Size(made.shape).numel() != stored.n_elements:
            raise ValueError(f"{stored.name[:80]!r} has {stored.n_elements} numbers and the shape {list(made.shape)}")
        return made

    def __call__(self) -> Tensor:
        if narrow := self.narrow():
            return narrow.widened(torch.bfloat16)
        return dequantised(self.stored.data, self.stored.tensor_type, self.shape, self.name)

    def layout(self) -> tuple[torch.dtype, tuple[int, ...]]:
        return dtype_of(self.stored.tensor_type), self.shape

    def narrow(self, read: bool = True) -> NarrowTensor | None:
        stored = self.stored
        if not is_narrow(stored.tensor_type.name):
            return None
        data = self.file[stored.data_offset : stored.data_offset + stored.n_bytes].reshape(stored.data.shape)
        return narrow_gguf(data if read else outline(data), stored.tensor_type.name, self.shape)


def dtype_of(kind: Any) -> torch.dtype:
    """The dtype in which a tensor of the package's type `kind` is read."""
    return _PLAIN.get(kind.name, torch.bfloat16)


def dequantised(data: Any, kind: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """The tensor that a numpy array of the package's type `kind` stands for: bf16, or the type that the array has.

    Raises BadFile, with the tensor's `name`, for a quantisation that the package cannot read.
    """
    if kind.name in _PLAIN:
        return torch.tensor(data, dtype=_PLAIN[kind.name]).reshape(shape)
    if kind.name == "BF16":
        return torch.tensor(data).view(torch.bfloat16).reshape(shape)
    from gguf.quants import dequantize

    try:
        return torch.from_numpy(dequantize(data, kind)).bfloat16().reshape(shape)
    except NotImplementedError:
        raise BadFile(f"{name}: is quantised as {kind.name}, which the package gguf cannot read") from None
