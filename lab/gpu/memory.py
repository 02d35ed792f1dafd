"""Measure the memory of training runs on a GPU, beside the predicted one: with many shapes, on small cards, after a cancel."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from core.device import release_memory
from core.models.memory_plan import PLANS, MemoryPlan
from core.training.callbacks import Callbacks, StepReport
from core.training.inputs import TrainingInputs
from core.training.loop import accumulate_within_memory
from core.training.memory_prediction import choose_plan, predicted_memory
from core.training.step import Run
from core.training.store import train
from lab.gpu.session import Measurements, Send, Session, elsewhere
from lab.timing import seconds

FIRST_PLANS = (PLANS[0], PLANS[1], PLANS[3])
"""The plans that keep the weights in full: nothing, the cheap operations, and everything recomputed."""
CARDS = (12, 8, 24)
"""The memory, in GiB, that the GPU is limited to."""


class _Cancelled(Exception):
    """What a user's cancel raises in these runs."""


def plans(session: Session) -> Measurements:
    """Train on all shapes in turn under memory plans, and once in a process whose torch extends its blocks of memory."""
    for plan in session.some(FIRST_PLANS):
        yield str(plan), partial(_under, session, plan)
    yield f"{PLANS[0]}, expandable segments", partial(_in_segments, replace(session))


def _in_segments(session: Session) -> Mapping[str, Any]:
    setting = dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True")
    with patch.dict(os.environ, setting):
        return next(elsewhere(_send_under, session, PLANS[0]))


def _send_under(send: Send, session: Session, plan: MemoryPlan) -> None:
    send(_under(session, plan))


def _under(session: Session, plan: MemoryPlan) -> dict[str, Any]:
    inputs = _photos(session)
    return {"predicted": predicted_memory(inputs, plan), **_trained(inputs, plan, [])}


def cards(session: Session) -> Measurements:
    """Limit the GPU's memory, choose a memory plan, and train on all shapes in turn."""
    for size in session.some(CARDS):
        yield f"{size} GiB", partial(_bounded, session, size)


def _bounded(session: Session, size: int) -> dict[str, Any]:
    warnings: list[str] = []
    _bound(session.device, size)
    try:
        inputs = _photos(session, memory_limit=0.9 * size)
        plan = choose_plan(inputs, warnings.append)
        return {"chosen": str(plan), **_trained(inputs, plan, warnings)}
    finally:
        _bound(session.device, None)


def _photos(session: Session, **settings: Any) -> TrainingInputs:
    """Return the inputs of a run on as many shapes as fifteen photos have."""
    return session.inputs(session.sdxl, session.config(**settings), session.photo_sizes(session.sdxl))


def _trained(inputs: TrainingInputs, plan: MemoryPlan, warnings: list[str]) -> dict[str, Any]:
    """Train a few rounds on each shape, with smaller plans if memory runs out, and return the time and the memory."""
    device = inputs.device
    release_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before, run = _allocator(device), Run(inputs, plan)

    def step() -> None:
        run.update(accumulate_within_memory(run, warnings.append))

    first, later = (seconds(step, device, len(run.examples.images))[0] for _ in range(2))
    after, last = _allocator(device), str(run.model.memory.plan)
    found: dict[str, Any] = {name: after[name] - before[name] for name in after}
    return {**found, "first seconds": first, "seconds": later, "trained with": last, "warnings": warnings}


def _allocator(device: torch.device) -> dict[str, int]:
    """Return the most bytes in use and reserved, and how often torch has given back its cached blocks to get memory."""
    if device.type != "cuda":
        return {}
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "retries": torch.cuda.memory_stats(device).get("num_alloc_retries", 0),
    }


def _bound(device: torch.device, size: int | None) -> None:
    """Limit the GPU's memory to that many GiB, or to what it has."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size * 2**30 / total) if size else 1.0, device)


def cancelling(session: Session) -> Measurements:
    """Cancel a training run whose blocks are brought in, and read the page-locked memory."""
    yield "after two steps", partial(_cancelled, session)


def _cancelled(session: Session) -> dict[str, Any]:
    base = session.sdxl
    found: dict[str, Any] = {"locked before": _locked()}

    def cancel(report: StepReport) -> None:
        if report.step == 2:
            found["locked while training"] = _locked()
            raise _Cancelled

    # No plan fits, so the last one is chosen.
    config = session.config(memory_limit=0.001, check_photos=False, steps=3, sample_every=0)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, FACELORA_CACHE=f"{folder}/cache"),
        # These count tokens with transformers, which isn't needed otherwise.
        patch("core.training.encode.chunk_count", return_value=1),
        patch("core.training.run_job.hints", return_value=()),
    ):
        photos = _write_photos(Path(folder) / "photos", session.photo_sizes(base))
        try:
            train(
                photos, base, config, output=Path(folder) / "me.safetensors", device=session.device,
                callbacks=Callbacks(on_step=cancel),
            )  # fmt: skip
        except _Cancelled:  # Its traceback keeps the run alive here, as in a program that shows it.
            found["locked after the cancel"] = _locked()
    release_memory()
    is_good = (found["locked after the cancel"] or 0) <= (found["locked before"] or 0)
    return {**found, "locked after releasing": _locked(), "is_good": is_good}


def _write_photos(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """Write a picture of noise in each size."""
    folder.mkdir()
    for index, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def _locked() -> int | None:
    """Return the bytes of page-locked memory that torch holds; None on a CPU, and if torch doesn't report it."""
    if not (torch.cuda.is_available() and hasattr(torch.cuda, "host_memory_stats")):
        return None
    return torch.cuda.host_memory_stats().get("allocated_bytes.current")


STAGES = {"plans": plans, "cards": cards, "cancelling": cancelling}
