"""A prediction of the memory that a run needs under each memory plan, and the choice of the plan that it starts with."""

import functools
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import TrainConfig, name_matches
from ..device import free_memory, precision_name
from ..lora.modules import stands_alone
from ..models.alike_blocks import AlikeBlocks, put_stand_ins
from ..models.base import Base
from ..models.memory_plan import (
    OPTIMIZER_BYTES,
    RESERVE,
    MemoryCount,
    MemoryPlan,
    allocated,
    first_that_fits,
    unique_bytes,
)
from ..storage.lazy import LazyTensors, Stored, narrow_in
from ..storage.narrow import NarrowTensor
from .encode import LatentCache
from .methods import METHODS, trains_text
from .methods.lycoris import LycorisAdapter
from .step import Run, memory_plans
from .training_adapter import TrainingAdapter

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


class StepPrediction:
    """The memory that a training run needs under its memory plans, where its kernels' workspace is not counted.

    It is counted in steps on torch's fake tensors, which hold no data and follow the rules of the device. Of blocks that are
    alike only one is gone through, unless `each_block` is set.
    """

    def __init__(
        self,
        cache: LatentCache,
        base: Base,
        config: TrainConfig,
        device: torch.device,
        dtype: torch.dtype,
        training_adapter: TrainingAdapter | None = None,
        each_block: bool = False,
    ):
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._beside = 0 if device.type == "cpu" else _bytes_of(cache)
        for change in training_adapter.changes.values() if training_adapter else ():
            self._beside += sum(allocated(part.numel() * dtype.itemsize, device) for part in change.tensors())
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)  # such as what networks are built with
        self._blocks: AlikeBlocks | None = None
        alike = METHODS[config.method].freezes_weights and not each_block
        empty = _empty_base(
            self._mode, base, config, dtype, partial(_marks, base, config, training_adapter) if alike else None
        )
        with self._mode:
            self._run = _fake_run(self._mode, cache, empty, config, device, dtype, training_adapter)
            with self._run.fast():
                pass  # has the adapter make its copies, so that they are there under all plans
            if alike:
                self._blocks = AlikeBlocks(self._run.denoiser, self._run.adapter.copies())
                self._run.adapter.copy([(parameter,) for parameter in self._blocks.copied], dtype)
                self._run.optimizer.add_param_group({"params": self._blocks.trained})
        self._count = MemoryCount(device)
        self._known: dict[MemoryPlan, int] = {}

    def bytes(self, plan: MemoryPlan) -> int:
        """The most bytes that are in use at a time under a plan. Plans with full weights come before those with 8 bits."""
        if plan not in self._known:
            narrows = plan.weights != self._run.memory.plan.weights
            assert not narrows or plan.weights != "full"
            plain = replace(plan, recompute=0.0, offload=0.0)
            with self._mode:
                if narrows:
                    self._run.adopt(plain)
                if narrows and self._blocks:
                    self._blocks.fill()
                if self._blocks and plan != plain:
                    self.bytes(plain)  # goes through the blocks, which must not be recomputed or away for it
                self._known[plan] = self._counted(plan) + self._beside
        return self._known[plan]

    def _counted(self, plan: MemoryPlan) -> int:
        run = self._run
        run.optimizer.zero_grad()
        run.adopt(plan)
        beside = [tensor for tensor in run.adapter.beside() if tensor.device == run.device]
        there = [*run.memory.resident(), *beside, *run.adapter.copies().values()]
        for encoder in run.encoders.values():
            there += [*encoder.parameters(), *encoder.buffers()]
        # The memory of these is known otherwise.
        others = [*(run.average or {}).values(), *run.denoiser.parameters()]
        others += run.training_adapter.tensors() if run.training_adapter else []
        with self._count as count:
            for tensor in [*there, *others]:
                count.leave_out(tensor)
            if self._blocks:
                self._blocks.begin(count)
            count.peak = count.live  # what former steps have made once, such as rotary embeddings
            if plan.offload:
                run.accumulate()  # only a second step prefetches blocks, in the order of the first
            run.accumulate()
        trained = sum(parameter.numel() for group in run.optimizer.param_groups for parameter in group["params"])
        per_number = OPTIMIZER_BYTES[run.config.optimizer] + (4 if run.average else 0)
        if self._blocks and not METHODS[run.config.method].keeps_dtype and run.dtype != torch.float32:
            per_number += run.dtype.itemsize  # autocast's copies of weights, which stay until a forward pass ends
        return unique_bytes(there) + trained * per_number + count.peak


def predicted_memory(
    cache: LatentCache,
    base: Base,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    plan: MemoryPlan,
    training_adapter: TrainingAdapter | None = None,
    each_block: bool = False,
) -> int:
    """The most bytes that a training run uses at a time on the device under a plan (`StepPrediction`)."""
    return StepPrediction(cache, base, config, device, dtype, training_adapter, each_block).bytes(plan)


def _empty_base(
    mode: "FakeTensorMode",
    base: Base,
    config: TrainConfig,
    dtype: torch.dtype,
    marks: Callable[[str], object] | None,
) -> Base:
    """The base model without numbers, and given `marks` with stand-ins for blocks that are alike (`put_stand_ins`)."""
    components, networks = dict(base.components), {}
    for part in ("denoiser", *(base.family.text_encoders if trains_text(config) else ())):
        stored = components[part].tensors
        narrow = {name: narrow_in(stored, name, read=False) for name in stored}
        networks[part] = base.family.build_empty(part, components[part].config)
        if marks and part == "denoiser":
            put_stand_ins(networks[part], marks)
        _fake_constants(mode, networks[part])
        readers = {
            name: _Empty({}, name, dtype, tensor.shape, narrow.get(name))
            for name, tensor in networks[part].state_dict().items()
        }
        components[part] = replace(components[part], tensors=LazyTensors(readers))
    return replace(base, components=components, family=replace(base.family, build=lambda part, _: networks[part]))


def _fake_constants(mode: "FakeTensorMode", network: nn.Module) -> None:
    """Makes the tensors fake that a network is built with, such as tables of rotary embeddings. No file has them."""
    for module in network.modules():
        for values in (module._buffers, vars(module)):
            for name, value in values.items():
                if isinstance(value, Tensor) and not value.is_meta:
                    values[name] = mode.from_tensor(value)


def _fake_run(
    mode: "FakeTensorMode",
    cache: LatentCache,
    base: Base,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    training_adapter: TrainingAdapter | None,
) -> Run:
    """A run on the largest picture, of a base without numbers, with nothing recomputed and full weights."""
    config = replace(config, precision=precision_name(dtype), compile=False)
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
        caption: {name: mode.from_tensor(value) for name, value in conditioning.items()}
        for caption, conditioning in cache.text.items()
    }
    small = replace(cache, images=(image,) * config.batch_size, text=text)
    if training_adapter:
        here = {name.rpartition(".")[0] for name in base.components["denoiser"].tensors}
        changes = {path: c.map(mode.from_tensor) for path, c in training_adapter.changes.items() if path in here}
        training_adapter = replace(training_adapter, changes=changes)
    run = Run(small, base, config, device, plan=MemoryPlan(), training_adapter=training_adapter)
    if isinstance(run.adapter, LycorisAdapter):
        for layer in run.adapter.layers.values():
            layer.eval()  # else peft's draw a number to drop layers by, and a fake tensor has none
    return run


def _marks(base: Base, config: TrainConfig, training_adapter: TrainingAdapter | None, path: str) -> object:
    """What is put on the layer of the denoiser at that path."""
    change = training_adapter and training_adapter.changes.get(path)
    return (
        bool(re.fullmatch(base.family.denoiser_targets[config.targets], path))
        and stands_alone(base.family.names, path),
        tuple(name_matches(pattern, path) for pattern in (*config.rank_pattern, *config.alpha_pattern)),
        change and tuple(tensor.shape for tensor in change.tensors()),
    )


@dataclass(frozen=True, eq=False)
class _Empty(Stored):
    """A reader of a tensor without numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: NarrowTensor | None
    """What is stored in its place."""

    def __call__(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype)

    def layout(self) -> tuple[torch.dtype, tuple[int, ...]]:
        return self.dtype, self.shape

    def narrow(self, read: bool = True) -> NarrowTensor | None:
        return self.stored and self.stored.map(lambda part: torch.empty(part.shape, dtype=part.dtype))


def _bytes_of(cache: LatentCache) -> int:
    """The bytes of the encoded photos and captions, all of which lie on the device."""
    of_images = (
        tensor
        for image in cache.images
        for tensor in (image.mean, image.deviation, image.mask, *image.conditioning.values())
    )
    of_text = (tensor for conditioning in cache.text.values() for tensor in conditioning.values())
    return sum(tensor.nbytes for tensor in (*of_images, *of_text) if tensor is not None)


def choose_plan(
    cache: LatentCache,
    base: Base,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    on_warning: Callable[[str], None],
    training_adapter: TrainingAdapter | None = None,
) -> MemoryPlan:
    """The first of the plans that fits into `memory_limit`, or else into the free memory of a GPU; the last when none fits.

    `on_warning` is called when it is not the fastest of all.
    """
    plans, frozen = memory_plans(config, base), METHODS[config.method].freezes_weights
    if config.memory_limit is not None:
        room, whose = int(config.memory_limit * 2**30), "memory_limit"
    elif device.type == "cuda" and (free := free_memory(device)) is not None:
        room, whose = int(free * RESERVE), "free"
    else:
        return plans[0]

    @functools.cache
    def prediction() -> StepPrediction:
        return StepPrediction(cache, base, config, device, dtype, training_adapter)

    @functools.cache
    def need(plan: MemoryPlan) -> int:
        """The bytes that the plan needs; only those of its weights where they are too many already, which takes no time."""
        narrowest = dtype if plan.weights == "full" else torch.int8
        least = 0 if plan.offload else base.weight_bytes("denoiser", narrowest, as_stored=frozen)
        return least if least > room else prediction().bytes(plan)

    def fits(plan: MemoryPlan) -> bool:
        return need(plan) <= room

    try:
        with _collector_paused():
            plan = first_that_fits(plans, fits)
        if not fits(plans[0]):
            too_much = "" if fits(plan) else ", which may still be too much: lower resolution or batch_size"
            on_warning(
                f"memory: a step would take at least {need(plans[0]) / 2**30:.1f} GiB, and there are "
                f"{room / 2**30:.1f} ({whose}); with {plan} it takes {need(plan) / 2**30:.1f}{too_much}"
            )
    except Exception as error:  # e.g. a network whose step depends on the numbers in its tensors
        reason = str(error).partition("\n")[0]
        on_warning(f"memory: cannot be predicted ({reason}); {plans[0]} until it runs out")
        return plans[0]
    return plan


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Python's cyclic garbage collector is off in here: going through all of torch's objects takes a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
