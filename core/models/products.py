"""Choose how products with a network's quantised weights are computed: in 8 bits, or with dequantised weights."""

import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from ..device import synchronize
from ..storage.stored import Dequantise, QuantisedTensor, as_stored
from .quantised import dequantise_fp8, dequantise_int8, dequantise_rotated
from .quantised_layers import (
    FEWEST_ROWS,
    LIMITS,
    InEightBits,
    QuantisedLinear,
    linear,
    times,
    times_scale,
    to_int8,
    unrotated,
)

REPEATS = 20
"""How often products are timed. They are waited for once, since a step waits for its work only at its end."""
WRONG = 0.1
"""The relative distance from the dequantised product above which results are wrong. Rounding makes it 0.01 to 0.04."""
WORTHWHILE = 0.9
"""The share of the time with dequantised weights below which products in 8 bits are used."""


def choose_products(
    network: nn.Module,
    wanted: Literal["auto", "on", "off"],
    device: torch.device,
    dtype: torch.dtype,
    predict: Callable[[], object],
) -> bool:
    """Compute the products with a network's quantised weights in 8 bits or not, and return whether they are.

    With "on" they are if the device can, and with "auto" if that is faster, which is measured on a GPU that computes in bf16.
    Products are measured with as many rows as each layer has when `predict` calls the network. This changes the results a
    little, as rounding the weights does.
    """
    quantised = [layer for layer in network.modules() if isinstance(layer, QuantisedLinear)]
    layers = [layer for layer in quantised if _is_product_of_scale(layer)]
    may_pay = device.type == "cuda" and dtype == torch.bfloat16
    most = math.inf if wanted == "on" else WORTHWHILE if wanted == "auto" and may_pay else 0.0
    chosen = bool(layers and most) and time_in_eight_bits(_products_of(layers, predict), device, dtype) < most
    for layer in layers:
        layer.multiply(in_eight_bits=chosen)
    return chosen


def has_int8_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device multiplies int8 weights in 8 bits."""
    return time_in_eight_bits([(to_int8(torch.ones(64, 64)), FEWEST_ROWS)], device, dtype) < math.inf


def _products_of(layers: Iterable[QuantisedLinear], predict: Callable[[], object]) -> list[tuple[QuantisedTensor, int]]:
    """Return the weight and the number of rows of each product of these layers when `predict` calls them."""
    found: list[tuple[QuantisedLinear, int]] = []

    def note(layer: QuantisedLinear, inputs: tuple[Tensor, ...]) -> None:
        found.append((layer, inputs[0].numel() // layer.in_features))

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        predict()
    finally:
        for hook in hooks:
            hook.remove()
    # Not within the call, where weights may be on the device for a moment.
    return [(layer.quantised, rows) for layer, rows in found]


def _is_product_of_scale(layer: QuantisedLinear) -> bool:
    """Return whether the layer's weight is its stored numbers times one scale, or one for each output.

    torch's products in 8 bits also need sides that are multiples of 16.
    """
    numbers_times_scale = (as_stored, times_scale, dequantise_fp8, dequantise_int8, dequantise_rotated)
    is_scaled = unrotated(layer.plain_dequantise)[0] in numbers_times_scale
    weight = layer.quantised
    return is_scaled and weight.parts[0].dtype in LIMITS and not any(side % 16 for side in weight.shape)


def time_in_eight_bits(
    products: Iterable[tuple[QuantisedTensor, int]], device: torch.device, dtype: torch.dtype
) -> float:
    """Return the time of products in 8 bits, as a share of that with dequantised weights. They are weights with row counts.

    Of alike products one is timed, forward and backward. Infinite if the device has no such products, or if their results are
    wrong.
    """
    if torch.version.hip and sys.platform == "win32":
        return math.inf  # they end the process (github.com/ROCm/rocm-libraries/issues/5205)
    of_shapes: dict[object, list[tuple[QuantisedTensor, int]]] = {}
    for weight, rows in products:
        of_shapes.setdefault((weight.shape, weight.parts[0].dtype, rows), []).append((weight, rows))
    in_eight_bits = dequantised = 0.0
    try:
        for alike in of_shapes.values():
            weight, rows = alike[0][0].map(lambda part: part.to(device)), alike[0][1]
            taken, results = _timed(weight, InEightBits(weight.dequantise), rows, device, dtype)
            taken_wide, expected = _timed(weight, weight.dequantise, rows, device, dtype)
            in_eight_bits, dequantised = in_eight_bits + len(alike) * taken, dequantised + len(alike) * taken_wide
            if any(_distance(*pair) > WRONG for pair in zip(results, expected, strict=True)):
                return math.inf
    except RuntimeError:
        return math.inf
    return in_eight_bits / dequantised


def _timed(
    weight: QuantisedTensor, dequantise: Dequantise, rows: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, tuple[Tensor, ...]]:
    """Return the seconds of a forward and a backward product, the mean of several, and their results."""
    waves = [torch.arange(length, device=device).sin().to(dtype) for length in (rows, *weight.shape)]
    gradient, x = (waves[0][:, None] + wave for wave in waves[1:])

    def multiply() -> tuple[Tensor, ...]:
        return linear(x, dequantise, weight.parts), times(gradient, dequantise, weight.parts)

    results = multiply()  # The first call also loads kernels.
    synchronize(device)
    began = time.perf_counter()
    for _ in range(REPEATS):
        multiply()
    synchronize(device)
    return (time.perf_counter() - began) / REPEATS, results


def _distance(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm((found - expected).float()) / torch.linalg.vector_norm(expected.float()))
