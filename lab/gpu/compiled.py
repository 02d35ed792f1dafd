"""Time training steps of compiled models on a GPU, for the first time and from torch's cache, and check their gradients."""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from core.errors import BadConfig
from core.models.memory_plan import PLANS
from core.training.step import Run
from lab.gpu.correctness import COMPARED, beside_the_first
from lab.gpu.session import Measurements, Send, Session, elsewhere
from lab.timing import seconds, synchronize

MODELS = ("flux", "sdxl")
"""The base models of a session that are compiled. SDXL takes minutes."""


def steps(session: Session) -> Measurements:
    """Time the first step and later ones, each time in a new process: compiled anew, from torch's cache, and plain."""
    with (
        TemporaryDirectory(ignore_cleanup_errors=True) as cache,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=f"{cache}/inductor", TRITON_CACHE_DIR=f"{cache}/triton"),
    ):
        models = MODELS[:1] if session.small else MODELS
        for ways in (("compiled", "compiled again"), ("plain",)):
            for model, way in product(models, ways):
                results = elsewhere(_steps, session, model, way != "plain")
                for what in ("first step", "later steps"):
                    yield f"{model}, {way}, {what}", partial(_next, results)


def _next(results: Iterator[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(results, {"error": "the first step failed"})


def _steps(send: Send, session: Session, model: str, compile: bool) -> None:
    """Send the seconds of the first step with those to build the run, and then the seconds of later steps."""
    base = getattr(session, model)
    config = session.config(compile=compile)
    if model == "flux" and session.small:
        config = replace(config, resolution=None)
    inputs = session.inputs(base, config)
    synchronize(session.device)
    begun = time.monotonic()
    run = Run(inputs, PLANS[0])
    if run.model.why_not_compiled:
        raise BadConfig(run.model.why_not_compiled)
    run.train_step()
    synchronize(session.device)
    send({"seconds": time.monotonic() - begun})
    run.train_step()
    taken, host, _ = seconds(run.train_step, session.device, session.times)
    send({"seconds": taken, "host": host})


def gradients(session: Session) -> Measurements:
    """Compare the gradient of compiled blocks with that of plain ones."""
    for name in session.some(COMPARED):
        yield from beside_the_first(session, name, [("plain", {}), ("compiled", {"compile": True})])


STAGES = {"steps": steps, "gradients": gradients}
