"""LoRA's layers (arXiv:2106.09685): a frozen layer with a trained low-rank change, and groups of them with one input.

    y = W x + b + s B A x        s = alpha / rank

`LoraLayer` is one layer. `SharedInput` is a group, such as q, k and v of an attention. It computes the equation for all its
layers at once, with as few passes over the activations as possible.
"""

import math
import weakref
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...models.cpu_matmul import add_product, matmul
from ...models.cpu_matmul import linear as linear_of
from ...models.quantised_layers import as_under_autocast, linear, quantised_of, times
from ...models.selective import kept
from ...storage.stored import Dequantise

_Form = tuple[float, Dequantise, int]
"""The scale s of a layer, the function that dequantises its weight, and the number of the weight's parts."""


class LoraLayer(nn.Module):
    """A frozen Linear or Conv2d whose weight W becomes W + s B A.

    `down` is A, (rank, in) or (rank, in, height, width), and `up` is B, (out, rank) or (out, rank, 1, 1). Both are float32
    whatever the dtype of W. The arithmetic is in the dtype of the input.
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
        """The group of this layer, which may be the only one in it."""
        outputs, inputs, *kernel = weight.shape
        wide = {"device": weight.device, "dtype": torch.float32}
        self.down: nn.Parameter = nn.Parameter(torch.empty(rank, inputs, *kernel, **wide))
        self.up: nn.Parameter = nn.Parameter(torch.zeros(outputs, rank, *(1 for _ in kernel), **wide))

    @property
    def weight(self) -> Tensor:
        """The frozen weight. Some networks look at its dtype."""
        return self.base_layer.weight  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.base_layer
        if not self.enabled:
            return layer(x)
        is_linear = isinstance(layer, nn.Linear)
        if is_linear and not (self.dropout and self.training):
            return self.together.output(self, x)
        x = as_under_autocast(x)
        down, (up,) = self.together.matrices(x.dtype)
        dropped = F.dropout(x, self.dropout, self.training)
        if is_linear:
            return layer(x) + self.scale * F.linear(F.linear(dropped, down), up)
        change = F.conv2d(F.conv2d(dropped, down, None, layer.stride, layer.padding, layer.dilation), up)
        return layer(x) + self.scale * change


class SharedInput:
    """Linear layers that a network calls with the same x, one after another: q, k and v of an attention, or one layer alone.

    The matrices A of its layers are stacked, so that one product A x serves all of them. The network still calls each layer.
    The first call with an x computes the outputs of all layers, and each other call takes its own.
    """

    def __init__(self, layers: Sequence[LoraLayer]):
        # Layers refer to this object. A strong reference back would keep them and their frozen weights until garbage
        # collection.
        self._layers: tuple[weakref.ref[LoraLayer], ...] = tuple(map(weakref.ref, layers))
        self.copies: tuple[Tensor, list[Tensor]] | None = None
        """What `matrices` returns while the adapter keeps it up to date (`cast_once`)."""
        self._x: Tensor | None = None
        self._not_taken: dict[LoraLayer, Tensor] = {}
        """The outputs for `_x` that no call has taken yet."""

    @property
    def layers(self) -> list[LoraLayer]:
        """The layers, as long as their network exists."""
        return [reference() for reference in self._layers]  # pyright: ignore

    def downs(self) -> tuple[nn.Parameter, ...]:
        """Return the matrices A. Layers that are one in the file share one."""
        return tuple(dict.fromkeys(layer.down for layer in self.layers))

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Return the stacked matrices A and the matrices B, in that dtype."""
        if self.copies and self.copies[0].dtype == dtype:
            return self.copies
        downs = [down.to(dtype) for down in self.downs()]
        return torch.cat(downs) if len(downs) > 1 else downs[0], [layer.up.to(dtype) for layer in self.layers]

    def output(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """Return the output of one of the layers."""
        if x is not self._x or layer not in self._not_taken:
            self._x, self._not_taken = x, dict(zip(self.layers, self.outputs(as_under_autocast(x)), strict=True))
        output = self._not_taken.pop(layer)
        if not self._not_taken:
            self.forget()
        return output

    def forget(self) -> None:
        """Release the input and the outputs that an interrupted pass has left."""
        self._x, self._not_taken = None, {}

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of all layers, in their order."""
        down, ups = self.matrices(x.dtype)
        layers = self.layers
        bases: list[Any] = [layer.base_layer for layer in layers]
        weights = [quantised_of(base) for base in bases]
        biases = [base.bias for base in bases]
        forms = [(layer.scale, one.dequantise, len(one.parts)) for layer, one in zip(layers, weights, strict=True)]
        parts = [part for weight in weights for part in weight.parts]
        return _AdaptedLinears.apply(x, forms, down, *ups, *biases, *parts)


class _AdaptedLinears(torch.autograd.Function):
    """The equation y = W x + b + s B (A x) for layers with one x, and its gradients. Of the activations, x and A x are kept.

    `down` is the stacked matrices A, or the one that all layers share. The other arguments are all matrices B, all biases, and
    the parts of all weights. The weights are dequantised for a product and again for the backward pass, or multiplied in 8 bits
    (quantised_layers.py). Everything but their parts is in the dtype of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, forms: Sequence[_Form], down: Tensor, *others: Any) -> tuple[Tensor, ...]:
        ups, biases, parts = others[: len(forms)], others[len(forms) : 2 * len(forms)], others[2 * len(forms) :]

        def multiply() -> list[Tensor]:
            outputs = [linear_of(x, down)]  # A x of all layers, side by side
            for column, (scale, dequantise, _), up, weight, bias in zip(
                _columns(outputs[0], ups), forms, ups, _by_layer(parts, forms), biases, strict=True
            ):
                y = linear(x, dequantise, weight, bias)  # W x + b
                y.view(-1, y.shape[-1]).addmm_(column, up.t(), alpha=scale)  # + s B (A x), in place
                outputs.append(y)
            return outputs

        low, *outputs = kept(multiply)
        ctx.save_for_backward(x, low, down, *ups, *parts)
        ctx.forms = forms
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Any, ...]:
        x, low, down, *others = ctx.saved_tensors
        forms: Sequence[_Form] = ctx.forms
        ups, weights = others[: len(forms)], _by_layer(others[len(forms) :], forms)
        low_gradient = torch.empty_like(low)  # the gradient of A x
        parts, low_gradients = _columns(low, ups), _columns(low_gradient, ups)
        x_gradient, up_gradients = None, []
        for number, (gradient, (scale, dequantise, _)) in enumerate(zip(gradients, forms, strict=True)):
            gradient, up = gradient.flatten(0, -2), ups[number]
            summed = number > 0 and len(down) == up.shape[1]  # the layers share one matrix A
            add_product(low_gradients[number], gradient, up, beta=int(summed), alpha=scale)  # s g B
            up_gradient = add_product(torch.empty_like(up), gradient.t(), parts[number], beta=0, alpha=scale)
            up_gradients.append(up_gradient)  # s g^T (A x)
            if ctx.needs_input_grad[0]:  # g W, summed over the layers
                x_gradient = times(gradient, dequantise, weights[number], x_gradient)
        low_gradient = low_gradient.flatten(0, -2)
        down_gradient = matmul(low_gradient.t(), x.flatten(0, -2))
        if x_gradient is not None:
            x_gradient = x_gradient.addmm_(low_gradient, down).view(x.shape)
        return x_gradient, None, down_gradient, *up_gradients, *(None,) * (len(ctx.needs_input_grad) - 3 - len(ups))


def _by_layer(parts: Sequence[Tensor], forms: Sequence[_Form]) -> list[Sequence[Tensor]]:
    ends = list(accumulate(count for _, _, count in forms))
    return [parts[end - count : end] for end, (_, _, count) in zip(ends, forms, strict=True)]


def _columns(low: Tensor, ups: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the part of x A^T that each B is multiplied by, (positions, rank)."""
    flat, ranks = low.flatten(0, -2), [up.shape[1] for up in ups]
    return flat.split(ranks, dim=1) if sum(ranks) == flat.shape[1] else (flat,) * len(ups)
