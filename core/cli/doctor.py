"""The command `doctor`, which reports what the machine has."""

import argparse
import json
import sys

from ..bench import examine, format_doctor
from ..device import stay_within_free_memory
from .computing import named_or_best


def run_doctor(options: argparse.Namespace) -> None:
    def say(what: str) -> None:
        print(f"measuring {what}", file=sys.stderr)

    device = named_or_best(options.device)
    stay_within_free_memory(device)
    report = examine(device, options.measure, say)
    print(json.dumps(report.as_dict(), indent=1) if options.json else format_doctor(report))
