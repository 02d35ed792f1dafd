"""Run the stages of a command, and write each row of its tables as soon as it is measured."""

import gc
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from core.device import device_and_dtype, release_memory
from core.doctor import examine
from core.storage.files import write_text
from lab.gpu.session import Measurements, Session

Stage = Callable[[Session], Measurements]
UNFINISHED = {"error": "not finished"}
"""A row whose measurement has begun."""


def run(command: str, folder: Path, until: float, rehearse: bool = False) -> int:
    """Measure the GPU, or with `rehearse` small models on the CPU, until a monotonic time. Return the exit status.

    When the time is over, the process ends in the middle of a measurement.
    """
    if not (rehearse or torch.cuda.is_available()):
        print("gpu: torch finds no GPU. Install the build for this GPU that pytorch.org lists", file=sys.stderr)
        return 1
    device, dtype = (torch.device("cpu"), torch.float32) if rehearse else device_and_dtype()
    folder.mkdir(parents=True, exist_ok=True)
    clock = threading.Timer(until - time.monotonic(), _stop, [folder])
    clock.daemon = True
    clock.start()
    session = Session(device, dtype, folder, small=rehearse)
    stages = import_module(f"lab.gpu.{command}").STAGES
    found = measure(session, command, stages, lambda what: print(what, file=sys.stderr, flush=True))
    clock.cancel()
    print(as_markdown(found))
    rows = [row for stage in found["stages"].values() for row in stage.values()]
    return int(any("error" in row or row.get("is_good") is False for row in rows))


def _stop(folder: Path) -> None:
    for process in multiprocessing.active_children():
        process.kill()
    print(f"gpu: the time is over. What was measured is in {folder}", file=sys.stderr, flush=True)
    os._exit(1)


def measure(
    session: Session, command: str, stages: Mapping[str, Stage], say: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Run a command's stages, and return the date, the machine and the results.

    They are also written to COMMAND.json and COMMAND.md in the session's folder, before and after each row. A measurement that
    fails is recorded with its error, and the next one starts. `say` is told what is being measured.
    """
    tables: dict[str, dict[str, Any]] = {}
    machine = examine(session.device).as_dict()
    found = {"command": command, "date": date.today().isoformat(), "machine": machine, "stages": tables}
    begun = time.monotonic()

    def write() -> None:
        write_text(session.folder / f"{command}.json", json.dumps(found, indent=1))
        write_text(session.folder / f"{command}.md", as_markdown(found))

    for name, stage in stages.items():
        rows = tables.setdefault(name, {})
        for row, work in _until_one_fails(stage(session)):
            say(f"{time.monotonic() - begun:5.0f} s  {name}: {row}")
            rows[row] = UNFINISHED
            write()
            rows[row] = _result(work)
            write()
            _forget(session.device)
    return found


def _until_one_fails(measurements: Measurements) -> Measurements:
    """Yield the measurements. If the stage itself fails, its error is one more."""
    try:
        yield from measurements
    except Exception as error:  # the next stage may work
        described = _described(error)
        yield "all", lambda: described


def _result(work: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    try:
        return work()
    except Exception as error:
        return _described(error)


def _described(error: Exception) -> dict[str, str]:
    return {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}


def _forget(device: torch.device) -> None:
    """Free what a measurement leaves behind, which would count in the next one's peak."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
    gc.collect()
    release_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def as_markdown(found: Mapping[str, Any]) -> str:
    """Format the results as a section of a page, with the GPU, the date and the command."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [f"### On a GPU: {found['command']} ({found['date']})", "", f"{machine['processor']}; {versions}"]
    for name, rows in found["stages"].items():
        lines += ["", f"**{name[0].upper()}{name[1:]}**", "", *_table(rows)]
    return "\n".join([*lines, ""])


def _table(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    for name, row in rows.items():
        yield f"| {name} | {' | '.join(_cell(row.get(key)) for key in columns)} |"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "<br>".join(map(_cell, value))
    if isinstance(value, int) and abs(value) >= 2**20:
        return f"{value / 2**30:.2f} GiB"
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
