"""Checkpointing: a block's activations are computed again in the backward pass instead of being kept.

Selective checkpointing (arXiv:2205.05198) keeps what products and attention return, and computes only the rest again: norms,
activation functions, gates, rotations. That is nearly none of the arithmetic, and about half of the memory.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, Token
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

_Result = TypeVar("_Result")

_PRODUCTS = ("mm", "addmm", "bmm", "convolution", "_scaled_mm")
_ATTENTION = (
    "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
    "attention_math_for_mps", "fused_attention_overrideable",
)  # fmt: skip
"""The kernels of attention on NVIDIA's, AMD's and the computer's processors, and on Apple's and Intel's GPUs."""
KEPT = {
    getattr(room, name).default
    for room, names in (
        (torch.ops.aten, (*_PRODUCTS, *(f"_scaled_dot_product_{kind}" for kind in _ATTENTION))),
        (torch.ops.mkldnn, ("_linear_pointwise",)),
    )
    for name in names
    if hasattr(room, name)
}
"""The operations whose results are kept. Layers with frozen weights keep their own results instead (`kept`)."""
_FACTORS = {torch.ops.aten.mm.default: (0, 1), torch.ops.aten.addmm.default: (1, 2), torch.ops.aten.bmm.default: (0, 1)}
"""The places of a product's two matrices among its arguments."""
_CHEAP = 8
"""A product whose result has sides this many times its inner dimension is cheap: there is little arithmetic for each number."""


def checkpointed(block: nn.Module, inputs: Sequence[Any], selective: bool, draws: bool) -> Any:
    """Return `block(*inputs)`. `draws` is whether the block draws random numbers, which must then be the same again."""
    run = block
    if selective:
        results: deque[Any] = deque()
        run = partial(_in_next, iter((_Keeping(results), _Returning(results))), block)
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=draws)


def _in_next(modes: Iterator["KeepingMode"], block: nn.Module, *inputs: Any) -> Any:
    """Call a block with its forward pass in the next of these modes. Its hooks, which bring in weights, are outside.

    The first call is the forward pass, and the second the recomputation.
    """
    forward, own = block.forward, "forward" in vars(block)

    def within(*args: Any, **kwargs: Any) -> Any:
        with next(modes):
            return forward(*args, **kwargs)

    block.forward = within
    try:
        return block(*inputs)
    finally:
        if own:
            block.forward = forward
        else:
            del block.forward


def is_kept(func: Any, args: Sequence[Any]) -> bool:
    """Return whether an operation's result is kept.

    A product such as an adapter's B A is not: it is as large as a weight, but costs little, because its rank is small.
    """
    if func not in _FACTORS:
        return func in KEPT
    left, right = (args[place] for place in _FACTORS[func])
    return _CHEAP * left.shape[-1] >= min(left.shape[-2], right.shape[-1])


def kept(compute: Callable[[], _Result]) -> _Result:
    """Return the result of `compute`, new tensors. It is kept like a single operation's, so it isn't called again."""
    mode = _MODE.get()
    return mode.of(compute) if mode else compute()


class KeepingMode(TorchDispatchMode):
    """A mode that sees all operations in its context, except those within `kept`, whose result it sees."""

    def __enter__(self) -> Any:
        self._before: Token[KeepingMode | None] = _MODE.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _MODE.reset(self._before)
        super().__exit__(*error)

    def of(self, compute: Callable[[], Any]) -> Any:
        """Return what a call of `kept` returns."""
        with _pop_mode_temporarily():
            result = compute()
            self.keep(result)
        return result

    def keep(self, result: Any) -> None:
        """Keep a result, in a mode that keeps any."""


class _Keeping(KeepingMode):
    """Keeps what the forward pass of a block computes that must not be computed again."""

    def __init__(self, results: deque[Any]):
        super().__init__()
        self._results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_kept(func, args):
            self.keep(result)
        return result

    def keep(self, result: Any) -> None:
        # Autograd attaches the graph to the result itself.
        self._results.append(tree_map_only(Tensor, Tensor.detach, result))


class _Returning(KeepingMode):
    """Returns what was kept when a block is computed again.

    In-place operations on it are left out, such as adding a LoRA's change or a bias, since it already has their changes.
    """

    def __init__(self, results: deque[Any]):
        super().__init__()
        self._results = results
        self._taken: WeakValueDictionary[int, torch.UntypedStorage] = WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.endswith("_") and args[0].untyped_storage()._cdata in self._taken:
            return args[0]
        return self._take() if is_kept(func, args) else func(*args, **(kwargs or {}))

    def of(self, compute: Callable[[], Any]) -> Any:
        return self._take()

    def _take(self) -> Any:
        result = self._results.popleft()
        storages = [tensor.untyped_storage() for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        self._taken.update({storage._cdata: storage for storage in storages})
        return result


_MODE: ContextVar[KeepingMode | None] = ContextVar("_MODE", default=None)
