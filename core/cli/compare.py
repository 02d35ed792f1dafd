"""The command that trains several methods on the same photos and measures them: compare."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from ..config import config_from
from ..errors import BadConfig
from .common import BarProgress, Command, add_base, add_device, base_from, device_from, unicode_text
from .settings import add_settings, schedule_from, settings_from


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s PHOTOS [PHOTOS ...] --base BASE --output DIR [OPTIONS] (--help lists them)"
    parser.add_argument("photos", type=Path, nargs="+", metavar="PHOTOS", help="a folder for each person")
    add_base(parser, required=True)
    parser.add_argument(
        "--methods", default="lora,textual-inversion,dreambooth", metavar="A,B,...", help="(default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="what is there is not made again")
    parser.add_argument("--held-out", type=int, default=2, metavar="N", help="photos of each person (default: 2)")
    parser.add_argument(
        "--rate", action="append", default=[], metavar="METHOD=X",
        help="learning rate of a method; default: the settings' times what suits the method; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--scene", action="append", type=unicode_text, default=[], metavar="TEXT",
        help="what pictures are asked for beside the person, to measure adherence; give two or more (default: left, front and "
        "right view)",
    )  # fmt: skip
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="settings; options given here win over the file's"
    )
    add_device(parser)
    parser.add_argument("--json", action="store_true")
    add_settings(parser.add_argument_group("settings"))


def run_compare(options: argparse.Namespace) -> None:
    from ..bench.compare import REPORT, SETTINGS, Comparison, compare, summary_rows
    from ..faces import load_faces
    from ..photos import read_photos

    names = [folder.resolve().name for folder in options.photos]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadConfig(f"two of the folders are called {twice[0]}; the people are told apart by the folders' names")
    if (reserved := Path(REPORT).stem) in names:
        raise BadConfig(
            f"one of the folders is called {reserved}, as the report on all people is; give it another name"
        )
    if options.output.resolve() in (folder.resolve() for folder in options.photos):
        raise BadConfig(
            f"--output {options.output}: is a folder of photos, to which pictures would be added; choose another"
        )
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
            people, comparison, options.output, load_faces(), device=device_from(options), on_phase=progress.phase
        )
    if options.json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
        return
    for row in summary_rows(results):
        print("| " + " | ".join(row) + " |")
    print(f"{options.output / REPORT}, compare.png and a sheet of pictures for each person", file=sys.stderr)


def _rate(text: str) -> tuple[str, float]:
    method, _, number = text.partition("=")
    try:
        return method, float(number)
    except ValueError:
        raise BadConfig(f"--rate {text}: give METHOD=NUMBER") from None


COMPARE_COMMANDS: tuple[Command, ...] = (
    (
        "compare",
        "train several methods on the same photos, and measure what each gives and costs",
        add_compare,
        run_compare,
    ),
)
