"""Callbacks through which a training run reports to its caller. The caller can stop the run by raising from one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from PIL import Image
from torch import Tensor

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


def _nothing(*_: object) -> None:
    """Accept any arguments and do nothing."""


@dataclass(frozen=True)
class Callbacks:
    """The functions that a training run calls. Each may raise any exception, including a BaseException, to cancel the run."""

    on_step: Callable[[StepReport], None] = _nothing
    """Called after every optimizer step. Raise StopAndKeep from it to end the run and keep what has been learned."""
    on_phase: Callable[[str, int, int], None] = _nothing
    """Called with (phase, done, total) while photos and captions are encoded, and class images and samples are drawn."""
    on_sample: Callable[[int, list[Image.Image]], None] | None = None
    """Called with (step, pictures) every `sample_every` steps. If None, `train` saves the pictures in `<name>-samples`."""
    on_save: Callable[[int, Trained], None] | None = None
    """Called with (step, LoRA) every `save_every` steps. If None, `train` saves the LoRA beside its output."""
    on_measured: Callable[[int, Trained], None] | None = None
    """Called at the end with (step, LoRA) for each of the most alike measured intermediate LoRAs, except the result."""
    on_warning: Callable[[str], None] = _nothing
    """Called with a sentence about anything the user should know that doesn't stop the training run."""
    check_cancelled: Callable[[], None] | None = None
    """Called many times within each step and sample, which can take long. It raises to cancel. None means never called."""

    def progress(self, phase: str) -> Callable[[int, int], None]:
        """Return a function of (done, total) that calls `on_phase` with this phase."""
        return partial(self.on_phase, phase)


NO_CALLBACKS = Callbacks()
"""The default: reports are ignored, and nothing cancels."""
