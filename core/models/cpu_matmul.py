"""Matrix products of float32 on a CPU, by the faster of the two libraries that torch contains.

torch computes them with MKL. On AMD's processors oneDNN is faster (docs/benchmarks.md). There, MKL's products of few rows also
depend on where a factor is in memory, so a resumed training run could end with other numbers. oneDNN's don't. The choice
depends on the processor alone: a choice by measured times could differ when a run is resumed.

These functions have no gradients of their own. Autograd functions call them. Outside the context `faster_products`, they
compute what torch does.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..device import described_processor

AMD = ("AuthenticAMD", "HygonGenuine")
"""How AMD's processors, and those of a licensee, name their maker."""
_Product = Callable[[Tensor, Tensor, Tensor | None, str, list[Any], str], Tensor]
_IN_USE: ContextVar[bool] = ContextVar("_IN_USE", default=False)


@contextlib.contextmanager
def faster_products() -> Iterator[None]:
    """Use the faster library within the context, in this thread."""
    before = _IN_USE.set(True)
    try:
        yield
    finally:
        _IN_USE.reset(before)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b (..., out), for x (..., in) and W (out, in)."""
    product = _product_of(x, weight)
    return product(x, weight, bias, "none", [], "") if product else F.linear(x, weight, bias)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of two matrices, or of each two in batches (B, M, K) and (B, K, N)."""
    product = _product_of(left, right)
    if product is None:
        return left @ right
    if left.ndim == 3:
        result = left.new_empty(*left.shape[:2], right.shape[2])
        for place, *factors in zip(result, left, right, strict=True):
            place.copy_(matmul(*factors))
        return result
    # oneDNN copies a first factor that isn't contiguous, so the smaller one is the first.
    if left.is_contiguous() or len(left) <= right.shape[1]:
        return product(left, right.t(), None, "none", [], "")
    return product(right.t(), left, None, "none", [], "").t()


def add_product(total: Tensor, left: Tensor, right: Tensor, *, beta: int = 1, alpha: float = 1.0) -> Tensor:
    """Set a matrix to `beta` (0 or 1) of itself plus alpha times the product of two, in place, and return it."""
    if _product_of(left, right) is None:
        return total.addmm_(left, right, beta=beta, alpha=alpha)
    product = matmul(left, right)
    return total.add_(product, alpha=alpha) if beta else torch.mul(product, alpha, out=total)


def has_faster_products() -> bool:
    """Return whether products on this processor are computed by oneDNN."""
    return _onednn() is not None


def _product_of(*factors: Tensor) -> _Product | None:
    """Return oneDNN's product if it is in use and can compute that of these tensors, or None for torch's own."""
    if torch.compiler.is_compiling():  # The compiler can't see through the rest, and chooses products itself.
        return None
    for factor in factors:
        # torch's private operation takes no other types of tensors.
        is_plain = type(factor) is Tensor or type(factor) is nn.Parameter
        if not is_plain or factor.dtype != torch.float32 or factor.device.type != "cpu" or not factor.numel():
            return None
    return _onednn() if _IN_USE.get() else None


@functools.cache
def _onednn() -> _Product | None:
    """Return oneDNN's x W^T + b where it is faster than torch's own product and computes the same, or None.

    torch has no public name for it.
    """
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not has_both or not any(maker in described_processor() for maker in AMD):
        return None
    try:
        product = torch.ops.mkldnn._linear_pointwise.default
        # Whoever counts operations or memory at the first call isn't told of this one.
        with torch.no_grad(), _disable_current_modes():
            weight = torch.arange(-8.0, 7.0).view(3, 5).t()
            x, bias = torch.arange(6.0).view(2, 3), torch.arange(5.0)
            same = torch.equal(product(x, weight, bias, "none", [], ""), F.linear(x, weight, bias))
    except (AttributeError, RuntimeError, TypeError):  # another torch, in which it is gone or takes other arguments
        return None
    return product if same else None
