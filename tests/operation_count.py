"""How many operations a piece of work requests from torch, and how many bytes they read and write."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OperationCount(TorchDispatchMode):
    """Counts the operations requested from torch within the context, apart from views of memory."""

    count: int = 0
    bytes: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name().partition("::")[2]
        if not func.is_view and not name.startswith(("_unsafe_view", "empty", "new_empty", "_record_function")):
            self.count += 1
            written = tree_leaves(result)
            only_written = [kwargs.get("out"), args[0] if name == "copy_" else None]
            read = [leaf for leaf in tree_leaves((args, kwargs)) if not any(leaf is one for one in only_written)]
            self.bytes += sum(_bytes(leaf) for leaf in [*read, *written] if isinstance(leaf, Tensor))
        return result


def _bytes(tensor: Tensor) -> int:
    """Return the bytes that an operation reads or writes of a tensor: those of an expanded one are read once."""
    sides = (size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return math.prod(sides) * tensor.element_size()


def count_operations(work: Callable[[], object]) -> int:
    """Count the operations that `work` requests from torch. On a GPU the host starts one or a few kernels for each."""
    with OperationCount() as operations:
        work()
    return operations.count
