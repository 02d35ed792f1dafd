"""The device and the precision of a computation, and the handling of a lack of memory."""

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from .config import TrainConfig
from .errors import BadConfig, OutOfMemory

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""The dtype of each precision, by its name in the settings."""
TILE = 512
"""The side, in pixels, of the tiles that a VAE works on where a whole picture does not fit into memory."""
_OUT_OF_MEMORY = (
    "out of memory",  # of CUDA, HIP, XPU and MPS, in errors of several classes
    "DefaultCPUAllocator: can't allocate",
    "DefaultCPUAllocator: not enough memory",  # on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "HOST_ALLOCATION_FAILED",
)
"""What messages say of a lack of memory where the class of the error does not."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def precision_name(dtype: torch.dtype) -> str:
    """The name that a dtype of PRECISIONS has in the settings."""
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def device_and_dtype(
    config: TrainConfig, device: torch.device | None = None, overflows_in_fp16: bool = False
) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype to compute with.

    Without `device` it is CUDA, else Apple's MPS, else the CPU. The precision "auto" is bf16 on GPUs of compute capability
    8.0 and above, fp16 on older ones unless the model `overflows_in_fp16`, and fp32 everywhere else.
    """
    if device is None:
        device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
    if config.precision != "auto":
        return device, PRECISIONS[config.precision]
    if device.type == "cuda":
        # Older cards only emulate bf16, and torch.cuda.is_bf16_supported() says yes to that.
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return device, torch.bfloat16
        return device, torch.float32 if overflows_in_fp16 else torch.float16
    return device, torch.float32


def processor(device: torch.device) -> str:
    """The name of the device's processor, as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", names.read_text()) if names.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


@contextmanager
def deterministic_if(wanted: bool) -> Iterator[None]:
    """A context in which a GPU computes the same numbers from the same inputs each time, if that is wanted.

    cuBLAS reads its setting when it is first used, so the first context should be entered before anything is computed.
    Raises BadConfig for an operation that torch has no such form of.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise BadConfig(f"deterministic = true: {str(error).partition('. ')[0]}; train without it") from None
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def stay_within_free_memory(device: torch.device) -> None:
    """On Windows, has an allocation fail that the GPU's free memory does not suffice for, for the rest of the process.

    There the driver would move memory of the GPU to the computer's without a word, and each step would take many times as
    long, where a smaller memory plan takes a third more. For programs that have the process to themselves.
    """
    if sys.platform == "win32" and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(free / total, device)


def free_memory(device: torch.device) -> int | None:
    """The bytes that can still be allocated on a device; None where the system does not say.

    On a GPU they include what torch has reserved but does not use.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        try:
            with open("/proc/meminfo", encoding="ascii") as file:
                return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
        except (OSError, StopIteration):
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports a lack of memory, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def in_parts_that_fit(compute: Callable[[Sequence[_Item]], list[_Result]], items: Sequence[_Item]) -> list[_Result]:
    """What `compute` makes of the items together; where memory runs out, of each half of them, down to single ones.

    A lack of memory with a single item is raised as it is.
    """
    try:
        return compute(items)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or len(items) == 1:
            raise
    # Out of the except clause, where the error no longer holds on to what was computed.
    release_memory()
    middle = len(items) // 2
    return [result for half in (items[:middle], items[middle:]) for result in in_parts_that_fit(compute, half)]


def release_memory() -> None:
    """Gives the GPU memory that torch has reserved and does not use back to the system."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def explained_memory_error(advice: str) -> Iterator[None]:
    """A context in which a lack of memory raises OutOfMemory, with `advice` on what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        raise OutOfMemory(f"the device has not enough memory ({reason}); use {advice}") from None


def whole_or_in_tiles(vae: Any, compute: Callable[[], _Result]) -> _Result:
    """The result of `compute`; where memory runs out, that of a second call with `vae` working on overlapping tiles.

    `vae` is one of diffusers' and keeps working on tiles afterwards. A lack of memory with tiles is raised as it is.
    Without tiles, the decoders of today's families take about 9 GB for 1024 pixels in float32.
    """
    try:
        return compute()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or vae.use_tiling:
            raise
    release_memory()
    if hasattr(vae, "tile_latent_min_size"):
        vae.tile_sample_min_size = TILE
        vae.tile_latent_min_size = TILE // 2 ** (len(vae.config["block_out_channels"]) - 1)
        vae.enable_tiling()
    else:
        vae.enable_tiling(TILE, TILE, TILE * 3 // 4, TILE * 3 // 4)
    return compute()
