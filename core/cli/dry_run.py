"""The output of `--dry-run`: the work of a job, part by part, and its time on this device."""

import json
from typing import Any

from ..studio import Ledger
from .studio_progress import rough_duration


def show(ledger: Ledger, rate: float, as_json: bool) -> None:
    """Print the ledger, for a device that does `rate` operations per second."""
    if as_json:
        print(json.dumps(described(ledger, rate)))
    else:
        print(*table(ledger, rate), "Nothing was trained or drawn.", sep="\n")


def described(ledger: Ledger, rate: float) -> dict[str, Any]:
    """Return the ledger as values for JSON."""
    parts = {part: {"operations": count, "seconds": count / rate} for part, count in ledger.operations.items()}
    return {
        "parts": parts,
        "operations": ledger.total,
        "seconds": ledger.total / rate,
        "memory": ledger.memory,
        "memory_plan": str(ledger.plan),
    }


def in_short(ledger: Ledger, rate: float) -> str:
    """Return the total in one line."""
    return f"at most about {rough_duration(ledger.total / rate)} and {ledger.memory / 2**30:.1f} GiB of memory"


def table(ledger: Ledger, rate: float) -> list[str]:
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
