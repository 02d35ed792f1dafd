"""Show a studio at work: one line on a terminal, plain lines elsewhere."""

import math
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import studio  # Its modules load only when a name is used.
from ..errors import counted
from ..progress import AT_WORK, PEOPLE
from .common import print_warning, rough_duration

if TYPE_CHECKING:
    from ..training import StepReport

WIDTH = 80
"""The most columns of the line."""
REDRAWN, PRINTED = 0.5, 60.0
"""The seconds between updates of the line on a terminal, and between two lines elsewhere."""


def planned(plan: "studio.Plan") -> str:
    """Return the line that describes the planned work."""
    work, counts = plan.work, {"made before": len(plan.made_before), "refused": len(plan.refused)}
    aside = [f"{count} {what}" for what, count in counts.items() if count]
    others = f" ({', '.join(aside)})" if aside else ""
    return (
        f"to make: {counted(work.people, 'person', 'people')}{others}: {counted(work.photos, 'photo')}, "
        f"at most {counted(work.steps, 'step')}, {counted(work.pictures, 'picture')}"
    )


class StudioProgress:
    """Shows who is done, what is in progress, the speed, and the time left."""

    def __init__(self, people: Sequence[str], plan: "studio.Plan"):
        """Take the people in their order."""
        self._people, self._left = people, {*plan.to_make}
        self._made: list[studio.Cost] = []
        self._failed, self._ended, self._at_work = 0, 0, 1
        self._doing, self._rate = "", 0.0
        self._bar, self._on_terminal = None, sys.stderr.isatty()
        self._started = time.monotonic()
        self._shown = -math.inf if self._on_terminal else self._started

    def __enter__(self) -> "StudioProgress":
        if self._on_terminal:
            from tqdm import tqdm

            self._bar = tqdm(bar_format="{desc}", file=sys.stderr, leave=False)
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def line(self) -> str:
        """The state in one line, most important first."""
        failed = f", {self._failed} failed" if self._failed else ""
        parts = [f"{self._ended} of {len(self._people)} done{failed}"]
        if self._made and self._left:
            mean = sum(sum(cost.seconds.values()) for cost in self._made) / len(self._made)
            parts.append(f"{rough_duration(mean * len(self._left) / max(1, self._at_work))} left")
        if self._rate:
            parts.append(f"{self._rate:.3g} steps/s")
        return " | ".join([*parts, *([self._doing] if self._doing else [])])

    def step(self, report: "StepReport") -> None:
        self._doing = f"training {report.step}/{report.steps}: {self._person}"
        self._rate = 1 / max(report.seconds_per_step, 1e-6)
        self._show()

    def phase(self, name: str, done: int, total: int) -> None:
        if name == AT_WORK:
            self._at_work, self._doing = done, f"{done} at work"
        elif name != PEOPLE:
            self._doing = f"{name} {done}/{total}: {self._person}"
        self._show()

    def warning(self, message: str) -> None:
        self._make_room()
        print_warning(message)

    def ended(self, result: "studio.Result") -> None:
        """Print a finished person's line."""
        self._ended += 1
        self._failed += result.status == "failed"
        self._left.discard(result.name)
        if result.status == "made" and result.cost:
            self._made.append(result.cost)
            self._rate = studio.Work.sum(cost.work for cost in self._made).steps / (time.monotonic() - self._started)
        self._doing = ""
        self._make_room()
        print(f"{self._ended} of {len(self._people)}: {_line(result)}", file=sys.stderr, flush=True)
        self._show()

    @property
    def _person(self) -> str:
        """The person in progress; on one machine, people are made in order."""
        return self._people[min(self._ended, len(self._people) - 1)]

    def _make_room(self) -> None:
        if self._bar is not None:
            self._bar.clear()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._shown < (REDRAWN if self._on_terminal else PRINTED):
            return
        self._shown = now
        if self._bar is None:
            print(self.line, file=sys.stderr, flush=True)
            return
        from tqdm.utils import disp_trim

        columns = min(WIDTH, shutil.get_terminal_size().columns) - 1
        self._bar.set_description_str(disp_trim(self.line, columns))


def _line(result: "studio.Result") -> str:
    if result.status == "failed":
        return f"{result.name}: failed: {result.reason}"
    likeness = "" if result.likeness is None else f", mean likeness {result.likeness:.2f}"
    seconds = f", {rough_duration(result.seconds)}" if result.status == "made" else ""
    why = f": {result.reason}" if result.reason else ""
    return f"{result.name}: {result.shown_status}, pictures kept: {result.kept_of}{likeness}{seconds}{why}"
