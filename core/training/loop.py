"""The training loop: one run of one adapter on one base model, from its first step to its file."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import TrainConfig
from ..device import device_and_dtype, explained_memory_error
from ..errors import BadConfig
from ..lora.file import LoraFile
from ..models.base import Base
from .encode import LatentCache
from .identity import run_identity
from .likeness import LikenessPoint, LikenessWatch, Selection
from .memory_prediction import choose_plan
from .metadata import training_metadata
from .methods.method import Trained
from .state import read_state
from .step import CheckCancelled, Run, Sampler, Shot

CHECK_EVERY = 10
"""Steps between looks at whether the loss is still finite; each look waits for the device."""


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


OnStep = Callable[[StepReport], None]
OnSave = Callable[[int, Trained], None]
OnSample = Callable[[int, list[Image.Image]], None]


@dataclass(frozen=True)
class Samples:
    """The pictures that a run makes of its checkpoints."""

    sampler: Sampler
    shots: Sequence[Shot] = ()
    """What `on_sample` is given."""
    watch: LikenessWatch | None = None
    """Measures likeness on shots of its own. What is a shot of both is drawn once."""


class StopAndKeep(Exception):
    """What `on_step` raises to end the run after this step as if it had no more: with the LoRA, and without an error."""


def train_lora(
    cache: LatentCache,
    base: Base,
    config: TrainConfig,
    *,
    device: torch.device | None = None,
    continue_from: LoraFile | None = None,
    state_path: Path | None = None,
    resume: bool = False,
    extra_metadata: Mapping[str, str] | None = None,
    samples: Samples | None = None,
    on_step: OnStep | None = None,
    on_save: OnSave | None = None,
    on_sample: OnSample | None = None,
    on_warning: Callable[[str], None] = lambda message: None,
    check_cancelled: CheckCancelled | None = None,
) -> Trained:
    """The trained LoRA, in Kohya naming with complete metadata.

    `on_step` hears of every step and cancels by raising: the state is then saved to `state_path` and the exception goes
    on. When it raises StopAndKeep the run ends there, and the LoRA comes back as if that had been the last step.
    `check_cancelled` cancels in the middle of a step or of a sample, which may take long.
    With `resume` the run goes on from that state, if there is one; on the same machine the result is the same, tensor
    for tensor, as of a run that was never interrupted. Whoever gave `state_path` deletes the state once the LoRA is safe.
    `on_save(step, lora)` is called every `save_every` steps (for the last one too, if another is kept), and
    `on_sample(step, images)` every `sample_every`, with the shots of `samples`.
    With a watch in `samples`, likeness is measured every `sample_every` steps and at the end, the checkpoint that the watch
    chooses is the one that comes back, and the curve is in its metadata.

    A step that does not fit the memory is done again with a smaller memory plan, of which `on_warning` hears.

    TrainingDiverged when the loss is no longer finite; the last saved state is from before.
    """
    device, dtype = device_and_dtype(config, device)
    forked = [device] if device.type == "cuda" else []
    # A ComfyUI node runs in inference mode, in which nothing can be trained.
    explained = explained_memory_error("batch_size 1 or a lower resolution")
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(forked), explained:
        plan = choose_plan(cache, base, config, device, dtype, on_warning)
        run = Run(cache, base, config, device, continue_from, check_cancelled, plan)
        if run.why_not_compiled:
            on_warning(f"compile: not possible here ({run.why_not_compiled}); the training goes on without")
        watch = samples.watch if samples else None
        selection = Selection(watch) if watch else None
        network = watch.network.name if watch else None
        identity = {} if state_path is None else run_identity(cache, base, config, dtype, continue_from, network)
        thumbnail: Image.Image | None = None
        if resume and state_path is not None and state_path.exists():
            state = read_state(state_path, identity)
            if state.step > config.steps:
                raise BadConfig(f"{state_path.name}: is at step {state.step} already, beyond steps = {config.steps}")
            run.restore(state)
            if selection:
                selection.unpack(state.tensors, state.scalars["likeness"])
            if config.thumbnail and "thumbnail" in state.tensors:
                thumbnail = Image.fromarray(state.tensors["thumbnail"].numpy())
        if samples and watch:
            with run.adapter.disabled():
                watch.see_base(run.sample(samples.sampler, watch.shots))
        started_at, first_step = time.time(), run.step
        last_state, started = time.monotonic(), time.monotonic()

        def lora(values: Mapping[str, Tensor], step: int) -> Trained:
            metadata = training_metadata(
                cache, base, config, steps=step, started_at=started_at, precision=dtype,
                plan=run.memory.plan, weights_narrowed=run.narrowed_after is not None and run.narrowed_after < step,
                thumbnail=thumbnail,
            )  # fmt: skip
            return run.adapter.export(values, base, metadata | dict(extra_metadata or {}))

        def draw(shots: Sequence[Shot], values: Mapping[str, Tensor]) -> dict[Shot, Image.Image]:
            assert samples
            distinct = list(dict.fromkeys(shots))
            return dict(zip(distinct, run.sample(samples.sampler, distinct, values), strict=True))

        def measure(
            drawn: Mapping[Shot, Image.Image], values: Mapping[str, Tensor], merged: tuple[int, ...] = ()
        ) -> None:
            assert selection
            images = [drawn[shot] for shot in selection.watch.shots]
            selection.add(selection.watch.measure(run.step, images, merged), values)

        def save_state() -> None:
            if state_path is not None and run.step:
                run.check_finite()
                pictures = {"thumbnail": torch.from_numpy(np.array(thumbnail))} if thumbnail else {}
                run.state(identity, selection, pictures).save(state_path)

        @contextlib.contextmanager
        def cancelled_with_a_state() -> Iterator[None]:
            try:
                yield
            except StopAndKeep:
                raise
            except BaseException:
                # A cancel, also ComfyUI's and Ctrl-C's, which are no Exceptions.
                save_state()
                raise

        def look() -> None:
            nonlocal thumbnail
            if samples is None:
                return
            measured = selection.watch.shots if selection and not selection.has(run.step) else []
            shown = samples.shots if on_sample else []
            drawn = draw([*measured, *shown], run.trained())
            if on_sample and shown:
                images = [drawn[shot] for shot in shown]
                thumbnail = images[0] if config.thumbnail else None
                on_sample(run.step, images)
            if measured:
                measure(drawn, run.trained())

        def is_time_to_look() -> bool:
            return bool(config.sample_every) and run.step > 0 and run.step % config.sample_every == 0

        with cancelled_with_a_state():
            if is_time_to_look():  # it may have been cancelled just then
                look()
        while run.step < config.steps:
            with cancelled_with_a_state():
                loss = run.accumulate_within_memory(on_warning)
            run.update(loss)
            if run.step % CHECK_EVERY == 0 or run.step == config.steps:
                run.check_finite()
            try:
                with cancelled_with_a_state():
                    if on_save and config.save_every and run.step % config.save_every == 0 and run.step < config.steps:
                        run.check_finite()
                        on_save(run.step, lora(run.trained(), run.step))
                    if is_time_to_look():
                        look()
                    if on_step:
                        on_step(_report(run, first_step, started, selection))
            except StopAndKeep:
                run.check_finite()
                break
            if run.step < config.steps and time.monotonic() - last_state >= config.state_interval:
                save_state()
                last_state = time.monotonic()
            if selection and config.stop_early and selection.watch.enough(selection.points):
                break
        if selection is None:
            return lora(run.trained(), run.step)
        with cancelled_with_a_state():
            if not selection.has(run.step):
                measure(draw(selection.watch.shots, run.trained()), run.trained())
            if config.merge_best and (average := selection.average(config.merge_best)):
                steps, values = average
                measure(draw(selection.watch.shots, values), values, merged=steps)
        kept, values = selection.choose() if config.keep == "best" else (selection.points[-1], run.trained())
        if on_save and config.save_every and (kept.merged or kept.step < run.step):
            on_save(run.step, lora(run.trained(), run.step))
        chosen = lora(values, kept.step)
        return chosen.with_metadata({**chosen.metadata, **selection.metadata(kept)})


def _report(run: Run, first_step: int, started: float, selection: Selection | None) -> StepReport:
    seconds = (time.monotonic() - started) / (run.step - first_step)
    return StepReport(
        step=run.step,
        steps=run.config.steps,
        learning_rate=run.optimizer.param_groups[0]["lr"],
        seconds_per_step=seconds,
        seconds_left=seconds * (run.config.steps - run.step),
        memory=torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else 0,
        likeness=selection.points[-1] if selection and selection.points else None,
        _loss=run.loss,
    )
