"""What a person has cost, by the clock and by the processor in each phase, and what others will by it."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..device import processor
from ..training.callbacks import Callbacks, StepReport

PHASES = ("check", "encode", "load", "train", "draw")
"""What is done for a person, in this order: photos are read and checked, photos and captions encoded, the denoiser brought to
the device, the LoRA trained and measured, pictures drawn and ranked."""


@dataclass(frozen=True)
class Work:
    """How much there is to do, or has been done."""

    people: int = 0
    photos: int = 0
    steps: int = 0
    pictures: int = 0

    @classmethod
    def sum(cls, works: Iterable["Work"]) -> "Work":
        listed = list(works)
        return cls(*(sum(getattr(one, name) for one in listed) for name in cls.__dataclass_fields__))


_UNITS = {"check": "photos", "encode": "photos", "load": "people", "train": "steps", "draw": "pictures"}
"""By what the time of each phase grows."""


@dataclass(frozen=True)
class Cost:
    """What a person has cost in the run that made it; what earlier runs had done of it is not in it."""

    device: str
    """`cpu`, `cuda` or `mps`."""
    processor: str
    """The name of the GPU, or else of the machine's processor."""
    base: str
    """The identity of the base model."""
    work: Work
    """What was done: steps made, and pictures drawn."""
    seconds: Mapping[str, float]
    """By the clock, of each of PHASES."""
    processor_seconds: Mapping[str, float]
    """Of all processors, of each of PHASES."""

    @property
    def gpu_hours(self) -> float | None:
        """How long the GPU was held; None where there was none."""
        return None if self.device == "cpu" else sum(self.seconds.values()) / 3600

    @property
    def processor_hours(self) -> float:
        return sum(self.processor_seconds.values()) / 3600


def cost_of(values: Any) -> Cost:
    """The cost of which the values were read from a file. Raises TypeError or KeyError where it is damaged."""
    cost = Cost(**{**values, "work": Work(**values["work"])})
    numbers = [table[phase] for table in (cost.seconds, cost.processor_seconds) for phase in PHASES]
    numbers += [getattr(cost.work, name) for name in Work.__dataclass_fields__]
    if not all(isinstance(one, str) for one in (cost.device, cost.processor, cost.base)):
        raise TypeError("a name is of another type")
    if not all(isinstance(one, (int, float)) for one in numbers):
        raise TypeError("a number is of another type")
    return cost


def seconds_for(work: Work, costs: Sequence[Cost]) -> float | None:
    """The seconds that the work will take one device by what others have cost; None where there is nobody to go by."""
    if not costs:
        return None
    done, seconds = Work.sum(cost.work for cost in costs), 0.0
    for phase, unit in _UNITS.items():
        taken = sum(cost.seconds[phase] for cost in costs)
        seconds += taken * getattr(work, unit) / (getattr(done, unit) or 1)
    return seconds


class Stopwatch:
    """Measures the phases of a person by the callbacks that the making of it calls."""

    def __init__(self, now: Callable[[], float] = time.monotonic, worked: Callable[[], float] = time.process_time):
        self._clocks = (now, worked)
        self._taken: list[dict[str, float]] = [dict.fromkeys(PHASES, 0.0) for _ in self._clocks]
        self._phase, self._since = PHASES[0], [clock() for clock in self._clocks]
        self._steps, self._pictures = 0, 0

    def enter(self, phase: str) -> None:
        """Ends the phase that it is in."""
        for index, clock in enumerate(self._clocks):
            now = clock()
            self._taken[index][self._phase] += now - self._since[index]
            self._since[index] = now
        self._phase = phase

    def listening(self, callbacks: Callbacks) -> Callbacks:
        """The callbacks, but that what they are told is heard here too."""

        def on_step(report: StepReport) -> None:
            if self._phase == "load":  # without likeness to measure, the first step is the first that is heard of
                self.enter("train")
                self._move_back(report.seconds_per_step)
            self._steps += 1
            callbacks.on_step(report)

        def on_phase(name: str, done: int, total: int) -> None:
            if name == "encoding" and done == total:
                self.enter("load")
            elif name == "samples" and self._phase == "load":
                self.enter("train")
            elif name == "pictures":
                if self._phase != "draw":
                    self.enter("draw")
                self._pictures += done > 0
            callbacks.on_phase(name, done, total)

        return replace(callbacks, on_step=on_step, on_phase=on_phase)

    def cost(self, device: torch.device, base: str, photos: int) -> Cost:
        """What has been measured until now."""
        self.enter(self._phase)
        rounded = [{phase: round(seconds, 3) for phase, seconds in taken.items()} for taken in self._taken]
        work = Work(1, photos, self._steps, self._pictures)
        return Cost(device.type, processor(device), base, work, *rounded)

    def _move_back(self, seconds: float) -> None:
        """Counts the last seconds of the load as training, by the clock, and of the processor's the same share."""
        share = min(1.0, seconds / (self._taken[0]["load"] or 1))
        for taken in self._taken:
            taken["train"] += share * taken["load"]
            taken["load"] -= share * taken["load"]
