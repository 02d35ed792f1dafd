"""The callbacks by which a training reports to its caller, and by raising from which the caller stops it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from PIL import Image
from torch import Tensor

from .likeness import LikenessPoint
from .methods.method import Trained


@dataclass(frozen=True)
class StepReport:
    """The values that `on_step` is given after an optimizer step."""

    step: int
    """The number of steps done, from 1 to `steps`."""
    steps: int
    learning_rate: float
    seconds_per_step: float
    seconds_left: float
    memory: int
    """The peak memory use of the device so far, in bytes; 0 on a CPU."""
    likeness: LikenessPoint | None
    """The last measurement; None when there is none yet, or no photos are held out."""
    _loss: Tensor = field(repr=False)

    @property
    def loss(self) -> float:
        """The smoothed loss. Reading it waits for the device, so read it when you show it and not at every step."""
        return float(self._loss)

    @property
    def measured(self) -> LikenessPoint | None:
        """The measurement made after this very step, None when there was none."""
        return self.likeness if self.likeness is not None and self.likeness.step == self.step else None


class StopAndKeep(Exception):
    """Raised from `on_step` to end the training after this step, with the LoRA as its result and without an error."""


def _nothing(*_: object) -> None:
    """Takes any arguments and does nothing."""


@dataclass(frozen=True)
class Callbacks:
    """The functions that a training calls as it goes. Each may raise, also a BaseException, to cancel the training."""

    on_step: Callable[[StepReport], None] = _nothing
    """Called after every optimizer step. Raising StopAndKeep from it ends the training with what has been learned."""
    on_phase: Callable[[str, int, int], None] = _nothing
    """Called with (phase, done, total) while photos and captions are encoded, and class images and samples are drawn."""
    on_sample: Callable[[int, list[Image.Image]], None] | None = None
    """Called with (step, pictures) every `sample_every` steps. None: `train` writes files into `<name>-samples`."""
    on_save: Callable[[int, Trained], None] | None = None
    """Called with (step, LoRA) every `save_every` steps. None: `train` writes it beside its output."""
    on_measured: Callable[[int, Trained], None] | None = None
    """Called at the end with (step, LoRA) of each measured checkpoint that is not the result, of the most alike ones."""
    on_warning: Callable[[str], None] = _nothing
    """Called with a sentence about anything that a user should know and that does not stop the training."""
    check_cancelled: Callable[[], None] | None = None
    """Called many times within each step and each sample, which may take long, to raise on a cancel. None: never called."""

    def progress(self, phase: str) -> Callable[[int, int], None]:
        """A function of (done, total) that calls `on_phase` with this phase."""
        return partial(self.on_phase, phase)


NO_CALLBACKS = Callbacks()
"""The default: every report is dropped, and nothing cancels."""
