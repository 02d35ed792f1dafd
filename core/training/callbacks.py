"""What a training tells whoever started it, and how it is stopped: by what a callback raises."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from PIL import Image
from torch import Tensor

from .likeness import LikenessPoint
from .methods.method import Trained


@dataclass(frozen=True)
class StepReport:
    """What a callback learns after each optimizer step."""

    step: int
    """Steps done, 1 to `steps`."""
    steps: int
    learning_rate: float
    seconds_per_step: float
    seconds_left: float
    memory: int
    """Peak memory of the device in bytes; 0 on a CPU."""
    likeness: LikenessPoint | None
    """What was measured last, where photos are held out."""
    _loss: Tensor = field(repr=False)

    @property
    def loss(self) -> float:
        """The smoothed loss. Looking at it waits for the device: look when you show it, not at every step."""
        return float(self._loss)

    @property
    def measured(self) -> LikenessPoint | None:
        """What was measured after this very step, None if nothing was."""
        return self.likeness if self.likeness is not None and self.likeness.step == self.step else None


class StopAndKeep(Exception):
    """What `on_step` raises to end the run after this step as if it had no more: with the LoRA, and without an error."""


def _nothing(*_: object) -> None:
    """Does nothing with what it is told."""


@dataclass(frozen=True)
class Callbacks:
    """The functions that a training calls as it goes. Each may raise, also a BaseException, to cancel the training."""

    on_step: Callable[[StepReport], None] = _nothing
    """Hears of every optimizer step. StopAndKeep raised from it ends the training with what has been learned."""
    on_phase: Callable[[str, int, int], None] = _nothing
    """Hears (what is being done, done, total) while photos and captions are encoded, and class images and samples drawn."""
    on_sample: Callable[[int, list[Image.Image]], None] | None = None
    """Takes (step, pictures) every `sample_every` steps. None: `train` writes them into `<name>-samples` beside its output."""
    on_save: Callable[[int, Trained], None] | None = None
    """Takes (step, LoRA) every `save_every` steps. None: `train` writes it beside its output, with the step in the name."""
    on_warning: Callable[[str], None] = _nothing
    """Hears, in a sentence, of everything that a user should know and that does not stop the training."""
    check_cancelled: Callable[[], None] | None = None
    """Is called many times in each step and each sample, which may take long. None: they are not interrupted."""

    def progress(self, phase: str) -> Callable[[int, int], None]:
        """A function of (done, total) that `on_phase` hears of as that phase."""
        return partial(self.on_phase, phase)


NO_CALLBACKS = Callbacks()
"""Nobody listens."""
