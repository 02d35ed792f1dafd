"""Choose the device and precision of a computation, and handle a lack of memory."""

import ctypes
import gc
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, repeat, takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch

from .config import Precision
from .errors import BadConfig, OutOfMemory

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""The dtype of each precision, by its name in the settings."""
TILE = 512
"""The side, in pixels, of the tiles that a VAE works on if a whole picture doesn't fit into memory."""
_C_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None
_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, HIP, XPU and MPS, in errors of several classes.
    "DefaultCPUAllocator: can't allocate",
    "DefaultCPUAllocator: not enough memory",  # On Windows.
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",  # Each thread's first product needs memory for cuBLAS.
    "CUDNN_STATUS_ALLOC_FAILED",
    "HOST_ALLOCATION_FAILED",
    # cuDNN hides the allocator's error, and then reports that it has no way of computing a convolution.
    "GET was unable to find an engine to execute this computation",
    "FIND was unable to find an engine to execute this computation",
    "ERROR_OUT_OF_DEVICE_MEMORY",  # XPU's drivers: Level Zero, Unified Runtime.
    "ERROR_OUT_OF_HOST_MEMORY",
    "ERROR_OUT_OF_RESOURCES",
)
"""Texts that identify an out-of-memory error if its class doesn't."""
# From ComfyUI's comfy/model_management.py, version 0.30:
BROKEN_FP16 = (
    "1660", "1650", "1630", "T500", "T550", "T600", "MX550", "MX450", "CMP 30HX", "T2000", "T1000", "T1200",
)  # fmt: skip
"""Parts of the names of NVIDIA cards of compute capability 7.5 whose fp16 gives NaN."""
NO_BF16 = ("gfx1030", "gfx1031", "gfx1035", "gfx1010", "gfx1011", "gfx1012", "gfx906", "gfx900", "gfx803")
"""AMD's architectures without bf16, RDNA 2 and older. Their compute capability is the number in the name."""
BF16_FLAGS = ("avx512_bf16", "amx_bf16")
"""Linux's names of a processor's instructions for products of bf16."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def precision_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype of PRECISIONS in the settings."""
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def device_and_dtype(
    precision: Precision = "auto",
    device: torch.device | str | None = None,
    overflows_in_fp16: bool = False,
    is_large: bool = False,
) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype to compute with. `is_large` is whether the denoiser has the size of published models.

    The device is that of `usable_device`. On a CPU, precision "auto" is bf16 if the processor multiplies bf16 and the denoiser
    is large, else fp32. On other devices it is bf16 if the device supports it, else fp16 if the device supports it and the
    model doesn't overflow, else fp32.
    """
    device = usable_device(device)
    if precision != "auto":
        return device, PRECISIONS[precision]
    return device, fastest_dtype(device, overflows_in_fp16, is_large)


def usable_device(device: torch.device | str | None = None) -> torch.device:
    """Return the device, by default CUDA, else Intel's XPU, else Apple's MPS, else the CPU. CUDA without an index gets one.

    Raises BadConfig for a name of no available device, and for a GPU that this torch has no kernels for.
    """
    device = named_device(device) if isinstance(device, str) else device or best_device()
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if reason := why_no_kernels(device):
        raise BadConfig(reason)
    return device


def named_device(name: str) -> torch.device:
    """Return the device of that name, even if this torch has no kernels for it. Raises BadConfig if it isn't available."""
    try:
        made = torch.zeros(1, device=name)
        made.item()  # Reading fails on the device "meta", which has no values.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        raise BadConfig(
            f"device {name}: {reason}; available: {', '.join(name for name, here in available.items() if here)}"
        ) from None
    return made.device if made.is_cuda else torch.device(name)


def best_device() -> torch.device:
    """Return the fastest kind of device that torch finds."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.xpu.is_available():
        return torch.device("xpu", torch.xpu.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fastest_dtype(device: torch.device, overflows_in_fp16: bool = False, is_large: bool = False) -> torch.dtype:
    """Return the fastest dtype with correct results on the device. A small network on a CPU is always computed in fp32."""
    if device.type == "cpu" and is_large and any(flag in described_processor() for flag in BF16_FLAGS):
        return torch.bfloat16
    if device.type == "xpu":
        return torch.bfloat16 if torch.xpu.is_bf16_supported() else torch.float32
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float32
    if device.type != "cuda":
        return torch.float32
    card = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        has_bf16, has_fp16 = not any(architecture in card.gcnArchName for architecture in NO_BF16), True
    else:
        # Older cards only emulate bf16, but torch.cuda.is_bf16_supported() returns True for them.
        has_bf16 = card.major >= 8
        has_fp16 = not any(name in card.name for name in BROKEN_FP16)
    if has_bf16:
        return torch.bfloat16
    return torch.float16 if has_fp16 and not overflows_in_fp16 else torch.float32


def why_no_kernels(device: torch.device) -> str | None:
    """Return why this torch cannot compute on an NVIDIA card, if it has no kernels for it; None if it can."""
    built_for = torch.cuda.get_arch_list() if device.type == "cuda" and not torch.version.hip else []
    if not built_for:
        return None
    card = torch.cuda.get_device_properties(device)
    for name in built_for:
        kind, _, number = name.partition("_")
        digits = "".join(filter(str.isdigit, number))
        major, minor = int(digits[:-1]), int(digits[-1])
        # Kernels run on cards of the same generation; kernels stored as PTX (compute_90) also run on all later ones.
        if (kind == "sm" and card.major == major and card.minor >= minor) or (
            kind == "compute" and (card.major, card.minor) >= (major, minor)
        ):
            return None
    return (
        f"this torch has no kernels for the {card.name} (compute capability {card.major}.{card.minor}): it is built for "
        f"{', '.join(built_for)}; install a build for the card (older cards require an older CUDA), or use the device cpu"
    )


def keeps_quantised_weights(device: torch.device) -> bool:
    """Return whether the device supports weights in fp8. MPS lacks them (pytorch#148420)."""
    return device.type != "mps"


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "mps":
        torch.mps.synchronize()
    else:
        getattr(torch, device.type).synchronize(device)


def processor(device: torch.device) -> str:
    """Return the name of the device's processor, as reported by the system."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).get_device_name(device)
    found = re.search(r"model name\s*:\s*(.+)", described_processor())
    return found[1] if found else platform.processor() or platform.machine()


def described_processor() -> str:
    """Return what the system tells of the first of its processors: on Linux its maker, name and instructions."""
    description = Path("/proc/cpuinfo")
    if not description.exists():
        return platform.processor()
    with description.open(encoding="utf-8", errors="replace") as lines:
        return lines.read(8000)  # The others are like it.


@contextmanager
def deterministic_if(wanted: bool) -> Iterator[None]:
    """Make a GPU compute the same numbers from the same inputs within the context, if `wanted`.

    Raises BadConfig for an operation that torch has no deterministic form of. Matrix products are such operations if the
    process has computed one on a GPU before, without the setting of cuBLAS that this sets.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it once, at the first product on a GPU
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # Nothing here reads uninitialized memory.
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        if "CuBLAS" in str(error):
            raise BadConfig(
                "deterministic = true: this process has used the GPU before, without cuBLAS's setting for it. Start the "
                "program with CUBLAS_WORKSPACE_CONFIG=:4096:8 in its environment, or ComfyUI with --deterministic"
            ) from None
        raise BadConfig(f"deterministic = true: {str(error).partition('. ')[0]}; train without it") from None
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


@contextmanager
def exact_arithmetic(tf32: bool = True) -> Iterator[None]:
    """Turn off the inexact sums and kernel trials that ComfyUI's --fast sets for its whole process.

    Without `tf32`, float32 convolutions are not rounded to TF32 either, which cuDNN does by default.
    """
    products: Any = torch.backends.cuda.matmul
    convolutions: Any = torch.backends.cudnn
    settings: list[tuple[Any, str, Any]] = [(convolutions, "benchmark", False)]
    if hasattr(products, "allow_fp16_accumulation"):  # Only torch 2.7 and later has this.
        settings.append((products, "allow_fp16_accumulation", False))
    if not tf32:
        rounding: list[tuple[Any, str, Any]] = [(convolutions, "allow_tf32", False), (products, "allow_tf32", False)]
        try:
            [getattr(place, name) for place, name, _ in rounding]
        except RuntimeError:  # The process has set `fp32_precision` of torch 2.9, beside which these can't be read.
            rounding = [(convolutions.conv, "fp32_precision", "ieee"), (products, "fp32_precision", "ieee")]
        settings += rounding
    before = [getattr(place, name) for place, name, _ in settings]
    try:
        for place, name, value in settings:
            setattr(place, name, value)
        yield
    finally:
        for (place, name, _), value in zip(settings, before, strict=True):
            setattr(place, name, value)


def spills_over(device: torch.device) -> bool:
    """Return whether the driver moves a GPU's memory to the computer's memory when it is full, as on Windows and in WSL 2.

    WSL 2 reports itself as Linux, with a kernel of Microsoft's (github.com/microsoft/WSL/issues/11050).
    """
    on_windows = sys.platform == "win32" or "microsoft" in platform.release().lower()
    return on_windows and device.type == "cuda"


def stay_within_free_memory(device: torch.device) -> None:
    """Where the driver spills over, make allocations fail that exceed the GPU's free memory, for the rest of the process.

    Otherwise each step takes many times as long, while a smaller memory plan only takes a third more. Apple's GPUs get what
    macOS recommends: torch would take 1.7 times as much, and macOS would swap.
    """
    if device.type == "mps":
        torch.mps.set_per_process_memory_fraction(1.0)
    elif spills_over(device):
        free, total = torch.cuda.mem_get_info(device)
        free -= 2**29  # for what torch doesn't count: kernels and libraries that are loaded later
        share = (max(0, free) + torch.cuda.memory_reserved(device)) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)


@contextmanager
def within_free_memory(device: torch.device) -> Iterator[None]:
    """Apply the limit of `stay_within_free_memory` within the context, for programs that do other work afterwards."""
    stay_within_free_memory(device)
    try:
        yield
    finally:
        if device.type == "mps":
            torch.mps.set_per_process_memory_fraction(float(os.environ.get("PYTORCH_MPS_HIGH_WATERMARK_RATIO", 1.7)))
        elif spills_over(device):
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a device; None if the system doesn't report them.

    On a GPU they include memory that torch has reserved but doesn't use, or that only reference cycles keep alive. Apple's GPUs
    share the computer's memory, and can use what macOS recommends.
    """
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available
    gc.collect()
    if device.type == "mps":
        torch.mps.empty_cache()
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    card: Any = getattr(torch, device.type)
    try:
        free, _ = card.mem_get_info(device)
    except (AttributeError, RuntimeError):
        if device.type != "xpu":
            raise
        return None  # torch before 2.6 and some drivers don't report it for Intel's GPUs.
    return free + card.memory_reserved(device) - card.memory_allocated(device)


def why_no_gpu(device: torch.device) -> str | None:
    """Return why that device is a CPU, with what to do about it. None if it isn't one, or was chosen despite a GPU."""
    if device.type != "cpu" or best_device().type != "cpu":
        return None
    if torch.version.cuda or torch.version.hip:
        return "torch finds no usable GPU: check the GPU and its driver"
    return "this torch only supports the CPU: for a GPU, install the build that pytorch.org lists for it"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports a lack of memory, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def until_it_fits(compute: Callable[[], _Result], smaller: Iterable[Callable[[], object]]) -> _Result:
    """Return the result of `compute`. While memory runs out, make the next change of `smaller`, and call it again.

    A change that runs out of memory itself is followed by the next one. When none is left, the last lack of memory is raised,
    unless `smaller` itself raises another error.
    """
    lacking: BaseException | None = None
    for change in chain((int,), smaller):  # int() does nothing
        try:
            change()
            return compute()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # The frames of errors would keep the computed tensors alive.
            lacking = error.with_traceback(None)
            lacking.__context__ = lacking.__cause__ = None
        release_memory()
    assert lacking
    try:
        raise lacking
    finally:
        # Its traceback has this frame. If the frame also had it, the cycle would keep the caller's tensors alive.
        del lacking


def in_parts_that_fit(compute: Callable[[Sequence[_Item]], list[_Result]], items: Sequence[_Item]) -> list[_Result]:
    """Return the results of `compute` for all items together; while memory runs out, for half as many of them at a time.

    A lack of memory with a single item is raised unchanged.
    """
    results: list[_Result] = []
    size = len(items)

    def compute_the_rest() -> list[_Result]:
        while len(results) < len(items):
            results.extend(compute(items[len(results) : len(results) + size]))
        return results

    def halve() -> None:
        nonlocal size
        size = (size + 1) // 2

    return until_it_fits(compute_the_rest, takewhile(lambda _: size > 1, repeat(halve)))


def release_memory() -> None:
    """Return unused memory to the system: the GPU's, the computer's page-locked memory, and what `release_heap` returns.

    Garbage is collected first, since networks of other libraries contain reference cycles.
    """
    gc.collect()
    release_heap()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if empty_host_cache := getattr(torch._C, "_host_emptyCache", None):  # Only in builds for a GPU.
            empty_host_cache()
    if torch.xpu.is_available():
        torch.xpu.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def release_heap() -> None:
    """Return the freed memory that the C library keeps, if it can. After a training run, this is as much as the model's."""
    if trim := getattr(_C_LIBRARY, "malloc_trim", None):
        trim(0)


def clear_variables(error: BaseException) -> None:
    """Clear the variables of the functions that an error has ended, and of those in the errors before it.

    Its traceback would keep their tensors alive for as long as a program keeps the error.
    """
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following and following not in seen:
        traceback.clear_frames(following.__traceback__)
        seen.append(following)
        following = following.__context__


@contextmanager
def released_memory() -> Iterator[None]:
    """Call `release_memory` at the end of the context. After an error, its traceback keeps no tensors alive."""
    try:
        yield
    except BaseException as error:
        clear_variables(error)
        raise
    finally:
        release_memory()


@contextmanager
def explained_memory_error(advice: str) -> Iterator[None]:
    """Raise OutOfMemory, with `advice` on what to change, for a lack of memory within the context."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        raise OutOfMemory(f"the device does not have enough memory ({reason}); use {advice}") from None


def whole_or_in_tiles(vae: Any, compute: Callable[[], _Result]) -> _Result:
    """Return the result of `compute`; if memory runs out, call it again with `vae` working on overlapping tiles.

    `vae` is a diffusers VAE, and keeps working on tiles afterwards. A lack of memory with tiles is raised unchanged. Without
    tiles, the decoders of today's families need about 9 GB for 1024 pixels in float32.
    """

    def work_on_tiles() -> None:
        if hasattr(vae, "tile_latent_min_size"):
            vae.tile_sample_min_size = TILE
            vae.tile_latent_min_size = TILE // 2 ** (len(vae.config["block_out_channels"]) - 1)
            vae.enable_tiling()
        else:
            vae.enable_tiling(TILE, TILE, TILE * 3 // 4, TILE * 3 // 4)

    return until_it_fits(compute, () if vae.use_tiling else (work_on_tiles,))
