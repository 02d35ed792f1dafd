"""Compute the changes that each kind of adapter makes to weights and biases, measure them, and reduce their rank.

Changes are measured from their factors, without computing a huge product that a small file may claim.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UnmatchedKeys
from .kinds import BIAS_DIFFERENCES, Shapes, needs_base, rank_of, weight_shape

LARGEST_VALUE = torch.finfo(torch.float16).max
"""The largest plausible change of a value in a weight, 65504. Larger ones don't fit into 16 bits, and draw black pictures."""
Factorised = tuple[Tensor, Tensor, float]
"""The down and up matrices of a change, and their relative error, 0 to 1."""


class Product(NamedTuple):
    """A matrix `left @ right`, or the kernel of each position k, `left @ core[:, :, k] @ right`."""

    left: Tensor  # (out, r)
    right: Tensor  # (s, in)
    core: Tensor | None  # (r, s, positions)


def weight_change(kind: str, tensors: Mapping[str, Tensor], base: Tensor | None = None) -> Tensor:
    """Compute the change that the adapter makes to the weight, float32.

    `base` is the weight itself, required if `needs_base` returns True. The change then has its shape, else that of
    `weight_shape`. Raises ValueError when a required `base` is missing.
    """
    float32 = {role: tensor.float() for role, tensor in tensors.items()}
    if not needs_base(kind, tensors):
        return _additive_change(kind, float32)
    if base is None:
        raise ValueError(f"the change of this {kind} depends on the base weight; pass it as `base`")
    base = base.float()
    if kind == "set":
        return float32["set_weight"].reshape(base.shape) - base
    if kind in ("oft", "boft"):
        return _rotation(float32, base)
    change = _additive_change(kind, float32).reshape(base.shape)
    return _with_magnitude(base + change, float32["dora"]) - base


def bias_change(kind: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Compute the change that the adapter makes to the bias, float32 (out,); None if it makes none."""
    changes = [tensors[role].float() for role in BIAS_DIFFERENCES if role in tensors]
    if "bias" in tensors:
        # With peft's lora_bias, the bias of the up matrix is scaled like the product.
        changes.append(scale_of(kind, tensors) * tensors["bias"].float())
    return torch.stack(changes).sum(0) if changes else None


def scale_of(kind: str, tensors: Mapping[str, Tensor]) -> float:
    """Return the factor on the product: alpha / rank, or 1 if either is missing."""
    # Without an .alpha key, every program uses alpha = rank. LyCORIS ignores alpha if both LoKr factors are whole.
    rank = rank_of(kind, _shapes(tensors))
    return tensors["alpha"].item() / rank if rank and "alpha" in tensors else 1.0


def _additive_change(kind: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if kind in ("full", "norm"):
        return tensors["diff" if kind == "full" else "w_norm"]
    made = [_made(factor) for factor in factors_of(kind, tensors)[0]]
    if kind == "lokr":
        first, second = (factor.reshape(*factor.shape[:2], -1).contiguous() for factor in made)
        made = [torch.kron(first, second)]  # torch 2.5 takes only contiguous tensors.
    change = scale_of(kind, tensors) * made[0]
    if kind == "loha":
        change = change * made[1]
    return change.reshape(weight_shape(kind, _shapes(tensors)) or ())


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {role: tuple(tensor.shape) for role, tensor in tensors.items()}


def _made(factor: Product | Tensor) -> Tensor:
    """Multiply a factor out: (out, in), or (out, in, positions) if it has a core."""
    if isinstance(factor, Tensor):
        return factor
    left, right, core = factor
    if core is None:
        return left @ right
    # This order keeps the intermediate result no larger than the inputs or the output.
    if core.shape[1] > right.shape[1]:
        return torch.einsum("rik,or->oik", torch.einsum("rsk,si->rik", core, right), left)
    return torch.einsum("osk,si->oik", torch.einsum("rsk,or->osk", core, left), right)


def factors_of(kind: str, tensors: Mapping[str, Tensor]) -> tuple[Sequence[Product | Tensor], list[Tensor]]:
    """Return the factors of the change, and the tensors that are added or modify it in another way; all float32."""
    t = {role: tensor.float() for role, tensor in tensors.items() if role != "alpha"}

    def factor(name: str, core_name: str) -> Product | Tensor:
        if name in t:
            return t[name]
        left, core = t[f"{name}_a"], t.get(core_name)
        return Product(left if core is None else left.T, t[f"{name}_b"], None if core is None else core.flatten(2))

    if kind in ("lora", "locon", "dora"):
        core = t["mid"].flatten(2) if "mid" in t else None
        factors = [Product(t["up"].flatten(1), t["down"].flatten(1), core)]
    elif kind in ("loha", "lokr"):
        prefix = {"loha": "hada_", "lokr": "lokr_"}[kind]
        factors = [factor(f"{prefix}w{number}", f"{prefix}t{number}") for number in "12"]
    else:
        return [], list(t.values())
    return factors, [t[role] for role in ("dora", "diff_b", "b_norm", "bias") if role in t]


def _with_magnitude(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Return the weight with its norms replaced by trained magnitudes (DoRA, arXiv:2402.09353)."""
    if magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == weight.shape[1]:
        # LyCORIS' first layout, (1, in): one magnitude for each input feature.
        norm = weight.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    else:
        # peft's (out) and LyCORIS' (out, 1): one magnitude for each output feature.
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    return weight * (magnitude.reshape(norm.shape) / norm.clamp_min(torch.finfo(torch.float32).eps))


def _rotation(t: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """Compute the change of OFT and BOFT: rotations by the Cayley transform, as in LyCORIS 4.1 and sd-scripts."""
    blocks = t["oft_blocks"]
    skew = blocks - blocks.transpose(-1, -2)
    # Alpha bounds the rotation here instead of scaling it, and is stored per output feature.
    bound = t["alpha"].item() * base.shape[0] if "alpha" in t else 0.0
    if bound > 0 and skew.norm() > bound:
        skew = skew * (bound / skew.norm())
    identity = torch.eye(blocks.shape[-1], device=blocks.device)
    rotations = (identity + skew) @ torch.linalg.inv(identity - skew)
    rotated = base.flatten(1)
    if blocks.ndim == 3:
        count, size, _ = blocks.shape
        rotated = torch.einsum("knm,kni->kmi", rotations, rotated.reshape(count, size, -1)).flatten(0, 1)
    else:
        for level, level_rotations in enumerate(rotations):
            # Butterfly: each level rotates rows together that are further apart.
            stride = 2**level * (blocks.shape[-1] // 2)
            mixed = rotated.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2)
            mixed = torch.einsum("bij,bjk->bik", level_rotations, mixed.unflatten(0, (-1, blocks.shape[-1])))
            rotated = mixed.flatten(0, 1).unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    rotated = rotated.reshape(base.shape)
    if "rescale" in t:
        rotated = rotated * t["rescale"].reshape(-1, *[1] * (base.ndim - 1))
    return rotated - base


def largest_change(kind: str, tensors: Mapping[str, Tensor]) -> float:
    """Return an upper bound of the absolute values in the adapter's change; NaN or infinity if a tensor or the scale is.

    `tensors` are those of a module by role. For kinds that depend on the base weight, its values are not included.
    """
    factors, others = factors_of(kind, tensors)
    peak = scale_of(kind, tensors) * torch.stack([_peak(factor) for factor in factors]).prod() if factors else 0.0
    peaks = [torch.linalg.vector_norm(other, math.inf) for other in others if other.numel()]
    if "alpha" in tensors:
        peaks.append(0.0 * tensors["alpha"].float().max())  # NaN if alpha is not finite, even if it scales nothing.
    return torch.stack([torch.as_tensor(peak).abs(), *peaks]).max().item()  # Unlike Python's max, torch's keeps NaN.


def change_norm(kind: str, tensors: Mapping[str, Tensor]) -> float:
    """Compute the Frobenius norm of an adapter's weight change. The kind must not need the base weight."""
    if kind in ("full", "norm"):
        return _additive_change(kind, tensors).float().norm().item()
    factors, _ = factors_of(kind, tensors)
    if kind == "loha":
        first, second = factors
        assert isinstance(first, Product) and isinstance(second, Product)
        return abs(scale_of(kind, tensors)) * _norm_of_hadamard(first, second)
    return abs(scale_of(kind, tensors)) * math.prod(map(_norm, factors))


def _peak(factor: Product | Tensor) -> Tensor:
    """Return an upper bound of the absolute values in the product: by Cauchy-Schwarz, the longest row times column."""
    if isinstance(factor, Tensor):
        return torch.linalg.vector_norm(factor, math.inf)
    peak = factor.left.norm(dim=1).max() * factor.right.norm(dim=0).max()
    return peak if factor.core is None else peak * factor.core.norm()


def _norm(factor: Product | Tensor) -> float:
    if isinstance(factor, Tensor):
        return factor.norm().item()
    left, right, core = factor
    if core is None and left.shape[1] >= min(left.shape[0], right.shape[1]):
        return (left @ right).norm().item()  # The product is at most as large as its factors.
    if core is not None:
        # Multiplying the core by a factor whose inner side is the longer one makes it no larger either.
        if left.shape[1] > left.shape[0]:
            left, core = torch.eye(left.shape[0]), torch.tensordot(left, core, 1)
        if right.shape[0] > right.shape[1]:
            right, core = torch.eye(right.shape[1]), torch.einsum("rsk,si->rik", core, right)
    # |L C R|^2 = trace(C^T L^T L C R R^T) needs two small matrices instead of a large one.
    by_left, by_right = left.T @ left, right @ right.T
    if core is None:
        square = (by_left * by_right).sum().item()
    else:
        square = (torch.tensordot(by_left, core, 1) * torch.einsum("rsk,su->ruk", core, by_right)).sum().item()
    return math.sqrt(max(square, 0.0)) if math.isfinite(square) else square


def _norm_of_hadamard(first: Product, second: Product) -> float:
    outputs, inputs = first.left.shape[0], first.right.shape[1]
    if single := single_product(first, second):
        return _norm(single)
    positions = 1 if first.core is None else first.core.shape[2]
    widest = max(inputs, first.right.shape[0], second.right.shape[0])
    norm = 0.0
    for rows in torch.arange(outputs).split(max((1 << 20) // (widest * positions), 1)):  # A million values at once.
        block = _made(first._replace(left=first.left[rows])) * _made(second._replace(left=second.left[rows]))
        norm = math.hypot(norm, block.norm().item())
    return norm


def single_product(first: Product, second: Product) -> Product | None:
    """Return the element-wise product of two products as a single one; None if its factors would be larger than itself."""
    outputs, inputs = first.left.shape[0], first.right.shape[1]
    ranks = max(first.left.shape[1] * second.left.shape[1], first.right.shape[0] * second.right.shape[0])
    if ranks**2 * (outputs + inputs) >= outputs * inputs:
        return None
    # Its factors are the products of each pair of columns, of rows, and of values in the cores.
    left = (first.left[:, :, None] * second.left[:, None]).flatten(1)
    right = (first.right[:, None] * second.right).flatten(0, 1)
    core = None
    if first.core is not None and second.core is not None:
        core = torch.einsum("rsk,tuk->rtsuk", first.core, second.core).flatten(2, 3).flatten(0, 1)
    return Product(left, right, core)


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


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the left singular vectors (m, rank), the `rank` largest singular values and the right vectors (rank, n).

    The values are in descending order. Large matrices are decomposed by subspace iteration (Halko, Martinsson and Tropp,
    arXiv:0909.4061) with a fixed seed, so that the same input gives the same result.
    """
    columns = rank + 16  # The vectors that are not asked for make the others accurate.
    if min(matrix.shape) <= max(512, 2 * columns):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    start = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(6):
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
    (first, second), _ = factors_of(kind, tensors)
    shape = weight_shape(kind, _shapes(tensors))
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
