"""`python -m lab.soak --minutes 5 [--seed N]`: runs the soak, and writes what was tried and what has failed as JSON.

A fault is told with its number: `--only NUMBER` and the same seed give it again.
"""

import argparse
import json
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from .pages import ask_often
from .worker import name_of, work

_CONTEXT: Any = multiprocessing.get_context("forkserver")
"""How the worker is started: as a copy of a process that has loaded its modules, and nothing else. (This one may be a run of
all tests, so large that the system refuses to copy it, or have a GPU open.)"""
_CONTEXT.set_forkserver_preload(["lab.soak.worker"])
_MEMORY = Path("/dev/shm")
"""A folder in memory: a trial writes many small files, each of which a disk would be waited for."""
_PATIENCE = 300.0
"""Seconds until a trial is taken for one that hangs. (A busy machine is slow; the worker counts its own seconds.)"""


class _Worker:
    """A process that runs trials. One that hangs or dies is replaced."""

    def __init__(self, folder: Path, seed: str):
        self._folder, self._seed, self._starts = folder, seed, 0
        self._process: multiprocessing.process.BaseProcess | None = None

    def _start(self) -> multiprocessing.process.BaseProcess:
        self._starts += 1
        self._answers, theirs = multiprocessing.Pipe()
        arguments = (self._folder / str(self._starts), self._seed, theirs, self._answers)
        process = _CONTEXT.Process(target=work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self._answers.recv()  # modules and good files take a while, which is no trial's
        return process

    def __call__(self, number: int) -> dict[str, Any]:
        """What came of a trial."""
        process = self._process = self._process or self._start()
        self._answers.send(number)
        try:
            if self._answers.poll(_PATIENCE):
                return self._answers.recv()
            error = f"hangs for {_PATIENCE:.0f} seconds"
        except (EOFError, ConnectionError):
            process.join()
            error = f"the process ended with {process.exitcode}"
        self.end()
        return {"number": number, "trial": name_of(self._seed, number)[0], "outcome": "failed", "error": error}

    def end(self) -> None:
        if self._process is not None:
            assert self._process.pid
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()
            self._process = None


def soak(seed: str, numbers: Iterable[int], until: float = float("inf")) -> dict[str, Any]:
    """What came of the trials of these numbers, as far as the time (of time.monotonic) lasts."""
    outcomes: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    report: dict[str, Any] = {"seed": seed, "trials": 0, "damaged": 0, "kills": 0, "seconds": 0.0, "memory": 0}
    failures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="soak-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None) as folder:
        worker = _Worker(Path(folder), seed)
        try:
            for number in numbers:
                if time.monotonic() > until:
                    break
                found = worker(number)
                report["trials"] += 1
                report["damaged"] += found.get("damaged", 0)
                report["kills"] += found.get("kills", 0)
                for worst in ("seconds", "memory"):
                    report[worst] = max(report[worst], found.get(worst, 0))
                tried[found["trial"]] += 1
                outcomes[found["outcome"]] += 1
                if found["outcome"] == "failed":
                    last = f"{found['trial']}: {found['error'].strip().splitlines()[-1][:160]}"
                    failure = failures.setdefault(last, {"times": 0, "numbers": [], "error": found["error"]})
                    failure["times"] += 1
                    failure["numbers"] = [*failure["numbers"], number][:5]
        finally:
            worker.end()
    return report | {"tried": dict(tried), "outcomes": dict(outcomes), "failures": failures}


def _requests(seed: str, count: int) -> dict[str, Any]:
    from tests.comfyui.server import running_server

    with tempfile.TemporaryDirectory(prefix="soak-") as folder, running_server(Path(folder)) as server:
        statuses, faults = ask_often(server.url, Path(folder) / "input" / "soak", seed, count)
        logged = server.log().count("Traceback")
    return {"requests": count, "statuses": dict(statuses), "request_faults": faults[:20], "tracebacks_in_log": logged}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", default=str(int(time.time())))
    parser.add_argument("--first", type=int, default=0, help="the number of the first trial")
    parser.add_argument("--only", type=int, help="this trial alone, with all that it says")
    parser.add_argument("--requests", type=int, default=0, help="to a real ComfyUI server, after `make setup-test`")
    parser.add_argument("--report", type=Path, default=Path("soak.json"))
    options = parser.parse_args()
    if options.only is not None:
        report = soak(options.seed, range(options.only, options.only + 1))
        for failure in report["failures"].values():
            print(failure["error"])
    else:
        report = soak(options.seed, count(options.first), time.monotonic() + 60 * options.minutes)
        report |= _requests(options.seed, options.requests) if options.requests else {}
        options.report.write_text(json.dumps(report, indent=1))
    faults = [
        f"{text} ({failure['times']} times, e.g. {failure['numbers'][0]})"
        for text, failure in report["failures"].items()
    ]
    faults += report.get("request_faults", [])
    print(
        *(
            f"{key}: {report[key]}"
            for key in ("seed", "trials", "damaged", "kills", "seconds", "memory", "tried", "outcomes")
        ),
        sep="\n",
    )
    print(*faults or ["no fault"], sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
