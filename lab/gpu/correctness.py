"""Compare what a GPU computes with the CPU, and memory plans, products in 8 bits and resumed training with each other."""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from core.config import TrainConfig
from core.device import deterministic_if, precision_name
from core.errors import BadConfig
from core.models.base import Base
from core.models.compiled import why_not_compiled
from core.models.families import FAMILIES
from core.models.memory_plan import PLANS, MemoryPlan
from core.models.packages import import_diffusers
from core.models.quantised_layers import InEightBits, linear, times
from core.training.encode import LatentCache
from core.training.inputs import TrainingInputs
from core.training.state import pack_run, restore_run
from core.training.step import Run
from lab.gpu.agreement import SMALL_CHANNELS, SMALL_RESOLUTION, agreement, eight_bit_weight
from lab.gpu.session import CPU, Measurements, Send, Session, elsewhere, profiled
from tests.random_models import SHAPES, random_base, random_cache
from tests.small_flows import FLOW, SMALL_FLOWS, random_flow

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `deterministic`; torch reads it at the first product

DIFFERENT_ROUNDING = 1e-2
"""The largest difference of two products in 8 bits: numbers at a half may be rounded up or down."""
ALIKE = 1e-3
"""The largest difference of two gradients in fp32 that rounding explains, as a share of their norm."""
COMPARED = (FLOW, "sd15")
"""The families that stages other than `families` use."""


def _small(name: str) -> tuple[Base, LatentCache]:
    """Return a small base model with random weights on the CPU, and a random picture."""
    if name in SHAPES:
        base = random_base(name, SMALL_CHANNELS, CPU, torch.float32)
        return base, random_cache(base, TrainConfig(resolution=SMALL_RESOLUTION))
    base = random_flow(name, SMALL_FLOWS[name], CPU, torch.float32)
    return base, random_cache(base, TrainConfig())


def start(session: Session) -> Measurements:
    """Try what every other measurement requires."""
    yield "imports", _imports
    yield "another process", partial(next, elsewhere(_multiply, session.device))
    yield "profiler", partial(_profile, session.device)
    yield "compiler", partial(_compiler, session.device)


def _imports() -> dict[str, Any]:
    begun = time.monotonic()
    network = import_diffusers().UNet2DConditionModel.__name__
    return {"seconds": time.monotonic() - begun, "is_good": bool(network)}


def _multiply(send: Send, device: torch.device) -> None:
    begun = time.monotonic()
    ones = torch.ones(64, 64, device=device)
    send({"is_good": bool((ones @ ones == 64).all()), "seconds": time.monotonic() - begun})


def _profile(device: torch.device) -> dict[str, Any]:
    begun = time.monotonic()
    ones = torch.ones(64, 64, device=device)
    kernels = profiled(lambda: ones @ ones, device)
    names = [name for name, taken, _ in kernels if taken]
    return {"is_good": bool(names), "seconds": time.monotonic() - begun, "kernels": names[:3]}


def _compiler(device: torch.device) -> dict[str, Any]:
    """Whether the command `compiled` can do anything here, and what it lacks."""
    begun = time.monotonic()
    reason = why_not_compiled(device)
    return {"is_good": not reason, "seconds": time.monotonic() - begun} | ({"error": reason} if reason else {})


def families(session: Session) -> Measurements:
    """Compare loss and gradient of each family with the CPU's in fp32."""
    for dtype in session.some((torch.float32, torch.bfloat16, torch.float16)):
        for name in session.some((*SMALL_FLOWS, *SHAPES)):
            if not (dtype == torch.float16 and FAMILIES[name].overflows_in_fp16):
                yield f"{name}, {precision_name(dtype)}", partial(_agreement, name, session.device, dtype)


def _agreement(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    small = _small(name)
    found, on_cpu = (agreement(*small, place, dtype) for place in (device, CPU))
    # Over the many blocks of SDXL rounding to bf16 adds up to more than the usual limit, on a CPU too.
    is_good = found.is_good or found.gradient < 2 * on_cpu.gradient
    return {**asdict(found), "gradient_on_cpu": on_cpu.gradient, "is_good": is_good}


def plans(session: Session) -> Measurements:
    """Compare the gradient under each memory plan with that under the fastest plan that stores weights alike."""
    for name in session.some(COMPARED):
        yield from beside_the_first(session, name, [(str(plan), {"plan": plan}) for plan in session.some(PLANS)])


def beside_the_first(session: Session, name: str, ways: Iterable[tuple[str, Mapping[str, Any]]]) -> Measurements:
    """Compare the gradients of a family that each of these ways gives, with their options of `_beside`."""
    small, first = _small(name), {}
    for way, options in ways:
        yield f"{name}, {way}", partial(_beside, first, *small, session.device, **options)


def _beside(
    first: dict[str, Tensor],
    base: Base,
    cache: LatentCache,
    device: torch.device,
    plan: MemoryPlan = PLANS[0],
    compile: bool = False,
) -> dict[str, Any]:
    """Compare a gradient with the first one whose plan stores weights alike. `first` keeps these."""
    config = TrainConfig(rank=4, precision="fp32", compile=compile)
    run = Run(TrainingInputs.on(device, cache, base, config), plan=plan)
    if run.model.why_not_compiled:
        raise BadConfig(run.model.why_not_compiled)
    for name, parameter in run.parameters.items():
        if name.endswith(".up"):
            parameter.data.fill_(0.01)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        run.accumulate()  # blocks are prefetched only the second time
        run.accumulate()
    gradient = torch.cat([p.grad.flatten().cpu() for p in run.parameters.values() if p.grad is not None]).double()
    other = first.setdefault(plan.weights, gradient)
    apart = float((gradient - other).norm() / other.norm().clamp_min(1e-30))
    wide = float((gradient - first["full"]).norm() / first["full"].norm().clamp_min(1e-30))
    return {"apart": apart, "is_good": apart < ALIKE, "apart_from_full_weights": wide}


def products_in_eight_bits(session: Session) -> Measurements:
    """Compare products in 8 bits with the CPU's."""
    for kind in ("int8", "fp8"):
        yield kind, partial(_products_apart, kind, session.device, session.dtype)


def _products_apart(kind: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    found: list[list[Tensor]] = []
    for place in (CPU, device):
        found.append([])
        for outputs, inputs in ((1, 1), (4, 1), (1, 4)):  # those of a block of a transformer
            shape = outputs, inputs = outputs * SMALL_CHANNELS, inputs * SMALL_CHANNELS
            weight = eight_bit_weight(kind, shape).map(lambda part, place=place: part.to(place))
            generator = torch.Generator().manual_seed(1)
            x, gradient = (torch.randn(64, side, generator=generator).to(place, dtype) for side in (inputs, outputs))
            dequantise = InEightBits(weight.dequantise)
            found[-1] += [linear(x, dequantise, weight.parts).cpu(), times(gradient, dequantise, weight.parts).cpu()]
    distances = [float((b - a).norm() / a.norm().clamp_min(1e-30)) for a, b in zip(*found, strict=True)]
    return {"apart": max(distances), "is_good": max(distances) < DIFFERENT_ROUNDING}


def resuming(session: Session) -> Measurements:
    """Compare a training run with an equal one and with a resumed one, with and without `deterministic`."""
    for name in session.some(COMPARED):
        for deterministic in session.some((True, False)):
            way = "deterministic" if deterministic else "as it is"
            yield f"{name}, {way}", partial(_resumed, name, session.device, deterministic)


def _resumed(name: str, device: torch.device, deterministic: bool) -> dict[str, Any]:
    """Return the largest difference of a trained number after six steps, between equal runs and after resuming."""
    base, cache = _small(name)

    def begun() -> Run:
        return Run(TrainingInputs.on(device, cache, base, TrainConfig(rank=4, learning_rate=1e-3)))

    def end(run: Run) -> Tensor:
        while run.step < 6:
            run.train_step()
        return torch.cat([p.detach().flatten().cpu() for p in run.parameters.values()])

    with deterministic_if(deterministic):
        first, second, stopped, third = begun(), begun(), begun(), begun()
        for _ in range(3):
            stopped.train_step()
        restore_run(third, pack_run(stopped, {}, {}, []))
        ends = [end(run) for run in (first, second, third)]
    equal, after = (float((other - ends[0]).abs().max()) for other in ends[1:])
    return {"equal": equal, "resumed": after, **({"is_good": equal == after == 0} if deterministic else {})}


STAGES = {
    "start": start,
    "families": families,
    "plans": plans,
    "products in 8 bits": products_in_eight_bits,
    "resuming": resuming,
}
