"""How fast a machine works in each part of a job, by what others have measured or by its own jobs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..config import Precision
from ..device import precision_name, processor
from ..errors import BadFile
from ..models.base import Base
from ..models.cpu_matmul import faster_products, linear
from ..storage.cache_folder import cache_folder, content_key, made_folder
from ..storage.files import read_json, write_text
from ..threads import usable_threads
from .cost import Cost

Span = tuple[float, float]
"""The lowest and the highest value to expect."""
ENCODE, TRAIN, DRAW = "encode", "train", "draw"
"""The phases whose speed differs and is measured."""
_ON_GPU: Mapping[bool, Sequence[tuple[float, Mapping[str, Span]]]] = {
    True: (
        (250e12, {ENCODE: (0.08, 0.15), TRAIN: (0.04, 0.15), DRAW: (0.07, 0.37)}),
        (100e12, {ENCODE: (0.09, 0.25), TRAIN: (0.15, 0.35), DRAW: (0.24, 0.5)}),
        (0.0, {ENCODE: (0.1, 0.25), TRAIN: (0.3, 0.54), DRAW: (0.45, 0.65)}),
    ),
    False: (
        (250e12, {ENCODE: (0.08, 0.15), TRAIN: (0.12, 0.25), DRAW: (0.31, 0.5)}),
        (0.0, {ENCODE: (0.1, 0.25), TRAIN: (0.33, 0.55), DRAW: (0.6, 0.85)}),
    ),
}
"""The share of a large product's rate that each phase reaches on NVIDIA's GPUs, for UNets and for transformers.

Each is for GPUs from a rate on, in operations per second: a fast one waits for the host. docs/benchmarks.md has the sources.
"""
_LARGE_ON_CPU: Mapping[str, Span] = {ENCODE: (0.2, 0.6), TRAIN: (0.42, 0.65), DRAW: (0.42, 0.65)}
_SMALL_ON_CPU: Mapping[str, Span] = {ENCODE: (0.1, 0.5), TRAIN: (0.25, 0.5), DRAW: (0.25, 0.5)}
"""Shares on a CPU, measured with SD1.5's widths and with the demo's narrow base model."""
_OTHER: Mapping[str, Span] = {ENCODE: (0.1, 0.5), TRAIN: (0.2, 0.5), DRAW: (0.2, 0.6)}
"""Shares on devices that nobody has measured."""
_SIDES = {"cpu": 1024, "cuda": 4096, "mps": 2048}
"""The side of the matrices whose product is timed."""
_OWN = 0.1
"""How much the speed of a machine's own jobs varies, as a share."""


@dataclass(frozen=True)
class Speed:
    """How fast a machine works on a base model."""

    rate: float
    """Floating-point operations per second of the product of two large matrices."""
    shares: Mapping[str, Span]
    """The share of that rate that each phase reaches."""
    copies: Span
    """Bytes per second from the computer's memory to the device."""
    loads: Span = (0.5e9, 3e9)
    """Bytes per second of weights from a disk, or from the system's cache of it, to the device."""
    seconds_per_face_detection: Span = (0.05, 0.5)
    """How long a picture takes in the face networks."""

    @classmethod
    def published(cls, device: str, base: Base, rate: float, copies: Span) -> Speed:
        """Return the speed on a kind of device (`cuda`, `cpu`, ...) that does `rate` operations per second."""
        if device == "cpu":
            return cls(rate, _LARGE_ON_CPU if base.is_large else _SMALL_ON_CPU, copies)
        if device != "cuda":
            return cls(rate, _OTHER, copies)
        return cls(rate, next(shares for least, shares in _ON_GPU[base.family.names.is_unet] if rate >= least), copies)


def speed_of(base: Base, device: torch.device | None = None, precision: Precision = "auto") -> Speed:
    """Return the speed of this machine: that of its last job on such a base model, or else the published one."""
    device, dtype = base.device_and_dtype(precision, device)
    side = _SIDES.get(device.type, 1024)
    matrix, best = torch.randn(side, side, device=device).to(dtype), math.inf
    with faster_products():
        for _ in range(4):  # The first product also loads the kernels.
            started = time.perf_counter()
            linear(matrix, matrix)[0, 0].item()  # Wait for the device.
            best = min(best, time.perf_counter() - started)
    # From PCIe 3 with 8 lanes to PCIe 4 with 16.
    copies = (5e9, 26e9) if device.type == "cuda" else (math.inf, math.inf)
    speed = Speed.published(device.type, base, 2 * side**3 / best, copies)
    own = _reached(_file(base, device, dtype))
    spans = {phase: (share * (1 - _OWN), share * (1 + _OWN)) for phase, share in own.items()}
    return replace(speed, shares={**speed.shares, **spans})


def remember_speed(base: Base, precision: Precision, speed: Speed, operations: Mapping[str, float], cost: Cost) -> None:
    """Keep the share of the rate that a job has reached in each phase, for later predictions.

    `operations` are those of each phase in what the job has done. The file is named by a hash of the kinds of processor and
    base model, and has no other values.
    """
    device, dtype = base.device_and_dtype(precision, torch.device(cost.device))
    reached = {
        phase: count / speed.rate / cost.seconds[phase]
        for phase, count in operations.items()
        if count and cost.seconds[phase]
    }
    if reached:
        with suppress(BadFile):  # Predictions then use the published speed.
            path = _file(base, device, dtype)
            made_folder(path.parent.name)
            write_text(path, json.dumps(_reached(path) | reached))


def _reached(path: Path) -> dict[str, float]:
    """Return the shares in a file, by phase; none from a missing or damaged one."""
    with suppress(BadFile, AttributeError, TypeError, ValueError):
        found = {phase: float(share) for phase, share in read_json(path).items()}
        return {phase: share for phase, share in found.items() if 0 < share < math.inf}
    return {}


def _file(base: Base, device: torch.device, dtype: torch.dtype) -> Path:
    threads = min(torch.get_num_threads(), usable_threads().count) if device.type == "cpu" else 0
    about = (processor(device), threads, precision_name(dtype), base.family.name, base.is_large)
    return cache_folder() / "speeds" / f"{content_key(*about)}.json"
