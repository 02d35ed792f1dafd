"""Tensors as they are stored: in fewer bits than they are computed with, or read only on access."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

Dequantise = Callable[[Sequence[Tensor], torch.dtype], Tensor]
"""A function that dequantises the parts of a quantised weight to a dtype."""
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """A quantised weight as it is stored, and the function that dequantises it."""

    parts: tuple[Tensor, ...]
    """The stored tensors: some have one row per row of the weight, and those of shape () apply to the whole weight."""
    dequantise: Dequantise
    shape: tuple[int, ...]

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Dequantise the weight to that dtype."""
        return self.dequantise(self.parts, dtype)

    @property
    def nbytes(self) -> int:
        """The total size of its parts in bytes."""
        return sum(part.nbytes for part in self.parts)

    def map(self, function: Callable[[Tensor], Tensor]) -> "QuantisedTensor":
        """Return the weight with `function` applied to each part."""
        return replace(self, parts=tuple(map(function, self.parts)))

    def cut(self, function: Callable[[Tensor], Tensor]) -> "QuantisedTensor":
        """Return the weight with only some of its rows. `function` selects them from a tensor with all rows."""
        cut = self.map(lambda part: function(part) if part.ndim else part)
        return replace(cut, shape=(len(cut.parts[0]), *self.shape[1:]))


def outline(tensor: Tensor) -> Tensor:
    """Return a tensor of the same dtype and shape on the meta device, without values."""
    return torch.empty_like(tensor, device="meta")


def as_stored(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Convert the only part of a weight, which is the weight itself, to that dtype."""
    return parts[0].to(dtype)


def scaled(numbers: Tensor, scale: Tensor, plus: Tensor | None = None) -> Tensor:
    """Return numbers * scale + plus, computed in float32 and rounded to bf16 once. `numbers` has the shape of the result.

    A GPU does this in one pass over memory, without intermediate tensors in float32.
    """
    if numbers.device.type == "mps":  # whose kernels compute in the dtype of the result
        wide = numbers.float() * scale
        return (wide if plus is None else wide + plus).bfloat16()
    out = numbers.new_empty(numbers.shape, dtype=torch.bfloat16)
    if plus is None:
        return torch.mul(numbers, scale, out=out)
    return torch.addcmul(plus, numbers, scale, out=out)


@dataclass(frozen=True, eq=False)
class Stored:
    """A callable that reads one tensor of a mapping."""

    tensors: Mapping[str, Tensor]
    name: str

    def __call__(self) -> Tensor:
        return self.tensors[self.name]

    def layout(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return the dtype and shape of the tensor."""
        return dtype_and_shape(self.tensors, self.name)

    def quantised(self, read: bool = True) -> QuantisedTensor | None:
        """Return the tensor in its quantised stored form, as `quantised_in` does."""
        return quantised_in(self.tensors, self.name, read)


def stored_under(tensors: Mapping[str, Tensor], *prefixes: str) -> dict[str, Stored]:
    """Return readers of the tensors under the first prefix that occurs, by their names without it. Empty if none occurs."""
    for prefix in prefixes:
        if names := [name for name in tensors if name.startswith(prefix)]:
            return {name.removeprefix(prefix): Stored(tensors, name) for name in names}
    return {}


class LazyValues(Mapping[_Key, _Value]):
    """Values that are read or computed on each access."""

    def __init__(self, readers: Mapping[_Key, Callable[[], _Value]]):
        self.readers = readers

    def __getitem__(self, key: _Key) -> _Value:
        return self.readers[key]()

    def __contains__(self, key: object) -> bool:
        return key in self.readers

    def __iter__(self) -> Iterator[_Key]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


class LazyTensors(LazyValues[str, Tensor]):
    """Tensors under new names, each read (and reshaped) on access."""


def dtype_and_shape(tensors: Mapping[str, Tensor], name: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return the dtype and shape of a tensor. They are looked up without reading a tensor that is only renamed."""
    reader = tensors.readers[name] if isinstance(tensors, LazyTensors) else None
    if isinstance(reader, Stored):
        return reader.layout()
    tensor = tensors[name]
    return tensor.dtype, tuple(tensor.shape)


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return the shape of a tensor. It is looked up without reading a tensor that is only renamed."""
    return dtype_and_shape(tensors, name)[1]


def quantised_in(tensors: Mapping[str, Tensor], name: str, read: bool = True) -> QuantisedTensor | None:
    """Return a tensor that is stored in fewer bits than it has when dequantised; None for other and for computed tensors.

    Without `read`, its parts hold no values. This is instant, and enough to ask for dtypes, shapes and sizes.
    """
    if isinstance(tensors, LazyTensors):
        reader = tensors.readers[name]
        return reader.quantised(read) if isinstance(reader, Stored) else None
    tensor = tensors[name]
    if tensor.dtype not in FLOAT8:
        return None
    return QuantisedTensor((tensor if read else outline(tensor),), as_stored, tuple(tensor.shape))
