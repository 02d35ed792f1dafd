"""The training loop: train one adapter on one base model, from the first step to its file."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import MachineSettings, TrainConfig
from ..device import deterministic_if, exact_arithmetic, explained_memory_error, until_it_fits
from ..errors import BadConfig, counted
from ..lora.convert import reading_limits
from ..lora.file import LoraFile
from ..models.base import Base
from ..models.products import has_int8_products
from ..progress import OnWarning
from .adapted_model import keeps_stored, memory_plans, smaller_plans
from .callbacks import NO_CALLBACKS, Callbacks, StepReport, StopAndKeep
from .encode import LatentCache
from .identity import run_identity
from .inputs import TrainingInputs
from .intermediate_loras import IntermediateLoras
from .likeness import LikenessPoint
from .memory_prediction import choose_plan
from .methods import METHODS
from .methods.method import Trained, left_out
from .samples import Samples
from .state import read_state
from .step import Run
from .training_adapter import TrainingAdapter


def train_lora(
    cache: LatentCache,
    base: Base,
    config: TrainConfig,
    *,
    device: torch.device | str | None = None,
    continue_from: LoraFile | None = None,
    training_adapter: TrainingAdapter | None = None,
    state_path: Path | None = None,
    resume: bool = False,
    extra_metadata: Mapping[str, str] | None = None,
    samples: Samples | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
) -> Trained:
    """Train the LoRA, or the checkpoint or embedding that the method makes. The result has complete metadata.

    A callback cancels by raising: the state is then saved to `state_path`, and the exception is raised again. StopAndKeep
    instead ends the run as if that had been its last step. With `resume`, the run continues from the state at that path, if it
    exists. On the same machine the result then equals that of an uninterrupted run. On a CPU it is equal tensor for tensor. On
    a GPU that requires the setting `deterministic`, because sums are otherwise computed in a different order each time. The
    caller deletes the state after writing the LoRA.

    A `training_adapter` is active in the steps only, not in samples or in the result. Its hash is in the metadata.

    `on_save` is called every `save_every` steps (also for the last, if another is kept). `on_sample` is called every
    `sample_every` steps with the shots of `samples`. With a watch in `samples`, likeness is measured every `sample_every`
    steps and at the end. The intermediate LoRA that the watch chooses is returned, with the curve in its metadata.

    A step that does not fit into memory is repeated with a smaller memory plan, and `on_warning` is called. Raises OutOfMemory
    when no plan fits. Raises TrainingDiverged when the loss is not finite; a saved state is from before that.
    """
    inputs = TrainingInputs.on(device, cache, base, config, continue_from, training_adapter)
    with _on_its_own(inputs.device, config), explained_memory_error("batch_size 1 or a lower resolution"):
        inputs = _possible(inputs, callbacks.on_warning)
        run = _started(inputs, callbacks)
        intermediate = IntermediateLoras(run, inputs, samples, callbacks, extra_metadata or {})
        identity = run_identity(inputs, intermediate.face_networks) if state_path else {}
        state = StateFile(state_path, identity, intermediate)
        if resume:
            state.restore()
        intermediate.set_base_pictures()
        first_step, started = run.step, time.monotonic()
        with state.saved_when_cancelled():
            intermediate.save_when_due()  # a resumed run may have been cancelled before it had saved or drawn these
            intermediate.measure_when_due()
        while run.step < config.steps and not intermediate.is_enough():
            with state.saved_when_cancelled():
                loss = accumulate_within_memory(run, callbacks.on_warning)
            run.update(loss)
            if run.step % 10 == 0 or run.step == config.steps:  # Each check waits for the device.
                run.check_finite()
            try:
                with state.saved_when_cancelled():
                    intermediate.save_when_due()
                    intermediate.measure_when_due()
                    callbacks.on_step(_report(run, first_step, started, intermediate.likeness))
            except StopAndKeep:
                run.check_finite()
                break
            state.save_when_due()
        with state.saved_when_cancelled():
            intermediate.measure_last()
            return intermediate.chosen()


def accumulate_within_memory(run: Run, on_warning: OnWarning) -> Tensor:
    """Return the loss of the next step, using smaller memory plans until it fits. Raises OutOfMemory when none does."""
    model = run.model
    what, advice = f"step {run.step + 1}", "Use batch_size 1, a lower resolution, or gradient_checkpointing auto"
    smaller = smaller_plans(model.plans, model.memory.plan, model.adopt, what, advice, on_warning)
    return until_it_fits(run.accumulate, smaller)


@contextmanager
def _on_its_own(device: torch.device, config: MachineSettings) -> Iterator[None]:
    """Isolate the run from the program's torch settings, and leave the program's random numbers unchanged."""
    with (
        torch.inference_mode(False),  # a ComfyUI node runs in inference mode, in which nothing can be trained
        torch.enable_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        exact_arithmetic(),
        deterministic_if(config.deterministic),
    ):
        yield


def _started(inputs: TrainingInputs, callbacks: Callbacks) -> Run:
    """Return the run before its first step, with the chosen memory plan or the first smaller one whose weights fit."""
    warn = callbacks.on_warning
    if inputs.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(inputs.device)  # which another run may have raised
    plan = choose_plan(inputs, warn)
    tried = [plan]

    def start() -> Run:
        return Run(inputs, tried[-1], callbacks.check_cancelled)

    # Recomputing more does not help to load the weights.
    plans = memory_plans(inputs.config, inputs.base, inputs.device)
    plans = [one for one in plans if (one.weights, one.offload) != (plan.weights, plan.offload)]
    run = until_it_fits(start, smaller_plans(plans, plan, tried.append, "the model", "Use a smaller base model", warn))
    for limit in _limits_of(run, inputs.base):
        warn(limit)
    return run


def _possible(inputs: TrainingInputs, on_warning: OnWarning) -> TrainingInputs:
    """Return the inputs without products in 8 bits if weights would be rounded for them in vain."""
    config = inputs.config
    stored = keeps_stored(config, inputs.device) and inputs.base.is_quantised
    rounds = METHODS[config.method].freezes_weights and not stored
    if config.eight_bit_products != "on" or not rounds or has_int8_products(inputs.device, inputs.dtype):
        return inputs
    on_warning("eight_bit_products: not possible here (this device has no products of int8 weights). They are off")
    return replace(inputs, config=replace(config, eight_bit_products="off"))


def _limits_of(run: Run, base: Base) -> Iterator[str]:
    """List, in sentences, what the run cannot do although its settings ask for it."""
    model = run.model
    if model.why_not_compiled:
        yield f"compile: not possible here ({model.why_not_compiled}). Training continues without it"
    if run.config.eight_bit_products == "on" and not model.in_eight_bits:
        yield (
            "eight_bit_products: not possible here (this device has no products with such weights, or the method trains them). "
            "Training continues without it"
        )
    if pageable := model.memory.offload.pageable:
        yield (
            f"memory: {pageable / 2**30:.1f} GiB of the weights are copied from memory that isn't page-locked, because too "
            "little of the computer's memory is free. This makes steps slower. Close other programs to free memory"
        )
    method, config = METHODS[run.config.method], run.config
    if not method.joins_modules and (paths := left_out(model.family, config, model.denoiser)):
        yield (
            f"method {config.method!r} leaves out {counted(len(paths), 'module')} of targets = {config.targets!r}, such as "
            f"{paths[0]}: they are parts of one layer in files of {model.family.name}, where only method 'lora' fits"
        )
    if method.makes == "lora":
        file = model.adapter.export(model.adapter.parameters(), base, {})
        assert isinstance(file, LoraFile)
        yield from reading_limits(file)


def _report(run: Run, first_step: int, started: float, likeness: LikenessPoint | None) -> StepReport:
    seconds = (time.monotonic() - started) / (run.step - first_step)
    return StepReport(
        step=run.step,
        steps=run.config.steps,
        learning_rate=run.optimizer.param_groups[0]["lr"],
        seconds_per_step=seconds,
        seconds_left=seconds * (run.config.steps - run.step),
        memory=torch.cuda.max_memory_allocated(run.model.device) if run.model.device.type == "cuda" else 0,
        likeness=likeness,
        _loss=run.loss,
    )


class StateFile:
    """The file that an interrupted run continues from. Without a path, nothing is written or restored."""

    def __init__(self, path: Path | None, identity: Mapping[str, str], intermediate: IntermediateLoras):
        """`identity` is the result of `run_identity`. A run can only continue from a state with an equal identity."""
        self._path = path
        self._identity, self._intermediate = identity, intermediate
        self._last = time.monotonic()

    def restore(self) -> None:
        """Restore the run from the file, if it exists. Raises BadConfig for the state of a different or longer run."""
        if self._path is None or not self._path.exists():
            return
        state, steps = read_state(self._path, self._identity), self._intermediate.config.steps
        if state.step > steps:
            raise BadConfig(
                f"{self._path.name}: is already at step {state.step}, beyond steps = {steps}. Raise steps, or restart"
            )
        self._intermediate.restore(state)

    def save(self) -> None:
        """Write the state, except before the first step. Raises TrainingDiverged without writing when it is not finite."""
        run = self._intermediate.run
        if self._path is not None and run.step:
            run.check_finite()
            self._intermediate.state(self._identity).save(self._path)

    def save_when_due(self) -> None:
        """Write the state between two steps if the last write was at least `state_interval` seconds ago."""
        config = self._intermediate.config
        if self._intermediate.run.step < config.steps and time.monotonic() - self._last >= config.state_interval:
            self.save()
            self._last = time.monotonic()

    @contextmanager
    def saved_when_cancelled(self) -> Iterator[None]:
        """Write the state when anything but StopAndKeep is raised in this context, and raise it again."""
        try:
            yield
        except StopAndKeep:
            raise
        except BaseException:
            # BaseException, since ComfyUI's cancel and Ctrl-C are not Exceptions.
            self.save()
            raise
