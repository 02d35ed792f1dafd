"""Weights in 8 bits with a scale for each output. Frozen layers keep them instead of wider ones.

Rounding to 255 even steps leaves an error of about 1 % of a normally distributed weight. fp8 (e4m3), with a mantissa of 3
bits, leaves 2.6 %.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..storage.narrow import NarrowTensor
from .narrow_layers import can_be_narrow, make_narrow

SMALLEST = 2**16
"""The smallest number of elements of a weight that is narrowed. Smaller ones, such as first and last layers, gain little."""


def narrowed(weight: Tensor) -> NarrowTensor:
    """Round the weight to int8, with the float32 scales (out, 1, ...) that multiply it back."""
    wide = weight.detach().float()
    scale = wide.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).clamp_min(1e-12) / 127
    return NarrowTensor(((wide / scale).round_().to(torch.int8), scale), _times_scale, tuple(weight.shape))


def _times_scale(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    weight, scale = parts
    return weight * scale.to(dtype)


def narrow_weights(network: nn.Module, device: torch.device) -> None:
    """Replace the large frozen Linear and Conv2d layers of a network by layers with 8-bit weights, computed on `device`.

    Layers that keep the narrow weights of their file are not changed.
    """
    for path, layer in list(network.named_modules()):
        if not can_be_narrow(layer):
            continue
        weight: Tensor = layer.weight  # pyright: ignore[reportAssignmentType]
        if weight.requires_grad or weight.numel() < SMALLEST:
            continue
        # Rounded on the device, which is much faster, and moved back, since all of them may not fit on the device.
        made = narrowed(weight.to(device)).map(lambda part, home=weight.device: part.to(home))
        make_narrow(network, path, made, weight.dtype)
