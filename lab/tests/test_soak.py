"""A part of the soak, always the same."""

import sys
from collections import Counter
from itertools import count
from pathlib import Path

import pytest

from lab.soak.__main__ import soak
from lab.soak.trials import TRIALS
from lab.soak.worker import MOST_MEMORY, MOST_SECONDS, name_of

SEED = "make test"
_OFTEN = 100
"""The weight from which a trial takes milliseconds."""


def first_of_each(cheap: int, others: int) -> list[int]:
    """The numbers of the first trials of each name: so many of those that take milliseconds, and of those that train."""
    wanted = Counter({name: cheap if kind.weight >= _OFTEN else others for name, kind in TRIALS.items()})
    numbers = []
    for number in count():
        name = name_of(SEED, number)[0]
        if wanted[name]:
            wanted[name] -= 1
            numbers.append(number)
        if not wanted.total():
            return numbers
    raise AssertionError


@pytest.mark.skipif(sys.platform != "linux", reason="limits and forks are Linux's")
@pytest.mark.parametrize("cheap, others", [(15, 1), pytest.param(400, 30, marks=pytest.mark.slow)])
def test_damage_kills_and_closed_disks_end_in_success_or_one_clear_error(cheap, others):
    report = soak(SEED, first_of_each(cheap, others))
    assert report["failures"] == {}
    assert report["tried"].keys() == TRIALS.keys() and report["kills"] > 0
    assert min(report["outcomes"][outcome] for outcome in ("done", "refused")) >= cheap


def test_the_limits_that_are_promised_are_those_of_the_soak():
    page = (Path(__file__).parents[2] / "docs/security.md").read_text(encoding="utf-8")
    assert f"no hang over {MOST_SECONDS:.0f} s" in page and f"the file's size + {MOST_MEMORY >> 20} MB" in page
