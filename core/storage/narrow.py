"""Weights in fewer bits than the numbers that they stand for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Widen = Callable[[Sequence[Tensor], torch.dtype], Tensor]
"""A function that gives the numbers that the parts of a narrow weight stand for, in a dtype."""
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, eq=False)
class NarrowTensor:
    """A weight as it is stored, and the way in which it is widened."""

    parts: tuple[Tensor, ...]
    """What is stored: tensors with a row for each of the weight's rows, and numbers of shape () that are for all of it."""
    widen: Widen
    shape: tuple[int, ...]
    """The shape of the weight."""

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weight in that dtype."""
        return self.widen(self.parts, dtype)

    @property
    def nbytes(self) -> int:
        """The bytes of its parts."""
        return sum(part.nbytes for part in self.parts)

    def map(self, function: Callable[[Tensor], Tensor]) -> "NarrowTensor":
        """The same weight with `function` of each part in its place."""
        return replace(self, parts=tuple(map(function, self.parts)))

    def cut(self, function: Callable[[Tensor], Tensor]) -> "NarrowTensor":
        """The weight that has some of the rows, which `function` takes out of a tensor with all of them."""
        cut = self.map(lambda part: function(part) if part.ndim else part)
        return replace(cut, shape=(len(cut.parts[0]), *self.shape[1:]))


def outline(tensor: Tensor) -> Tensor:
    """A tensor of the same dtype and shape without numbers, on the meta device."""
    return torch.empty_like(tensor, device="meta")


def as_stored(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The weight that is its only part, in that dtype."""
    return parts[0].to(dtype)
