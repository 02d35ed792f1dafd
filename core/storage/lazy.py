"""Tensors that are read or computed only when they are asked for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .narrow import FLOAT8, NarrowTensor, as_stored, outline


@dataclass(frozen=True, eq=False)
class Stored:
    """A reader of one tensor of a mapping, which reads it when it is called."""

    tensors: Mapping[str, Tensor]
    name: str

    def __call__(self) -> Tensor:
        return self.tensors[self.name]

    def layout(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype and shape of the tensor."""
        return dtype_and_shape(self.tensors, self.name)

    def narrow(self, read: bool = True) -> NarrowTensor | None:
        """The tensor as it is stored, where that is in fewer bits than it stands for; its parts' outlines without `read`."""
        return narrow_in(self.tensors, self.name, read)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors under new names, each read (and reshaped) only when asked for."""

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
    """The dtype and shape of a tensor. One that is only stored under a new name is looked up where it is stored."""
    reader = tensors.readers[name] if isinstance(tensors, LazyTensors) else None
    if isinstance(reader, Stored):
        return reader.layout()
    tensor = tensors[name]
    return tensor.dtype, tuple(tensor.shape)


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor. One that is only stored under a new name is looked up where it is stored."""
    return dtype_and_shape(tensors, name)[1]


def narrow_in(tensors: Mapping[str, Tensor], name: str, read: bool = True) -> NarrowTensor | None:
    """A tensor as it is stored, where that is in fewer bits than it stands for; None for others and for computed ones.

    Without `read` its parts have no numbers, which takes no time: for questions about their dtypes, shapes and sizes.
    """
    if isinstance(tensors, LazyTensors):
        reader = tensors.readers[name]
        return reader.narrow(read) if isinstance(reader, Stored) else None
    tensor = tensors[name]
    if tensor.dtype not in FLOAT8:
        return None
    return NarrowTensor((tensor if read else outline(tensor),), as_stored, tuple(tensor.shape))
