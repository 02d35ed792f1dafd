"""The intermediate LoRAs of a training run: draw and measure their samples, save their files, and choose the one to keep."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import TrainConfig
from ..lora.file import LoraFile
from ..storage.cache_folder import cache_in, content_key, made_folder
from ..storage.drawn import save_png
from .callbacks import Callbacks
from .drawing import Drawing, Shot
from .inputs import TrainingInputs
from .likeness import LikenessPoint, Selection
from .metadata import training_metadata
from .methods.method import Trained
from .samples import Samples, is_whole
from .state import RunState, pack_run, restore_run
from .step import Run
from .training_adapter import METADATA_KEY

THUMBNAIL = "thumbnail"
"""The name of the thumbnail among the tensors of a run's state: uint8 pixels (H, W, 3)."""


class IntermediateLoras:
    """Draw, measure and save the intermediate LoRAs of a training run, and choose the one to return."""

    def __init__(
        self,
        run: Run,
        inputs: TrainingInputs,
        samples: Samples | None,
        callbacks: Callbacks,
        extra_metadata: Mapping[str, str],
    ):
        """Without `samples`, no pictures are drawn. Without a watch in them, likeness isn't measured and the last is kept."""
        self.run: Run = run
        self.config: TrainConfig = run.config
        self._inputs = inputs
        self._extra_metadata: dict[str, str] = {METADATA_KEY: inputs.adapter.digest} if inputs.adapter else {}
        self._extra_metadata |= extra_metadata
        self._samples, self._callbacks = samples, callbacks
        self._selection = Selection(samples.watch) if samples and samples.watch else None
        self._drawing = Drawing(run)
        self._thumbnail: Image.Image | None = None
        self._started_at = time.time()

    @property
    def face_networks(self) -> list[str]:
        """The names of the face networks that measure likeness, the judge's last. Empty if likeness isn't measured."""
        watch = self._selection and self._selection.watch
        return [each.network.name for each in (watch, watch.judge) if each] if watch else []

    @property
    def likeness(self) -> LikenessPoint | None:
        """The latest measurement, or None before the first one."""
        return self._selection.points[-1] if self._selection and self._selection.points else None

    def set_base_pictures(self) -> None:
        """Show the base model's own pictures to the watch, which measures the adapter's changes against them.

        These pictures are the same for every person, so they are kept in the shared cache folder.
        """
        if self._samples is None or self._selection is None:
            return
        shots = self._selection.watch.base_shots
        weights = self.run.model.memory.plan.weights
        key = content_key("base pictures", shots, self._samples.drawn_as, weights, self._inputs.base.identity)
        with cache_in(None):  # not in a personal cache: these pictures show nobody
            folder = made_folder("base", key)
        paths = [folder / f"{number:02d}.png" for number in range(len(shots))]
        if not all(map(is_whole, paths)):
            with self.run.model.adapter.disabled():
                values = self.run.parameters  # which are the base model's here
                images = self._drawing.draw(self._samples.draw, shots, self._callbacks.on_warning, values)
            for path, image in zip(paths, images, strict=True):
                save_png(path, image)
        self._selection.watch.set_base_pictures([Image.open(path).convert("RGB") for path in paths])

    def save_when_due(self) -> None:
        """Call `on_save` every `save_every` steps, but not after the last step, whose file is the result."""
        run = self.run
        if _is_due(run.step, self.config.save_every) and self._callbacks.on_save and run.step < self.config.steps:
            run.check_finite()
            self._callbacks.on_save(run.step, self._file(run.trained(), run.step))

    def measure_when_due(self) -> None:
        """Draw pictures with the intermediate LoRA every `sample_every` steps, for `on_sample` and for measuring likeness."""
        if _is_due(self.run.step, self.config.sample_every):
            self._look()

    def _look(self) -> None:
        if self._samples is None:
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
        """Return whether the settings allow the run to end early and more steps would not help."""
        selection = self._selection
        if not (selection and selection.points and self.config.stop_early):
            return False
        return bool(not selection.why_not_to_choose(self._inputs.base) and selection.watch.enough(selection.points))

    def measure_last(self) -> None:
        """Measure the last LoRA, if it hasn't been measured."""
        selection = self._selection
        if selection is None:
            return
        if self.run.step < self.config.steps and not selection.has(self.run.step):
            self._look()  # it was stopped, and may keep this step: with samples of it
        elif not selection.has(self.run.step):
            self._measure(self._draw(selection.watch.shots, self.run.trained()), self.run.trained())

    def chosen(self) -> Trained:
        """Return the file of the intermediate LoRA to keep, with the likeness curve in its metadata.

        If it isn't the last intermediate LoRA, `on_save` is called with the last one. `on_measured` gets the other candidates.
        """
        run, selection = self.run, self._selection
        if selection is None:
            return self._file(run.trained(), run.step)
        kept, values = selection.points[-1], run.trained()
        if self.config.keep == "best":
            if reason := selection.why_not_to_choose(self._inputs.base):
                self._callbacks.on_warning(f"likeness chose no step, so the last is kept: {reason}")
            else:
                kept, values = selection.choose()
        if self._callbacks.on_save and self.config.save_every and kept.step < run.step:
            self._callbacks.on_save(run.step, self._file(run.trained(), run.step))
        if self._callbacks.on_measured:
            for point, other in selection.others(kept):
                self._callbacks.on_measured(point.step, self._measured_file(other, point))
        return self._measured_file(values, kept)

    def state(self, identity: Mapping[str, str]) -> RunState:
        """Return the current state of the run, including the measurements and the pictures that are still needed."""
        tensors, points = self._selection.pack() if self._selection else ({}, [])
        if self._thumbnail:
            tensors[THUMBNAIL] = torch.from_numpy(np.array(self._thumbnail))
        return pack_run(self.run, identity, tensors, points)

    def restore(self, state: RunState) -> None:
        """Restore the run to a state that `state` returned."""
        restore_run(self.run, state)
        if self._selection:
            self._selection.unpack(state.tensors, state.scalars["likeness"])
        if self.config.thumbnail and THUMBNAIL in state.tensors:
            self._thumbnail = Image.fromarray(state.tensors[THUMBNAIL].numpy())

    def _measured_file(self, values: Mapping[str, Tensor], point: LikenessPoint) -> Trained:
        assert self._selection
        file = self._file(values, point.step)
        measured = self._selection.metadata(point, by_speed_lora=self._inputs.base.speed_lora is not None)
        return file.with_metadata({**file.metadata, **measured})

    def _file(self, values: Mapping[str, Tensor], step: int) -> Trained:
        run = self.run
        metadata = training_metadata(
            self._inputs,
            steps=step,
            started_at=self._started_at,
            plan=run.model.memory.plan,
            weights_quantised=run.quantised_after is not None and run.quantised_after < step,
            products_in_eight_bits=run.model.in_eight_bits,
            thumbnail=self._thumbnail,
        )
        file = run.model.adapter.export(values, self._inputs.base, {**metadata, **self._extra_metadata})
        # The tensors reveal which published model of the family the LoRA is for.
        return file.with_metadata(file.true_metadata) if isinstance(file, LoraFile) else file

    def _draw(self, shots: Sequence[Shot], values: Mapping[str, Tensor]) -> dict[Shot, Image.Image]:
        assert self._samples
        distinct = list(dict.fromkeys(shots))
        images = self._drawing.draw(self._samples.draw, distinct, self._callbacks.on_warning, values)
        return dict(zip(distinct, images, strict=True))

    def _measure(self, drawn: Mapping[Shot, Image.Image], values: Mapping[str, Tensor]) -> None:
        assert self._selection
        images = [drawn[shot] for shot in self._selection.watch.shots]
        point = self._selection.watch.measure(self.run.step, images)
        self._selection.add(replace(point, rough=self._inputs.base.draws_roughly), values)


def _is_due(step: int, every: int) -> bool:
    """Return whether something that happens every `every` steps is due after this step. 0 means never."""
    return bool(every) and step > 0 and step % every == 0
