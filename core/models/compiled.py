"""The blocks of a denoiser compiled by torch, so that a GPU does not wait for the host to start its many small kernels.

This is regional compilation: the code around the blocks is not compiled. Blocks of equal widths share one compiled form,
which torch keeps on disk for later runs. Each shape of picture has its own, and so has each length of text in families that
do not pad captions to one length (Chroma, Qwen-Image, Qwen-Image 2.1, FLUX.3 Klein). The limits set here are torch's, for the
calling thread.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

MOST_FORMS = 1024
"""The number of compiled forms after which torch stops compiling a block.

There is one for each kind of block and shape of picture, with the adapter on and off, with and without gradients. torch's
own limit of 8 is meant for networks that are compiled once."""


def why_not_compiled(device: torch.device) -> str | None:
    """The reason why torch cannot compile for the device, such as no C++ compiler or no Triton; None if it can."""
    try:
        torch.compile(torch.sin, dynamic=False)(torch.ones(1, device=device))
    except Exception as error:  # torch raises a different class for each reason
        return str(error).strip().partition("\n")[0]
    return None


class CompiledBlocks:
    """Blocks with a compiled forward pass beside their own. Hooks on a block itself are not compiled."""

    def __init__(self, blocks: Iterable[nn.Module]):
        self._in_use = False
        for block in blocks:
            block.forward = partial(self._forward, block.forward, torch.compile(block.forward, dynamic=False))

    def _forward(self, plain: Callable[..., Any], compiled: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        return (compiled if self._in_use else plain)(*inputs, **named)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """A context that uses the compiled forms, made when a shape is new; a block that fails to compile runs as it is."""
        limits = {"cache_size_limit": MOST_FORMS, "accumulated_cache_size_limit": MOST_FORMS, "suppress_errors": True}
        self._in_use = True
        try:
            with torch._dynamo.config.patch(**limits):
                yield
        finally:
            self._in_use = False
