"""Count the operations of a computation."""

import math
from collections.abc import Callable
from typing import Any

import torch


def count_flops(work: Callable[[], object]) -> int:
    """Count the floating-point operations of matrix products, convolutions and attention in `work`. A multiply-add is two."""
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
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        more[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        work()
    return counter.get_total_flops()
