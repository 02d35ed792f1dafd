"""Narrow weights: stored in fewer bits than they are computed with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Widen = Callable[[Sequence[Tensor], torch.dtype], Tensor]
"""A function that widens the parts of a narrow weight to a dtype."""
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, eq=False)
class NarrowTensor:
    """A narrow weight as it is stored, and the function that widens it."""

    parts: tuple[Tensor, ...]
    """The stored tensors: some have one row per row of the weight, and those of shape () apply to the whole weight."""
    widen: Widen
    shape: tuple[int, ...]
    """The shape of the weight."""

    def widened(self, dtype: torch.dtype) -> Tensor:
        """Widen the weight to that dtype."""
        return self.widen(self.parts, dtype)

    @property
    def nbytes(self) -> int:
        """The total size of its parts in bytes."""
        return sum(part.nbytes for part in self.parts)

    def map(self, function: Callable[[Tensor], Tensor]) -> "NarrowTensor":
        """Return the weight with `function` applied to each part."""
        return replace(self, parts=tuple(map(function, self.parts)))

    def cut(self, function: Callable[[Tensor], Tensor]) -> "NarrowTensor":
        """Return the weight with only some of its rows. `function` selects them from a tensor with all rows."""
        cut = self.map(lambda part: function(part) if part.ndim else part)
        return replace(cut, shape=(len(cut.parts[0]), *self.shape[1:]))


def outline(tensor: Tensor) -> Tensor:
    """Return a tensor of the same dtype and shape on the meta device, without values."""
    return torch.empty_like(tensor, device="meta")


def as_stored(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Convert the only part of a weight, which is the weight itself, to that dtype."""
    return parts[0].to(dtype)
