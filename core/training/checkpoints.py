"""What is made of a run's adapter as it goes: samples, the likeness that is measured on them, files, and the one to keep."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.base import Base
from .callbacks import Callbacks
from .encode import LatentCache
from .likeness import LikenessPoint, Selection
from .metadata import training_metadata
from .methods.method import Trained
from .samples import Samples
from .state import RunState
from .step import Run, Shot

THUMBNAIL = "thumbnail"
"""Name of the thumbnail among the tensors of a run's state: pixels (H, W, 3), 0 to 255."""


class Checkpoints:
    """The checkpoints of a run: what they look like, what was saved of them, and which one comes back."""

    def __init__(
        self,
        run: Run,
        cache: LatentCache,
        base: Base,
        samples: Samples | None,
        callbacks: Callbacks,
        extra_metadata: Mapping[str, str],
    ):
        """Without `samples` no picture is drawn; where they have no watch, none is measured and the last one is kept."""
        self.run, self.config = run, run.config
        self._cache, self._base, self._extra_metadata = cache, base, extra_metadata
        self._samples, self._callbacks = samples, callbacks
        self._selection = Selection(samples.watch) if samples and samples.watch else None
        self._thumbnail: Image.Image | None = None
        self._started_at = time.time()

    @property
    def face_network(self) -> str | None:
        """The name of what measures likeness, where it is measured."""
        return self._selection.watch.network.name if self._selection else None

    @property
    def likeness(self) -> LikenessPoint | None:
        """What was measured last."""
        return self._selection.points[-1] if self._selection and self._selection.points else None

    def see_base(self) -> None:
        """Draws the base model's own pictures, where likeness is measured: what a checkpoint has changed is seen by them."""
        if self._samples and self._selection:
            watch = self._selection.watch
            with self.run.adapter.disabled():
                watch.see_base(self.run.sample(self._samples.sampler, watch.shots))

    def save_when_due(self) -> None:
        """Hands the checkpoint to `on_save` every `save_every` steps, apart from the last step, whose file is the result."""
        run = self.run
        if _is_due(run.step, self.config.save_every) and self._callbacks.on_save and run.step < self.config.steps:
            run.check_finite()
            self._callbacks.on_save(run.step, self._file(run.trained(), run.step))

    def look_when_due(self) -> None:
        """Draws the checkpoint's pictures every `sample_every` steps, for `on_sample` and to measure their likeness."""
        if self._samples is None or not _is_due(self.run.step, self.config.sample_every):
            return
        on_sample, selection = self._callbacks.on_sample, self._selection
        measured = selection.watch.shots if selection and not selection.has(self.run.step) else []
        shown = self._samples.shots if on_sample else []
        drawn = self._draw([*measured, *shown], self.run.trained())
        if on_sample and shown:
            images = [drawn[shot] for shot in shown]
            self._thumbnail = images[0] if self.config.thumbnail else None
            on_sample(self.run.step, images)
        if measured:
            self._measure(drawn, self.run.trained())

    def is_enough(self) -> bool:
        """Whether the settings let the run end early and more steps would not help."""
        selection = self._selection
        return bool(selection and self.config.stop_early and selection.watch.enough(selection.points))

    def measure_last(self) -> None:
        """Measures what is still to be chosen from when the run ends: its last checkpoint, and the average of the best."""
        selection = self._selection
        if selection is None:
            return
        if not selection.has(self.run.step):
            self._measure(self._draw(selection.watch.shots, self.run.trained()), self.run.trained())
        if self.config.merge_best and (average := selection.average(self.config.merge_best)):
            steps, values = average
            self._measure(self._draw(selection.watch.shots, values), values, merged=steps)

    def chosen(self) -> Trained:
        """The file of the checkpoint to keep, with what was measured; `on_save` is given the last one if another is kept."""
        run, selection = self.run, self._selection
        if selection is None:
            return self._file(run.trained(), run.step)
        kept, values = selection.choose() if self.config.keep == "best" else (selection.points[-1], run.trained())
        if self._callbacks.on_save and self.config.save_every and (kept.merged or kept.step < run.step):
            self._callbacks.on_save(run.step, self._file(run.trained(), run.step))
        file = self._file(values, kept.step)
        return file.with_metadata({**file.metadata, **selection.metadata(kept)})

    def state(self, identity: Mapping[str, str]) -> RunState:
        """The run as it is now, with everything that was measured and drawn and is still needed."""
        tensors, points = self._selection.pack() if self._selection else ({}, [])
        if self._thumbnail:
            tensors[THUMBNAIL] = torch.from_numpy(np.array(self._thumbnail))
        return self.run.state(identity, tensors, points)

    def restore(self, state: RunState) -> None:
        """Goes on from what `state` gave."""
        self.run.restore(state)
        if self._selection:
            self._selection.unpack(state.tensors, state.scalars["likeness"])
        if self.config.thumbnail and THUMBNAIL in state.tensors:
            self._thumbnail = Image.fromarray(state.tensors[THUMBNAIL].numpy())

    def _file(self, values: Mapping[str, Tensor], step: int) -> Trained:
        """The file of the checkpoint that has these values after that step."""
        run = self.run
        metadata = training_metadata(
            self._cache, self._base, self.config, steps=step, started_at=self._started_at, precision=run.dtype,
            plan=run.memory.plan, weights_narrowed=run.narrowed_after is not None and run.narrowed_after < step,
            thumbnail=self._thumbnail,
        )  # fmt: skip
        return run.adapter.export(values, self._base, {**metadata, **self._extra_metadata})

    def _draw(self, shots: Sequence[Shot], values: Mapping[str, Tensor]) -> dict[Shot, Image.Image]:
        """Each of the shots, drawn once, by the adapter with these values."""
        assert self._samples
        distinct = list(dict.fromkeys(shots))
        return dict(zip(distinct, self.run.sample(self._samples.sampler, distinct, values), strict=True))

    def _measure(
        self, drawn: Mapping[Shot, Image.Image], values: Mapping[str, Tensor], merged: tuple[int, ...] = ()
    ) -> None:
        """Adds the checkpoint that has these values, and drew these pictures, to those that may be kept."""
        assert self._selection
        images = [drawn[shot] for shot in self._selection.watch.shots]
        self._selection.add(self._selection.watch.measure(self.run.step, images, merged), values)


def _is_due(step: int, every: int) -> bool:
    """Whether something that happens `every` so many steps, or never where that is 0, happens after that one."""
    return bool(every) and step > 0 and step % every == 0
