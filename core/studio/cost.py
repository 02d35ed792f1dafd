"""Measure what a person has cost, in elapsed and processor time per phase."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ..device import processor
from ..errors import BadConfig
from ..progress import LOADING, PICTURES, SAMPLES
from ..training.callbacks import Callbacks, StepReport

PHASES = ("check", "encode", "load", "train", "draw")
"""The phases of making a person, in order. Photos are read and checked, photos and captions encoded, the denoiser loaded onto
the device, the LoRA trained and measured, pictures drawn and ranked."""


@dataclass(frozen=True)
class Work:
    """The amount of work to do, or done."""

    people: int = 0
    photos: int = 0
    steps: int = 0
    pictures: int = 0

    @classmethod
    def sum(cls, works: Iterable["Work"]) -> "Work":
        listed = list(works)
        return cls(*(sum(getattr(one, name) for one in listed) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class Cost:
    """The cost of a person in the run that made it, without the work of earlier runs."""

    device: str
    """`cpu`, `cuda` or `mps`."""
    processor: str
    """The name of the GPU, or else of the machine's processor."""
    base: str
    """The identity of the base model."""
    work: Work
    """The work done: steps made, and pictures drawn."""
    seconds: Mapping[str, float]
    """The elapsed time of each of PHASES."""
    processor_seconds: Mapping[str, float]
    """The time of all processors in each of PHASES."""

    def __post_init__(self) -> None:
        if {*PHASES} - self.seconds.keys() or {*PHASES} - self.processor_seconds.keys():
            raise BadConfig(f"a cost needs the time of each phase: {', '.join(PHASES)}")

    @property
    def gpu_hours(self) -> float | None:
        """How long the GPU was used, in hours; None without a GPU."""
        return None if self.device == "cpu" else sum(self.seconds.values()) / 3600

    @property
    def processor_hours(self) -> float:
        return sum(self.processor_seconds.values()) / 3600


class Stopwatch:
    """Measures a person's phases through the callbacks of the job."""

    def __init__(self, now: Callable[[], float] = time.monotonic, worked: Callable[[], float] = time.process_time):
        self._clocks = (now, worked)
        self._taken: list[dict[str, float]] = [dict.fromkeys(PHASES, 0.0) for _ in self._clocks]
        self._phase, self._since = PHASES[0], [clock() for clock in self._clocks]
        self._steps, self._pictures = 0, 0

    def enter(self, phase: str) -> None:
        """Start a phase, and end the current one."""
        for index, clock in enumerate(self._clocks):
            now = clock()
            self._taken[index][self._phase] += now - self._since[index]
            self._since[index] = now
        self._phase = phase

    def listening(self, callbacks: Callbacks) -> Callbacks:
        """Return callbacks that also report to this stopwatch."""

        def on_step(report: StepReport) -> None:
            if self._phase == "load":  # Without likeness, the first step is the first news.
                self.enter("train")
                # The last seconds of loading were this step's. The processor time is divided by the same share.
                share = min(1.0, report.seconds_per_step / (self._taken[0]["load"] or 1))
                for taken in self._taken:
                    taken["train"] += share * taken["load"]
                    taken["load"] -= share * taken["load"]
            self._steps += 1
            callbacks.on_step(report)

        def on_phase(name: str, done: int, total: int) -> None:
            if name == LOADING:
                self.enter("load")
            elif name == SAMPLES and self._phase == "load":
                self.enter("train")
            elif name == PICTURES:
                if self._phase != "draw":
                    self.enter("draw")
                self._pictures += done > 0
            callbacks.on_phase(name, done, total)

        return replace(callbacks, on_step=on_step, on_phase=on_phase)

    def cost(self, device: torch.device, base: str, photos: int) -> Cost:
        """Return the measurements so far."""
        self.enter(self._phase)
        rounded = [{phase: round(seconds, 3) for phase, seconds in taken.items()} for taken in self._taken]
        work = Work(1, photos, self._steps, self._pictures)
        return Cost(device.type, processor(device), base, work, *rounded)
