"""Tensors that are read, and computed from others, only when they are asked for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stored:
    """Reads a tensor of a mapping when it is called."""

    tensors: Mapping[str, Tensor]
    name: str

    def __call__(self) -> Tensor:
        return self.tensors[self.name]

    def layout(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Its dtype and shape."""
        return dtype_and_shape(self.tensors, self.name)


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
    """A tensor's dtype and shape, without computing it where it is known what it is made of."""
    reader = tensors.readers[name] if isinstance(tensors, LazyTensors) else None
    if isinstance(reader, Stored):
        return reader.layout()
    tensor = tensors[name]
    return tensor.dtype, tuple(tensor.shape)


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """A tensor's shape, without computing it where it is known what it is made of."""
    return dtype_and_shape(tensors, name)[1]
