"""The demo, the benchmark, and the emptying of the cache: demo, bench, clear-cache."""

import argparse
import dataclasses
import json
import shlex
import sys

from .. import bench, demo
from ..storage import check_writable
from ..storage.cache_folder import cache_folder, clear_cache
from .common import BarProgress, device_from


def run_demo(options: argparse.Namespace) -> None:
    steps = demo.CONFIG.steps if options.steps is None else options.steps
    config = dataclasses.replace(
        demo.CONFIG, steps=steps, warmup_steps=max(0, min(demo.CONFIG.warmup_steps, steps - 1))
    )
    with BarProgress() as bar:
        report = demo.run(options.output, person=options.person, config=config, progress=bar)
    print(report.text)
    print(f"look at {options.output / 'contact_sheet.png'}")


def run_bench(options: argparse.Namespace) -> None:
    if options.append:
        check_writable(options.append)
    report = bench.run(options, device_from(options))
    print(json.dumps(report, indent=1) if options.json else bench.format_report(report))
    if options.append:  # last, so that nothing measured is lost where it fails
        bench.append_report(options.append, report, shlex.join(["facelora", *sys.argv[1:]]))


def run_clear_cache(options: argparse.Namespace) -> None:
    print(f"{clear_cache()} files deleted from {cache_folder()}")
