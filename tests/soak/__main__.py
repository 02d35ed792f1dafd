"""`python -m tests.soak --minutes 5 [--seed N]`: runs the soak, and writes what was tried and what has failed as JSON.

A fault is told with its number: `--only NUMBER` and the same seed give it again.
"""

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from .worker import name_of

ROOT = Path(__file__).parents[2]
_PATIENCE = 60.0
"""Seconds until a trial is taken for one that hangs. (A busy machine is slow; the worker counts its own seconds.)"""


class _Worker:
    """A process that runs trials. One that hangs or dies is replaced."""

    def __init__(self, folder: Path, seed: str):
        self._folder, self._seed, self._starts = folder, seed, 0
        self._process: subprocess.Popen[str] | None = None

    def _started(self) -> subprocess.Popen[str]:
        self._starts += 1
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.worker", str(self._folder / str(self._starts)), self._seed], cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "ready\n", "the worker does not start"
        return process

    def __call__(self, number: int) -> dict[str, Any]:
        """What came of a trial."""
        self._process = self._process or self._started()
        assert self._process.stdin is not None and self._process.stdout is not None
        print(number, file=self._process.stdin, flush=True)
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            answer = self._process.stdout.readline() if selector.select(_PATIENCE) else ""
        if answer:
            return json.loads(answer)
        code = self._process.poll()
        self.end()
        error = f"hangs for {_PATIENCE:.0f} seconds" if code is None else f"the process ended with {code}"
        return {"number": number, "trial": name_of(self._seed, number)[0], "outcome": "failed", "error": error}

    def end(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def soak(seed: str, numbers: Iterator[int] | range, until: float = float("inf")) -> dict[str, Any]:
    """What came of the trials of these numbers, as far as the time (of time.monotonic) lasts."""
    outcomes: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    report: dict[str, Any] = {"seed": seed, "trials": 0, "kills": 0}
    failures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        worker = _Worker(Path(folder), seed)
        try:
            for number in numbers:
                if time.monotonic() > until:
                    break
                found = worker(number)
                report["trials"] += 1
                report["kills"] += found.get("kills", 0)
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

    from .pages import ask_often

    with tempfile.TemporaryDirectory(prefix="soak-") as folder, running_server(Path(folder)) as server:
        statuses, faults = ask_often(server.url, Path(folder) / "input" / "soak", seed, count)
        logged = server.log().count("Traceback")
    return {"requests": count, "statuses": dict(statuses), "request_faults": faults[:20], "tracebacks_in_log": logged}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
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
    print(*(f"{key}: {report[key]}" for key in ("seed", "trials", "kills", "tried", "outcomes")), sep="\n")
    print(*faults or ["no fault"], sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
