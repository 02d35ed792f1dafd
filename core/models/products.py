"""Choose how products with a network's narrow weights are computed: in 8 bits, or with widened weights."""

import math
import sys
import time
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from ..device import synchronize
from ..storage.stored import NarrowTensor, Widen, as_stored
from .narrow_layers import LIMITS, InEightBits, NarrowLinear, linear, narrowed, times, times_scale
from .quantised import widen_fp8, widen_int8

MULTIPLE = 16
"""The number that both sides of a weight must be a multiple of, for `torch._int_mm` and `torch._scaled_mm`."""
ROWS, REPEATS = 2048, 5
"""The rows that products are timed with, about the positions of a picture of 768 px, and how often they are timed."""
WRONG = 0.1
"""The relative distance from the widened product above which results are wrong. Rounding makes it 0.01 to 0.04."""
WORTHWHILE = 0.9
"""The share of the time with widened weights below which products in 8 bits are used."""


def choose_products(
    network: nn.Module, wanted: Literal["auto", "on", "off"], device: torch.device, dtype: torch.dtype
) -> bool:
    """Compute the products with a network's narrow weights in 8 bits or not, and return whether they are.

    With "on" they are if the device can, and with "auto" if that is faster, which is measured on a GPU that computes in bf16.
    This changes the results a little, as rounding the weights does.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, NarrowLinear) and _is_product_of_scale(layer)]
    may_pay = device.type == "cuda" and dtype == torch.bfloat16
    most = math.inf if wanted == "on" else WORTHWHILE if wanted == "auto" and may_pay else 0.0
    chosen = bool(layers and most) and time_in_eight_bits([layer.narrow for layer in layers], device, dtype) < most
    for layer in layers:
        layer.multiply(in_eight_bits=chosen)
    return chosen


def has_int8_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device multiplies int8 weights in 8 bits."""
    return time_in_eight_bits([narrowed(torch.ones(64, 64))], device, dtype) < math.inf


def _is_product_of_scale(layer: NarrowLinear) -> bool:
    """Return whether the layer's weight is its stored numbers times one scale, or one for each output."""
    is_scaled = layer.plain_widen in (as_stored, times_scale, widen_fp8, widen_int8)
    weight = layer.narrow
    return is_scaled and weight.parts[0].dtype in LIMITS and not any(side % MULTIPLE for side in weight.shape)


def time_in_eight_bits(weights: Iterable[NarrowTensor], device: torch.device, dtype: torch.dtype) -> float:
    """Return the time of products with the weights in 8 bits, as a share of that with the widened weights.

    One weight of each shape is timed, in a forward and a backward product. Infinite if the device has no such products, or if
    their results are wrong.
    """
    if torch.version.hip and sys.platform == "win32":
        return math.inf  # they end the process (github.com/ROCm/rocm-libraries/issues/5205)
    of_shapes: dict[object, list[NarrowTensor]] = {}
    for weight in weights:
        of_shapes.setdefault((weight.shape, weight.parts[0].dtype), []).append(weight)
    in_eight_bits = widened = 0.0
    try:
        for alike in of_shapes.values():
            weight = alike[0].map(lambda part: part.to(device))
            taken, results = _timed(weight, InEightBits(weight.widen), device, dtype)
            taken_wide, expected = _timed(weight, weight.widen, device, dtype)
            in_eight_bits, widened = in_eight_bits + len(alike) * taken, widened + len(alike) * taken_wide
            if any(_distance(*pair) > WRONG for pair in zip(results, expected, strict=True)):
                return math.inf
    except RuntimeError:
        return math.inf
    return in_eight_bits / widened


def _timed(
    weight: NarrowTensor, widen: Widen, device: torch.device, dtype: torch.dtype
) -> tuple[float, tuple[Tensor, ...]]:
    """Return the seconds of a forward and a backward product, the least of a few, and their results."""
    waves = [torch.arange(length, device=device).sin().to(dtype) for length in (ROWS, *weight.shape)]
    gradient, x = (waves[0][:, None] + wave for wave in waves[1:])
    taken, results = [], ()
    for _ in range(REPEATS):
        synchronize(device)
        began = time.perf_counter()
        results = linear(x, widen, weight.parts), times(gradient, widen, weight.parts)
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken), results


def _distance(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm((found - expected).float()) / torch.linalg.vector_norm(expected.float()))
