"""Measure a GPU in four commands, each within a time limit: `python -m tools.gpu COMMAND`, with one of COMMANDS.

It requires a torch that is built for the GPU, and what core requires. A command runs stages, and a stage yields its
measurements, the most important first. Each result is written to a file as soon as it is measured. A measurement that fails is
recorded with its error, and the next one starts.
"""

import argparse
import functools
import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from core.config import TrainConfig
from core.device import deterministic_if, device_and_dtype, precision_name, release_memory, whole_or_in_tiles
from core.doctor import examine
from core.errors import BadConfig
from core.models.base import Base, CaptionEncoder
from core.models.families import FAMILIES
from core.models.memory_plan import PLANS, MemoryPlan, blocks_of
from core.models.narrow_layers import InEightBits, linear, times
from core.pictures.generate import Job, generate
from core.pictures.sampling import load_vae
from core.storage.files import write_text
from core.training.encode import LatentCache
from core.training.inputs import TrainingInputs
from core.training.loop import accumulate_within_memory
from core.training.memory_prediction import choose_plan, predicted_memory
from core.training.state import pack_run, restore_run
from core.training.step import Run
from tools.bench import LEAST_ROUNDS, append_text, bench, format_report, matmul, take_turns
from tools.bench_loops import OurLoop
from tools.random_models import CAPTION, REAL_CHANNELS, SHAPES, random_base, random_cache, random_component
from tools.small_flows import FLOW, SMALL_FLOWS, WIDE_FLOW, random_flow
from tools.timing import peak_memory, seconds
from tools.trials import (
    FLUX_WIDTH,
    SMALL_CHANNELS,
    SMALL_RESOLUTION,
    agreement,
    eight_bit_weights,
    products,
    trial,
)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `resumed`; torch reads it at the first product

T = TypeVar("T")
Measurements = Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]
"""Names of measurements, each with the function that makes it."""
CPU = torch.device("cpu")
UNET, LARGE_UNET = SHAPES
SPEEDS = ((LARGE_UNET, 1024, 1), (UNET, 512, 1), (LARGE_UNET, 1024, 4), (UNET, 512, 8))
"""The family, pixels and batch size of each benchmark."""
CARDS = (8, 12, 16, 24, 4)
"""The memory, in GiB, that the GPU is limited to."""
FIRST_PLANS = (PLANS[0], PLANS[1], PLANS[3], PLANS[7], PLANS[-1])
"""The memory plans that are measured first."""
BLOCK = 5
"""The steps that a loop makes in a round."""
LONGEST = 30.0
"""The expected seconds of a stage's first measurement."""
DIFFERENT_ROUNDING = 1e-2
"""The largest difference of two products in 8 bits: numbers at a half may be rounded up or down."""
ALIKE = 1e-3
"""The largest difference of two gradients in fp32 that rounding explains, as a share of their norm."""


@dataclass
class Session:
    """The GPU to measure, and when to stop."""

    device: torch.device
    dtype: torch.dtype
    until: float
    """The monotonic time of the limit."""
    small: bool = False
    """Whether models are small and cases few, for tests."""

    def some(self, cases: Sequence[T]) -> Sequence[T]:
        """All cases, or only the first if `small`."""
        return cases[:1] if self.small else cases

    @functools.cached_property
    def large_unet(self) -> tuple[Base, TrainConfig, LatentCache]:
        """LARGE_UNET in its published size with random weights on the CPU, settings, and a random picture."""
        family, channels = (UNET, SMALL_CHANNELS) if self.small else (LARGE_UNET, REAL_CHANNELS)
        base = _at_home(random_base(family, channels, self.device, self.dtype))
        config = TrainConfig(resolution=64 if self.small else 1024)
        return base, config, random_cache(base, config)

    @functools.cached_property
    def wide_flow(self) -> tuple[Base, TrainConfig, LatentCache]:
        """A transformer of the published width with a quarter of the blocks, settings, and a random picture."""
        base = _at_home(random_flow(FLOW, SMALL_FLOWS[FLOW] if self.small else WIDE_FLOW, self.device, self.dtype))
        config = TrainConfig(resolution=(16 if self.small else 128) * base.latent_shape.pixels)
        return base, config, random_cache(base, config)


def _at_home(base: Base) -> Base:
    """Move the weights to the CPU. The GPU draws random ones much faster."""
    return replace(
        base,
        components={
            part: replace(component, tensors={name: tensor.cpu() for name, tensor in component.tensors.items()})
            for part, component in base.components.items()
        },
    )


def _small(name: str) -> tuple[Base, LatentCache]:
    """A small base model with random weights on the CPU, and a random picture."""
    if name in SHAPES:
        base = random_base(name, SMALL_CHANNELS, CPU, torch.float32)
        return base, random_cache(base, TrainConfig(resolution=SMALL_RESOLUTION))
    base = random_flow(name, SMALL_FLOWS[name], CPU, torch.float32)
    return base, random_cache(base, TrainConfig())


# --- correctness ---


def families(session: Session) -> Measurements:
    """Compare loss and gradient of each family with the CPU's in fp32."""
    for dtype in session.some((torch.float32, torch.bfloat16, torch.float16)):
        for name in session.some((*SMALL_FLOWS, *SHAPES)):
            if not (dtype == torch.float16 and FAMILIES[name].overflows_in_fp16):
                yield f"{name}, {precision_name(dtype)}", partial(_agreement, name, session.device, dtype)


def _agreement(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    small = _small(name)
    found, on_cpu = (agreement(*small, place, dtype) for place in (device, CPU))
    # Over the many blocks of LARGE_UNET rounding to bf16 adds up to more than the usual limit, on a CPU too.
    is_good = found.is_good or found.gradient < 2 * on_cpu.gradient
    return {**asdict(found), "gradient_on_cpu": on_cpu.gradient, "is_good": is_good}


def plans(session: Session) -> Measurements:
    """Compare the gradient under each memory plan with that under the fastest plan that stores weights alike."""
    for name in session.some((FLOW, UNET)):
        yield from _beside_the_first(session, name, [(str(plan), {"plan": plan}) for plan in session.some(PLANS)])


def compiled(session: Session) -> Measurements:
    """Compare the gradient of compiled blocks with that of plain ones."""
    for name in session.some((FLOW, UNET)):
        ways = [("plain", {}), ("compiled", {"compile": not session.small})]
        yield from _beside_the_first(session, name, ways)


def _beside_the_first(session: Session, name: str, ways: Iterable[tuple[str, Mapping[str, Any]]]) -> Measurements:
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
        for weight in eight_bit_weights(SMALL_CHANNELS)[kind]:
            weight = weight.map(lambda part, place=place: part.to(place))
            outputs, inputs = weight.shape
            generator = torch.Generator().manual_seed(1)
            x, gradient = (torch.randn(64, side, generator=generator).to(place, dtype) for side in (inputs, outputs))
            widen = InEightBits(weight.widen)
            found[-1] += [linear(x, widen, weight.parts).cpu(), times(gradient, widen, weight.parts).cpu()]
    distances = [float((b - a).norm() / a.norm().clamp_min(1e-30)) for a, b in zip(*found, strict=True)]
    return {"apart": max(distances), "is_good": max(distances) < DIFFERENT_ROUNDING}


def resuming(session: Session) -> Measurements:
    """Compare a training run with an equal one and with a resumed one, with and without `deterministic`."""
    for name in session.some((FLOW, UNET)):
        # cuBLAS reads its setting once per process.
        yield f"{name}, deterministic", partial(apart, resumed, name, session.device, True)
        if not session.small:
            yield f"{name}, as it is", partial(resumed, name, session.device, False)


def apart(work: Callable[..., T], *args: Any) -> T:
    """Call `work` in a new process, and return its result. Raises TimeoutError after two minutes."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply_async(work, args).get(120)


def resumed(name: str, device: torch.device, deterministic: bool) -> dict[str, float]:
    """The largest difference of a trained number after six steps, between equal runs and after resuming."""
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
    return {"equal": float((ends[1] - ends[0]).abs().max()), "resumed": float((ends[2] - ends[0]).abs().max())}


# --- memory ---


def copies(session: Session) -> Measurements:
    """Measure how fast weights are copied to the GPU."""
    size = 2**20 if session.small else 2**28
    there = torch.empty(size, dtype=torch.uint8, device=session.device)
    pageable, locked = (torch.empty(size, dtype=torch.uint8, pin_memory=pin) for pin in (False, True))
    ways = {
        "pageable": partial(there.copy_, pageable),
        "page-locked": partial(there.copy_, locked, non_blocking=True),
        "on the GPU": there.clone,
    }
    for name, work in ways.items():
        yield name, partial(_rate, work, size, session.device)


def _rate(work: Callable[[], object], amount: float, device: torch.device) -> dict[str, float]:
    work()
    return {"giga_a_second": amount / max(seconds(work, device, 5)[0], 1e-9) / 1e9}


def memory(which: Sequence[MemoryPlan], session: Session) -> Measurements:
    """Measure time and memory of steps under memory plans, beside the predicted memory."""
    for plan in session.some(which):
        for base, config, cache in (session.large_unet, session.wide_flow):
            yield f"{base.family.title}, {plan}", partial(_trial, session, base, config, cache, plan)


def _trial(session: Session, base: Base, config: TrainConfig, cache: LatentCache, plan: MemoryPlan) -> dict[str, Any]:
    tried = asdict(trial(cache, base, config, session.device, session.dtype, plan))
    kept = {name: tried[name] for name in ("seconds", "predicted", "measured", *(["error"] if tried["error"] else []))}
    return {**kept, "reserved": torch.cuda.max_memory_reserved(session.device)}


def run_ahead(session: Session) -> Measurements:
    """Measure the memory of offloading on a GPU that is slowed down, so that the host runs ahead."""
    for base, config, cache in (session.wide_flow, session.large_unet):
        yield base.family.title, partial(_slowed, session, base, config, cache)


def _slowed(session: Session, base: Base, config: TrainConfig, cache: LatentCache) -> dict[str, Any]:
    plan = PLANS[-1]
    run = Run(TrainingInputs.on(session.device, cache, base, config), plan=plan)
    sleep: Any = torch.cuda._sleep
    for block in () if session.small else blocks_of(run.model.denoiser):
        block.register_forward_pre_hook(lambda *_: sleep(20_000_000))  # cycles, about a hundredth of a second
    run.train_step()
    peak = peak_memory(run.train_step, session.device)
    need = predicted_memory(TrainingInputs(cache, base, config, session.device, session.dtype), plan)
    return {"measured": peak, "predicted": need}


def cards(session: Session) -> Measurements:
    """Limit the GPU's memory, and record the memory plan that is chosen and whether its steps fit."""
    total = torch.cuda.get_device_properties(session.device).total_memory
    for size in session.some(CARDS):
        for base, config, cache in (session.large_unet, session.wide_flow):
            if size * 2**30 <= total:
                share = size * 2**30 / total
                yield f"{base.family.title}, {size} GiB", partial(_bounded, session, base, config, cache, size, share)


def _bounded(
    session: Session, base: Base, config: TrainConfig, cache: LatentCache, size: float, share: float
) -> dict[str, Any]:
    warnings: list[str] = []
    torch.cuda.set_per_process_memory_fraction(share, session.device)
    try:
        limited = replace(config, memory_limit=0.9 * size)
        plan = choose_plan(TrainingInputs(cache, base, limited, session.device, session.dtype), warnings.append)
        run = Run(TrainingInputs.on(session.device, cache, base, config), plan=plan)
        for _ in range(3):
            run.update(accumulate_within_memory(run, warnings.append))
        ran, step = run.model.memory.plan, seconds(run.train_step, session.device)[0]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, session.device)
    reserved = torch.cuda.max_memory_reserved(session.device)
    return {
        "chosen": str(plan), "ran_with": str(ran), "seconds": step, "reserved": reserved, "warnings": warnings,
    }  # fmt: skip


# --- speed ---


def rates(session: Session) -> Measurements:
    """Measure how fast matrix products are in each precision."""
    for dtype in session.some((torch.bfloat16, torch.float16, torch.float32)):
        yield precision_name(dtype), partial(_product_rate, session.device, dtype)


def _product_rate(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    return _rate(*matmul(device, dtype), device)


def eight_bit_times(session: Session) -> Measurements:
    """Time products in 8 bits, as a share of the time with widened weights, at the widths of SDXL, FLUX.1 and Krea 2."""
    for width in session.some((SMALL_CHANNELS,) if session.small else (1280, FLUX_WIDTH, 6144)):
        yield f"width {width}", partial(products, session.device, session.dtype, width)


def speeds(compile: bool, which: Sequence[tuple[str, int, int]], session: Session) -> Measurements:
    """Run the benchmark against a plain loop of diffusers and peft."""
    for family, pixels, batch in session.some(which):
        channels, steps = REAL_CHANNELS, LEAST_ROUNDS * BLOCK
        if session.small:
            family, pixels, channels, steps = UNET, 64, SMALL_CHANNELS, 1
        config = TrainConfig(
            resolution=pixels, batch_size=batch, gradient_checkpointing="off", compile=compile and not session.small
        )
        yield (
            f"{FAMILIES[family].title}, {pixels} px, batch {batch}",
            partial(bench, family, config, steps=steps, channels=channels, device=session.device, until=session.until),
        )


def compiled_flow(session: Session) -> Measurements:
    """Measure a step of a transformer with compiled blocks against one with plain blocks."""
    yield "a quarter of the blocks", partial(_compiled_flow, session)


def _compiled_flow(session: Session) -> dict[str, Any]:
    base, config, cache = session.wide_flow
    config = replace(config, gradient_checkpointing="off")
    begun = time.monotonic()
    fast = OurLoop(cache, base, replace(config, compile=not session.small), session.device)
    fast.step()
    first = time.monotonic() - begun
    loops = {"compiled": fast, "plain": OurLoop(cache, base, config, session.device)}
    for loop in loops.values():
        loop.step()
        loop.forward()
    work, _ = matmul(session.device, session.dtype)
    rounds = 1 if session.small else LEAST_ROUNDS
    taken = take_turns(loops, work, session.device, rounds, BLOCK, until=session.until)
    steps = {name: taken[f"{name} step"] for name in loops}
    ratios = [a / b for a, b in zip(steps["compiled"], steps["plain"], strict=True)]
    return {
        **{name: median(taken[name]) for name in sorted(taken) if name.endswith(("step", "forward", "host"))},
        "compiled over plain": median(ratios), "rounds": len(ratios), "seconds to the first step": first,
    }  # fmt: skip


def drawing(session: Session) -> Measurements:
    """Measure drawing a picture, and decoding it whole and in tiles."""
    widths = (32,) * 4 if session.small else (128, 256, 512, 512)
    config = {
        "block_out_channels": widths, "down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 2,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4, "scaling_factor": 0.13025,
    }  # fmt: skip
    base, _, cache = session.large_unet
    vae = random_component(base.family, "vae", config, CPU, session.dtype)
    encoder = CaptionEncoder(lambda _: cache.text[CAPTION], "random")
    base = replace(base, components={**base.components, "vae": vae}, caption_encoder=encoder)
    side, steps = (128, 2) if session.small else (1024, 20)
    jobs = [Job(CAPTION, seed, size=(side, side), steps=steps) for seed in range(2)]
    yield f"{side} px, {steps} steps, with loading", partial(_drawn, session, base, jobs[:1])
    yield "two of these", partial(_drawn, session, base, jobs)
    for tiled in (False, True):
        yield f"VAE {'in tiles' if tiled else 'whole'}, {side} px", partial(_decoded, session, base, side, tiled)


def _drawn(session: Session, base: Base, jobs: Sequence[Job]) -> dict[str, Any]:
    taken: list[float] = []

    def draw() -> None:
        taken.append(seconds(lambda: list(generate(base, [], jobs, device=session.device)), session.device)[0])

    return {"peak": peak_memory(draw, session.device), "seconds": taken[0]}


def _decoded(session: Session, base: Base, side: int, tiled: bool) -> dict[str, Any]:
    vae: Any = load_vae(base, session.device, session.dtype)
    places = side // base.latent_shape.pixels
    latents = torch.zeros(1, base.latent_shape.channels, places, places, device=session.device)

    def decode() -> Tensor:
        if tiled and not vae.use_tiling:
            raise torch.OutOfMemoryError("out of memory")  # pretend, so that tiles are used
        return base.family.decode_latents(vae, latents.to(next(vae.parameters())))

    with torch.no_grad():
        peak = peak_memory(lambda: whole_or_in_tiles(vae, decode), session.device)
        return {"peak": peak, "seconds": seconds(decode, session.device, 5)[0]}


# --- running ---

Stage = Callable[[Session], Measurements]
COMMANDS: Mapping[str, Mapping[str, Stage]] = {
    "correctness": {
        "families": families,
        "plans": plans,
        "products in 8 bits": products_in_eight_bits,
        "resuming": resuming,
        "compiled": compiled,
    },
    "memory": {
        "copies": copies,
        "plans": partial(memory, FIRST_PLANS),
        "run-ahead": run_ahead,
        "cards": cards,
        "other plans": partial(memory, [plan for plan in PLANS if plan not in FIRST_PLANS]),
    },
    "speed": {
        "rates": rates,
        "products in 8 bits": eight_bit_times,
        "steps": partial(speeds, False, SPEEDS),
        "drawing": drawing,
    },
    "compiled": {
        "transformer": compiled_flow,
        "steps": partial(speeds, True, [SPEEDS[1], SPEEDS[0], SPEEDS[2]]),
    },
}
"""The stages of each command."""


def measure(
    session: Session, command: str, output: Path, say: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Run a command's stages, and return the date, the machine and the results, which are also written to `output`.

    No measurement starts if the longest one of its stage so far would not fit into the time left. `say` is told what is
    being measured.
    """
    stages: dict[str, dict[str, Any]] = {}
    machine = examine(session.device).as_dict()
    found = {"command": command, "date": date.today().isoformat(), "machine": machine, "stages": stages}
    for name, stage in COMMANDS[command].items():
        rows, longest = stages.setdefault(name, {}), LONGEST
        try:
            for row, work in stage(session):
                begun = time.monotonic()
                if begun + longest > session.until:
                    rows[row] = {"skipped": "no time left for this and the rest"}
                    break
                say(f"{name}: {row}")
                rows[row] = _result(work)
                longest = max(longest, time.monotonic() - begun)
                write_text(output, json.dumps(found, indent=1))
                _forget(session.device)
        except Exception as error:  # the next stage may work
            rows["all"] = {"error": _described(error)}
        write_text(output, json.dumps(found, indent=1))
        _forget(session.device)
    return found


def _result(work: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    try:
        return work()
    except Exception as error:
        return {"error": _described(error)}


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _forget(device: torch.device) -> None:
    """Free what a measurement leaves behind, which would count in the next one's peak."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
    gc.collect()
    release_memory()
    torch.cuda.reset_peak_memory_stats(device)


def as_markdown(found: Mapping[str, Any], command: str) -> str:
    """Format the results as a section of a page, with the GPU, the date and the command."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        "", f"### On a GPU: {found['command']} ({found['date']})", "", f"{machine['processor']}; {versions}", "",
        f"`{command}`",
    ]  # fmt: skip
    for name, rows in found["stages"].items():
        reports = {row: result for row, result in rows.items() if "step_over_peer" in result}
        others = {row: result for row, result in rows.items() if row not in reports}
        lines += ["", f"**{name[0].upper()}{name[1:]}**"]
        lines += [f"\n{format_report(report)}" for report in reports.values()]
        columns = list(dict.fromkeys(key for result in others.values() for key in result))
        if columns:
            lines += ["", f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        for row, result in others.items():
            lines.append(f"| {row} | {' | '.join(_cell(result.get(key)) for key in columns)} |")
    return "\n".join([*lines, ""])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 2**20:
        return f"{value / 2**30:.2f} GiB"
    return f"{value:.3g}" if isinstance(value, float) else str(value or "")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure a GPU.")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--minutes", type=float, default=8, help="Minutes to spend (default: %(default)s)")
    parser.add_argument("--append", type=Path, metavar="FILE.md", help="Also append the results to this Markdown file")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="File for the results (default: gpu-COMMAND.json)"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu: torch finds no GPU; install a torch that is built for it", file=sys.stderr)
        return 1
    output = options.output or Path(f"gpu-{options.command}.json")
    session = Session(*device_and_dtype(), until=time.monotonic() + 60 * options.minutes)
    found = measure(session, options.command, output, lambda what: print(what, file=sys.stderr))
    text = as_markdown(found, f"python -m tools.gpu {options.command} --minutes {options.minutes:g}")
    if options.append:
        append_text(options.append, text)
    print(text)
    rows = [row for stage in found["stages"].values() for row in stage.values()]
    return int(any("error" in row or row.get("is_good") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
