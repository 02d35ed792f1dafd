"""Measure the change of an adapter from its factors, without computing a huge product that a small file may claim."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .changes import scale_of

LARGEST_VALUE = torch.finfo(torch.float16).max
"""The largest plausible change of a value in a weight, 65504. Larger ones don't fit into 16 bits, and draw black pictures."""
_BLOCK = 1 << 20
"""The number of values computed at once if a product has to be computed anyway."""


class Product(NamedTuple):
    """A matrix `left @ right`, or the kernel of each position k, `left @ core[:, :, k] @ right`."""

    left: Tensor  # (out, r)
    right: Tensor  # (s, in)
    core: Tensor | None  # (r, s, positions)


def largest_change(kind: str, tensors: Mapping[str, Tensor]) -> float:
    """Return an upper bound of the absolute values in the adapter's change; NaN or infinity if a tensor or the scale is.

    `tensors` are those of a module by role. For kinds that depend on the base weight, its values are not included.
    """
    float32 = {role: tensor.float() for role, tensor in tensors.items() if role != "alpha"}
    factors, others = factors_of(kind, float32)
    peak = scale_of(kind, tensors) * torch.stack([_peak(factor) for factor in factors]).prod() if factors else 0.0
    peaks = [torch.linalg.vector_norm(other, math.inf) for other in others if other.numel()]
    if "alpha" in tensors:
        peaks.append(0.0 * tensors["alpha"].float().max())  # NaN if alpha is not finite, even if it scales nothing.
    return torch.stack([torch.as_tensor(peak).abs(), *peaks]).max().item()  # Unlike Python's max, torch's keeps NaN.


def change_norm(kind: str, tensors: Mapping[str, Tensor]) -> float:
    """Compute the Frobenius norm of an adapter's weight change. Raises ValueError for kinds that need the base weight."""
    float32 = {role: tensor.float() for role, tensor in tensors.items() if role != "alpha"}
    factors, others = factors_of(kind, float32)
    if kind == "loha":
        first, second = factors
        assert isinstance(first, Product) and isinstance(second, Product)
        return abs(scale_of(kind, tensors)) * _norm_of_hadamard(first, second)
    if kind in ("full", "norm"):
        return others[0].norm().item()
    return abs(scale_of(kind, tensors)) * math.prod(map(_norm, factors))


def factors_of(kind: str, t: Mapping[str, Tensor]) -> tuple[Sequence[Product | Tensor], list[Tensor]]:
    """Return the factors of the change, and the tensors that are added or modify it in another way."""

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
    """Compute the norm of the element-wise product of two products."""
    outputs, inputs = first.left.shape[0], first.right.shape[1]
    if single := single_product(first, second):
        return _norm(single)
    positions = 1 if first.core is None else first.core.shape[2]
    widest = max(inputs, first.right.shape[0], second.right.shape[0])
    norm = 0.0
    for rows in torch.arange(outputs).split(max(_BLOCK // (widest * positions), 1)):
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


def _made(product: Product) -> Tensor:
    if product.core is None:
        return product.left @ product.right
    return torch.einsum("osk,si->oik", torch.tensordot(product.left, product.core, 1), product.right)
