"""All that has to be measured on a GPU, in one command: `python -m tests.gpu_day --minutes 9 --append docs/benchmarks.md`.

It goes through STAGES in turn. What each found is in `gpu_day.json` as soon as it is done, so that nothing is lost when the
time is over; a stage that fails is noted, and the next one begins. A stage begins no new measurement after its share of the
time. Nothing outside of the machine is asked for.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from core.bench.doctor import agreement, examine, trial
from core.bench.loops import random_base, random_cache
from core.bench.report import bench, format_report, matmul, peak_memory, seconds
from core.bench.shapes import REAL_CHANNELS
from core.cli.version import __version__
from core.config import TrainConfig
from core.device import deterministic_if, device_and_dtype, precision_name
from core.models import Base, load_base
from core.models.memory_plan import PLANS
from core.pictures.generate import Job, generate
from core.storage.files import write_file
from core.training.encode import LatentCache
from core.training.memory_prediction import choose_plan, predicted_memory
from core.training.step import Run
from tests.tooling import (
    FULL_SDXL,
    SMALL_FLOWS,
    SMALL_SD15,
    UNETS,
    encoded_cache,
    encoded_image,
    small_flow_base,
    write_checkpoint,
)

T = TypeVar("T")
CPU = torch.device("cpu")
CARDS = (8, 12, 16, 24)
"""The GiB of the cards that a larger one is bounded to."""
SPEEDS = (
    ("sd15", 512, 1, ""), ("sd15", 512, 8, ""), ("sdxl", 1024, 1, ""), ("sdxl", 1024, 4, ""),
    ("sd15", 512, 1, "compiled"), ("sdxl", 1024, 1, "compiled"), ("sdxl", 1024, 4, "compiled"),
)  # fmt: skip
"""(family, pixels, batch, way) of the table of speeds. (The bench has no published shapes of transformers.)"""


@dataclass
class Day:
    """What the stages have at hand."""

    device: torch.device
    dtype: torch.dtype
    small: bool
    """Whether everything is small, for a rehearsal."""
    until: float = 0.0
    """The monotonic time at which the current stage begins nothing new."""
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.until

    def some(self, cases: Sequence[T]) -> Sequence[T]:
        """All cases; in a rehearsal the first alone."""
        return cases[:1] if self.small else cases

    def unet(self, family: str, pixels: int, batch: int = 1) -> tuple[Base, TrainConfig, LatentCache]:
        """A denoiser of a published size with random weights on the CPU, settings, and a batch."""
        config = TrainConfig(resolution=64 if self.small else pixels, batch_size=batch)
        family = UNETS[0] if self.small else family
        base = random_base(family, 64 if self.small else REAL_CHANNELS, CPU, self.dtype)
        return base, config, random_cache(base, config)


def environment(day: Day) -> dict[str, Any]:
    """What there is, and how fast it is at most: products in three precisions, copies, and its own memory."""
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        product, operations = matmul(day.device, dtype)
        rates[name] = operations / max(seconds(product, day.device, 5)[0], 1e-9)
    size = 2**20 if day.small else 2**28
    there = torch.empty(size, dtype=torch.uint8, device=day.device)
    here = torch.empty(size, dtype=torch.uint8)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    copies = {
        "pageable": lambda: there.copy_(here),
        "page-locked": lambda: there.copy_(pinned, non_blocking=True),
        "on the device": there.clone,
    }
    bytes_a_second = {name: size / max(seconds(work, day.device, 5)[0], 1e-9) for name, work in copies.items()}
    report = examine(day.device, False, __version__).as_dict()
    return {"report": report, "operations_a_second": rates, "bytes_a_second": bytes_a_second}


def families(day: Day) -> dict[str, Any]:
    """How far loss and gradient of each family are from the CPU's in float32."""
    found = {}
    for name in day.some((*UNETS, *SMALL_FLOWS)):
        base, cache = _small(name)
        for dtype in day.some((torch.float32, torch.bfloat16, torch.float16)):
            if not day.is_over:
                found[f"{name} {precision_name(dtype)}"] = asdict(agreement(base, cache, day.device, dtype))
    return found


def _small(name: str) -> tuple[Base, LatentCache]:
    if name in UNETS:
        base = random_base(name, 64, CPU, torch.float32)
        return base, random_cache(base, TrainConfig(resolution=64))
    base = small_flow_base(name)
    shape = (base.latent_shape.channels, 16, 16)
    return base, encoded_cache(base, [encoded_image(base, "a.png", "a photo of sks person", 1, shape=shape)])


def plans(day: Day) -> dict[str, Any]:
    """How far the gradient under each plan, and of compiled blocks, is from that of the fastest plan on the same device."""
    base, cache = _small(next(iter(SMALL_FLOWS)))
    config, plain, found = TrainConfig(rank=4, precision="fp32"), None, {}
    compiled = ("compiled", PLANS[0], replace(config, compile=True))
    for name, plan, settings in day.some((*((str(p), p, config) for p in PLANS), compiled)):
        run = Run(cache, base, settings, day.device, plan=plan)
        for parameter_name, parameter in run.parameters.items():
            if parameter_name.endswith(".up"):
                parameter.data.fill_(0.01)
        run.accumulate()
        gradient = torch.cat([p.grad.flatten().cpu() for p in run.parameters.values() if p.grad is not None])
        plain = gradient if plain is None else plain
        found[name] = float((gradient - plain).norm() / plain.norm().clamp_min(1e-30))
    return found


def resuming(day: Day) -> dict[str, Any]:
    """How far two equal runs of six steps are from each other, with and without `deterministic`."""
    base, cache = _small(next(iter(SMALL_FLOWS)))
    found = {}
    for wanted in (False, True):
        with deterministic_if(wanted):
            ends = []
            for _ in range(2):
                run = Run(cache, base, TrainConfig(rank=4, learning_rate=1e-3), day.device)
                for _ in day.some(range(6)):
                    run.train_step()
                ends.append(torch.cat([p.detach().flatten().cpu() for p in run.parameters.values()]))
            found["deterministic" if wanted else "as it is"] = float((ends[0] - ends[1]).abs().max())
    return found


def speeds(day: Day) -> dict[str, Any]:
    """The benchmark's reports beside a plain loop of diffusers and peft."""
    found = {}
    for family, pixels, batch, way in day.some(SPEEDS):
        if day.is_over:
            continue
        config = TrainConfig(
            resolution=64 if day.small else pixels, batch_size=batch, compile=way == "compiled",
            gradient_checkpointing="off",
        )  # fmt: skip
        report = bench(
            family, config, steps=1 if day.small else 10, channels=64 if day.small else 320, device=day.device
        )
        found[f"{family} {pixels} px, batch {batch}{way and f', {way}'}"] = report
    return found


def memory(day: Day) -> dict[str, Any]:
    """Seconds, predicted and measured memory of steps by each plan, and what is reserved beside it."""
    found = {}
    for family, pixels in day.some((("sd15", 512), ("sdxl", 1024))):
        base, config, cache = day.unet(family, pixels)
        for plan in day.some(PLANS):
            if not day.is_over:
                tried = trial(cache, base, config, day.device, day.dtype, plan)
                reserved = torch.cuda.max_memory_reserved(day.device)
                found[f"{family} {pixels} px, {plan}"] = {**asdict(tried), "reserved": reserved}
                torch.cuda.empty_cache()
    return found


def run_ahead(day: Day) -> dict[str, Any]:
    """The memory of a step whose blocks are brought in one by one on a device that is slowed down at each block."""
    base, config, cache = day.unet("sdxl", 1024)
    plan = PLANS[-1]
    run = Run(cache, base, config, day.device, plan=plan)
    sleep: Any = getattr(torch.cuda, "_sleep", None)
    for block in run.memory._blocks if sleep and not day.small else ():
        block.register_forward_pre_hook(lambda *_: sleep(20_000_000))  # cycles, about a hundredth of a second
    run.train_step()
    peak = peak_memory(run.train_step, day.device)
    return {"measured": peak, "predicted": predicted_memory(cache, base, config, day.device, day.dtype, plan)}


def cards(day: Day) -> dict[str, Any]:
    """The plan that is chosen on a card bounded to each size, and whether its steps fit."""
    found, total = {}, torch.cuda.get_device_properties(day.device).total_memory
    base, config, cache = day.unet("sdxl", 1024)
    for size in day.some(CARDS):
        if day.is_over or size * 2**30 > total:
            continue
        torch.cuda.set_per_process_memory_fraction(size * 2**30 / total, day.device)
        warnings: list[str] = []
        limited = replace(config, memory_limit=0.9 * size)
        plan = choose_plan(cache, base, limited, day.device, day.dtype, warnings.append)
        run = Run(cache, base, config, day.device, plan=plan)
        for _ in range(2):
            run.update(run.accumulate_within_memory(warnings.append))
        found[f"{size} GiB"] = {"chosen": str(plan), "ran with": str(run.memory.plan), "warnings": warnings}
        del run
        torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0, day.device)
    return found


def whole(day: Day) -> dict[str, Any]:
    """The seconds of each phase of drawing with a full-size checkpoint, its VAE whole and in tiles among them."""
    found = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        clock = time.monotonic()
        path = write_checkpoint(Path(folder) / "base.safetensors", SMALL_SD15 if day.small else FULL_SDXL)
        base = load_base(path)
        found["writing"] = time.monotonic() - clock
        side = 128 if day.small else 1024
        found |= _decoding(day, base, side)
        clock = time.monotonic()
        jobs = [Job("a photo of a person", 1, size=(side, side), steps=2 if day.small else 20)]
        list(generate(base, [], jobs, device=day.device))
        found["one picture, with loading"] = time.monotonic() - clock
    return found


def _decoding(day: Day, base: Base, side: int) -> dict[str, Any]:
    """The seconds and the peak memory of decoding a picture whole and in tiles."""
    vae: Any = base.load("vae", day.device, day.dtype)
    places = side // base.latent_shape.pixels
    latents = torch.zeros(1, base.latent_shape.channels, places, places, device=day.device, dtype=day.dtype)

    @torch.no_grad()
    def decode() -> None:
        base.family.decode_latents(vae, latents)

    found = {}
    for name, begin in (("VAE whole", lambda: None), ("VAE in tiles", vae.enable_tiling)):
        begin()
        peak = peak_memory(decode, day.device)
        found[name] = {"seconds": seconds(decode, day.device)[0], "peak": peak}
    return found


STAGES: Mapping[str, tuple[Callable[[Day], dict[str, Any]], float]] = {
    "environment": (environment, 0.04),
    "families": (families, 0.10),
    "plans": (plans, 0.05),
    "resuming": (resuming, 0.05),
    "memory": (memory, 0.18),
    "run-ahead": (run_ahead, 0.06),
    "cards": (cards, 0.10),
    "speeds": (speeds, 0.27),
    "whole": (whole, 0.15),
}
"""The stages, each with its share of the time."""


def spend(day: Day, minutes: float, output: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """What all stages found, by stage; a stage that failed has `error`. It is also in the file `output` after each stage."""
    for name, (stage, share) in STAGES.items():
        started = time.monotonic()
        day.until = started + 60 * minutes * share
        say(f"{name} ...")
        try:
            found = stage(day)
        except Exception as error:  # the next stage may well work
            found = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        day.found[name] = {"seconds": time.monotonic() - started, **found}
        text = json.dumps(day.found, indent=1)
        write_file(output, lambda file, text=text: file.write(text.encode()))
        say(f"{name}: {found.get('error', 'done')}")
    return day.found


def as_markdown(found: Mapping[str, Any]) -> str:
    """What was found, with a table for each benchmark and a list for each other stage."""
    lines = ["", "## A day on a GPU", "", "`python -m tests.gpu_day`", ""]
    for name, results in found.items():
        lines += [f"### {name[0].upper()}{name[1:]}, {results['seconds']:.0f} s", ""]
        for key, value in results.items():
            if key != "seconds":
                is_report = isinstance(value, Mapping) and "step_over_peer" in value
                lines.append(f"**{key}**\n\n{format_report(value)}\n" if is_report else f"- {key}: {json.dumps(value)}")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--append", type=Path, metavar="FILE.md", help="also add what was found to this file")
    parser.add_argument("--output", type=Path, default=Path("gpu_day.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_day: torch finds no GPU here", file=sys.stderr)
        return 1
    device, dtype = device_and_dtype(TrainConfig())
    found = spend(Day(device, dtype, small=False), options.minutes, options.output)
    with options.append.open("a", encoding="utf-8") if options.append else nullcontext(sys.stdout) as file:
        file.write(as_markdown(found))
    return int(any("error" in results for results in found.values()))


if __name__ == "__main__":
    sys.exit(main())
