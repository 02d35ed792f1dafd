"""How long operations report to their caller: functions that they call, and may raise from to cancel."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
OnProgress = Callable[[int, int], None]
"""A function that is called with (steps done, total steps)."""
OnPhase = Callable[[str, int, int], None]
"""A function that is called with (phase, steps done, total steps). The total is 0 for a phase without steps to count."""
OnWarning = Callable[[str], None]
"""A function that is called with a sentence about something that the user should know."""
READING = "reading the model"
"""The phase in which a base model's hashes are computed, which reads its whole file."""
LOADING = "loading the model"
"""The phase between the last caption and the first step or sample."""
SAMPLES, PICTURES = "samples", "pictures"
"""The phases in which pictures are drawn while a LoRA is trained, and with the trained one."""
PEOPLE, AT_WORK = "people", "at work"
"""The phases that count the people who are done, and the workers that are making some."""


def silent(*_: object) -> None:
    """Do nothing: a function of any of these kinds for callers that want no reports."""


def steps(on_progress: OnProgress, total: int) -> Callable[[], None]:
    """Return a function to call after each step, which reports how many of the `total` steps are done."""
    done = itertools.count(1)
    return lambda: on_progress(next(done), total)


def counting(items: Sequence[Item], on_progress: OnProgress) -> Iterator[Item]:
    """Yield the items, and report after each one how many the caller is done with."""
    for done, item in enumerate(items, start=1):
        yield item
        on_progress(done, len(items))


def percent(on_progress: OnProgress, total: int) -> Callable[[], None]:
    """Return a function to call after each of `total` steps, which reports each new percentage that is done, and 100."""
    done = itertools.count(1)

    def step() -> None:
        number = next(done)
        if 100 * number // total > 100 * (number - 1) // total:
            on_progress(100 * number // total, 100)

    return step
