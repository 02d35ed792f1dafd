"""The command `bench`, which times training steps."""

import argparse
import json
import shlex
import sys

from ..bench import append_report, format_report, run
from .computing import device_from


def run_bench(options: argparse.Namespace) -> None:
    report = run(options, device_from(options))
    print(json.dumps(report, indent=1) if options.json else format_report(report))
    if options.append:  # Print first: the measurement survives a failed write.
        append_report(options.append, report, shlex.join(["facelora", *sys.argv[1:]]))
