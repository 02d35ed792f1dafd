"""The command `doctor`, which reports what the machine has."""

import argparse
import json

from ..device import stay_within_free_memory
from ..doctor import examine, format_doctor
from .computing import named_or_best


def run_doctor(options: argparse.Namespace) -> None:
    device = named_or_best(options.device)
    stay_within_free_memory(device)
    report = examine(device)
    print(json.dumps(report.as_dict(), indent=1) if options.json else format_doctor(report))
