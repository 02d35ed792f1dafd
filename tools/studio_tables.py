"""The prediction in docs/studio.md: `python -m tools.studio_tables --report studio/report.json --start 10` writes it there.

Nothing of it is measured but the seconds of each phase, which are the means over the people whom a studio has made. A
simulation then lets workers make people as core/studio/cluster.py does: some die at random, their people go on from the last
state, and after three deaths they fail. `--workers` prints that one prediction and writes nothing.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from core.storage.files import write_text
from core.studio.cluster import MOST_DEATHS
from core.studio.cost import PHASES, Cost
from core.studio.report import read_report
from tools.photo_tables import replace_table, table

DOCUMENT = Path(__file__).parent.parent / "docs" / "studio.md"
WORKERS, DEATHS = (1, 10, 100, 1000), (0.0, 0.1, 1.0)
"""Workers, and how often each dies an hour."""
PEOPLE, SEED = 1000, 1
STATE = 60.0
"""Seconds of training between two states, the usual `state_interval`."""
REPLACED = 5.0
"""Seconds until Ray has started another worker. An assumption."""


@dataclass(frozen=True)
class Times:
    """Seconds."""

    start: float
    """Until a worker is ready for its first person."""
    again: float
    """Of a person's phases those that are repeated by the next worker: photos checked, denoiser loaded."""
    encode: float
    train: float
    draw: float

    @classmethod
    def mean(cls, costs: Sequence[Cost], start: float, by_processor: bool) -> Times:
        tables = [cost.processor_seconds if by_processor else cost.seconds for cost in costs]
        check, encode, load, train, draw = (sum(each[phase] for each in tables) / len(tables) for phase in PHASES)
        return cls(start, check + load, encode, train, draw)

    @property
    def person(self) -> float:
        return self.again + self.encode + self.train + self.draw

    def kept(self, before: float, done: float) -> float:
        """What is not lost of `done` seconds of encoding, training and drawing, `before` of which earlier workers did.

        All that was encoded or drawn, but for the picture that is being drawn, and the training up to the last state.
        """
        begun = max(before, self.encode)
        if not begun < done < self.encode + self.train:
            return done
        return begun + (done - begun) // STATE * STATE


@dataclass(frozen=True)
class Outcome:
    seconds: float
    made: int
    failed: int
    wasted: float
    """Seconds of workers that were lost with those who died, and until others were ready."""


def simulate(times: Times, people: int, workers: int, deaths: float, seed: int = SEED) -> Outcome:
    """What so many people take on so many workers, each of which dies so often an hour; the same for the same seed."""
    chance, number = random.Random(seed), count()
    # A worker that is free, or a person, (deaths, what is kept), that is back.
    events: list[tuple[float, int, tuple[int, float] | None]] = [(times.start, next(number), None)] * workers
    back: list[tuple[int, float]] = []
    given = made = failed = idle = 0
    end = wasted = 0.0
    while events:
        now, _, person = heapq.heappop(events)
        if person is not None:
            back.append(person)
            if not idle:
                continue
            idle -= 1
        if back:
            died, kept = back.pop(0)
        elif given == people:
            idle += 1
            continue
        else:
            died, kept, given = 0, 0.0, given + 1
        needed = times.person - kept
        death = chance.expovariate(deaths / 3600) if deaths else math.inf
        if death >= needed:
            made, end = made + 1, max(end, now + needed)
            heapq.heappush(events, (now + needed, next(number), None))
            continue
        left = times.kept(kept, kept + max(0.0, death - times.again))
        wasted += death - (left - kept) + REPLACED + times.start
        heapq.heappush(events, (now + death + REPLACED + times.start, next(number), None))
        if died + 1 < MOST_DEATHS:
            heapq.heappush(events, (now + death, next(number), (died + 1, left)))
        else:
            failed, end = failed + 1, max(end, now + death)
    return Outcome(end, made, failed, wasted)


def row(times: Times, people: int, workers: int, deaths: float) -> tuple[str, ...]:
    outcome = simulate(times, people, workers, deaths)
    hours = outcome.seconds / 3600
    used = outcome.made * times.person / (workers * outcome.seconds)
    lost = outcome.wasted / (outcome.wasted + outcome.made * times.person)
    return (
        f"{workers:,}", f"{deaths:g}", f"{hours:.3g}", f"{outcome.made / hours:,.0f}", f"{used:.0%}", f"{lost:.1%}",
        str(outcome.failed),
    )  # fmt: skip


HEADER = ("workers", "deaths an hour of each", "hours", "people an hour", "busy", "lost by deaths", "failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True, metavar="FILE", help="the report.json of a studio")
    parser.add_argument("--processor", action="store_true", help="go by the processor's seconds, not by the clock's")
    parser.add_argument("--start", type=float, required=True, help="seconds until a worker is ready")
    parser.add_argument("--people", type=int, default=PEOPLE, help=f"default: {PEOPLE}")
    parser.add_argument("--workers", type=int, help="predict this alone, without deaths, and write nothing")
    options = parser.parse_args()
    costs = [result.cost for result in read_report(options.report.parent) if result.cost]
    times = Times.mean(costs, options.start, options.processor)
    if options.workers:
        print(f"{simulate(times, options.people, options.workers, 0.0).seconds:.1f} s")
        return
    content = table(HEADER, [row(times, options.people, workers, deaths) for deaths in DEATHS for workers in WORKERS])
    print(times, content, sep="\n")
    write_text(DOCUMENT, replace_table(DOCUMENT.read_text(encoding="utf-8"), "many workers", content))


if __name__ == "__main__":
    main()
