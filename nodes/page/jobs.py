"""The commands that the page runs, one after the other: each is a process, which a page that starts later finds again.

A job is in its person's folder: what was asked (KIND.json), what the process printed (KIND.events, KIND.errors).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from ...core.errors import BadConfig, BadFile
from ...core.pictures.gallery import SAME_PERSON, SOMEONE_ELSE
from ...core.storage.files import read_json, write_text, writing
from ...core.storage.plain_values import parse_json, read_as
from ...core.training.callbacks import likeness_word
from ..shown import DONE, FAILED, STEPPING, STOPPED, add_news

TRAIN, DRAW = KINDS = ("train", "draw")
WAITING = "waiting"
MOST_POINTS = 400
"""The most points of a curve that a page is sent."""
ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "core")
"""How this project's commands are run, with ROOT among the places of modules."""


@dataclass(frozen=True)
class Job:
    """A command that was asked for. It waits until it has a process."""

    arguments: tuple[str, ...]
    """The words after `facelora`."""
    asked: float
    begun: float = 0.0
    pid: int = 0
    born: float = 0.0
    """When the process was made, since another one may get its number."""
    ended: bool = False
    """Whether it was cancelled while it waited."""


class Jobs:
    """The jobs of all people, whose folders are in one folder."""

    def __init__(self, folder: Path) -> None:
        self.starts = True
        """Whether jobs start when they are asked for. In another program, they wait until it has made room."""
        self._folder = folder
        self._processes: dict[int, psutil.Popen] = {}  # Those of this page, which has to wait for them when they end.
        self._states: dict[Path, tuple[int, dict[str, Any]]] = {}

    def ask(self, person: Path, kind: str, arguments: Sequence[str], *, again: bool = False) -> None:
        """Let a command run when no other one does. With `again` it continues, and its curves too."""
        if self.is_active(person):
            raise BadConfig(f"{person.name}: this is running already")
        for ending in ("events", "errors"):
            if not again or ending == "errors":
                (person / f"{kind}.{ending}").unlink(missing_ok=True)
        self._write(person, kind, Job(tuple(arguments), time.time()))
        if self.starts:
            self.start_next()

    def running(self) -> tuple[Path, str] | None:
        """Return the person and kind of the job that runs; None if none does."""
        return next(((person, kind) for person, kind, job in self._found() if self._is_running(job)), None)

    def waiting(self) -> list[tuple[Path, str]]:
        """Return the persons and kinds of the jobs that wait, in their order."""
        waiting = sorted((job.asked, person, kind) for person, kind, job in self._found() if not (job.pid or job.ended))
        return [(person, kind) for _, person, kind in waiting]

    def start_next(self) -> None:
        """Start the job that waits longest, unless one runs."""
        for person, kind in [] if self.running() else self.waiting()[:1]:
            job = self.of(person, kind)
            assert job
            variables = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
            events, errors = person / f"{kind}.events", person / f"{kind}.errors"
            with writing(events), events.open("ab") as out, errors.open("ab") as told:
                process = psutil.Popen(
                    [*COMMAND, *job.arguments],
                    stdin=subprocess.DEVNULL, stdout=out, stderr=told, env=variables, cwd=person,
                )  # fmt: skip
            self._processes[process.pid] = process
            self._write(person, kind, replace(job, begun=time.time(), pid=process.pid, born=process.create_time()))

    def stop(self, person: Path) -> None:
        """End the person's process, which saves what it has, or the wait for one. It can continue later."""
        for kind in KINDS:
            if (job := self.of(person, kind)) and self._is_running(job):
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(job.pid).terminate()
            elif job and not job.pid:
                self._write(person, kind, replace(job, ended=True))

    def is_active(self, person: Path) -> bool:
        """Return whether a job of the person waits or runs."""
        jobs = (job for kind in KINDS if (job := self.of(person, kind)))
        return any(self._is_running(job) or not (job.pid or job.ended) for job in jobs)

    def of(self, person: Path, kind: str) -> Job | None:
        """Return the last job of a kind; None if there is none."""
        with suppress(BadFile, TypeError, KeyError):
            return read_as(Job, read_json(person / f"{kind}.json"))
        return None

    def state(self, person: Path, kind: str) -> dict[str, Any]:
        """Return what the page shows of the last job of a kind; {} if there is none."""
        job = self.of(person, kind)
        if job is None:
            return {}
        is_running = self._is_running(job)  # Before the events are read, so that the last one isn't missed.
        state = self._read(person / f"{kind}.events")
        for curve in ("history", "learning_rates"):
            points = state.get(curve, [])
            state[curve] = points[:: -(-len(points) // MOST_POINTS) or 1]
        if not (job.pid or job.ended):
            ahead = [one for *_, one in self._found() if not one.ended and one.asked < job.asked]
            active = [one for one in ahead if not one.pid or self._is_running(one)]
            return state | {"phase": WAITING, "ahead": len(active)}
        if is_running:
            age = time.time() - (person / f"{kind}.events").stat().st_mtime
            left = {"seconds_left": max(0.0, state["seconds_left"] - age)} if "seconds_left" in state else {}
            return {"phase": "starting", **state, "seconds": time.time() - job.begun, **left}
        error = self._error(person / f"{kind}.errors")
        if state.get("phase") not in (DONE, FAILED):
            state["phase"] = FAILED if error else STOPPED
        return {"error": error, **state, "ended": True}

    def _found(self) -> list[tuple[Path, str, Job]]:
        people = [path for path in self._folder.iterdir() if path.is_dir()] if self._folder.is_dir() else []
        return [(path, kind, job) for path in people for kind in KINDS if (job := self.of(path, kind))]

    def _write(self, person: Path, kind: str, job: Job) -> None:
        write_text(person / f"{kind}.json", json.dumps(asdict(job)))

    def _is_running(self, job: Job) -> bool:
        if not job.pid:
            return False
        if (own := self._processes.get(job.pid)) and own.poll() is not None:
            del self._processes[job.pid]
        with suppress(psutil.Error):
            process = psutil.Process(job.pid)
            return abs(process.create_time() - job.born) < 1 and process.status() != psutil.STATUS_ZOMBIE
        return False

    def _read(self, events: Path) -> dict[str, Any]:
        """Return the state after all events that are in the file. Only new ones are read."""
        size = events.stat().st_size if events.exists() else 0
        at, state = self._states.get(events, (0, {}))
        if size < at:  # another job's
            at, state = 0, {}
        if size > at:
            with events.open("rb") as file:
                file.seek(at)
                lines = file.read(size - at)
            whole = lines.rpartition(b"\n")[0]
            for line in whole.splitlines():
                with suppress(ValueError):
                    if isinstance(event := parse_json(line), dict):
                        _add_event(state, event)
            at += len(whole) + bool(whole)
            self._states[events] = at, state
        return {"limits": (SOMEONE_ELSE, SAME_PERSON), **state}

    def _error(self, errors: Path) -> str:
        """Return the last message of a process that failed; empty if it was stopped."""
        with suppress(OSError):
            lines = errors.read_text("utf-8", errors="replace").strip().splitlines()
            last = lines[-1] if lines else ""
            message = last.removeprefix("facelora: ")
            is_error = message != last or ": error: " in last or last.partition(":")[0].endswith("Error")
            return message if is_error and not message.startswith("stopped") else ""
        return ""


def _add_event(state: dict[str, Any], event: Mapping[str, Any]) -> None:
    """Add what a process has printed to the state."""
    if "status" in event:
        state |= {"phase": FAILED, "error": event["reason"]} if event["status"] == "failed" else {"phase": DONE}
        state |= {"advice": event["reason"], "kept": event.get("kept"), "mean_likeness": event.get("likeness")}
    elif "warning" in event:
        state["warning"] = event["warning"]
    elif event.get("phase") == STEPPING and "step" in event:
        news = {name: value for name, value in event.items() if name != "likeness" and value is not None}
        measured = event["likeness"] or {}
        if measured and measured["step"] not in dict(state.get("likenesses", ())):
            likeness = measured["likeness"]
            add_news(
                state,
                {
                    "step": measured["step"],
                    "likeness": likeness,
                    "likeness_word": likeness_word(likeness, measured["rough"]),
                },
            )
        add_news(state, news)
    elif "phase" in event:
        state |= {name: event[name] for name in ("phase", "done", "total") if name in event}
