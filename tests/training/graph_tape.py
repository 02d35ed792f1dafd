"""CUDA graphs on a CPU: what is captured is written down, operation by operation, and replayed at the same addresses.

As on a GPU a capture changes nothing, and a replay asks for what was asked for then with the tensors of then: numbers that the
host had in its hands are those of the capture. What would make the host wait, or draw numbers, is refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import core.training.step as step
from core.training.graphs import Pass, why_no_graphs

HOST: set[int] = set()
"""Where the tensors are that would be the host's on a GPU too, and may be read."""
REFUSED = "operation not permitted when stream is capturing"


def _places(values: Any) -> set[int]:
    return {value.untyped_storage()._cdata for value in tree_leaves(values) if isinstance(value, Tensor)}


class Tape:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, before in self.operations:
            given = _places((args, kwargs))
            for place, result in zip(tree_leaves(before), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(result, Tensor) and result.untyped_storage()._cdata not in given:
                    place.copy_(result)


class Capture(TorchDispatchMode):
    """In the place of torch.cuda.graph."""

    def __init__(self, tape: Tape, pool: object, stream: object, capture_error_mode: str):
        super().__init__()
        assert pool is not None and stream is not None and capture_error_mode == "thread_local"
        self._tape = tape
        self._made: set[int] = set()
        self._host = set(HOST)
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        """What was there before and has been written to, with its values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Attention is among what may draw numbers, since it may have dropout; there is none here.
        draws = torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func.name()
        given = _places((args, kwargs))
        on_host = bool(given) and given <= self._host
        if draws or (func is torch.ops.aten._local_scalar_dense.default and not on_host):
            raise RuntimeError(f"{REFUSED}: {func}")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    place = tensor.untyped_storage()._cdata
                    if place not in self._made and place not in self._before:
                        whole = tensor.detach().as_strided(
                            (tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0
                        )
                        self._before[place] = whole, whole.clone()
        result = func(*args, **kwargs)
        self._made |= _places(result) - given
        self._host |= _places(result) if on_host else set()
        if func._schema.is_mutable or not _places(result) <= given:
            self._tape.operations.append(tree_map_only(Tensor, Tensor.detach, (func, args, kwargs, result)))
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for place, value in self._before.values():
            place.copy_(value)


@contextmanager
def taped_graphs() -> Iterator[list[Tape]]:
    """A context in which runs on a CPU make passes by graphs, and the tapes that are made in it."""
    tapes: list[Tape] = []

    def tape() -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    def stream(*_: object) -> Any:
        return SimpleNamespace(wait_stream=lambda _: None)

    cuda = {
        "CUDAGraph": tape, "graph": Capture, "graph_pool_handle": object, "Stream": stream, "current_stream": stream,
        "stream": nullcontext,
    }  # fmt: skip
    copy = Pass.copy

    def copied(inputs: Pass) -> Pass:
        HOST.update(_places(inputs.conditioning.get("context_mask")))
        return copy(inputs)

    as_on_a_gpu = patch.object(step, "why_no_graphs", lambda _, *others: why_no_graphs(torch.device("cuda"), *others))
    with patch.multiple(torch.cuda, **cuda), as_on_a_gpu, patch.object(Pass, "copy", copied):
        yield tapes
