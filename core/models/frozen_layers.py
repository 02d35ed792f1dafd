"""Layers with frozen weights, computed faster on a CPU than by torch.

Linear layers use the faster library (cpu_matmul.py), and so do the products of convolutions.

Kernels of 3x3 use Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, arXiv:1509.09308), in float32. A tile of four by
four inputs is transformed by additions. So is the kernel, once for all calls. Their sixteen products, each summed over the
channels by a matrix product, are transformed to a tile of two by two outputs: 16 multiplications instead of 36.

For large weights, the transforms would take too much memory. These use one matrix product each if the output has few
positions, since torch rearranges such weights in each call.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..storage.stored import as_stored
from .cpu_matmul import faster_products, has_faster_products, matmul
from .quantised_layers import FrozenLinear

_LARGE_WEIGHT = 10_000_000
"""The number of weights above which oneDNN, which computes torch's convolutions, rearranges a weight in each call."""
_FEW_POSITIONS = {torch.float32: 256, torch.bfloat16: 64}
"""Up to this many output positions, by dtype, rearranging takes longer than oneDNN then saves."""
_LEAST_CHANNELS, _LEAST_POSITIONS = 256, 256
"""With at least this many channels and output positions, fewer multiplications save more than the transforms cost."""
# The transforms of one axis: B^T, G and A^T of the paper's equation 8.
_INPUT = ((1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, -1.0, 1.0, 0.0), (0.0, 1.0, 0.0, -1.0))
_KERNEL = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
_OUTPUT = ((1.0, 1.0, 1.0, 0.0), (0.0, 1.0, -1.0, -1.0))


class FrozenLayers:
    """The layers of a network that can be made faster as long as its weights don't change.

    If a weight changes, convolutions still compute with the old weight.
    """

    def __init__(self, network: nn.Module, device: torch.device, convolutions: bool = True):
        """Select the layers that get faster if the network computes on that device. On a GPU, none is selected.

        `convolutions` is whether convolutions are selected too. Transformed kernels take 16/9 of the memory of their weights.
        They are computed when a layer is first used.
        """
        self._forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        for layer in network.modules() if device.type == "cpu" else ():
            forward = _forward_of(layer, convolutions)
            if forward is not None:
                self._forwards[layer] = forward

    @property
    def keeps_kernels(self) -> bool:
        """Whether transformed kernels are kept besides the weights."""
        return any(isinstance(forward, _WithFewerMultiplications) for forward in self._forwards.values())

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Make the network use them within this context. Results are the same, except for rounding.

        A layer whose `forward` has been replaced by other code stays unchanged.
        """
        ours = {layer: forward for layer, forward in self._forwards.items() if "forward" not in vars(layer)}
        for layer, forward in ours.items():
            layer.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
        try:
            with faster_products():
                yield
        finally:
            for layer in ours:
                del layer.forward


def _forward_of(layer: nn.Module, convolutions: bool) -> Callable[[Tensor], Tensor] | None:
    if type(layer) is nn.Linear and not layer.weight.requires_grad and has_faster_products():
        return partial(_linear, layer)
    if not convolutions or type(layer) is not nn.Conv2d or layer.weight.requires_grad:
        return None
    if (layer.dilation, layer.groups, layer.padding_mode) != ((1, 1), 1, "zeros") or isinstance(layer.padding, str):
        return None
    if layer.weight.numel() > _LARGE_WEIGHT:
        return partial(_with_one_product, layer)
    is_small = (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (1, 1), (1, 1))
    gains = is_small and layer.weight.dtype == torch.float32 and min(layer.weight.shape[:2]) >= _LEAST_CHANNELS
    return _WithFewerMultiplications(layer) if gains else None


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled("cpu") or (layer.bias is not None and layer.bias.requires_grad):
        return nn.Linear.forward(layer, x)
    output: Tensor = FrozenLinear.apply(x, as_stored, layer.bias, layer.weight)
    return output


def _with_one_product(layer: nn.Conv2d, x: Tensor) -> Tensor:
    window = {"kernel_size": layer.kernel_size, "padding": layer.padding, "stride": layer.stride}
    size = [
        (side + 2 * padding - kernel) // stride + 1
        for side, kernel, padding, stride in zip(x.shape[2:], *window.values(), strict=True)
    ]
    if len(x) * size[0] * size[1] > _FEW_POSITIONS.get(x.dtype, 0) or torch.is_autocast_enabled("cpu"):
        return nn.Conv2d.forward(layer, x)
    output: Tensor = _Product.apply(x, layer.weight, layer.bias, window)
    return output.unflatten(2, size)


class _Product(torch.autograd.Function):
    """Compute the gradient of the inputs in the faster of the two orders. torch itself chooses the other one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, window: dict[str, Any]) -> Tensor:
        ctx.weight, ctx.size, ctx.window = weight, x.shape[2:], window
        columns = F.unfold(x, **window).transpose(0, 1)
        output = matmul(weight.flatten(1), columns.flatten(1))
        if bias is not None:
            output += bias[:, None]
        return output.unflatten(1, columns.shape[1:]).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        rows = matmul(gradients[0].mT.flatten(0, 1), ctx.weight.flatten(1))
        columns = rows.unflatten(0, (len(gradients[0]), -1)).mT
        return F.fold(columns, ctx.size, **ctx.window), None, None, None


class _WithFewerMultiplications:
    """The output of a convolution by Winograd's filtering."""

    def __init__(self, layer: nn.Conv2d):
        self._layer = layer
        self._kernel: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        few = batch * height * width < _LEAST_POSITIONS
        if few or height % 2 or width % 2 or torch.is_autocast_enabled("cpu"):
            return nn.Conv2d.forward(self._layer, x)
        if self._kernel is None:  # (16, O, I), of a weight (O, I, 3, 3)
            weight = self._layer.weight.detach()
            rows = weight.flatten(2).permute(2, 0, 1).flatten(1)
            self._kernel = (_square(_KERNEL) @ rows).unflatten(1, weight.shape[:2])
        output: Tensor = _Winograd.apply(x, self._kernel, self._layer.bias)
        return output


def _square(transform: Sequence[Sequence[float]]) -> Tensor:
    """Return the transform of both axes of a tile, as one matrix."""
    rows = torch.tensor(transform)
    return torch.kron(rows, rows)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        ctx.kernel = kernel
        output = _convolved(x, kernel)
        return output if bias is None else output.add_(bias[:, None, None])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _convolved_back(gradients[0], ctx.kernel), None, None


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve x (B, I, H, W), padded by 1, with a transformed 3x3 kernel. H and W are even. Returns (B, O, H, W)."""
    (batch, _, height, width), channels = x.shape, kernel.shape[1]
    padded, across = F.pad(x, (1, 1, 1, 1)), width // 2
    output = x.new_empty(batch, channels, height // 2, 2, across, 2)
    before, after = _square(_INPUT), _square(_OUTPUT)
    for start, end in _strips(batch, height, width):
        tiles = padded[:, :, 2 * start : 2 * end + 2].unfold(2, 4, 2).unfold(3, 4, 2)
        inputs = before @ tiles.permute(4, 5, 1, 0, 2, 3).reshape(16, -1)
        products = matmul(kernel, inputs.unflatten(1, (x.shape[1], -1)))
        outputs = after @ products.flatten(1)
        output[:, :, start:end] = outputs.view(2, 2, channels, batch, end - start, across).permute(3, 2, 4, 0, 5, 1)
    return output.view(batch, channels, height, width)


def _convolved_back(gradient: Tensor, kernel: Tensor) -> Tensor:
    """Return the gradient (B, I, H, W) of `_convolved`'s input from that of its output (B, O, H, W), each step transposed."""
    (batch, _, height, width), channels = gradient.shape, kernel.shape[2]
    outputs, across = gradient.reshape(batch, -1, height // 2, 2, width // 2, 2), width // 2
    padded = gradient.new_zeros(batch, channels, height // 2 + 1, 2, across + 1, 2)
    before, after = _square(_INPUT).T, _square(_OUTPUT).T
    for start, end in _strips(batch, height, width):
        tiles = outputs[:, :, start:end].permute(3, 5, 1, 0, 2, 4)
        products = after @ tiles.reshape(4, -1)
        inputs = matmul(kernel.mT, products.unflatten(1, (kernel.shape[1], -1)))
        tiles = (before @ inputs.flatten(1)).view(2, 2, 2, 2, channels, batch, end - start, across)
        tiles = tiles.permute(0, 2, 5, 4, 6, 1, 7, 3)
        for down in range(2):
            for right in range(2):
                padded[:, :, start + down : end + down, :, right : across + right] += tiles[down, right]
    return padded.view(batch, channels, height + 2, width + 2)[:, :, 1:-1, 1:-1]


def _strips(batch: int, height: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last rows of tiles that are computed at once, few enough to stay in a processor's cache."""
    rows = max(1, 256 // (batch * width // 2))
    for start in range(0, height // 2, rows):
        yield start, min(start + rows, height // 2)
