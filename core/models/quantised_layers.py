"""Frozen layers whose weights are kept as they are stored, in few bits, and dequantised whenever they are used.

Products with 8-bit weights can also be computed in 8 bits. The other factor is rounded too: row x_i becomes q_i =
round(x_i / t_i), with t_i = max |x_i| / limit. The weight is W = s Q, with one scale s or one for each output. This is
LLM.int8's vector-wise rounding (arXiv:2208.07339), with no outliers apart:

    x W^T = t (q Q^T) s        in the forward pass
    g W = t (q Q)              the gradient of x, where q rounds g s

int8 weights are multiplied with `torch._int_mm`, and e4m3 weights of fp8 files with `torch._scaled_mm`.

A weight whose inputs were rotated before rounding (ConvRot) is not rotated back: the layer's input is rotated instead. The
matrix is orthogonal, so only rounding differs.
"""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from ..storage.stored import Dequantise, QuantisedTensor, as_stored
from . import cpu_matmul
from .selective import kept

FEWEST_ROWS = 17
"""The fewest rows of x that `torch._int_mm` takes on a GPU. Fewer are multiplied with the dequantised weight."""
ROWS_MULTIPLE = 32
"""int8 rows are filled up to a multiple of this. cuBLAS has computed odd numbers of rows wrongly (pytorch#107671)."""
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number that each kind of weight in 8 bits can hold."""


class WeightChange(Protocol):
    """What is added to a weight: an applied LoRA's change of it."""

    def __call__(self, device: torch.device) -> Tensor:
        """Return the change in float32, on the device."""
        ...

    def times(self, x: Tensor) -> Tensor:
        """Return x C^T for the change C of a linear layer, in the dtype of x."""
        ...


class InEightBits:
    """Dequantises a weight as another function does, and marks it as one whose products are computed in 8 bits."""

    def __init__(self, dequantise: Dequantise):
        self.dequantise: Dequantise = dequantise

    def __call__(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return self.dequantise(parts, dtype)


class Rotated:
    """Dequantises a weight whose inputs are stored rotated in groups, as in ConvRot, bit for bit as ComfyUI does."""

    def __init__(self, dequantise: Dequantise, size: int):
        """`dequantise` leaves the inputs rotated. `size` is the number of inputs in a group."""
        self.dequantise: Dequantise = dequantise
        self.size: int = size

    def __call__(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return rotated(self.dequantise(parts, torch.float32), self.size).bfloat16().to(dtype)


def rotated(x: Tensor, size: int) -> Tensor:
    """Apply ConvRot's rotation, which is its own inverse, to groups of that size in the last dimension."""
    matrix = constant(_hadamard, x, size, x.dtype)
    return (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2)


def _hadamard(device: torch.device, size: int, dtype: torch.dtype) -> Tensor:
    """Return a symmetric orthogonal matrix: a Kronecker power of a regular Hadamard matrix of order 4."""
    matrix = of_four = torch.ones(4, 4, device=device) - 2 * torch.eye(4, device=device).flip(0)
    while len(matrix) < size:
        matrix = torch.kron(matrix, of_four)
    return (matrix / math.sqrt(size)).to(dtype)


def constant(make: Callable[..., Tensor], like: Tensor, *given: Any) -> Tensor:
    """Return a small tensor `make(device, *given)` on the device of another one. It is kept, except for fake tensors."""
    kept = _made.__wrapped__ if isinstance(like, FakeTensor) else _made
    return kept(make, like.device, *given)


@functools.lru_cache(maxsize=8)
def _made(make: Callable[..., Tensor], *given: Any) -> Tensor:
    return make(*given)


def linear(x: Tensor, dequantise: Dequantise, parts: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b (..., out) for x (..., in), in the dtype of x."""
    dequantise, size = unrotated(dequantise)
    x = rotated(x, size) if size else x
    if not _is_in_eight_bits(x, dequantise):
        return cpu_matmul.linear(x, dequantise(parts, x.dtype), bias)
    weight, *scales = parts
    product = _product(x, weight.t(), *scales)
    return product if bias is None else product.add_(bias)


def times(gradient: Tensor, dequantise: Dequantise, parts: Sequence[Tensor], total: Tensor | None = None) -> Tensor:
    """Return g W (..., in) for g (..., out), in the dtype of g; added to `total`, which is changed, if there is one."""
    dequantise, size = unrotated(dequantise)
    if size:
        product = rotated(times(gradient, dequantise, parts), size)
        return product if total is None else total.add_(product)
    if not _is_in_eight_bits(gradient, dequantise):
        wide = dequantise(parts, gradient.dtype)
        return cpu_matmul.linear(gradient, wide.t()) if total is None else cpu_matmul.add_product(total, gradient, wide)
    weight, *scales = parts
    for scale in scales:
        gradient = gradient * scale.to(gradient.dtype).reshape(-1)
    product = _product(gradient, weight)
    return product if total is None else total.add_(product)


def unrotated(dequantise: Dequantise) -> tuple[Dequantise, int]:
    """Return how a weight is dequantised with its inputs left rotated, and the size of their groups: 0 if there are none."""
    marked = isinstance(dequantise, InEightBits)
    plain = dequantise.dequantise if marked else dequantise
    if not isinstance(plain, Rotated):
        return dequantise, 0
    return InEightBits(plain.dequantise) if marked else plain.dequantise, plain.size


def _is_in_eight_bits(x: Tensor, dequantise: Dequantise) -> bool:
    return isinstance(dequantise, InEightBits) and x.numel() >= FEWEST_ROWS * x.shape[-1]


def _product(x: Tensor, matrix: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return x M diag(s) for x (..., k), M (k, n) in 8 bits and s of n numbers or one, in the dtype of x."""
    rows, limit = x.flatten(0, -2), LIMITS[matrix.dtype]
    unit = torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-30) / limit
    # cuBLAS reads the first factor row by row, and the second column by column. Other layouts exist on some GPUs only.
    columns = matrix if matrix.stride(0) == 1 else matrix.t().contiguous().t()
    if matrix.dtype == torch.int8:
        # In fp16, whose 10 bits hold 127.5 exactly, in half of the bytes of float32.
        rounded = torch.mul(rows, 1 / unit, out=rows.new_empty(rows.shape, dtype=torch.float16)).round_().to(torch.int8)
        if odd := -len(rounded) % ROWS_MULTIPLE:
            rounded = F.pad(rounded, (0, 0, 0, odd))
        sums = torch._int_mm(rounded, columns)[: len(rows)]
        if scale is not None and rows.dtype == torch.float16:  # which overflows without the weight's scale
            largest = scale.amax().clamp_min(1e-30)
            unit, scale = unit * largest, scale / largest
        product = torch.mul(sums, unit, out=rows.new_empty(sums.shape))
        if scale is not None:
            product *= scale.reshape(-1)
    else:
        rounded = (rows / unit).to(matrix.dtype).contiguous()
        ones = unit.new_ones(1, matrix.shape[1])
        of_columns = ones if scale is None else ones * scale.reshape(1, -1)
        if sys.platform == "win32":  # where torch has no fp8 products with a scale for each row
            one = unit.new_ones(())
            product = torch._scaled_mm(rounded, columns, one, one, out_dtype=torch.bfloat16) * unit * of_columns
        else:
            product = torch._scaled_mm(rounded, columns, unit, of_columns, out_dtype=torch.bfloat16)
        product = product.to(x.dtype)
    return product.view(*x.shape[:-1], -1)


class QuantisedLayer(nn.Module):
    """The base class of frozen layers whose weight is a QuantisedTensor. Its parts are parameters, so they can be moved."""

    changes: tuple[WeightChange, ...] = ()
    """What is added to the weight, in order: applied LoRAs for drawing pictures."""

    def _take(self, weight: QuantisedTensor, bias: Any, dtype: torch.dtype) -> None:
        self.dtype: torch.dtype = dtype
        self._dequantise: Dequantise = weight.dequantise
        self._shape = weight.shape
        self._names = tuple(f"part_{number}" for number in range(len(weight.parts)))
        for name, part in zip(self._names, weight.parts, strict=True):
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.register_parameter("bias", bias)

    @property
    def quantised(self) -> QuantisedTensor:
        """The stored weight, with its parts on their current devices."""
        return QuantisedTensor(tuple(getattr(self, name) for name in self._names), self._dequantise, self._shape)

    @property
    def weight(self) -> Tensor:
        """The weight in the dtype of the network, dequantised and changed for each call."""
        wide = self.quantised.dequantised(self.dtype)
        for change in self.changes:
            wide = (wide.float() + change(wide.device).reshape(wide.shape)).to(self.dtype)
        return wide


class QuantisedLinear(QuantisedLayer, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    def __init__(self, layer: nn.Linear, weight: QuantisedTensor, dtype: torch.dtype):
        """Replace a layer that has this weight, in a network of that dtype."""
        nn.Module.__init__(self)
        self.in_features: int = layer.in_features
        self.out_features: int = layer.out_features
        self._take(weight, layer.bias, dtype)

    def forward(self, input: Tensor) -> Tensor:
        x, weight = as_under_autocast(input), self.quantised
        y = FrozenLinear.apply(x, weight.dequantise, self.bias, *weight.parts)
        for change in self.changes:  # beside the weight, since adding it to the weight takes longer than the product
            y = y + change.times(x)
        return y

    @property
    def plain_dequantise(self) -> Dequantise:
        """The function that dequantises the weight, without the mark of products in 8 bits."""
        return self._dequantise.dequantise if isinstance(self._dequantise, InEightBits) else self._dequantise

    def multiply(self, in_eight_bits: bool) -> None:
        """Compute products with the weight in 8 bits or not."""
        self._dequantise = InEightBits(self.plain_dequantise) if in_eight_bits else self.plain_dequantise


class QuantisedConv2d(QuantisedLayer, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    def __init__(self, layer: nn.Conv2d, weight: QuantisedTensor, dtype: torch.dtype):
        """Replace a layer that has this weight, in a network of that dtype."""
        nn.Module.__init__(self)
        for name in (*nn.Conv2d.__constants__, "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(layer, name))
        self._take(weight, layer.bias, dtype)

    def forward(self, input: Tensor) -> Tensor:
        x, weight = as_under_autocast(input), self.quantised
        places = (self.stride, self.padding, self.dilation, self.groups)
        if self.changes:
            return self._conv_forward(x, self.weight.to(x.dtype), self.bias)
        return _Conv2d.apply(x, weight.dequantise, places, self.bias, *weight.parts)


def can_be_quantised(layer: nn.Module) -> bool:
    """Return whether a layer's weight can be kept quantised and is not quantised yet."""
    is_known = isinstance(layer, nn.Linear | nn.Conv2d) and not isinstance(layer, QuantisedLayer)
    return is_known and getattr(layer, "padding_mode", "zeros") == "zeros"


def make_quantised(network: nn.Module, path: str, weight: QuantisedTensor, dtype: torch.dtype) -> None:
    """Replace the layer of a network at that path by one that keeps its weight quantised."""
    layer: Any = network.get_submodule(path)
    kind: Any = QuantisedLinear if isinstance(layer, nn.Linear) else QuantisedConv2d
    made = kind(layer, weight, dtype)
    made._forward_hooks.update(layer._forward_hooks)  # a training adapter's
    network.set_submodule(path, made)


def quantised_of(layer: Any) -> QuantisedTensor:
    """Return the weight of a layer as it is stored. A plain weight is returned unchanged."""
    if isinstance(layer, QuantisedLayer):
        assert not layer.changes
        return layer.quantised
    return QuantisedTensor((layer.weight,), as_stored, tuple(layer.weight.shape))


def as_under_autocast(x: Tensor) -> Tensor:
    """Cast a layer's input as autocast would for the product, for example a norm's float32 output."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if autocast else x


class FrozenLinear(torch.autograd.Function):
    """A linear layer that dequantises its frozen weight again for the backward pass, instead of keeping it dequantised.

    Its arguments are the input, the function that dequantises the weight, the bias, and the weight's parts. They don't have
    their own names: if there are as many arguments as names, torch.compile assumes that the context was left out.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, dequantise, bias, *parts = given
        ctx.save_for_backward(*parts)
        ctx.dequantise = dequantise
        return kept(lambda: linear(x, dequantise, parts, bias))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        parts: Sequence[Tensor] = ctx.saved_tensors
        return times(gradients[0], ctx.dequantise, parts), *(None,) * (2 + len(parts))


class _Conv2d(torch.autograd.Function):
    """A convolution that dequantises its weight again for the backward pass, instead of keeping it dequantised.

    Its arguments are those of a linear layer, with the convolution's places before the bias.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, dequantise, places, bias, *parts = given
        ctx.save_for_backward(*parts)
        ctx.dequantise, ctx.places, ctx.shape = dequantise, places, x.shape
        return kept(lambda: F.conv2d(x, dequantise(parts, x.dtype), bias, *places))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        parts: Sequence[Tensor] = ctx.saved_tensors
        weight = ctx.dequantise(parts, gradients[0].dtype)
        return conv2d_input(ctx.shape, weight, gradients[0], *ctx.places), *(None,) * (3 + len(parts))


SMALLEST = 2**16
"""The smallest number of elements of a weight that is quantised. Smaller ones, such as first and last layers, gain little."""


def to_int8(weight: Tensor) -> QuantisedTensor:
    """Round the weight to int8, with the float32 scales (out, 1, ...) that multiply it back."""
    wide = weight.detach().float()
    scale = wide.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).clamp_min(1e-12) / 127
    return QuantisedTensor(((wide / scale).round_().to(torch.int8), scale), times_scale, tuple(weight.shape))


def times_scale(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Dequantise a weight from `to_int8`."""
    weight, scale = parts
    return weight * scale.to(dtype)


def quantise_weights(network: nn.Module, device: torch.device) -> None:
    """Replace the large frozen Linear and Conv2d layers of a network by layers with 8-bit weights, computed on `device`.

    Layers that keep the quantised weights of their file are not changed.
    """
    # Only their paths, so that each layer is freed when it is replaced: both kinds of weights may not fit together.
    for path in [path for path, layer in network.named_modules() if can_be_quantised(layer)]:
        weight: Tensor = network.get_submodule(path).weight  # pyright: ignore[reportAssignmentType]
        if weight.requires_grad or weight.numel() < SMALLEST:
            continue
        # Rounded on the device, which is much faster, and moved back, since all of them may not fit on the device.
        made = to_int8(weight.to(device)).map(lambda part, home=weight.device: part.to(home))
        make_quantised(network, path, made, weight.dtype)
