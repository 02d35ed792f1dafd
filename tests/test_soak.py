"""A minute of the soak, always the same."""

import sys

import pytest

from tests.soak.__main__ import soak


@pytest.mark.skipif(sys.platform != "linux", reason="limits and forks are Linux's")
def test_damage_kills_and_closed_disks_end_in_success_or_one_clear_error():
    report = soak("make test", range(600))
    assert report["failures"] == {}
    assert report["kills"] > 5 and min(report["outcomes"][outcome] for outcome in ("done", "refused")) > 100
