"""Predict how much memory a training run needs under each memory plan, and choose the plan to start with.

A prediction takes steps of a real `Run` on fake tensors. This module alone knows that: what a step can't do without numbers is
replaced here.
"""

import functools
import gc
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from ..config import OPTIMIZERS, name_matches
from ..device import free_memory, precision_name
from ..lora.modules import stands_alone
from ..models.alike_blocks import AlikeBlocks, put_stand_ins
from ..models.base import Base
from ..models.frozen_layers import FrozenLayers
from ..models.memory_plan import (
    RESERVE,
    MemoryCount,
    MemoryPlan,
    allocated,
    first_that_fits,
    lockable_memory,
    unique_bytes,
)
from ..progress import OnWarning
from ..storage.stored import LazyTensors, QuantisedTensor, Stored, quantised_in
from .adapted_model import AdaptedModel, keeps_stored, memory_plans
from .inputs import TrainingInputs
from .methods import METHODS, trains_text
from .methods.lora import LoraAdapter
from .methods.method import Adapter
from .step import Run

_CREATING = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
"""The operations that make a tensor of given numbers. Their argument is real, and their result is fake."""


class FakeMode(FakeTensorMode):
    """A fake mode in which a step can read what it has to.

    Tensors that are computed from real ones alone are real, such as the lengths of texts from their masks. A truth that only a
    fake tensor holds is True: peft's draw whether to keep a layer.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if FakeTensor in types:
            if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
                return True
        elif func not in _CREATING and any(isinstance(leaf, Tensor) for leaf in tree_leaves(args)):
            device = kwargs.get("device")
            if device is None or device.type == "cpu":
                return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


class StepPrediction:
    """The memory that a training run needs under its memory plans, not counting the kernels' workspace.

    It is counted in steps on torch's fake tensors, which hold no data and follow the rules of the device. Of several alike
    blocks only one is executed, unless `each_block` is set.
    """

    def __init__(self, inputs: TrainingInputs, each_block: bool = False):
        device, dtype = inputs.device, inputs.dtype
        self._beside = 0
        if device.type != "cpu":
            of_images = [(one.mean, one.deviation, one.mask, one.conditioning) for one in inputs.cache.images]
            leaves = tree_leaves([of_images, inputs.cache.text])
            self._beside = sum(leaf.nbytes for leaf in leaves if leaf is not None)
        for change in inputs.adapter.changes.values() if inputs.adapter else ():
            self._beside += sum(allocated(part.numel() * dtype.itemsize, device) for part in change.tensors())
        self._mode = FakeMode(allow_non_fake_inputs=True)  # such as the tables that networks are built with
        self._blocks: AlikeBlocks | None = None
        alike = METHODS[inputs.config.method].freezes_weights and not each_block
        empty = _empty_base(self._mode, inputs, partial(_marks, inputs) if alike else None)
        with self._mode:
            self.run: Run = _fake_run(self._mode, replace(inputs, base=empty))
            self.model: AdaptedModel = self.run.model
            with self.model.fast():
                pass  # makes the adapter create its copies, so that they exist under all plans
            if alike:
                adapter = self.model.adapter
                copies = adapter.copies if isinstance(adapter, LoraAdapter) else {}
                self._blocks = AlikeBlocks(self.model.denoiser, copies)
                if isinstance(adapter, LoraAdapter):
                    adapter.copy([(parameter,) for parameter in self._blocks.copied], dtype)
                self.run.optimizer.add_param_group({"params": self._blocks.trained})
        self._count = MemoryCount(device)
        self._known: dict[MemoryPlan, int] = {}
        self._executed_without: set[str] = set()
        """The kinds of weights with which blocks were executed without kept kernels of convolutions."""

    def bytes(self, plan: MemoryPlan) -> int:
        """Return the peak memory use under a plan, in bytes. Ask for plans with full weights before those with 8 bits."""
        if plan not in self._known:
            quantises = plan.weights != self.model.memory.plan.weights
            assert not quantises or plan.weights != "full"
            plain = MemoryPlan(weights=plan.weights)
            with self._mode:
                if quantises:
                    self.model.adopt(plain)
                if quantises and self._blocks:
                    self._blocks.fill()
                if self._blocks and plan != plain:
                    self.bytes(plain)  # executes the blocks, which must be neither recomputed nor offloaded for this
                    # Such plans don't keep the kernels (convolution.py) that other plans do.
                    loses_kernels = (plan.selective or plan.offload) and self._keeps_kernels()
                    if loses_kernels and plain.weights not in self._executed_without:
                        self._executed_without.add(plain.weights)
                        self._counted(plain, kernels=False)
                self._known[plan] = self._counted(plan) + self._beside
        return self._known[plan]

    def _keeps_kernels(self) -> bool:
        layers = self.model.fast_layers
        return isinstance(layers, FrozenLayers) and layers.keeps_kernels

    def _counted(self, plan: MemoryPlan, kernels: bool = True) -> int:
        run, model = self.run, self.model
        run.optimizer.zero_grad()
        model.adopt(plan)
        model.fast_layers = model.fast_layers if kernels else None
        beside = [tensor for tensor in _kept_by(model.adapter) if tensor.device == model.device]
        there = [*model.memory.resident(), *beside]
        for encoder in model.encoders.values():
            there += [*encoder.parameters(), *encoder.buffers()]
        # The memory of these is computed separately.
        others = [*(run.average or {}).values(), *model.denoiser.parameters()]
        others += model.training_adapter.tensors() if model.training_adapter else []
        with self._count as count:
            for tensor in [*there, *others]:
                count.leave_out(tensor)
            if self._blocks:
                self._blocks.begin(count, way="with kernels" if self._keeps_kernels() else "")
            count.peak = count.live  # what earlier steps create once and keep, such as rotary embeddings
            if plan.offload:
                run.accumulate()  # prefetching starts only in the second step, in the order of the first
            run.accumulate()
        trained = sum(parameter.numel() for group in run.optimizer.param_groups for parameter in group["params"])
        per_number = OPTIMIZERS[run.config.optimizer].state_bytes + (4 if run.average else 0)
        if self._blocks and not METHODS[run.config.method].keeps_dtype and model.dtype != torch.float32:
            per_number += model.dtype.itemsize  # autocast's copies of weights, which stay until a forward pass ends
        return unique_bytes(there) + trained * per_number + count.peak


def predicted_memory(inputs: TrainingInputs, plan: MemoryPlan) -> int:
    """Return the peak memory that a training run uses on the device under a plan, in bytes (see `StepPrediction`)."""
    return StepPrediction(inputs).bytes(plan)


def _empty_base(mode: FakeTensorMode, inputs: TrainingInputs, marks: Callable[[str], object] | None) -> Base:
    """Build the base model without data. With `marks`, alike blocks are replaced by stand-ins (see `put_stand_ins`)."""
    base, components, networks = inputs.base, dict(inputs.base.components), {}
    for part in ("denoiser", *(base.family.text_encoders if trains_text(inputs.config) else ())):
        stored = components[part].tensors
        quantised = {name: quantised_in(stored, name, read=False) for name in stored}
        networks[part] = base.family.build_empty(part, components[part].config)
        if marks and part == "denoiser":
            put_stand_ins(networks[part], marks)
        _fake_constants(mode, networks[part])
        readers = {
            name: _Empty({}, name, inputs.dtype, tensor.shape, quantised.get(name))
            for name, tensor in networks[part].state_dict().items()
        }
        components[part] = replace(components[part], tensors=LazyTensors(readers))
    return replace(base, components=components, family=replace(base.family, build=lambda part, _: networks[part]))


def _fake_constants(mode: FakeTensorMode, network: nn.Module) -> None:
    """Replace constant tensors, such as tables of rotary embeddings, with fake ones. They are not in any file."""
    for module in network.modules():
        for values in (module._buffers, vars(module)):
            for name, value in values.items():
                if isinstance(value, Tensor) and not value.is_meta:
                    values[name] = mode.from_tensor(value)


def _fake_run(mode: FakeTensorMode, inputs: TrainingInputs) -> Run:
    """Build a run on the largest picture, on a base model without data, with no recomputation and full weights.

    Each of its steps has all passes that any step of the run has: a pass after the first finds all gradients in memory.
    """
    cache, config, adapter = inputs.cache, inputs.config, inputs.adapter
    prior = float(config.prior_prediction > 0)
    # Whether products are computed in 8 bits is decided on real tensors. Both ways take about the same memory.
    config = replace(
        config, precision=precision_name(inputs.dtype), compile=False, prior_prediction=prior, eight_bit_products="off"
    )
    largest = max(cache.images, key=lambda image: image.mean.numel())
    image = replace(
        largest,
        mean=mode.from_tensor(largest.mean),
        deviation=mode.from_tensor(largest.deviation),
        mask=None,
        conditioning={name: mode.from_tensor(value) for name, value in largest.conditioning.items()},
        is_class=False,
    )
    text = {
        caption: {name: v if name == "context_mask" else mode.from_tensor(v) for name, v in conditioning.items()}
        for caption, conditioning in cache.text.items()
    }
    class_images = (replace(image, is_class=True),) if any(image.is_class for image in cache.images) else ()
    small = replace(cache, images=(image, *class_images) * config.batch_size, text=text)
    if adapter:
        here = {name.rpartition(".")[0] for name in inputs.base.components["denoiser"].tensors}
        changes = {path: c.map(mode.from_tensor) for path, c in adapter.changes.items() if path in here}
        adapter = replace(adapter, changes=changes)
    run = Run(replace(inputs, cache=small, config=config, adapter=adapter), MemoryPlan())
    run.model.memory.offload.store.pins = False  # there is nothing to keep in page-locked memory
    return run


def _kept_by(adapter: Adapter) -> Iterator[Tensor]:
    """Yield the tensors that an adapter keeps besides what it trains: copies in another dtype, or the weights of before."""
    for values in vars(adapter).values():
        for value in values.values() if isinstance(values, Mapping) else ():
            if isinstance(value, Tensor) and value.ndim and not isinstance(value, nn.Parameter):
                yield value


def _marks(inputs: TrainingInputs, path: str) -> object:
    """Describe what will be attached to the denoiser's layer at that path."""
    base, config = inputs.base, inputs.config
    change = inputs.adapter and inputs.adapter.changes.get(path)
    return (
        bool(re.fullmatch(base.family.denoiser_targets[config.targets], path))
        and stands_alone(base.family.names, path),
        tuple(name_matches(pattern, path) for pattern in (*config.rank_pattern, *config.alpha_pattern)),
        change and tuple(tensor.shape for tensor in change.tensors()),
    )


@dataclass(frozen=True, eq=False)
class _Empty(Stored):
    """A reader of a tensor without data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: QuantisedTensor | None
    """What the file stores instead of it."""

    def __call__(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype)

    def layout(self) -> tuple[torch.dtype, tuple[int, ...]]:
        return self.dtype, self.shape

    def quantised(self, read: bool = True) -> QuantisedTensor | None:
        return self.stored and self.stored.map(lambda part: torch.empty(part.shape, dtype=part.dtype))


def choose_plan(inputs: TrainingInputs, on_warning: OnWarning) -> MemoryPlan:
    """Choose the first plan that fits into `memory_limit`, or else into a GPU's free memory. If none fits, choose the last.

    `on_warning` is called if it isn't the fastest plan.
    """
    base, config, device = inputs.base, inputs.config, inputs.device
    plans = memory_plans(config, base, device)
    if config.memory_limit is not None:
        room, whose = int(config.memory_limit * 2**30), "memory_limit"
    elif device.type != "cpu" and (free := free_memory(device)) is not None:
        room, whose = int(free * RESERVE), "free memory"
    else:
        return plans[0]

    @functools.cache
    def prediction() -> StepPrediction:
        return StepPrediction(inputs)

    @functools.cache
    def need(plan: MemoryPlan) -> int:
        """Return the bytes that the plan needs. If its weights alone are too large, only their size, which takes no time."""
        least = weights(plan)
        return least if least > room else prediction().bytes(plan)

    def weights(plan: MemoryPlan, at_home: bool = False) -> int:
        narrowest = inputs.dtype if plan.weights == "full" else torch.int8
        size = base.weight_bytes("denoiser", narrowest, keeps_stored(config, device))
        return round(size * (plan.offload if at_home else 1 - plan.offload))

    def fits(plan: MemoryPlan) -> bool:
        return need(plan) <= room

    def locks(plan: MemoryPlan) -> bool:
        return device.type != "cuda" or weights(plan, at_home=True) <= lockable_memory()

    try:
        with _collector_paused():
            plan = first_that_fits(plans, fits, locks)
        if not fits(plans[0]):
            too_much = "" if fits(plan) else ", which may still be too much. Lower resolution or batch_size"
            on_warning(
                f"memory: a step would take at least {need(plans[0]) / 2**30:.1f} GiB, but the limit is "
                f"{room / 2**30:.1f} GiB ({whose}). With {plan} it takes {need(plan) / 2**30:.1f} GiB{too_much}"
            )
    except Exception as error:  # e.g. a network whose step depends on the values in its tensors
        reason = str(error).partition("\n")[0]
        plan = next((plan for plan in plans if weights(plan) <= room), plans[-1])
        on_warning(f"memory: cannot be predicted ({reason}). Starting with {plan}, and less if memory runs out")
    return plan


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Turn off Python's cyclic garbage collector in this context: traversing torch's objects takes a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
