"""The commands `bench`, which times training steps, and `doctor`, which reports what the machine has."""

import argparse
import json
import shlex
import sys

from ..bench import append_report, examine, format_doctor, format_report, run
from ..device import stay_within_free_memory
from .computing import device_from, named_or_best


def run_bench(options: argparse.Namespace) -> None:
    report = run(options, device_from(options))
    print(json.dumps(report, indent=1) if options.json else format_report(report))
    if options.append:  # Print first: the measurement survives a failed write.
        append_report(options.append, report, shlex.join(["facelora", *sys.argv[1:]]))


def run_doctor(options: argparse.Namespace) -> None:
    def say(what: str) -> None:
        print(f"measuring {what}", file=sys.stderr)

    device = named_or_best(options.device)
    stay_within_free_memory(device)
    report = examine(device, options.measure, say)
    print(json.dumps(report.as_dict(), indent=1) if options.json else format_doctor(report))
