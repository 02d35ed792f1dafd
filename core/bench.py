"""The benchmark: our training step beside that of a plain diffusers + peft loop, in one run on the same weights and input.

The denoiser has the family's real architecture and random weights made in memory; latents and conditioning have the real
shapes. The two loops take turns, so that a machine that is busy or gets warm slows both, and what is compared is the median
of the ratios of neighbours.
"""

import argparse
import contextlib
import ctypes
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Base
from .cache import EncodedImage, LatentCache
from .config import Targets, TrainConfig
from .errors import BadConfig, BadFile
from .families import FAMILIES
from .families.spec import Component, Conditioning
from .memory_plan import MemoryPlan
from .training import Run, device_and_dtype, predicted_memory

CAPTION = "a photo of sks person"
LATENT_CHANNELS, LATENT_SIZE, TOKENS = 4, 8, 77
WARM_UP = 2
"""Steps of each loop before the timed ones, the first of them reported as the time to the first step."""
MATRIX_SIZE, MATRIX_SECONDS = 8192, 0.05
"""Side of the square matrices whose product gives the machine's rate, or less where that takes this long."""


@dataclass(frozen=True)
class Shape:
    """What a family's denoiser looks like in its published size."""

    config: Mapping[str, Any]
    """Arguments of the UNet that differ from family to family; widths follow from the channels of the first level."""
    widths: tuple[int, ...]
    """Channels of each level, as multiples of the first level's."""
    heads: tuple[int, ...] | int
    """Attention heads of each level, as multiples of the first level's channels / 64; a number: whatever the width."""
    pooled: int | None
    """Width of the pooled text that the denoiser is told beside the context; None: it is not told."""


REAL_CHANNELS = 320
SHAPES = {
    "sd15": Shape(
        config={
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            "cross_attention_dim": 768,
        },
        widths=(1, 2, 4, 4),
        heads=8,
        pooled=None,
    ),
    "sdxl": Shape(
        config={
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,
        },
        widths=(1, 2, 4),
        heads=(1, 2, 4),
        pooled=1280,
    ),
}


def denoiser_config(family: str, channels: int = REAL_CHANNELS) -> dict[str, Any]:
    """The diffusers config of the family's denoiser; fewer `channels` in the first level make a small one of the same kind.

    BadConfig unless they are a multiple of 64: group norm wants 32, SDXL's attention heads are 64 wide.
    """
    if channels < 64 or channels % 64:
        raise BadConfig(f"--channels {channels}: must be a multiple of 64 (the published models have {REAL_CHANNELS})")
    shape = SHAPES[family]
    heads = shape.heads if isinstance(shape.heads, int) else tuple(n * channels // 64 for n in shape.heads)
    widths = tuple(n * channels for n in shape.widths)
    return {**shape.config, "block_out_channels": widths, "attention_head_dim": heads}


def random_base(family: str, channels: int, device: torch.device, dtype: torch.dtype) -> Base:
    """A Base of which there is only the denoiser, its random weights on the device in that dtype.

    Each layer keeps the size of its input (deviation 1 / sqrt(fan in)), so that no activation overflows in fp16.
    """
    spec, config = FAMILIES[family], denoiser_config(family, channels)
    with torch.device("meta"):
        shapes = spec.build("denoiser", config).state_dict()
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, place in shapes.items():
        tensor = torch.empty(place.shape, device=device, dtype=dtype)
        if place.ndim == 1:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)  # the norms' weights, and every bias
        else:
            tensor.normal_(std=place[0].numel() ** -0.5, generator=generator)
        tensors[name] = tensor
    return Base(
        family=spec,
        name="random weights",
        components={"denoiser": Component(config, tensors)},
        prediction_type="epsilon",
        zero_terminal_snr=False,
        resolution=spec.resolution,
    )


def random_cache(base: Base, config: TrainConfig) -> LatentCache:
    """One batch of random latents and a random caption's conditioning, in the shapes that the family's encoders make."""
    side = config.resolution or base.resolution
    latent = (LATENT_CHANNELS, side // LATENT_SIZE, side // LATENT_SIZE)
    generator = torch.Generator().manual_seed(0)
    image = EncodedImage(
        name="random",
        mean=torch.randn(latent, generator=generator),
        deviation=torch.full(latent, 0.1),
        mask=None,
        conditioning=base.family.image_conditioning((side, side), (0, 0), (side, side)),
        caption=CAPTION,
        class_caption="a photo of person",
        repeats=1,
        is_class=False,
    )
    width = base.components["denoiser"].config["cross_attention_dim"]
    text = {"context": torch.randn(1, TOKENS, width, generator=generator)}
    if pooled := SHAPES[base.family.name].pooled:
        text["pooled"] = torch.randn(1, pooled, generator=generator)
    return LatentCache((image,) * config.batch_size, {CAPTION: text}, chunks=1, digest="random")


class Loop(Protocol):
    """One way to train, as the benchmark sees it."""

    def step(self) -> None:
        """One whole optimizer step."""

    def forward(self) -> None:
        """What the step does up to its loss, without gradients, the adapter on."""


class OurLoop:
    """This project's loop, as `train_lora` runs it."""

    def __init__(self, cache: LatentCache, base: Base, config: TrainConfig, device: torch.device):
        self.run = Run(cache, base, config, device)
        self.generator = torch.Generator(device).manual_seed(0)

    def step(self) -> None:
        self.run.train_step()

    @torch.no_grad()
    def forward(self) -> None:
        self.run.picture_loss(self.run.images, [CAPTION] * len(self.run.images), self.generator)


class PlainLoop:
    """What diffusers' DreamBooth-LoRA script does in a step, written with diffusers and peft alone.

    To be fair to it, its latents are encoded before, and it adapts the same layers with the same rank.
    """

    def __init__(self, cache: LatentCache, base: Base, config: TrainConfig, device: torch.device):
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from peft import LoraConfig

        self.device, self.dtype = device_and_dtype(config, device)
        self.family, self.max_grad_norm = base.family, config.max_grad_norm
        self.denoiser: Any = base.load("denoiser", self.device, self.dtype)
        self.denoiser.add_adapter(
            LoraConfig(
                r=config.rank,
                lora_alpha=config.rank,
                init_lora_weights="gaussian",
                target_modules=base.family.denoiser_targets[config.targets],
            )
        )
        self.denoiser.train()
        self.parameters = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.lr_scheduler = get_scheduler("constant", self.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.noise_scheduler: Any = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
        )
        self.latents = torch.stack([image.mean for image in cache.images]).to(self.device)
        parts = [{**cache.text[image.caption], **image.conditioning} for image in cache.images]
        self.conditioning: Conditioning = {
            name: torch.cat([part[name] for part in parts]).to(self.device, self.dtype) for name in parts[0]
        }
        self.shown_loss = 0.0

    def loss(self) -> Tensor:
        noise = torch.randn_like(self.latents)
        timesteps = torch.randint(0, 1000, (len(self.latents),), device=self.device)
        noisy_latents = self.noise_scheduler.add_noise(self.latents, noise, timesteps).to(self.dtype)
        autocast = torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else None
        with autocast or contextlib.nullcontext():
            prediction = self.family.predict(self.denoiser, noisy_latents, timesteps, self.conditioning)
        return F.mse_loss(prediction.float(), noise.float())

    def step(self) -> None:
        loss = self.loss()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.shown_loss = loss.detach().item()

    @torch.no_grad()
    def forward(self) -> None:
        self.loss()


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    getattr(torch, device.type).synchronize()


def seconds(work: Callable[[], object], device: torch.device, times: int = 1) -> tuple[float, float, float]:
    """Seconds that one of `times` runs in a row takes, those after which the host was free again, and the processor's.

    The processor's are those of all threads together: other work on the machine lengthens them far less.
    """
    synchronize(device)
    start, used = time.perf_counter(), time.process_time()
    for _ in range(times):
        work()
    host = time.perf_counter() - start
    synchronize(device)
    return (time.perf_counter() - start) / times, host / times, (time.process_time() - used) / times


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products, convolutions and attentions in `work`, a multiply-add as two."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    aten: Any = torch.ops.aten
    # torch counts the attention kernels of a GPU, not those of the CPU, and no products in place. The arguments are the
    # shapes of the kernel's.
    more: dict[Any, Callable[..., int]] = {
        aten.addmm_: lambda total, left, right, **__: 2 * math.prod(left) * right[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
            query, key, value
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, query, key, value, *_, **__: (
            sdpa_backward_flop_count(gradient, query, key, value)
        ),
    }
    counter = FlopCounterMode(display=False, custom_mapping=more)
    with counter:
        work()
    return counter.get_total_flops()


def count_kernels(work: Callable[[], object], device: torch.device) -> int | None:
    """How many kernels and copies `work` starts on a GPU; None on another device."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        work()
        synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events() or ())


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes in use at a time during `work`: the allocator's on a GPU, the whole process's on Linux, else None."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    libc = ctypes.CDLL(None) if platform.system() == "Linux" else None
    if libc is None or not hasattr(libc, "malloc_trim"):
        return None
    libc.malloc_trim(0)  # what was freed before but is still held by the C library does not count
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's record of the peak starts anew
    work()
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak[1]) * 1024 if peak else None


def matmul(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A product of two square matrices, large enough to reach the machine's rate, and its floating-point operations."""
    size = 256
    while True:
        left, right = torch.randn(2, size, size, device=device).to(dtype)
        product = partial(torch.mm, left, right)
        product()
        if size == MATRIX_SIZE or seconds(product, device)[0] > MATRIX_SECONDS:
            return product, 2 * size**3
        size *= 2


def bench(
    family: str,
    config: TrainConfig,
    *,
    steps: int = 20,
    channels: int = REAL_CHANNELS,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """The report: what was measured on what, `ours` and `peer` each with its figures, seconds and bytes, medians of `steps`.

    `step_over_peer` is the median of the ratios of neighbouring steps, with its quartiles.
    """
    device, dtype = device_and_dtype(config, device)
    resolution = config.resolution or FAMILIES[family].resolution
    multiple = LATENT_SIZE * 2 ** (len(SHAPES[family].widths) - 1)
    if resolution % multiple:
        raise BadConfig(f"--resolution {resolution}: must be a multiple of {multiple}")
    config = replace(config, resolution=resolution)
    base = random_base(family, channels, device, dtype)
    cache = random_cache(base, config)
    loops: dict[str, Loop] = {}
    first: dict[str, float] = {}
    for name, kind in (("ours", OurLoop), ("peer", PlainLoop)):
        start = time.perf_counter()
        loops[name] = kind(cache, base, config, device)
        loops[name].step()
        synchronize(device)
        first[name] = time.perf_counter() - start
    for _ in range(WARM_UP - 1):
        for loop in loops.values():
            loop.step()
            loop.forward()
    flops = {name: count_flops(loop.step) for name, loop in loops.items()}
    kernels = {name: count_kernels(loop.step, device) for name, loop in loops.items()}
    peaks = {name: peak_memory(loop.step, device) for name, loop in loops.items()}
    product, product_flops = matmul(device, dtype)
    # On a GPU the host runs ahead of the device over several steps, as it does in training.
    block = 1 if device.type == "cpu" else 5
    rounds = max(1, steps // block)
    load = _load()
    taken: dict[str, list[float]] = {}
    for number in range(rounds):
        for name in list(loops)[:: 1 if number % 2 == 0 else -1]:
            for what in ("step", "forward"):
                measured = seconds(getattr(loops[name], what), device, block)
                for kind, value in zip(("", " host", " processor"), measured, strict=True):
                    taken.setdefault(f"{name} {what}{kind}", []).append(value)
        taken.setdefault("matmul", []).append(seconds(product, device, block)[0])
    rate = product_flops / median(taken["matmul"])
    report: dict[str, Any] = {
        "family": family,
        "channels": channels,
        "resolution": resolution,
        "batch_size": config.batch_size,
        "targets": config.targets,
        "rank": config.rank,
        "precision": {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype],
        "device": device.type,
        "processor": _processor(device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "diffusers", "peft")},
        "date": date.today().isoformat(),
        "load": load,
        "steps": rounds * block,
        "parameters": sum(tensor.numel() for tensor in base.components["denoiser"].tensors.values()),
        "matmul_flops_per_second": rate,
        "predicted_bytes": predicted_memory(cache, base, config, dtype, MemoryPlan()),
    }
    for name in loops:
        step = median(taken[f"{name} step"])
        report[name] = {
            "seconds_per_step": step,
            "seconds_per_image": step / config.batch_size,
            "forward_seconds": median(taken[f"{name} forward"]),
            "forwards_per_step": median(_ratios(taken[f"{name} step"], taken[f"{name} forward"])),
            "flops_per_step": flops[name],
            "matmul_rate_share": flops[name] / step / rate,
            "host_seconds_per_step": median(taken[f"{name} step host"]),
            "processor_seconds_per_step": median(taken[f"{name} step processor"]),
            "processor_forwards_per_step": median(
                _ratios(taken[f"{name} step processor"], taken[f"{name} forward processor"])
            ),
            "kernels_per_step": kernels[name],
            "peak_bytes": peaks[name],
            "seconds_to_first_step": first[name],
        }
    for kind in ("", "_processor"):
        ratios = _ratios(*(taken[f"{name} step{kind.replace('_', ' ')}"] for name in ("ours", "peer")))
        report[f"step_over_peer{kind}"] = median(ratios)
        report[f"step_over_peer{kind}_quartiles"] = quantiles(ratios)[::2] if len(ratios) > 1 else [ratios[0]] * 2
    return report


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", names.read_text()) if names.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _load() -> float | None:
    """How many processes wanted a processor in the last minute, this one included; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def format_report(report: Mapping[str, Any]) -> str:
    """The report as a heading and a table in Markdown."""
    ours, peer = report["ours"], report["peer"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    load = "" if report["load"] is None else f", load {report['load']:.1f}"
    low, high = report["step_over_peer_quartiles"]
    rate = report["matmul_flops_per_second"] / 1e9
    heading = [
        f"{FAMILIES[report['family']].title}, random weights ({report['parameters'] / 1e6:.1f} M), "
        f"{report['resolution']} px, batch {report['batch_size']}, {report['targets']} targets, rank {report['rank']}, "
        f"{report['precision']}",
        f"{report['device']}: {report['processor']}, {report['threads']} threads; {versions}; {report['date']}{load}",
    ]
    rows = [
        ("seconds per step", "seconds_per_step", 1, 3),
        ("seconds per image", "seconds_per_image", 1, 3),
        ("seconds per forward", "forward_seconds", 1, 3),
        ("step / forward", "forwards_per_step", 1, 2),
        ("TFLOP per step", "flops_per_step", 1e12, 3),
        (f"share of the matrix-multiply rate ({rate:.0f} GFLOP/s)", "matmul_rate_share", 1, 2),
        ("host seconds per step", "host_seconds_per_step", 1, 3),
        ("processor seconds per step", "processor_seconds_per_step", 1, 3),
        ("step / forward in processor seconds", "processor_forwards_per_step", 1, 2),
        ("kernels per step", "kernels_per_step", 1, 0),
        ("peak memory, GiB", "peak_bytes", 2**30, 2),
        ("seconds to the first step", "seconds_to_first_step", 1, 1),
    ]
    lines = ["| | ours | diffusers + peft |", "|---|--:|--:|"]
    for title, key, unit, digits in rows:
        if ours[key] is not None and peer[key] is not None:
            lines.append(f"| {title} | {ours[key] / unit:.{digits}f} | {peer[key] / unit:.{digits}f} |")
    verdict = (
        f"A step of ours takes {report['step_over_peer']:.3f} of the peer's "
        f"(median of {report['steps']} steps in turns; quartiles {low:.3f} to {high:.3f}), "
        f"in processor seconds {report['step_over_peer_processor']:.3f} "
        f"({report['step_over_peer_processor_quartiles'][0]:.3f} to {report['step_over_peer_processor_quartiles'][1]:.3f})."
    )
    memory = (
        f"Memory predicted for a run of ours: {report['predicted_bytes'] / 2**30:.2f} GiB, without Python's libraries."
    )
    return "\n\n".join([*heading, "\n".join(lines), verdict, memory])


def append_report(path: Path, report: Mapping[str, Any], command: str) -> None:
    """Adds the report to a Markdown file, under a title and with the command that it came from."""
    title = f"{FAMILIES[report['family']].title}, {report['resolution']} px, {report['precision']}, {report['device']}"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n### {title} ({report['date']})\n\n`{command}`\n\n{format_report(report)}\n")
    except OSError as error:
        raise BadFile(f"{path}: cannot be written: {error.strerror}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `facelora bench` beside `--device` and `--json`."""
    parser.add_argument("--family", choices=tuple(SHAPES), default="sd15", help="default: sd15")
    parser.add_argument("--resolution", type=int, metavar="PIXELS", help="default: the family's own")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures in a forward pass (default: 1)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (default: 16)")
    parser.add_argument("--targets", choices=get_args(Targets), default="transformer", help="default: transformer")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default: auto")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each loop (default: 20)")
    parser.add_argument("--append", type=Path, metavar="FILE", help="also add the report to this Markdown file")
    parser.add_argument(
        "--channels", type=int, default=REAL_CHANNELS, help=f"of the first level; real size: {REAL_CHANNELS} (default)"
    )


def run(options: argparse.Namespace, device: torch.device | None = None) -> dict[str, Any]:
    """The report for the command line's options."""
    if options.steps < 1:
        raise BadConfig(f"--steps {options.steps}: must be at least 1")
    config = TrainConfig(
        rank=options.rank,
        targets=options.targets,
        batch_size=options.batch_size,
        resolution=options.resolution,
        precision=options.precision,
        gradient_checkpointing="off",
    )
    return bench(options.family, config, steps=options.steps, channels=options.channels, device=device)
