"""Choose the number of processor threads: what the process may use, which is often less than the machine has.

torch, OpenMP and onnxruntime start a thread for each core of the machine, whatever a container allows. Importing this module
loads nothing heavy, since OpenMP reads its settings once, when torch is loaded.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SPINS = "3000"
"""The rounds that a waiting OpenMP thread spins before it sleeps, about a tenth of a millisecond.

GNU's library spins for milliseconds by default, and beside busy processes most of a step is then spent waiting. Threads that
sleep at once make the small operations of a small network as slow as with one thread. See docs/benchmarks.md."""
FEW = 4
"""The most threads for small networks: the face networks, and the demo's, whose step is 1.7 times as fast with two threads."""


@dataclass(frozen=True)
class Threads:
    """A number of threads, and the reason for it."""

    count: int
    why: str


def usable_threads(root: Path = Path("/")) -> Threads:
    """Return the number of threads that this process can keep busy.

    It is the smallest of the processors that the process may run on, their physical cores, and the cores that its control group
    allows (cgroup v1 and v2).
    `root` is the folder that contains `proc` and `sys`.
    """
    quotas = (Threads(max(1, int(quota)), f"its control group may use {quota:g} cores") for quota in _quotas(root))
    return min(*_machine_limits(root), *quotas, key=lambda limit: limit.count)


def _machine_limits(root: Path) -> list[Threads]:
    """Return the limits that torch also applies. The narrower reason is first."""
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    topology = (f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list" for number in processors)
    cores = {siblings for name in topology if (siblings := _text_of(root, name))}
    whose = "of the machine" if len(processors) == os.cpu_count() else "that the process may run on"
    limits = [Threads(len(processors), f"processors {whose}")]
    return [Threads(len(cores), f"physical cores {whose}"), *limits] if cores else limits


def _quotas(root: Path) -> Iterator[float]:
    """Yield the core limit of each control group of the process that has one, from its own up to the root."""
    for line in _text_of(root, "proc/self/cgroup").splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be the host's, while the container's own group is mounted as the root.
        for home in [controllers, "cpu"] if controllers else ["", "unified"]:
            folder = f"sys/fs/cgroup/{home}{place}".rstrip("/")
            while folder.startswith("sys/fs/cgroup"):
                if controllers:
                    names = (f"{folder}/cpu.cfs_quota_us", f"{folder}/cpu.cfs_period_us")
                    limit = [_text_of(root, name) for name in names]
                else:
                    limit = _text_of(root, f"{folder}/cpu.max").split()
                with suppress(ValueError, ZeroDivisionError):  # "max" or -1 means no limit; a missing file gives "".
                    quota, period = (float(number) for number in limit)
                    if quota > 0:
                        yield quota / period
                folder = folder.rpartition("/")[0]


def _text_of(root: Path, name: str) -> str:
    try:
        return (root / name).read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""


def threads_for_small_networks() -> int:
    """Return the threads for a network whose operations are too small for more than FEW, at most OMP_NUM_THREADS."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return min(FEW, int(wanted) if wanted.isdecimal() and int(wanted) else usable_threads().count)


def thread_settings(few: bool = False) -> dict[str, str]:
    """Return the environment that makes libraries use the threads that suit this process, at most FEW for `few`."""
    number = str(threads_for_small_networks() if few else usable_threads().count)
    settings = {"OMP_NUM_THREADS": number, "RAYON_NUM_THREADS": number}  # RAYON is for tokenizers.
    if "OMP_WAIT_POLICY" not in os.environ:
        settings |= {"GOMP_SPINCOUNT": SPINS, "KMP_BLOCKTIME": "1"}  # GNU, on Linux; LLVM and Intel, in milliseconds.
    return settings


def set_threads(few: bool = False) -> None:
    """Apply `thread_settings` in our own programs before they load torch. The user's settings are kept.

    A process that has already loaded torch belongs to another program, and is left unchanged.
    """
    if "torch" not in sys.modules:
        for name, value in thread_settings(few).items():
            os.environ.setdefault(name, value)


@contextmanager
def within_quota() -> Iterator[None]:
    """Limit the threads of torch, loaded by another program, to the cores of a container's quota within the context.

    Only torch's own default is lowered, not a number that the program or its user has set.
    """
    import torch

    before, usable = torch.get_num_threads(), usable_threads().count
    is_default = before in {limit.count for limit in _machine_limits(Path("/"))} and "OMP_NUM_THREADS" not in os.environ
    if not is_default or usable >= before:
        yield
        return
    torch.set_num_threads(usable)
    try:
        yield
    finally:
        torch.set_num_threads(before)
