"""Blocks of a denoiser compiled by torch, so that a GPU is not left waiting for the host to start its many small kernels.

Regional: what the blocks are put together with stays as it is. Blocks of equal widths share one compiled form, which torch
keeps on disk for later runs; each shape of picture has its own, and so has each length of text where captions are not padded
to one (Chroma, Qwen-Image). The limits that are set here are torch's of the calling thread.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

MOST_FORMS = 1024
"""Of a block that torch may compile before it goes on without: kinds of blocks times shapes of pictures, with the adapter on
and off, with gradients and without. Its own limit of 8 is for networks that are compiled once."""


def why_not_compiled(device: torch.device) -> str | None:
    """What torch says when it is to compile something for the device (no C++ compiler, no Triton...); None if it can."""
    try:
        torch.compile(torch.sin, dynamic=False)(torch.ones(1, device=device))
    except Exception as error:  # each reason has a kind of its own
        return str(error).strip().partition("\n")[0]
    return None


class CompiledBlocks:
    """Blocks whose forward pass has a compiled form beside its own. Hooks on a block itself stay outside of it."""

    def __init__(self, blocks: Iterable[nn.Module]):
        self._in_use = False
        for block in blocks:
            block.forward = partial(self._forward, block.forward, torch.compile(block.forward, dynamic=False))

    def _forward(self, plain: Callable[..., Any], compiled: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        return (compiled if self._in_use else plain)(*inputs, **named)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it the compiled forms are used: made when a shape is new, or the block's own where that fails."""
        limits = {"cache_size_limit": MOST_FORMS, "accumulated_cache_size_limit": MOST_FORMS, "suppress_errors": True}
        self._in_use = True
        try:
            with torch._dynamo.config.patch(**limits):
                yield
        finally:
            self._in_use = False
