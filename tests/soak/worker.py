"""The process that runs the trials: it reads their numbers from stdin, and writes a line of JSON for each to stdout.

`python -m tests.soak.worker FOLDER SEED`
"""

import json
import os
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path
from random import Random
from typing import Any

import torch

from core.errors import FaceLoraError

from .desk import Desk
from .trials import TRIALS

MOST_MEMORY = 300 * 2**20
"""That a trial may take beside the files that it reads, in bytes."""
MOST_SECONDS = 10.0
"""Of the processor, for a trial."""
_CEILING = 8 << 30
"""More memory is refused by the system, so that no trial takes the machine's."""


def name_of(seed: str, number: int) -> tuple[str, Random]:
    """The trial of that number, and what it draws its damage with."""
    draw = Random(f"{seed} {number}")
    return draw.choices(list(TRIALS), [weight for _, weight in TRIALS.values()])[0], draw


def main(folder: Path, seed: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of Pillow's about damaged photos
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    resource.setrlimit(resource.RLIMIT_DATA, (_CEILING, _CEILING))
    desk = Desk(folder)
    print("ready", file=answers)
    for line in sys.stdin:
        print(json.dumps(_tried(desk, seed, int(line))), file=answers)


def _tried(desk: Desk, seed: str, number: int) -> dict[str, Any]:
    name, draw = name_of(seed, number)
    desk.fresh_room()
    desk.counts.clear()
    before, started, error = _memory("VmRSS"), time.process_time(), ""
    try:
        TRIALS[name][0](desk, draw)
        outcome = "done"
    except FaceLoraError as problem:
        outcome = "refused"
        assert "\n" not in str(problem)
    except BaseException:
        outcome, error = "failed", traceback.format_exc()
    seconds, memory = time.process_time() - started, _memory("VmHWM") - before
    if seconds > MOST_SECONDS and name not in ("state", "killed_training"):  # which train
        outcome, error = "failed", f"{error}{seconds:.0f} seconds"
    if memory > MOST_MEMORY + desk.base.stat().st_size:
        outcome, error = "failed", f"{error}{memory >> 20} MiB"
    return {"number": number, "trial": name, "outcome": outcome, "error": error, **desk.counts}


def _memory(field: str) -> int:
    """Of this process in bytes, VmRSS now, or VmHWM at most since VmRSS was asked for; 0 where it is no Linux."""
    try:
        if field == "VmRSS":
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
