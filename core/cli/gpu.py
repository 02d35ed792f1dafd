"""Measure a GPU: `python -m facelora.core.cli.gpu COMMAND`, or `python -m core.cli.gpu COMMAND` in a clone.

Requires only the package and a torch built for the GPU.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from ..bench.gpu import COMMANDS, Session, as_markdown, measure
from ..bench.report import append_text
from ..config import TrainConfig
from ..device import device_and_dtype
from ..version import __version__
from .outputs import checked_outputs, output_file


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure a GPU.")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--minutes", type=float, default=8, help="Minutes to spend (default: %(default)s)")
    parser.add_argument(
        "--append", type=output_file, metavar="FILE.md", help="Also append the results to this Markdown file"
    )
    parser.add_argument(
        "--output", type=output_file, metavar="FILE.json", help="File for the results (default: gpu-COMMAND.json)"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu: torch finds no GPU; install a torch that is built for it", file=sys.stderr)
        return 1
    output = options.output or Path(f"gpu-{options.command}.json")
    session = Session(*device_and_dtype(TrainConfig()), until=time.monotonic() + 60 * options.minutes)
    with checked_outputs(parser, options):
        found = measure(session, options.command, output, __version__, lambda what: print(what, file=sys.stderr))
        text = as_markdown(found, f"python -m {__package__}.gpu {options.command} --minutes {options.minutes:g}")
        if options.append:
            append_text(options.append, text)
    print(text)
    rows = [row for stage in found["stages"].values() for row in stage.values()]
    return int(any("error" in row or row.get("is_good") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
