"""Time our training step beside other programs', on the same weights and inputs: `python -m lab.bench`.

The loops take turns, so that a busy or hot machine slows all of them. The median of the ratios of neighbouring steps is
compared.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, get_args

import torch

from core.cli.computing import device_from
from core.config import Precision, Targets, TrainConfig
from core.device import device_and_dtype, precision_name, processor
from core.errors import BadConfig, BadFile, FaceLoraError
from core.models.base import Base
from core.models.families import FAMILIES
from core.models.memory_plan import MemoryPlan
from core.storage.files import write_file
from core.training.encode import LatentCache
from core.training.inputs import TrainingInputs
from core.training.memory_prediction import predicted_memory
from lab.bench_loops import ComfyLoop, Loop, OurLoop, PlainLoop
from lab.flops import count_flops
from lab.timing import peak_memory, seconds, synchronize
from tests.operation_count import count_operations
from tests.random_models import REAL_CHANNELS, SHAPES, random_base, random_cache

WARM_UP = 2
"""The number of steps of each loop before the timed ones. The first is reported as the time to the first step."""
MATRIX_SIZE, MATRIX_SECONDS = 8192, 0.05
"""The largest side of the matrices whose product gives the machine's rate; a product that takes these seconds is enough."""
LEAST_ROUNDS = 8
"""The fewest rounds for meaningful quartiles."""


def count_kernels(work: Callable[[], object], device: torch.device) -> int | None:
    """Count the kernels and copies that `work` starts on a GPU; None on another device."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        work()
        synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events() or ())


def matmul(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """Return a function that multiplies two large matrices at the machine's full rate, and its floating-point operations."""
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
    comfyui: Path | None = None,
    comfyui_python: Path = Path(sys.executable),
) -> dict[str, Any]:
    """Run a benchmark, and return a description of what was timed, and figures of the loops under `ours` and `peer`.

    Figures are medians over `steps`, in seconds and bytes. `step_over_peer` is the median of the ratios of neighbouring steps,
    with its quartiles, which are None below LEAST_ROUNDS. `comfyui` is the folder of a ComfyUI, and `comfyui_python` the Python
    that runs it. Its trainer then takes turns too, for `comfyui` and `step_over_comfyui`. Raises BadFile if that ComfyUI is
    missing, and BadConfig for settings that the random model doesn't support.
    """
    if comfyui and not (comfyui / "comfy_extras" / "nodes_train.py").is_file():
        raise BadFile(f"--comfyui {comfyui}: this folder has no ComfyUI that can train")
    device, dtype = device_and_dtype(config.precision, device)
    config = replace(config, resolution=_fitting_resolution(family, config))
    base = random_base(family, channels, device, dtype)
    cache = random_cache(base, config)
    loops, first = _warm_loops(cache, base, config, device)
    comfy = ComfyLoop(cache, base, config, device, comfyui, comfyui_python) if comfyui else None
    counts = _counts(loops, config, device)
    product, product_flops = matmul(device, dtype)
    load = _load()
    # On a GPU the host runs ahead of the device by several steps, as in training.
    block = 1 if device.type == "cpu" else min(5, max(1, steps // LEAST_ROUNDS))
    taken = take_turns(loops, product, device, max(1, steps // block), block, comfy)
    if comfy:
        comfy.close()
    rate = product_flops / median(taken["matmul"])
    report: dict[str, Any] = {
        "family": family,
        "channels": channels,
        "resolution": config.resolution,
        "batch_size": config.batch_size,
        "targets": config.targets,
        "rank": config.rank,
        "compiled": config.compile,
        "precision": precision_name(dtype),
        "device": device.type,
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "diffusers", "peft")},
        "date": date.today().isoformat(),
        "load": load,
        "steps": len(taken["matmul"]) * block,
        "parameters": sum(tensor.numel() for tensor in base.components["denoiser"].tensors.values()),
        "matmul_flops_per_second": rate,
        "predicted_bytes": predicted_memory(TrainingInputs(cache, base, config, device, dtype), MemoryPlan()),
    }
    for name in loops:
        report[name] = _figures(name, taken, counts[name], config.batch_size, rate) | {
            "seconds_to_first_step": first[name]
        }
    report |= _step_over("peer", taken, "peer step") | _step_over("peer_processor", taken, "peer step processor")
    if comfy:
        report |= _step_over("comfyui", taken, "comfyui step")
        report["comfyui"] = {
            "seconds_per_step": median(taken["comfyui step"]),
            "processor_seconds_per_step": median(taken["comfyui step processor"]),
            "peak_bytes": max(taken["comfyui step peak"]),
        }
    return report


def _fitting_resolution(family: str, config: TrainConfig) -> int:
    """Return the resolution of the settings, else the family's. Raises BadConfig if the random model doesn't support it."""
    resolution = config.resolution or FAMILIES[family].resolution
    multiple = 8 * 2 ** (len(SHAPES[family].widths) - 1)
    if resolution % multiple:
        raise BadConfig(f"--resolution {resolution}: must be a multiple of {multiple}")
    return resolution


def _warm_loops(
    cache: LatentCache, base: Base, config: TrainConfig, device: torch.device
) -> tuple[dict[str, Loop], dict[str, float]]:
    """Return our loop and its peer after WARM_UP steps, and the seconds that each took to be built and take its first step."""
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
    return loops, first


def _counts(loops: Mapping[str, Loop], config: TrainConfig, device: torch.device) -> dict[str, dict[str, int | None]]:
    """Return each loop's counts for a step: arithmetic, operations, kernels and memory; None for what cannot be counted."""
    flops = {name: count_flops(loop.step) for name, loop in loops.items()}
    # Operations inside compiled blocks cannot be counted.
    operations = {
        name: None if config.compile and name == "ours" else count_operations(loop.gradients)
        for name, loop in loops.items()
    }
    kernels = {name: count_kernels(loop.step, device) for name, loop in loops.items()}
    peaks = {name: peak_memory(loop.step, device) for name, loop in loops.items()}
    return {
        name: {
            "flops_per_step": flops[name],
            "operations_per_gradient": operations[name],
            "kernels_per_step": kernels[name],
            "peak_bytes": peaks[name],
        }
        for name in loops
    }


def take_turns(
    loops: Mapping[str, Loop],
    product: Callable[[], object],
    device: torch.device,
    rounds: int,
    block: int,
    comfy: ComfyLoop | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of everything that was timed, one number for each round of `block` runs in a row.

    The keys are "step" and "forward" of each loop, alone and with "host" and "processor". For ComfyUI's trainer they are "step"
    alone and with "processor" and "peak", which is in bytes.
    """
    taken: dict[str, list[float]] = {}
    for number in range(rounds):
        for name in list(loops)[:: 1 if number % 2 == 0 else -1]:
            for what in ("step", "forward"):
                measured = seconds(getattr(loops[name], what), device, block)
                for kind, value in zip(("", " host", " processor"), measured, strict=True):
                    taken.setdefault(f"{name} {what}{kind}", []).append(value)
        if comfy:
            steps_taken = [comfy.step() for _ in range(block)]
            for kind, key in (("", "seconds"), (" processor", "processor"), (" peak", "peak")):
                taken.setdefault(f"comfyui step{kind}", []).append(median(step[key] or 0 for step in steps_taken))
        taken.setdefault("matmul", []).append(seconds(product, device, block)[0])
    return taken


def _figures(
    name: str, taken: Mapping[str, Sequence[float]], counts: Mapping[str, int | None], batch_size: int, rate: float
) -> dict[str, Any]:
    """Return the figures of one loop. `rate` is the machine's, in floating-point operations of matrix products per second."""
    step, flops = median(taken[f"{name} step"]), counts["flops_per_step"]
    assert flops is not None
    return {
        "seconds_per_step": step,
        "seconds_per_image": step / batch_size,
        "forward_seconds": median(taken[f"{name} forward"]),
        "forwards_per_step": median(_ratios(taken[f"{name} step"], taken[f"{name} forward"])),
        "matmul_rate_share": flops / step / rate,
        "host_seconds_per_step": median(taken[f"{name} step host"]),
        "processor_seconds_per_step": median(taken[f"{name} step processor"]),
        "processor_forwards_per_step": median(
            _ratios(taken[f"{name} step processor"], taken[f"{name} forward processor"])
        ),
        **counts,
    }


def _step_over(name: str, taken: Mapping[str, Sequence[float]], key: str) -> dict[str, Any]:
    """Return the median of the ratios of our steps to the neighbouring ones in `taken[key]`, and their quartiles."""
    ratios = _ratios(taken[f"ours {key.partition(' ')[2]}"], taken[key])
    return {
        f"step_over_{name}": median(ratios),
        f"step_over_{name}_quartiles": quantiles(ratios)[::2] if len(ratios) >= LEAST_ROUNDS else None,
    }


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _load() -> float | None:
    """Return the mean number of processes that were ready to run in the last minute; None if the system doesn't report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def format_report(report: Mapping[str, Any]) -> str:
    """Return the report as a heading and a table in Markdown."""
    ours, peer = report["ours"], report["peer"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    load = "" if report["load"] is None else f", load {report['load']:.1f}"
    rate = report["matmul_flops_per_second"] / 1e9
    heading = [
        f"{FAMILIES[report['family']].title}, random weights ({report['parameters'] / 1e6:.1f} M), "
        f"{report['resolution']} px, batch {report['batch_size']}, {report['targets']} targets, rank {report['rank']}, "
        f"{report['precision']}{', our blocks compiled' if report['compiled'] else ''}",
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
        ("operations of a forward and backward pass", "operations_per_gradient", 1, 0),
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
        f"(median of {report['steps']} steps in turns{_quartiles(report, 'peer')}), "
        f"in processor seconds {report['step_over_peer_processor']:.3f}{_quartiles(report, 'peer_processor')}."
    )
    memory = (
        f"Memory predicted for a run of ours: {report['predicted_bytes'] / 2**30:.2f} GiB, without Python's libraries."
    )
    others = []
    if comfy := report.get("comfyui"):
        others.append(
            f"ComfyUI's own trainer, which adapts every weight: {comfy['seconds_per_step']:.3f} s a step (processor "
            f"{comfy['processor_seconds_per_step']:.3f}), its process at most {comfy['peak_bytes'] / 2**30:.2f} GiB. A step "
            f"of ours takes {report['step_over_comfyui']:.3f} of its{_quartiles(report, 'comfyui')}."
        )
    return "\n\n".join([*heading, "\n".join(lines), verdict, *others, memory])


def _quartiles(report: Mapping[str, Any], name: str) -> str:
    """Return the quartiles of the ratios, formatted to follow their median; "" if there are few rounds."""
    found = report[f"step_over_{name}_quartiles"]
    return f", quartiles {found[0]:.3f} to {found[1]:.3f}" if found else ""


def append_report(path: Path, report: Mapping[str, Any], command: str) -> None:
    """Add the report to a Markdown file, with a title and the command that made it. Raises BadFile if that fails."""
    title = f"{FAMILIES[report['family']].title}, {report['resolution']} px, {report['precision']}, {report['device']}"
    append_text(path, f"\n### {title} ({report['date']})\n\n`{command}`\n\n{format_report(report)}\n")


def append_text(path: Path, text: str) -> None:
    """Add text to a file. Raises BadFile if that fails."""
    try:
        before = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror or error}") from None
    write_file(path, lambda file: file.write(before + text.encode("utf-8", "replace")))


def run(options: argparse.Namespace, device: torch.device | None = None) -> dict[str, Any]:
    """Run a benchmark with the command line's options, and return its report. Raises BadConfig or BadFile for invalid ones."""
    if options.steps < 1:
        raise BadConfig(f"--steps {options.steps}: must be at least 1")
    config = TrainConfig(
        rank=options.rank,
        targets=options.targets,
        batch_size=options.batch_size,
        resolution=options.resolution,
        precision=options.precision,
        compile=options.compile,
        gradient_checkpointing="off",
    )
    return bench(
        options.family, config, steps=options.steps, channels=options.channels, device=device, comfyui=options.comfyui,
        comfyui_python=options.comfyui_python,
    )  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lab.bench", description="Time training steps of several programs.")
    parser.add_argument(
        "--family", choices=tuple(SHAPES), default=next(iter(SHAPES)), help="Model family (default: %(default)s)"
    )
    parser.add_argument(
        "--resolution", type=int, metavar="PIXELS", help="Resolution in pixels (default: the family's own)"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="Pictures in a forward pass (default: 1)")
    parser.add_argument("--rank", type=int, default=16, help="Rank of the adapter (default: 16)")
    parser.add_argument(
        "--targets",
        choices=get_args(Targets),
        default="transformer",
        help="Layers that get an adapter (default: transformer)",
    )
    parser.add_argument("--precision", choices=get_args(Precision), default="auto", help="Precision (default: auto)")
    parser.add_argument("--compile", action="store_true", help="Compile the blocks of our loop")
    parser.add_argument("--steps", type=int, default=20, help="Timed steps of each loop (default: 20)")
    parser.add_argument(
        "--comfyui", type=Path, metavar="FOLDER", help="Also time the trainer of the ComfyUI in this folder"
    )
    parser.add_argument(
        "--comfyui-python",
        type=Path,
        metavar="FILE",
        default=Path(sys.executable),
        help="Python of that ComfyUI (default: this one)",
    )
    parser.add_argument("--append", type=Path, metavar="FILE", help="Also append the report to this Markdown file")
    parser.add_argument(
        "--channels",
        type=int,
        default=REAL_CHANNELS,
        help=f"Channels of the first level (default: {REAL_CHANNELS}, the real size)",
    )
    parser.add_argument("--device", help="Device: cpu, cuda, ... (default: the best available)")
    parser.add_argument("--json", action="store_true", help="Print JSON")
    return parser


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments()
    options = parser.parse_args(given)
    try:
        report = run(options, device_from(options.device))
        print(json.dumps(report, indent=1) if options.json else format_report(report))
        if options.append:  # Print first: the measurement survives a failed write.
            append_report(options.append, report, shlex.join(["python", "-m", "lab.bench", *sys.argv[1:]]))
    except FaceLoraError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
