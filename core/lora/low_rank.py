"""Find the nearest low-rank change and its factors, from a whole change or only from its factors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnmatchedKeys
from .changes import scale_of
from .kinds import weight_shape
from .norms import Product, factors_of, single_product

Factorised = tuple[Tensor, Tensor, float]
"""The down and up matrices of a change, and their relative error, 0 to 1."""


def factorise(change: Tensor, rank: int, name: str) -> Factorised:
    """Find the nearest change of at most that rank: its down and up matrices, and its relative error, 0 to 1.

    The error is that of the Frobenius norm. Raises UnmatchedKeys, with `name` in the message, for NaN and infinity.
    """
    matrix = change.flatten(1)
    total = torch.linalg.vector_norm(matrix, dtype=torch.float64).item() ** 2
    if not math.isfinite(total):
        raise UnmatchedKeys(f"{name}: its change contains NaN or infinity")
    return _factorised(*truncated_svd(matrix, min(rank, *matrix.shape)), total, change.shape)


def _factorised(left: Tensor, values: Tensor, right: Tensor, total: float, shape: tuple[int, ...]) -> Factorised:
    """Build the factors of a change of that shape from its singular values and vectors. `total` is its squared norm."""
    missing = max(total - values.double().square().sum().item(), 0.0)
    roots = values.sqrt()
    down = (roots[:, None] * right).reshape(-1, *shape[1:])
    up = (left * roots).reshape(-1, len(values), *[1] * (len(shape) - 2))
    return down, up, math.sqrt(missing / total) if total else 0.0


_FULL_SVD_LIMIT = 512
_OVERSAMPLING = 16
_POWER_ITERATIONS = 6


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the left singular vectors (m, rank), the `rank` largest singular values and the right vectors (rank, n).

    The values are in descending order. Large matrices are decomposed by subspace iteration (Halko, Martinsson and Tropp,
    arXiv:0909.4061) with a fixed seed, so that the same input gives the same result.
    """
    columns = rank + _OVERSAMPLING
    if min(matrix.shape) <= max(_FULL_SVD_LIMIT, 2 * columns):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    start = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]


@dataclass(frozen=True, eq=False)
class Decomposed:
    """A change `left @ right` that is never multiplied. For a Kronecker product, only the largest singular values."""

    left: Tensor  # (out, r)
    right: Tensor  # (r, in * positions), with orthonormal rows
    row_norms: Tensor  # (out), float64, of the whole change
    shape: tuple[int, ...]

    def nearest(self, rows: Tensor, rank: int) -> Factorised:
        """Return the nearest change of at most that rank for some of the rows."""
        left, values, right = torch.linalg.svd(self.left[rows], full_matrices=False)
        size = min(rank, len(values))
        total = self.row_norms[rows].square().sum().item()
        return _factorised(left[:, :size], values[:size], right[:size] @ self.right, total, self.shape)


def decomposed(kind: str, tensors: Mapping[str, Tensor], rank: int) -> Decomposed | None:
    """Decompose a LoKr or a LoHa from its factors, to find its nearest changes of at most that rank.

    The product is never computed, since a small file can claim one of any size. Returns None for other kinds, and for a LoHa
    whose product is hardly larger than its factors.
    """
    if kind not in ("loha", "lokr"):
        return None
    float32 = {role: tensor.float() for role, tensor in tensors.items() if role != "alpha"}
    (first, second), _ = factors_of(kind, float32)
    shape = weight_shape(kind, {role: tuple(tensor.shape) for role, tensor in tensors.items()})
    assert shape is not None
    if kind == "loha":
        assert isinstance(first, Product) and isinstance(second, Product)
        single = single_product(first, second)
        if single is None:
            return None
        norms, left, values, right = _svd(single, min(shape[0], math.prod(shape[1:])))
    else:
        # The singular values and vectors of a Kronecker product are the products of its factors' values and vectors.
        first_norms, first_left, first_values, first_right = _svd(first, rank)
        second_norms, second_left, second_values, second_right = _svd(second, rank)
        products = torch.outer(first_values, second_values).flatten()
        values, places = products.topk(min(rank, len(products)))
        one, other = places // len(second_values), places % len(second_values)
        left = (first_left[:, None, one] * second_left[None, :, other]).flatten(0, 1)
        right = (first_right[one, :, None] * second_right[other, None]).flatten(1)
        norms = torch.outer(first_norms, second_norms).flatten()
    scale = scale_of(kind, tensors)
    return Decomposed(scale * left * values, right, abs(scale) * norms, shape)


def _svd(factor: Product | Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the norms of a factor's rows in float64, and its left vectors, largest singular values and right vectors."""
    if isinstance(factor, Tensor):
        matrix = factor.flatten(1)
        return _row_norms(matrix), *truncated_svd(matrix, min(rank, *matrix.shape))
    left_basis, left = torch.linalg.qr(factor.left)
    right_basis, right = torch.linalg.qr(factor.right.T)
    if factor.core is None:
        inner = (left @ right.T)[:, :, None]
    else:
        inner = torch.einsum("ask,bs->abk", torch.einsum("ar,rsk->ask", left, factor.core), right)
    inner_left, values, inner_right = torch.linalg.svd(inner.flatten(1), full_matrices=False)
    left, size = left_basis @ inner_left, min(rank, len(values))
    right = torch.einsum("qbk,ib->qik", inner_right[:size].unflatten(1, inner.shape[1:]), right_basis).flatten(1)
    return _row_norms(left * values), left[:, :size], values[:size], right


def _row_norms(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64)
