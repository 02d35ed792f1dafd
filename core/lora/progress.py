"""Report the progress of long operations on a LoRA."""

import itertools
from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""A function that is called with (steps done, total steps)."""


def silent(done: int, total: int) -> None:
    """Do nothing: an OnProgress that reports nothing."""
    pass


def steps(on_progress: OnProgress, total: int) -> Callable[[], None]:
    """Return a function to call after each step, which reports how many of the `total` steps are done."""
    done = itertools.count(1)
    return lambda: on_progress(next(done), total)
