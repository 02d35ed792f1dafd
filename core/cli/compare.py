"""The command `compare`, which trains several methods on the same photos and measures them."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from ..bench import REPORT, SETTINGS, Comparison, summary_rows
from ..bench.compare import compare
from ..config import config_from
from ..errors import BadConfig, one_line
from ..faces import load_faces
from ..photos import read_photos
from .common import BarProgress, base_from
from .computing import device_from
from .settings import schedule_from, settings_from


def run_compare(options: argparse.Namespace) -> None:
    names = [folder.resolve().name for folder in options.photos]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadConfig(
            f"two folders are called {twice[0]}; rename one, since people are identified by their folders' names"
        )
    if (reserved := Path(REPORT).stem) in names:
        raise BadConfig(f"one folder is called {reserved}, which is the name of the report; rename it")
    rates = dict(map(_rate, options.rate))
    if len(rates) < len(options.rate):
        raise BadConfig(f"--rate {' --rate '.join(options.rate)}: give each method one rate")
    settings = settings_from(options)
    comparison = Comparison(
        base_from(options, **schedule_from(settings)),
        tuple(name.strip() for name in options.methods.split(",")),
        config_from(settings),
        rates,
        options.held_out,
        tuple(options.scene) or SETTINGS,
    )
    with BarProgress() as progress:
        people = {
            name: read_photos(folder, on_warning=progress.warning)
            for name, folder in zip(names, options.photos, strict=True)
        }
        results = compare(
            people, comparison, options.output, load_faces(), device=device_from(options), on_phase=progress.phase,
            on_warning=progress.warning,
        )  # fmt: skip
    if options.json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
        return
    methods = summary_rows(results)
    widths = [max(map(len, method)) for method in methods]
    for cells in zip(*methods, strict=True):  # Print a line per column, since methods are fewer.
        print(one_line("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()))
    print(f"{options.output / REPORT}, and a sheet of pictures for each person", file=sys.stderr)


def _rate(text: str) -> tuple[str, float]:
    method, _, number = text.partition("=")
    try:
        return method, float(number)
    except ValueError:
        raise BadConfig(f"--rate {text}: give METHOD=NUMBER") from None
