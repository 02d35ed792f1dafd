"""How many operations a piece of work requests from torch."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OperationCount(TorchDispatchMode):
    """Counts the operations requested from torch within the context, apart from views of memory."""

    count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2]
        if not func.is_view and not name.startswith(("_unsafe_view", "empty", "new_empty", "_record_function")):
            self.count += 1
        return func(*args, **(kwargs or {}))


def count_operations(work: Callable[[], object]) -> int:
    """Count the operations that `work` requests from torch. On a GPU the host starts one or a few kernels for each."""
    with OperationCount() as operations:
        work()
    return operations.count
