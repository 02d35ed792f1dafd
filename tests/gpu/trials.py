"""What is tried on the fake device. Each function runs in a process of its own, and returns plain values."""

# fmt: off
from tests.gpu.fake_cuda import CPU, DEVICE, Card, Copy, fake_cuda  # isort: skip  # before torch
# fmt: on

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import core.models.eight_bit as eight_bit
from core.config import TrainConfig
from core.device import device_and_dtype
from core.models.base import Base, load_base
from core.models.memory_plan import MemoryPlan
from core.training.memory_prediction import predicted_memory
from core.training.step import Run
from tests.tooling import UNETS, encoded_cache, encoded_image, small_flow_base

eight_bit.SMALLEST = 1  # so that the small networks have weights in 8 bits
PLAIN = MemoryPlan()


@dataclass(frozen=True)
class Case:
    """A step to try."""

    family: str
    checkpoint: Path | None = None
    """The file of a UNet's family."""
    plan: MemoryPlan = PLAIN
    capability: tuple[int, int] = (9, 0)
    size: float = 80
    """The card's memory in GiB."""
    latents: int = 16
    """The side of the latents."""
    settings: Mapping[str, Any] | None = None

    def base(self) -> Base:
        return load_base(self.checkpoint) if self.family in UNETS and self.checkpoint else small_flow_base(self.family)

    def config(self) -> TrainConfig:
        return TrainConfig(**{"rank": 4, "batch_size": 2, **(self.settings or {})})


@dataclass(frozen=True)
class Step:
    """What a step asked of the card."""

    dtypes: frozenset[torch.dtype]
    """Those of the operands of products."""
    copies: tuple[Copy, ...]
    launches: int
    peak: int
    predicted: int
    early: int
    """Tensors that were freed while a stream may still have read them."""
    pinned: int
    """Bytes of page-locked memory."""
    home: int
    """Bytes of the weights that stay in the computer's memory."""


def cached(base: Base, case: Case):
    shape = (base.latent_shape.channels, case.latents, case.latents)
    kinds = (False, False, True) if case.config().class_images else (False, False)
    return encoded_cache(
        base,
        [
            encoded_image(base, f"{n}.png", "a photo of sks person", n, is_class, shape)
            for n, is_class in enumerate(kinds)
        ],
    )


def step(case: Case) -> Step:
    """What the second step of a run asks for, when the adapter and its optimizer are there."""
    with fake_cuda(case.size, case.capability) as card:
        base, config = case.base(), case.config()
        cache = cached(base, case)
        dtype = device_and_dtype(config, DEVICE)[1]
        predicted = predicted_memory(cache, base, config, DEVICE, dtype, case.plan)
        before = card.live
        run = Run(cache, base, config, DEVICE, plan=case.plan)
        run.train_step()
        card.watch()
        run.train_step()
        dtypes, copies, launches = frozenset(card.product_dtypes()), tuple(card.copies), card.launches
        run.check_finite()
        home = sum(parameter.nbytes for parameter in run.memory._offload.parameters())
        return Step(dtypes, copies, launches, card.peak - before, predicted, card.early, card.pinned, home)
