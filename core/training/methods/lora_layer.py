"""The layer that LoRA puts in the place of a frozen one. It passes over its activations as few times as possible."""

import math
from collections.abc import Iterator, Sequence
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
        self.together: SharedInput = SharedInput([self])
        """The layers that are given the same input, this one among them."""
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
        linear = isinstance(layer, nn.Linear | EightBitLinear)
        if linear and not (self.dropout and self.training):
            return self.together.output(self, x)
        x = _as_under_autocast(x)
        down, (up,) = self.together.matrices(x.dtype)
        dropped = F.dropout(x, self.dropout, self.training)
        if linear:
            return layer(x) + self.scale * F.linear(F.linear(dropped, down), up)
        change = F.conv2d(F.conv2d(dropped, down, None, layer.stride, layer.padding, layer.dilation), up)
        return layer(x) + self.scale * change


class SharedInput:
    """Linear layers that are given one tensor, one after the other, as q, k and v are; or a layer alone.

    The first that is called with a tensor computes the outputs of all, which the others then hand out. So one product with
    the matrices A serves all of them, and the gradients of the input are added up by the products that make them.
    """

    def __init__(self, layers: Sequence[LoraLayer]):
        self.layers: tuple[LoraLayer, ...] = tuple(layers)
        self.copies: tuple[Tensor, list[Tensor]] | None = None
        """What `matrices` returns, while the adapter keeps it up to date (`cast_once`)."""
        self._ahead: tuple[Tensor, dict[LoraLayer, Tensor]] | None = None
        """The input, and the outputs that have not been asked for yet."""

    def downs(self) -> tuple[nn.Parameter, ...]:
        """The matrices A. Layers that are one in the file have one."""
        return tuple(dict.fromkeys(layer.down for layer in self.layers))

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """The matrices A, one below the other, and the matrices B, in that dtype."""
        if self.copies and self.copies[0].dtype == dtype:
            return self.copies
        downs = [down.to(dtype) for down in self.downs()]
        return torch.cat(downs) if len(downs) > 1 else downs[0], [layer.up.to(dtype) for layer in self.layers]

    def output(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """The output of one of the layers."""
        if self._ahead is None or self._ahead[0] is not x or layer not in self._ahead[1]:
            self._ahead = x, dict(zip(self.layers, self._outputs(_as_under_autocast(x)), strict=True))
        outputs = self._ahead[1]
        result = outputs.pop(layer)
        if not outputs:
            self._ahead = None
        return result

    def forget(self) -> None:
        """Lets go of what an interrupted pass has left."""
        self._ahead = None

    def _outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        down, ups = self.matrices(x.dtype)
        bases: list[Any] = [layer.base_layer for layer in self.layers]
        narrow = [isinstance(base, EightBitLinear) for base in bases]
        weights = [base.narrow if small else base.weight for base, small in zip(bases, narrow, strict=True)]
        scales = [base.scale if small else None for base, small in zip(bases, narrow, strict=True)]
        biases = [base.bias for base in bases]
        factors = [layer.scale for layer in self.layers]
        return _AdaptedLinears.apply(x, factors, down, *ups, *weights, *scales, *biases)


def _as_under_autocast(x: Tensor) -> Tensor:
    """The input of a Linear under autocast, which would cast a norm's float32 output: sums in place need one dtype."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if autocast else x


class _AdaptedLinears(torch.autograd.Function):
    """x W^T + bias + factor * (x A^T) B^T for several layers. Changes are added in place, and only x and x A^T are kept.

    `down` has the matrices A, one below the other, or the one that all layers share. The others are given as all matrices B,
    all weights, all scales of weights in 8 bits, and all biases. Everything but these is in the dtype of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Sequence[float], down: Tensor, *others: Any) -> tuple[Tensor, ...]:
        ups, weights, scales, biases = _parts(others, len(factors))
        low = F.linear(x, down)
        results = []
        for part, factor, up, weight, scale, bias in zip(
            _columns(low, ups), factors, ups, weights, scales, biases, strict=True
        ):
            result = F.linear(x, widened(weight, scale, x.dtype), bias)
            result.view(-1, result.shape[-1]).addmm_(part, up.t(), alpha=factor)
            results.append(result)
        ctx.save_for_backward(x, low, down, *ups, *weights, *scales)
        ctx.factors = factors
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Any, ...]:
        x, low, down, *others = ctx.saved_tensors
        ups, weights, scales = _parts(others, len(ctx.factors))
        low_gradient = torch.empty_like(low)
        parts, low_gradients = _columns(low, ups), _columns(low_gradient, ups)
        x_gradient, up_gradients = None, []
        for number, (gradient, factor) in enumerate(zip(gradients, ctx.factors, strict=True)):
            gradient, up = gradient.flatten(0, -2), ups[number]
            # With beta = 0 addmm ignores the values of its first argument, and multiplies a product by alpha in one kernel.
            summed = number > 0 and len(down) == up.shape[1]  # the layers share one matrix A
            low_gradients[number].addmm_(gradient, up, beta=int(summed), alpha=factor)
            up_gradients.append(torch.addmm(up, gradient.t(), parts[number], beta=0, alpha=factor))
            if ctx.needs_input_grad[0]:
                weight = widened(weights[number], scales[number], x.dtype)
                x_gradient = gradient @ weight if x_gradient is None else x_gradient.addmm_(gradient, weight)
        low_gradient = low_gradient.flatten(0, -2)
        down_gradient = low_gradient.t() @ x.flatten(0, -2)
        if x_gradient is not None:
            x_gradient = x_gradient.addmm_(low_gradient, down).view(x.shape)
        return x_gradient, None, down_gradient, *up_gradients, *(None,) * 3 * len(ups)


def _parts(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The values in parts of that size."""
    return (values[start : start + size] for start in range(0, len(values), size))


def _columns(low: Tensor, ups: Sequence[Tensor]) -> Sequence[Tensor]:
    """The part of x A^T that each B is multiplied by, (positions, rank)."""
    flat, ranks = low.flatten(0, -2), [up.shape[1] for up in ups]
    return flat.split(ranks, dim=1) if sum(ranks) == flat.shape[1] else (flat,) * len(ups)
