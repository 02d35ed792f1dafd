"""How long an order will take and how much memory, found out before it begins."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..config import TrainConfig
from ..device import device_and_dtype
from ..models.arithmetic import count_flops
from ..models.base import Base
from ..photos import Photo, prepare
from ..pictures.generate import Job
from ..training.callbacks import NO_CALLBACKS
from ..training.encode import encode
from ..training.memory_prediction import choose_plan, predicted_memory
from ..training.training_adapter import TrainingAdapter

EFFICIENCY = 0.4
"""The share of a matrix product's speed that a training step reaches.

On one core of a CPU it was 0.27 with the demo's narrow base and 0.6 with a UNet of SD1.5's width; on a GPU it has not been
measured.
"""
_SIDES = {"cpu": 1024, "cuda": 4096, "mps": 2048}
"""The side of the matrices whose product is timed."""


@dataclass(frozen=True)
class Estimate:
    """What an order will take, to the nearest factor of two or so."""

    seconds: float
    """Of training and drawing."""
    memory: int
    """The most bytes that the training has in use at a time."""

    def __str__(self) -> str:
        minutes = max(1, round(self.seconds / 60))
        duration = f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
        return f"about {duration} and {self.memory / 2**30:.1f} GiB of memory"


def estimate(
    photos: Sequence[Photo],
    base: Base,
    config: TrainConfig,
    jobs: Sequence[Job],
    device: torch.device | None = None,
    training_adapter: TrainingAdapter | None = None,
) -> Estimate:
    """The time and memory of training on the photos and drawing the jobs, where nothing of it has been done yet.

    A step is gone through with tensors that hold no numbers, which counts its arithmetic and its memory; how fast the device
    is, a product of two matrices says. One photo and its caption are encoded for it, which the training then need not do.
    """
    device, dtype = device_and_dtype(config, device, base.family.overflows_in_fp16)
    dataset = prepare(
        [max(photos, key=lambda photo: photo.size[0] * photo.size[1])],
        resolution=config.resolution or base.resolution,
        size_multiple=base.size_multiple,
        trigger=config.trigger_word,
        class_word=config.class_word,
        upscale=config.upscale,
    )
    cache = encode(dataset, base, config, device=device)
    plan = choose_plan(cache, base, config, device, dtype, NO_CALLBACKS.on_warning, training_adapter)
    memory = predicted_memory(cache, base, config, device, dtype, plan, training_adapter)
    # Apart from the memory, since the counter keeps activations that the plan would recompute.
    without_prior = replace(config, prior_prediction=0.0)
    whole = replace(plan, weights="full", offload=0.0)
    step = count_flops(
        lambda: predicted_memory(cache, base, without_prior, device, dtype, whole, training_adapter, each_block=True)
    )
    # Of frozen weights a step is a prediction and its gradient, which take the same. Prior prediction adds those of the class
    # and the prediction that they are held to.
    prediction = step / 2 / (config.batch_size * config.accumulation)
    drawn = sum(job.steps * (1 if base.embeds_guidance or job.guidance == 1 else 2) for job in jobs)
    work = config.steps * step * (1 + 1.5 * config.prior_prediction) + drawn * prediction
    return Estimate(work / (EFFICIENCY * _speed(device, dtype)), memory)


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """The arithmetic operations a second of a product of two large matrices: the best of three."""
    side = _SIDES.get(device.type, 1024)
    matrix = torch.randn(side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):  # the first one also loads what it runs on
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
