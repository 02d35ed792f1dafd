"""What the pages of every interface show: the check of photos, and the curves of a training run. Needs no other program."""

import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from ..core.errors import counted
from ..core.photos import SetReport
from ..core.photos.report import CROP, REJECT, REVIEW, USE

SERIES = {"history": "loss", "learning_rates": "learning_rate", "likenesses": "likeness"}
"""The curves in a state, lists of (step, value), with the name of the value that each step's news has for it."""
STEPPING = "training"
"""The phase of steps."""
DONE, STOPPED, FAILED = ENDED = "done", "stopped", "failed"
"""Phases that a training run ends with."""
COLOURS = {USE: "good", CROP: "good", REVIEW: "doubtful", REJECT: "rejected"}
"""The colour of a photo's tile, by the verdict of the report."""


def shown_check(
    names: Sequence[str], unread: Mapping[str, str], notes: Sequence[str], report: SetReport | None
) -> dict[str, Any]:
    """Return what a page shows of photos with these names: a tile for each, one headline, and the verdict on the set.

    `unread` has the reason for each photo that cannot be read, by name. `report` is None if the photos were only read.
    """
    tiles: list[dict[str, Any]] = [{"name": name} for name in names]
    tiles += [{"name": name, "verdict": COLOURS[REJECT], "reason": why} for name, why in unread.items()]
    more = f" (and {counted(len(notes) - 1, 'more note')})" if len(notes) > 1 else ""
    headline = notes[0] + more if notes else ""
    verdict = "doubtful" if unread else "good"
    if report:
        headline = "; ".join(filter(None, (report.headline, headline)))
        usable = len(report.usable)
        good = usable == len(names) and not unread and usable >= report.thresholds.photos_measured
        verdict = "rejected" if not report.enough else "good" if good else "doubtful"
        people = report.people or [0] * len(names)
        for tile, item, person in zip(tiles, report.photos, people, strict=False):
            # Without the settings that do it, which pages don't have.
            reasons = re.sub(r", or set \w+( or \w+)?", "", "; ".join(one.sentence for one in item.findings))
            tile |= {"verdict": COLOURS[item.verdict], "reason": reasons, "person": person}
    return {"photos": tiles, "headline": headline, "verdict": verdict, "mixed": bool(report and report.people)}


def add_news(state: MutableMapping[str, Any], news: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """Add the news to the state, and return the new points of its curves, by the curve's name."""
    points = {series: (news["step"], news[value]) for series, value in SERIES.items() if value in news}
    for series, (step, value) in points.items():
        # Where the process was killed, steps after the last saved state are done again.
        state[series] = [*(point for point in state.get(series, ()) if point[0] < step), (step, value)]
    state.update(news)
    return points
