"""Time training, drawing and products on a GPU, and the share of its rate that each part of a job reaches."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from core.device import precision_name, processor
from core.lora.apply import apply
from core.lora.file import LoraFile
from core.models.memory_plan import PLANS, MemoryPlan
from core.models.quantised_layers import InEightBits, linear, times
from core.pictures.generate import GenerateConfig, PictureJob, generate
from core.pictures.headshot import FacePass
from core.storage.files import write_text
from core.storage.stored import Dequantise, QuantisedTensor
from core.studio.passes import Passes
from core.studio.speed import speed_of
from core.training.drawing import Drawing
from core.training.recipes import FEWER_PICTURES
from core.training.samples import SAMPLE_BATCH, build_draw_shots, sample_size, sampling_steps
from core.training.step import Run
from lab.bench import matmul
from lab.gpu.agreement import eight_bit_weight
from lab.gpu.session import RANK, Measurements, Session, profiled
from lab.timing import peak_memory, seconds, synchronize
from tests.random_models import CAPTION

KERNELS = 10
"""The longest kernels that are listed."""
PRODUCTS = ((2304, 640, 5120), (576, 1280, 10240), (2304, 3072, 12288))
"""Rows, inputs and outputs of the widest layers of SDXL at 768 px, and of FLUX.1."""


def steps(session: Session) -> Measurements:
    """Time steps with prior prediction, on the GPU and on the host, and list the longest kernels."""
    for batch in session.some((1, 4)):
        yield f"batch {batch}", partial(_steps, session, batch)


def _steps(session: Session, batch: int) -> dict[str, Any]:
    run = _run(session, batch_size=batch)
    taken = _step_seconds(session, run)
    kernels = profiled(run.train_step, session.device)
    # Kernels on so small a picture take hardly any time, so that the host's remains.
    small = session.config(batch_size=batch, resolution=64)
    host = _step_seconds(session, Run(session.inputs(session.sdxl, small), PLANS[0]))
    longest = [f"{1000 * each:.2f} ms, {count} × {name[:60]}" for name, each, count in kernels[:KERNELS]]
    return {
        "seconds": taken, "seconds a picture": taken / batch, "on the GPU": sum(each for _, each, _ in kernels),
        "on the host": host, "kernels": sum(count for *_, count in kernels), "longest": longest,
    }  # fmt: skip


def _run(session: Session, plan: MemoryPlan = PLANS[0], **settings: Any) -> Run:
    return Run(session.inputs(session.sdxl, session.config(**settings)), plan)


def _step_seconds(session: Session, run: Run) -> float:
    for _ in range(2):
        run.train_step()
    return seconds(run.train_step, session.device, session.times)[0]


def layouts(session: Session) -> Measurements:
    """Time the same steps with convolutions in the layout that tensor cores prefer."""
    yield "channels_last", partial(_channels_last, session)


def _channels_last(session: Session) -> dict[str, float]:
    run = _run(session)
    plain = _step_seconds(session, run)
    for layer in run.model.denoiser.modules():
        if isinstance(layer, nn.Conv2d) and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)
    taken = _step_seconds(session, run)
    return {"seconds": taken, "seconds without": plain, "share": taken / plain}


# --- the parts of a job ---


@dataclass(frozen=True)
class Unit:
    """What the parts of a job are counted with, and the GPU's rate."""

    passes: Passes
    size: tuple[int, int]
    """The size of training pictures, in pixels."""
    drawn: tuple[int, int]
    """The size of headshots."""
    rate: float
    """The operations per second of a large matrix product, as the ledger measures it."""


def parts(session: Session) -> Measurements:
    """Time each part of a job, and divide its counted operations by the time and by the rate of a large product.

    shares.json gets the shares, by the names of the ledger's parts.
    """
    base, config = session.sdxl, session.config()
    side = config.resolution or base.resolution
    passes = Passes.of(base, config)
    of_drawn = 64 if session.small else base.resolution
    rate = speed_of(base, session.device, config.precision).rate
    unit = Unit(passes, (side, side), (of_drawn, of_drawn), rate)
    shares: dict[str, float] = {}
    known: dict[str, float] = {}
    measured: Mapping[tuple[str, ...], Callable[[], tuple[float, float]]] = {
        ("training",): partial(_training, session, unit, known),
        ("prior prediction",): partial(_prior, session, unit, known),
        ("headshots", "class images"): partial(_headshots, session, unit),
        ("likeness", "samples"): partial(_likeness, session, unit),
        ("face pass",): partial(_headshots, session, unit, redrawn=True),
        ("encoding",): partial(_encoding, session, unit),
        ("recomputation",): partial(_recomputation, session, unit, known),
    }
    for names, work in measured.items():
        yield ", ".join(names), partial(_part, session, unit, names, work, shares)


def _part(
    session: Session,
    unit: Unit,
    names: tuple[str, ...],
    work: Callable[[], tuple[float, float]],
    shares: dict[str, float],
) -> dict[str, float]:
    taken, operations = work()
    share = operations / taken / unit.rate
    shares |= dict.fromkeys(names, share)
    found = {
        "processor": processor(session.device), "precision": precision_name(session.dtype), "date": date.today().isoformat(),
        "family": session.sdxl.family.name, "operations per second": unit.rate, "shares": shares,
    }  # fmt: skip
    write_text(session.folder / "shares.json", json.dumps(found, indent=1))
    return {"seconds": taken, "TFLOP": operations / 1e12, "share": share, "TFLOP/s of a product": unit.rate / 1e12}


def _training(session: Session, unit: Unit, known: dict[str, float]) -> tuple[float, float]:
    known["plain"] = _step_seconds(session, _run(session, prior_prediction=0.0))
    return known["plain"], unit.passes.train(unit.size)


def _prior(session: Session, unit: Unit, known: dict[str, float]) -> tuple[float, float]:
    taken = _step_seconds(session, _run(session)) - known["plain"]
    return taken, unit.passes.predict(unit.size) + unit.passes.train(unit.size)


def _recomputation(session: Session, unit: Unit, known: dict[str, float]) -> tuple[float, float]:
    plan = MemoryPlan(1.0)
    taken = _step_seconds(session, _run(session, plan, prior_prediction=0.0)) - known["plain"]
    return taken, unit.passes.recompute(plan, unit.size)


def _headshots(session: Session, unit: Unit, redrawn: bool = False) -> tuple[float, float]:
    """Time the second of two pictures that are drawn, or redrawn as in the face pass. The first one includes loading."""
    base, lora = session.sdxl, _lora(session)
    steps = 4 if session.small else base.steps
    jobs = [PictureJob(CAPTION, seed, size=unit.drawn, steps=steps, guidance=base.guidance) for seed in range(2)]
    starts = {job: Image.new("RGB", unit.drawn) for job in jobs} if redrawn else None
    denoise = FacePass().denoise if redrawn else 1.0
    config = GenerateConfig(precision=session.config().precision)
    pictures = generate(base, [(lora, 1.0)], jobs, config, starts=starts, denoise=denoise, device=session.device)
    next(pictures)
    taken = seconds(lambda: next(pictures), session.device)[0]
    drawn = unit.passes.draw(base, unit.drawn, max(1, round(denoise * steps)), base.guidance)
    return taken, drawn + (unit.passes.encode(unit.drawn) if redrawn else 0)


def _lora(session: Session) -> LoraFile:
    """Return a LoRA on SDXL that changes little."""
    run = _run(session)
    for parameter in run.parameters.values():
        parameter.data.normal_(std=0.01)
    lora = run.model.adapter.export(run.parameters, session.sdxl, {})
    assert isinstance(lora, LoraFile)
    return lora


def _likeness(session: Session, unit: Unit) -> tuple[float, float]:
    """Time the second batch of pictures that is drawn between two steps."""
    base, config = session.sdxl, session.config(**(FEWER_PICTURES | ({"sample_steps": 2} if session.small else {})))
    run, size = _run(session), sample_size(base, unit.size)
    conditioning = next(iter(session.inputs(base, config).cache.text.values()))
    draw = build_draw_shots(base, config, {CAPTION: (conditioning, conditioning)}, session.device, size)
    drawing = Drawing(run)

    def look() -> None:
        drawing.draw(draw, [(CAPTION, seed) for seed in range(SAMPLE_BATCH)], lambda _: None)

    look()
    picture = unit.passes.draw(base, size, sampling_steps(base, config), base.guidance)
    return seconds(look, session.device)[0], SAMPLE_BATCH * picture


def _encoding(session: Session, unit: Unit) -> tuple[float, float]:
    vae = session.sdxl.load("vae", session.device, torch.float32)
    pixels = torch.zeros(1, 3, *reversed(unit.size), device=session.device)

    def encode() -> object:
        with torch.no_grad():
            return session.sdxl.family.encode_image(vae, pixels)

    encode()
    return seconds(encode, session.device, session.times)[0], unit.passes.encode(unit.size)


# --- products, LoRAs and drawing ---


def rates(session: Session) -> Measurements:
    """Measure how fast large matrix products are in each precision."""
    for dtype in session.some((torch.bfloat16, torch.float16, torch.float32)):
        yield precision_name(dtype), partial(_rate, session.device, dtype)


def _rate(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    product, operations = matmul(device, dtype)
    return {"TFLOP/s": operations / seconds(product, device, 5)[0] / 1e12}


def applying(session: Session) -> Measurements:
    """Time applying a LoRA to SDXL on the GPU, and removing it."""
    yield f"rank {RANK}", partial(_applied, session)


def _applied(session: Session) -> dict[str, Any]:
    lora = _lora(session)
    target = {
        "family": session.sdxl.family.name,
        "denoiser": session.sdxl.load("denoiser", session.device, session.dtype),
    }
    apply(lora, target).remove()
    synchronize(session.device)
    begun = time.perf_counter()
    applied = apply(lora, target)
    synchronize(session.device)
    between = time.perf_counter()
    removing = seconds(applied.remove, session.device)[0]
    again: list[float] = []
    peak = peak_memory(
        lambda: again.append(seconds(lambda: apply(lora, target, for_good=True), session.device)[0]), session.device
    )
    return {"applying": between - begun, "removing": removing, "for good": again[0], "peak": peak}


def products(session: Session) -> Measurements:
    """Time a forward and a backward product in 8 bits and with the weight dequantised, many in a row."""
    for rows, inputs, outputs in session.some(PRODUCTS):
        for kind in ("int8", "fp8"):
            yield f"{kind}, {rows} × {inputs} → {outputs}", partial(_product, session, kind, rows, inputs, outputs)


def _product(session: Session, kind: str, rows: int, inputs: int, outputs: int) -> dict[str, float]:
    device, dtype = session.device, session.dtype
    narrow = eight_bit_weight(kind, (outputs, inputs)).map(lambda part: part.to(device))
    wide = QuantisedTensor((narrow.dequantised(dtype),), lambda parts, _: parts[0], narrow.shape)
    x, gradient = (torch.randn(rows, side, device=device).to(dtype) for side in (inputs, outputs))

    def taken(dequantise: Dequantise, parts: tuple[Tensor, ...]) -> float:
        def both() -> None:
            linear(x, dequantise, parts)
            times(gradient, dequantise, parts)

        both()
        return seconds(both, device, 6 * session.times)[0]

    of_wide = taken(wide.dequantise, wide.parts)
    dequantised, in_eight_bits = (
        taken(narrow.dequantise, narrow.parts),
        taken(InEightBits(narrow.dequantise), narrow.parts),
    )
    return {"wide": of_wide, "dequantised": dequantised, "in 8 bits": in_eight_bits, "share": in_eight_bits / of_wide}


STAGES = {
    "rates": rates,
    "steps": steps,
    "parts of a job": parts,
    "applying a LoRA": applying,
    "products in 8 bits": products,
    "layouts": layouts,
}
