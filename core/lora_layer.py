"""The layer that LoRA puts in the place of a frozen one, with as few passes over its activations as there can be."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .eight_bit import EightBitLinear, widened


class LoraLayer(nn.Module):
    """A frozen Linear or Conv2d with W + scale * B A in the place of its weight W (arXiv:2106.09685).

    A and B are float32 whatever the dtype of W; the arithmetic is in that of the input.
    """

    def __init__(self, base_layer: nn.Module, rank: int, alpha: float, *, rslora: bool = False, dropout: float = 0.0):
        super().__init__()
        weight = base_layer.weight
        assert isinstance(weight, Tensor)
        self.base_layer = base_layer
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = dropout
        self.enabled = True
        self.down = nn.Parameter(torch.empty(rank, *weight.shape[1:], device=weight.device, dtype=torch.float32))
        ones = (1,) * (weight.ndim - 2)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, *ones, device=weight.device, dtype=torch.float32))

    @property
    def weight(self) -> Tensor:
        """The frozen one: some networks look at its dtype."""
        return self.base_layer.weight  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.base_layer
        if not self.enabled:
            return layer(x)
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            # As autocast does for a Linear, to which norms hand on float32: what is worked on in place must be of one type.
            x = x.to(torch.get_autocast_dtype(kind))
        linear = isinstance(layer, nn.Linear | EightBitLinear)
        if linear and not (self.dropout and self.training):
            narrow = isinstance(layer, EightBitLinear)
            weight, weight_scale = (layer.narrow, layer.scale) if narrow else (layer.weight, None)
            return _AdaptedLinear.apply(x, weight, weight_scale, layer.bias, self.down, self.up, self.scale)
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        dropped = F.dropout(x, self.dropout, self.training)
        if linear:
            return layer(x) + self.scale * F.linear(F.linear(dropped, down), up)
        change = F.conv2d(F.conv2d(dropped, down, None, layer.stride, layer.padding, layer.dilation), up)
        return layer(x) + self.scale * change


class _AdaptedLinear(torch.autograd.Function):
    """x W^T + bias + scale * (x A^T) B^T. The change is added in place, and of the activations only x and x A^T are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None,
        down: Tensor, up: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        low = F.linear(x, down.to(x.dtype))
        result = F.linear(x, widened(weight, weight_scale, x.dtype), bias)
        result.view(-1, result.shape[-1]).addmm_(low.flatten(0, -2), up.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, low, weight, weight_scale, down, up)
        ctx.scale = scale
        return result

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, low, weight, weight_scale, down, up = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        low_gradient = (gradient @ up.to(x.dtype)).mul_(ctx.scale)
        up_gradient = (gradient.t() @ low.flatten(0, -2)).mul_(ctx.scale).to(up.dtype)
        down_gradient = (low_gradient.t() @ x.flatten(0, -2)).to(down.dtype)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = gradient @ widened(weight, weight_scale, x.dtype)
            x_gradient = x_gradient.addmm_(low_gradient, down.to(x.dtype)).view(x.shape)
        return x_gradient, None, None, None, down_gradient, up_gradient, None
