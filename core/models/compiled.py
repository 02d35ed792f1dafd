"""The blocks of a denoiser compiled by torch, so that a GPU does not wait for the host to start its many small kernels.

This is regional compilation: the code around the blocks is not compiled. Blocks of equal widths share their compiled forms,
which torch keeps on disk for later runs. The first shape of picture and text gets its own form. The second shape makes torch
compile once more, for varying sizes, and later shapes use that form.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

MOST_FORMS = 1024
"""The number of compiled forms after which torch stops compiling a block.

There are a few for each kind of block: for fixed and varying sizes, with the adapter on and off, with and without gradients.
That is more than torch's own limit of 8, which is meant for networks that are compiled once.
"""


def why_not_compiled(device: torch.device) -> str | None:
    """Return why torch cannot compile for the device, such as a missing C++ compiler or Triton. None if it can."""
    try:
        torch.compile(torch.sin, dynamic=False)(torch.ones(1, device=device))
    except Exception as error:  # torch raises a different class for each reason
        return str(error).strip().partition("\n")[0]
    return None


class CompiledBlocks:
    """Blocks with a compiled forward pass in addition to their own. Hooks on a block itself are not compiled."""

    def __init__(self, blocks: Iterable[nn.Module]):
        # Autograd recomputes in a thread of its own, where torch 2.12 and newer don't see the limits that `in_use` sets.
        options: dict[str, Any] = {"recompile_limit": MOST_FORMS}
        options = options if options.keys() <= inspect.signature(torch.compile).parameters.keys() else {}
        self._compiled: dict[nn.Module, Callable[..., Any]] = {
            block: torch.compile(block.forward, **options) for block in blocks
        }

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Use the compiled forms in this context. New shapes are compiled. A block that fails to compile runs uncompiled."""
        limits = {"cache_size_limit": MOST_FORMS, "accumulated_cache_size_limit": MOST_FORMS, "suppress_errors": True}
        for block, compiled in self._compiled.items():
            block.forward = compiled
        try:
            with torch._dynamo.config.patch(**limits):
                yield
        finally:
            for block in self._compiled:
                del block.forward
