"""Products with frozen 8-bit weights, computed in 8 bits.

The other factor is rounded too: row x_i becomes q_i = round(x_i / t_i), with t_i = max |x_i| / limit. The weight is W = s Q,
with one scale s or one for each output. This is LLM.int8's vector-wise rounding (arXiv:2208.07339), with no outliers apart:

    x W^T = t (q Q^T) s        in the forward pass
    g W = t (q Q)              the gradient of x, where q rounds g s

int8 weights are multiplied with `torch._int_mm`, and e4m3 weights of fp8 files with `torch._scaled_mm`.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..storage.stored import Widen

FEWEST_ROWS = 17
"""The fewest rows of x that `torch._int_mm` takes on a GPU. Fewer are multiplied with the widened weight."""
ROWS_MULTIPLE = 32
"""int8 rows are filled up to a multiple of this. cuBLAS has computed odd numbers of rows wrongly (pytorch#107671)."""
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number that each kind of weight in 8 bits can hold."""


class InEightBits:
    """Widens a weight as another function does, and marks it as one whose products are computed in 8 bits."""

    def __init__(self, widen: Widen):
        self.widen: Widen = widen

    def __call__(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return self.widen(parts, dtype)


def linear(x: Tensor, widen: Widen, parts: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b (..., out) for x (..., in), in the dtype of x."""
    if not _is_in_eight_bits(x, widen):
        return F.linear(x, widen(parts, x.dtype), bias)
    weight, *scales = parts
    product = _product(x, weight.t(), *scales)
    return product if bias is None else product.add_(bias)


def times(gradient: Tensor, widen: Widen, parts: Sequence[Tensor], total: Tensor | None = None) -> Tensor:
    """Return g W (..., in) for g (..., out), in the dtype of g; added to `total`, which is changed, if there is one."""
    if not _is_in_eight_bits(gradient, widen):
        wide = widen(parts, gradient.dtype)
        return gradient @ wide if total is None else total.addmm_(gradient, wide)
    weight, *scales = parts
    for scale in scales:
        gradient = gradient * scale.to(gradient.dtype).reshape(-1)
    product = _product(gradient, weight)
    return product if total is None else total.add_(product)


def _is_in_eight_bits(x: Tensor, widen: Widen) -> bool:
    return isinstance(widen, InEightBits) and x.numel() >= FEWEST_ROWS * x.shape[-1]


def _product(x: Tensor, matrix: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return x M diag(s) for x (..., k), M (k, n) in 8 bits and s of n numbers or one, in the dtype of x."""
    rows, limit = x.flatten(0, -2), LIMITS[matrix.dtype]
    unit = torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-30) / limit
    # cuBLAS reads the first factor row by row, and the second column by column. Other layouts exist on some GPUs only.
    columns = matrix if matrix.stride(0) == 1 else matrix.t().contiguous().t()
    if matrix.dtype == torch.int8:
        # In fp16, whose 10 bits hold 127.5 exactly, in half of the bytes of float32.
        rounded = torch.mul(rows, 1 / unit, out=rows.new_empty(rows.shape, dtype=torch.float16)).round_().to(torch.int8)
        if odd := -len(rounded) % ROWS_MULTIPLE:
            rounded = F.pad(rounded, (0, 0, 0, odd))
        sums = torch._int_mm(rounded, columns)[: len(rows)]
        if scale is not None and rows.dtype == torch.float16:  # which overflows without the weight's scale
            largest = scale.amax().clamp_min(1e-30)
            unit, scale = unit * largest, scale / largest
        product = torch.mul(sums, unit, out=rows.new_empty(sums.shape))
        if scale is not None:
            product *= scale.reshape(-1)
    else:
        rounded = (rows / unit).to(matrix.dtype).contiguous()
        ones = unit.new_ones(1, matrix.shape[1])
        of_columns = ones if scale is None else ones * scale.reshape(1, -1)
        product = torch._scaled_mm(rounded, columns, unit, of_columns, out_dtype=torch.bfloat16).to(x.dtype)
    return product.view(*x.shape[:-1], -1)
