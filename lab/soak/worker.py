"""The process that runs the trials: it is sent their numbers, and answers each with what came of it."""

import os
import resource
import threading
import time
import traceback
import warnings
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm import tqdm

from core.cli import command
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
    return draw.choices(list(TRIALS), [kind.weight for kind in TRIALS.values()])[0], draw


def work(folder: Path, seed: str, asks: Connection, others: Connection) -> None:
    """Answers the numbers that `asks` sends, until nobody is there any more; None first, when it can."""
    others.close()  # the other end, so that `asks` ends with the other process
    os.setsid()  # so that what the trials start can be ended with it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what has a GPU in use cannot be forked
    torch.set_num_threads(1)
    # The usual one is shared by processes: one that is killed within it keeps it for ever.
    tqdm.set_lock(threading.RLock())
    warnings.simplefilter("ignore")  # of diffusers about what it was built with
    warnings.filterwarnings("error", module=r"PIL\.")  # about damaged photos, which we name ourselves
    # This takes longer than most trials, and is the same each time.
    command.command_parser = cache(command.command_parser)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    resource.setrlimit(resource.RLIMIT_DATA, (_CEILING, _CEILING))
    desk = Desk(folder)
    asks.send(None)
    with suppress(EOFError):
        while True:
            asks.send(_tried(desk, seed, asks.recv()))


def _tried(desk: Desk, seed: str, number: int) -> dict[str, Any]:
    name, draw = name_of(seed, number)
    desk.fresh_room()
    desk.counts.clear()
    before, started, error = _memory("VmRSS"), time.process_time(), ""
    try:
        TRIALS[name].trial(desk, draw)
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
    return {
        "number": number,
        "trial": name,
        "outcome": outcome,
        "error": error,
        "damaged": TRIALS[name].damaged,
        "seconds": seconds,
        "memory": memory,
        **desk.counts,
    }


def _memory(field: str) -> int:
    """Of this process in bytes, VmRSS now, or VmHWM at most since VmRSS was asked for; 0 where it is no Linux."""
    try:
        if field == "VmRSS":
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
