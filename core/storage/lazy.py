"""Tensors that are read or computed on access."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .narrow import FLOAT8, NarrowTensor, as_stored, outline


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

    def narrow(self, read: bool = True) -> NarrowTensor | None:
        """Return the tensor in its narrow stored form, as `narrow_in` does."""
        return narrow_in(self.tensors, self.name, read)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors under new names, each read (and reshaped) on access."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]):
        self.readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self.readers

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


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


def narrow_in(tensors: Mapping[str, Tensor], name: str, read: bool = True) -> NarrowTensor | None:
    """Return a tensor that is stored in fewer bits than it has when widened; None for other and for computed tensors.

    Without `read`, its parts hold no values. This is instant, and enough to ask for dtypes, shapes and sizes.
    """
    if isinstance(tensors, LazyTensors):
        reader = tensors.readers[name]
        return reader.narrow(read) if isinstance(reader, Stored) else None
    tensor = tensors[name]
    if tensor.dtype not in FLOAT8:
        return None
    return NarrowTensor((tensor if read else outline(tensor),), as_stored, tuple(tensor.shape))
