"""How long work on a LoRA tells of its progress."""

import itertools
from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""A function that is told (steps done, steps in all)."""


def silent(done: int, total: int) -> None:
    """The OnProgress that tells nobody."""
    pass


def steps(on_progress: OnProgress, total: int) -> Callable[[], None]:
    """A function to be called after each step, which passes on how many of the `total` steps are done."""
    done = itertools.count(1)
    return lambda: on_progress(next(done), total)
