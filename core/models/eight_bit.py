"""Frozen layers with weights in 8 bits and a scale for each output, which are widened whenever they are used.

Rounding to 255 even steps leaves an error of about 1 % of a normally distributed weight. fp8 (e4m3), with a mantissa of
3 bits, leaves 2.6 %.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

SMALLEST = 2**16
"""The number of elements from which a weight is narrowed. Smaller ones gain little, and include the first and last layers."""


def narrowed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight rounded to int8, and the float32 scales (out, 1, ...) that multiply it back."""
    wide = weight.detach().float()
    scale = wide.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).clamp_min(1e-12) / 127
    return (wide / scale).round_().to(torch.int8), scale


def widened(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight multiplied by its scale, in that dtype; unchanged when the scale is None."""
    return weight if scale is None else weight * scale.to(dtype)


class EightBitLayer(nn.Module):
    """The base class of layers with an int8 weight `narrow` and its `scale` in the place of a frozen layer's weight."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, device: torch.device):
        super().__init__()
        # Rounded on the device, which is much faster, and back to where the weight was: all of them may not fit there.
        narrow, scale = (part.to(layer.weight.device) for part in narrowed(layer.weight.to(device)))
        self.narrow: nn.Parameter = nn.Parameter(narrow, requires_grad=False)
        self.scale: nn.Parameter = nn.Parameter(scale, requires_grad=False)
        self.bias: Tensor | None = layer.bias
        self.dtype: torch.dtype = layer.weight.dtype

    @property
    def weight(self) -> Tensor:
        return widened(self.narrow, self.scale, self.dtype)


class EightBitLinear(EightBitLayer):
    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.narrow, self.scale, self.bias)


class EightBitConv2d(EightBitLayer):
    def __init__(self, layer: nn.Conv2d, device: torch.device):
        super().__init__(layer, device)
        self.stride: tuple[int, ...] = layer.stride
        self.padding: str | tuple[int, ...] = layer.padding
        self.dilation: tuple[int, ...] = layer.dilation
        self.groups: int = layer.groups

    def forward(self, x: Tensor) -> Tensor:
        places = (self.stride, self.padding, self.dilation, self.groups)
        return _Conv2d.apply(x, self.narrow, self.scale, self.bias, places)


class _Linear(torch.autograd.Function):
    """A linear layer that widens its weight again for the backward pass, instead of keeping it widened."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, narrow: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(narrow, scale)
        return F.linear(x, widened(narrow, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        narrow, scale = ctx.saved_tensors
        return gradients[0] @ widened(narrow, scale, gradients[0].dtype), None, None, None


class _Conv2d(torch.autograd.Function):
    """A convolution that widens its weight again for the backward pass, instead of keeping it widened."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, narrow: Tensor, scale: Tensor, bias: Tensor | None, places: tuple) -> Tensor:
        ctx.save_for_backward(narrow, scale)
        ctx.places, ctx.shape = places, x.shape
        return F.conv2d(x, widened(narrow, scale, x.dtype), bias, *places)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        narrow, scale = ctx.saved_tensors
        weight = widened(narrow, scale, gradients[0].dtype)
        return conv2d_input(ctx.shape, weight, gradients[0], *ctx.places), None, None, None, None


def narrow_weights(network: nn.Module, device: torch.device) -> None:
    """Replaces the large frozen Linear and Conv2d layers of a network by layers with 8-bit weights, computed on `device`."""
    for path, layer in list(network.named_modules()):
        if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.weight.requires_grad:
            continue
        if layer.weight.numel() < SMALLEST or getattr(layer, "padding_mode", "zeros") != "zeros":
            continue
        kind = EightBitLinear if isinstance(layer, nn.Linear) else EightBitConv2d
        narrow = kind(layer, device)  # pyright: ignore[reportArgumentType]
        narrow._forward_hooks.update(layer._forward_hooks)  # a training adapter's
        network.set_submodule(path, narrow)
