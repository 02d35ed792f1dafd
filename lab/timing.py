"""Measure the time and the memory of a piece of work."""

import ctypes
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from core.device import synchronize


def seconds(work: Callable[[], object], device: torch.device, times: int = 1) -> tuple[float, float, float]:
    """Return the seconds of one of `times` runs in a row, the seconds until the host was free, and the processor seconds.

    Processor seconds are summed over all threads; other work on the machine affects them far less.
    """
    synchronize(device)
    start, used = time.perf_counter(), time.process_time()
    for _ in range(times):
        work()
    host = time.perf_counter() - start
    synchronize(device)
    return (time.perf_counter() - start) / times, host / times, (time.process_time() - used) / times


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak memory in bytes during `work`: the allocator's on a GPU, else the process's on Linux, else None."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    libc = ctypes.CDLL(None) if platform.system() == "Linux" else None
    record = Path("/proc/self/clear_refs")
    if libc is None or not hasattr(libc, "malloc_trim") or not record.exists():
        work()
        return None
    libc.malloc_trim(0)  # Releases freed memory that the C library holds: it must not count.
    record.write_text("5", encoding="utf-8")  # Resets the kernel's record of the peak.
    work()
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(peak[1]) * 1024 if peak else None
