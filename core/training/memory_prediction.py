"""A prediction of the memory that a run needs under each memory plan, and the choice of the plan that it starts with."""

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..config import TrainConfig
from ..device import free_memory, precision_name, processor
from ..errors import BadFile
from ..models.base import Base
from ..models.memory_plan import OPTIMIZER_BYTES, RESERVE, MemoryCount, MemoryPlan, first_that_fits, unique_bytes
from ..storage.cache_folder import cache_in, content_key, made_folder
from ..storage.files import read_json, write_text
from ..storage.lazy import LazyTensors, Stored, dtype_and_shape, narrow_in
from ..storage.narrow import NarrowTensor
from .encode import LatentCache
from .methods import METHODS, trains_text
from .methods.lycoris import LycorisAdapter
from .step import Run, memory_plans
from .training_adapter import TrainingAdapter

PREDICTION_VERSION = 3
"""Raised whenever the same step is predicted to take another amount."""
_SAME = ("person", "output", "machine")
"""The groups of the settings without which a step takes the same: of those of the machine, precision and plan are known."""


def predicted_memory(
    cache: LatentCache,
    base: Base,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    plan: MemoryPlan,
    training_adapter: TrainingAdapter | None = None,
) -> int:
    """The most bytes that a run will use at a time on the device, where its kernels' workspace is not counted.

    They are counted in a step on torch's fake tensors, which hold no data and follow the rules of the device.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    parts = ("denoiser", *(base.family.text_encoders if trains_text(config) else ()))
    stored = {part: base.components[part].tensors for part in parts}
    narrow = {
        part: {name: narrow_in(tensors, name, read=False) for name in tensors} for part, tensors in stored.items()
    }
    config = replace(config, precision=precision_name(dtype), compile=False)
    largest = max(cache.images, key=lambda image: image.mean.numel())
    with FakeTensorMode() as mode:
        components = dict(base.components)
        for part in parts:
            state = base.family.build_empty(part, components[part].config).state_dict()
            readers = {
                name: _Empty({}, name, dtype, tensor.shape, narrow[part].get(name)) for name, tensor in state.items()
            }
            components[part] = replace(components[part], tensors=LazyTensors(readers))
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
            changes = {path: change.map(mode.from_tensor) for path, change in training_adapter.changes.items()}
            training_adapter = replace(training_adapter, changes=changes)
        faked = replace(base, components=components)
        run = Run(small, faked, config, device, plan=plan, training_adapter=training_adapter)
        if isinstance(run.adapter, LycorisAdapter):
            for layer in run.adapter.layers.values():
                layer.eval()  # else peft's draw a number to drop layers by, and a fake tensor has none
        beside = [tensor for tensor in run.adapter.beside() if tensor.device == run.device]
        beside += run.training_adapter.tensors() if run.training_adapter else []
        there = [*run.memory.resident(), *(run.average or {}).values(), *beside]
        for encoder in run.encoders.values():
            there += [*encoder.parameters(), *encoder.buffers()]
        with MemoryCount(device) as count:
            for tensor in [*there, *run.denoiser.parameters()]:
                count.leave_out(tensor)
            if plan.offload:
                run.accumulate()  # only a second step prefetches blocks, in the order of the first
            run.accumulate()
    trained = sum(parameter.numel() for parameter in run.parameters.values())
    kept = unique_bytes(there) + trained * OPTIMIZER_BYTES[config.optimizer]
    return kept + count.peak + (0 if device.type == "cpu" else _bytes_of(cache))


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


def _layout(tensors: Mapping[str, Tensor]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(name, *dtype_and_shape(tensors, name)) for name in tensors]


def _stored_layout(tensors: Mapping[str, Tensor]) -> list[tuple[str, list[tuple[torch.dtype, tuple[int, ...]]]]]:
    """The dtypes and shapes of what is stored of each weight that is stored in fewer bits than it stands for."""
    narrow = {name: narrow_in(tensors, name, read=False) for name in tensors}
    return [
        (name, [(part.dtype, tuple(part.shape)) for part in weight.parts]) for name, weight in narrow.items() if weight
    ]


def kept_prediction(
    cache: LatentCache,
    base: Base,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    plan: MemoryPlan,
    training_adapter: TrainingAdapter | None = None,
) -> int:
    """What `predicted_memory` gives, which takes seconds, many for a large model: from the cache folder where it is there."""
    parts = ("denoiser", *(base.family.text_encoders if trains_text(config) else ()))
    weights = {
        part: [*_layout(base.components[part].tensors), *_stored_layout(base.components[part].tensors)]
        for part in parts
    }
    settings = [getattr(config, setting.name) for setting in fields(config) if setting.metadata["group"] not in _SAME]
    key = content_key(
        "memory", PREDICTION_VERSION, torch.__version__, processor(device), dtype, plan, settings, weights,
        [base.components[part].config for part in parts],
        max((image.mean.shape for image in cache.images), key=math.prod),
        [_layout(image.conditioning) for image in cache.images[:1]],
        sorted({str(_layout(conditioning)) for conditioning in cache.text.values()}),
        _bytes_of(cache), training_adapter and training_adapter.digest,
    )  # fmt: skip
    with cache_in(None):  # it is about nobody
        with suppress(BadFile):  # there is none yet, or none can be kept
            path = made_folder("memory") / f"{key}.json"
            if isinstance(known := read_json(path), int):
                return known
        need = predicted_memory(cache, base, config, device, dtype, plan, training_adapter)
        with suppress(BadFile):
            write_text(made_folder("memory") / f"{key}.json", str(need))
    return need


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
    def need(plan: MemoryPlan) -> int:
        """The bytes that the plan needs; only those of its weights where they are too many already, which takes no time."""
        narrowest = dtype if plan.weights == "full" else torch.int8
        least = 0 if plan.offload else base.weight_bytes("denoiser", narrowest, as_stored=frozen)
        return least if least > room else kept_prediction(cache, base, config, device, dtype, plan, training_adapter)

    def fits(plan: MemoryPlan) -> bool:
        return need(plan) <= room

    try:
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
