"""Callbacks through which a training run reports to its caller, who can stop it by raising, and reports in words."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from PIL import Image
from torch import Tensor

from ..pictures.gallery import SAME_PERSON, SOMEONE_ELSE
from ..progress import OnPhase, OnProgress, OnWarning, silent
from .likeness import LikenessPoint
from .methods.method import Trained


@dataclass(frozen=True)
class StepReport:
    """The values passed to `on_step` after an optimizer step."""

    step: int
    """The number of completed steps, from 1 to `steps`."""
    steps: int
    learning_rate: float
    seconds_per_step: float
    seconds_left: float
    memory: int
    """The peak memory use of the device so far, in bytes. 0 on a CPU."""
    likeness: LikenessPoint | None
    """The latest measurement. None before the first one, or when no reference photos are held out."""
    _loss: Tensor = field(repr=False)

    @property
    def loss(self) -> float:
        """The smoothed loss. Reading it waits for the device, so read it when you display it, not at every step."""
        return float(self._loss)

    @property
    def measured(self) -> LikenessPoint | None:
        """The measurement made after this step, or None."""
        return self.likeness if self.likeness is not None and self.likeness.step == self.step else None


class StopAndKeep(Exception):
    """Raise this from `on_step` to end the training run after the current step. The LoRA trained so far is the result."""


@dataclass(frozen=True)
class Callbacks:
    """The functions that a training run calls. Each may raise any exception, including a BaseException, to cancel the run."""

    on_step: Callable[[StepReport], None] = silent
    """Called after every optimizer step. Raise StopAndKeep from it to end the run and keep what has been learned."""
    on_phase: OnPhase = silent
    """Called with (phase, done, total) while the model is read, photos and captions are encoded, the model is loaded, and class
    images and samples are drawn. `total` is 0 for a phase without parts to count."""
    on_sample: Callable[[int, list[Image.Image]], None] | None = None
    """Called with (step, pictures) every `sample_every` steps. If None, `train` saves the pictures in `<name>-samples`."""
    on_save: Callable[[int, Trained], None] | None = None
    """Called with (step, LoRA) every `save_every` steps. If None, `train` saves the LoRA beside its output."""
    on_measured: Callable[[int, Trained], None] | None = None
    """Called at the end with (step, LoRA) for each of the most alike measured intermediate LoRAs, except the result."""
    on_warning: OnWarning = silent
    """Called with a sentence about anything the user should know that doesn't stop the training run."""
    check_cancelled: Callable[[], None] | None = None
    """Called many times within each step and sample, which can take long. It raises to cancel. None means never called."""

    def progress(self, phase: str) -> OnProgress:
        """Return a function of (done, total) that calls `on_phase` with this phase."""
        return partial(self.on_phase, phase)


NO_CALLBACKS = Callbacks()
"""The default: reports are ignored, and nothing cancels."""


def likeness_word(likeness: float, rough: bool = False) -> str:
    """The meaning of a likeness in words, by the limits of the default face network. It is 0 if no picture shows a face.

    `rough` is that of the LikenessPoint.
    """
    if likeness >= SAME_PERSON:
        return "the same person"
    if rough:
        return "drawn too roughly to tell"
    return "perhaps" if likeness >= SOMEONE_ELSE else "someone else" if likeness else "no face"


def duration(seconds: float) -> str:
    """A number of seconds in words: "1 min 15 s" for 75."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def step_line(report: StepReport, elapsed: float) -> str:
    """The step, the loss, the likeness if it was measured after this step, and the seconds passed and left, in one line."""
    line = f"step {report.step} of {report.steps}, loss {report.loss:.4f}"
    if report.measured:
        line += f", likeness {report.measured.likeness:.2f} ({likeness_word(report.measured.likeness, report.measured.rough)})"
    return f"{line}, {duration(elapsed)} so far, {duration(report.seconds_left)} left"
