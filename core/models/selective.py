"""Checkpointing: a block's activations are computed again in the backward pass instead of being kept.

Selective checkpointing (arXiv:2205.05198) keeps what products and attention return, and computes only the rest again: norms,
activation functions, gates, rotations. That is nearly none of the arithmetic, and about half of the memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_PRODUCTS = ("mm", "addmm", "bmm", "convolution", "_scaled_mm")
_ATTENTION = (
    "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
    "attention_math_for_mps", "fused_attention_overrideable",
)  # fmt: skip
"""The kernels of attention on NVIDIA's, AMD's and the computer's processors, and on Apple's and Intel's GPUs."""
KEPT = [
    getattr(room, name).default
    for room, names in (
        (torch.ops.aten, (*_PRODUCTS, *(f"_scaled_dot_product_{kind}" for kind in _ATTENTION))),
        (torch.ops.mkldnn, ("_linear_pointwise",)),
    )
    for name in names
    if hasattr(room, name)
]
"""The operations whose results are kept. Not products of int8: their sums take twice the bytes of what is made of them."""
_FACTORS = {torch.ops.aten.mm.default: (0, 1), torch.ops.aten.addmm.default: (1, 2), torch.ops.aten.bmm.default: (0, 1)}
"""The places of a product's two matrices among its arguments."""
_CHEAP = 8
"""A product whose result has sides this many times its inner dimension is cheap: there is little arithmetic for each number."""


def checkpointed(block: nn.Module, inputs: Sequence[Any], selective: bool, draws: bool) -> Any:
    """Return `block(*inputs)`. `draws` is whether the block draws random numbers, which must then be the same again."""
    run = block
    if selective:
        # What is kept is changed in place where a LoRA's change or a bias is added to it.
        keeping, returning = create_selective_checkpoint_contexts(_policy, allow_cache_entry_mutation=True)
        run = partial(_in_next, iter(((keeping,), (returning, _Unchanged()))), block)
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=draws)


def _in_next(contexts: Iterator[Sequence[AbstractContextManager[object]]], block: nn.Module, *inputs: Any) -> Any:
    """Call a block with its forward pass in the next of these contexts. Its hooks, which bring in weights, are outside.

    The first call is the forward pass, and the second the recomputation.
    """
    forward, own = block.forward, "forward" in vars(block)

    def within(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for context in next(contexts):
                stack.enter_context(context)
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


def _policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(func, args) else CheckpointPolicy.PREFER_RECOMPUTE


class _Unchanged(TorchDispatchMode):
    """Leaves out in-place operations on what was kept, since it already has their changes."""

    def __init__(self):
        super().__init__()
        self._kept: WeakValueDictionary[int, torch.UntypedStorage] = WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.endswith("_") and args[0].untyped_storage()._cdata in self._kept:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if is_kept(func, args):
            storages = [tensor.untyped_storage() for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
            self._kept.update({storage._cdata: storage for storage in storages})
        return result
