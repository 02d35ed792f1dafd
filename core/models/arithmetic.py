"""Count the arithmetic of a computation."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch


def count_flops(work: Callable[[], object]) -> int:
    """Count the floating-point operations of matrix products, convolutions and attention in `work`. A multiply-add is two."""
    counter = _counter()
    with counter:
        work()
    return counter.get_total_flops()


@functools.cache
def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Return functions that count an operation from its arguments and its result `out_val`, by operation."""
    return _counter().flop_registry


def _counter() -> Any:
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    aten: Any = torch.ops.aten
    # torch counts neither the CPU's attention kernels nor in-place products. The functions take the shapes of the kernels'
    # arguments.
    more: dict[Any, Callable[..., int]] = {
        aten.addmm_: lambda total, left, right, **__: 2 * math.prod(left) * right[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
            query, key, value
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, query, key, value, *_, **__: (
            sdpa_backward_flop_count(gradient, query, key, value)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=more)
