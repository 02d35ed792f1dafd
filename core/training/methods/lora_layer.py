"""The layer that LoRA puts in the place of a frozen one. It passes over its activations as few times as possible."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...models.eight_bit import EightBitLinear, widened


class LoraLayer(nn.Module):
    """A frozen Linear or Conv2d with W + scale * B A in the place of its weight W (arXiv:2106.09685).

    `down` is A, (rank, in) or (rank, in, height, width), and `up` is B, (out, rank) or (out, rank, 1, 1). Both are float32
    whatever the dtype of W; the arithmetic is in the dtype of the input.
    """

    def __init__(self, base_layer: nn.Module, rank: int, alpha: float, *, rslora: bool = False, dropout: float = 0.0):
        super().__init__()
        weight = base_layer.weight
        assert isinstance(weight, Tensor)
        self.base_layer = base_layer
        self.scale: float = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = dropout
        self.enabled = True
        self.cast: tuple[Tensor, Tensor] | None = None
        """A and B in the dtype of the arithmetic, while the adapter keeps them up to date (`cast_once`)."""
        self.down: nn.Parameter = nn.Parameter(
            torch.empty(rank, *weight.shape[1:], device=weight.device, dtype=torch.float32)
        )
        ones = (1,) * (weight.ndim - 2)
        self.up: nn.Parameter = nn.Parameter(
            torch.zeros(weight.shape[0], rank, *ones, device=weight.device, dtype=torch.float32)
        )

    @property
    def weight(self) -> Tensor:
        """The frozen weight, whose dtype some networks look at."""
        return self.base_layer.weight  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.base_layer
        if not self.enabled:
            return layer(x)
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            # Autocast would cast a norm's float32 output for a Linear. The in-place sum below needs operands of one dtype.
            x = x.to(torch.get_autocast_dtype(kind))
        linear = isinstance(layer, nn.Linear | EightBitLinear)
        if linear and not (self.dropout and self.training):
            narrow = isinstance(layer, EightBitLinear)
            weight, weight_scale = (layer.narrow, layer.scale) if narrow else (layer.weight, None)
            matrices = self.cast or (self.down.detach(), self.up.detach())
            cast = [matrix.to(x.dtype) for matrix in matrices]
            return _AdaptedLinear.apply(x, weight, weight_scale, layer.bias, self.down, self.up, *cast, self.scale)
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        dropped = F.dropout(x, self.dropout, self.training)
        if linear:
            return layer(x) + self.scale * F.linear(F.linear(dropped, down), up)
        change = F.conv2d(F.conv2d(dropped, down, None, layer.stride, layer.padding, layer.dilation), up)
        return layer(x) + self.scale * change


class _AdaptedLinear(torch.autograd.Function):
    """x W^T + bias + scale * (x A^T) B^T. The change is added in place, and only x and x A^T are kept for the backward pass.

    `down_cast` and `up_cast` are A and B in the dtype of x, which the arithmetic is done with. The gradients go to A and B.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None,
        down: Tensor, up: Tensor, down_cast: Tensor, up_cast: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        low = F.linear(x, down_cast)
        result = F.linear(x, widened(weight, weight_scale, x.dtype), bias)
        result.view(-1, result.shape[-1]).addmm_(low.flatten(0, -2), up_cast.t(), alpha=scale)
        ctx.save_for_backward(x, low, weight, weight_scale, down_cast, up_cast)
        ctx.scale, ctx.trained = scale, down.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, low, weight, weight_scale, down, up = ctx.saved_tensors
        gradient, low = gradients[0].flatten(0, -2), low.flatten(0, -2)
        # With beta = 0 addmm ignores the values of its first argument, and multiplies a product by alpha in one kernel.
        low_gradient = torch.addmm(low, gradient, up, beta=0, alpha=ctx.scale)
        up_gradient = torch.addmm(up, gradient.t(), low, beta=0, alpha=ctx.scale).to(ctx.trained)
        down_gradient = (low_gradient.t() @ x.flatten(0, -2)).to(ctx.trained)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = gradient @ widened(weight, weight_scale, x.dtype)
            x_gradient = x_gradient.addmm_(low_gradient, down).view(x.shape)
        return x_gradient, None, None, None, down_gradient, up_gradient, None, None, None
