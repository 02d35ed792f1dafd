"""Choose the device of a command that computes, and print what its work will cost."""

import json
from typing import TYPE_CHECKING

from .common import rough_duration

if TYPE_CHECKING:
    import torch

    from ..studio import Ledger


def device_from(name: str | None) -> "torch.device":
    """Return the device of that name, else the best one. Raises BadConfig if it cannot compute.

    On Windows and in WSL 2, the process's use of GPU memory is limited to what is free.
    """
    from ..device import stay_within_free_memory, usable_device

    device = usable_device(named_or_best(name))
    stay_within_free_memory(device)
    return device


def named_or_best(name: str | None) -> "torch.device":
    """Return the device of that name, else the best one, even if this torch has no kernels for it."""
    from ..device import best_device, named_device

    return best_device() if name is None else named_device(name)


def show_work(ledger: "Ledger", rate: float, as_json: bool) -> None:
    """Print the work of a job part by part, and its time on a device that does `rate` operations per second."""
    if not as_json:
        print(*_table(ledger, rate), "Nothing was trained or drawn.", sep="\n")
        return
    described = {
        "parts": {part: {"operations": count, "seconds": count / rate} for part, count in ledger.operations.items()},
        "operations": ledger.total,
        "seconds": ledger.total / rate,
        "memory": ledger.memory,
        "memory_plan": str(ledger.plan),
    }
    print(json.dumps(described))


def work_in_short(ledger: "Ledger", rate: float) -> str:
    """Return the total in one line."""
    return f"at most about {rough_duration(ledger.total / rate)} and {ledger.memory / 2**30:.1f} GiB of memory"


def _table(ledger: "Ledger", rate: float) -> list[str]:
    """Return the lines of the job's parts and their total."""
    lines = [f"{'at most':<17}{'TFLOP':>10}{'time':>10}{'share':>8}"]
    for part, count in (*ledger.operations.items(), ("all", ledger.total)):
        if count or part == "all":
            tera = count / 1e12
            shown = f"{tera:,.0f}" if tera >= 100 else f"{tera:.2g}"
            lines.append(f"{part:<17}{shown:>10}{rough_duration(count / rate):>10}{count / ledger.total:>8.0%}")
    return [*lines, f"memory: {ledger.memory / 2**30:.1f} GiB ({ledger.plan})"]
