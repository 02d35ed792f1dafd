"""Choose the device of a command that computes, and print what its work will cost."""

import argparse
import json
from typing import TYPE_CHECKING

import torch

from ..device import best_device, named_device, stay_within_free_memory, usable_device
from .common import rough_duration

if TYPE_CHECKING:
    from ..studio import Ledger


def device_from(options: argparse.Namespace) -> torch.device:
    """Return the device from the command line, else the best one. Raises BadConfig if it cannot compute.

    On Windows, the process's use of GPU memory is limited to what is free.
    """
    device = usable_device(named_or_best(options.device))
    stay_within_free_memory(device)
    return device


def named_or_best(name: str | None) -> torch.device:
    """Return the device of that name, else the best one, even if this torch has no kernels for it."""
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
    rows = {part: count for part, count in ledger.operations.items() if count} | {"all": ledger.total}
    return [
        f"{'at most':<17}{'TFLOP':>10}{'time':>10}{'share':>8}",
        *(
            f"{part:<17}{_number(count / 1e12):>10}{rough_duration(count / rate):>10}{count / ledger.total:>8.0%}"
            for part, count in rows.items()
        ),
        f"memory: {ledger.memory / 2**30:.1f} GiB ({ledger.plan})",
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
