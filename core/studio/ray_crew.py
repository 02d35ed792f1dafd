"""The workers of a Ray cluster: an actor for each GPU, or for each node if the cluster has no GPU."""

import logging
import math
import os
import secrets
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import BadConfig, FaceLoraError, InUse, MissingPackage
from ..models.base import Base
from ..models.opening import load_base
from ..progress import OnProgress
from ..training.callbacks import Callbacks
from .people import Person
from .queue import News
from .result import Result, Terms, failed, find_or_make

LOCAL = "local"
"""Use instead of an address for a Ray on this machine, started and stopped with the run."""
INSTALL_RAY = 'pip install ".[ray]" in a clone of this project'
_ANSWER = 5.0
"""The seconds that a cluster has to answer."""
_LOOK = 5.0
"""The seconds between two checks of the cluster's nodes."""
_LOCK = 150.0
"""The seconds to wait for the lock of a dead worker: NFS releases it after 90."""
_STORE = 100_000_000
"""The bytes of Ray's shared memory, which is hardly used here. Ray's default is a third of the memory."""
_LAST_STEP = 20.0
"""The seconds that stopping workers have to finish their step and save its state."""


Opened = dict[str, Any]
"""The arguments that open a base model."""


class Stopped(Exception):
    """Raised in a worker when the driver has asked it to stop."""


class Worker:
    """The code of an actor. A second thread waits for the request to stop."""

    def __init__(self, base: Opened, drawn_on: Opened | None, output: Path, terms: Terms):
        self._base_with, self._drawn_on_with, self._output, self._terms = base, drawn_on, output, terms
        self._stop = threading.Event()

    def open(self) -> str:
        """Open the base models, and return their identity."""
        self._base = load_base(**self._base_with)
        if self._drawn_on_with:
            self._terms = replace(self._terms, drawn_on=load_base(**self._drawn_on_with))
        return self._terms.identity(self._base)

    def make(self, person: Person, again: bool) -> tuple[Result, list[str]]:
        """Make a person, and return the result and warnings."""
        warnings: list[str] = []
        callbacks = Callbacks(
            on_step=self._check, on_phase=self._check, on_warning=warnings.append, check_cancelled=self._check
        )
        deadline = time.monotonic() + (_LOCK if again else 0)
        while True:
            try:
                return find_or_make(person, self._base, self._output, self._terms, callbacks=callbacks), warnings
            except Stopped:
                raise
            except Exception as error:
                if not isinstance(error, InUse) or time.monotonic() > deadline:
                    return failed(person, error), warnings
            self._check()
            time.sleep(1)

    def stop(self) -> None:
        self._stop.set()

    def _check(self, *_: object) -> None:
        if self._stop.is_set():
            raise Stopped


class RayCrew:
    """The workers of the cluster that this machine belongs to. It is connected to, or started, with the first worker."""

    def __init__(self, address: str, base: Base, output: Path, terms: Terms, on_progress: OnProgress):
        """Take the head node's address, HOST:PORT, or LOCAL, and read the base models' files.

        Raises BadConfig or MissingPackage if it cannot work.
        """
        if find_spec("ray") is None:
            raise MissingPackage(f"a cluster requires Ray, which is not installed: {INSTALL_RAY}")
        host, _, port = address.rpartition(":")
        if address != LOCAL and (not host or not port.isdecimal() or "/" in address):
            raise BadConfig(f"ray = {address!r}: expected the head node's HOST:PORT, such as 10.0.0.5:6379, or {LOCAL}")
        opened = [None if one is None else _opened_with(one) for one in (base, terms.drawn_on)]
        self._address, self._server = address, None if address == LOCAL else (host, int(port))
        self._arguments = (*opened, output.absolute(), replace(terms, drawn_on=None))
        terms.compute_hashes(base, on_progress)
        self._identity = terms.identity(base)
        self._ray: Any = None
        self._owns_connection = False
        self._actors: dict[str, Any] = {}
        """The workers by name."""
        self._nodes: dict[str, str] = {}
        """The node of each worker."""
        self._calls: dict[Any, str] = {}
        """The worker of each unanswered call."""
        self._open: set[str] = set()
        """The workers that have opened the base model."""
        self._started, self._looked = 0, -math.inf

    def __enter__(self) -> "RayCrew":
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the workers, which save their current state."""
        if self._ray is None:
            return
        try:
            busy = [call for call, name in self._calls.items() if name in self._open]
            for actor in self._actors.values() if busy else ():
                actor.stop.remote()
            if busy:
                self._ray.wait(busy, num_returns=len(busy), timeout=_LAST_STEP)
            for actor in self._actors.values():
                self._ray.kill(actor)
        finally:
            if self._owns_connection:
                self._ray.shutdown()

    def hire(self, wanted: int) -> int:
        if wanted > len(self._actors) and time.monotonic() > self._looked + _LOOK:
            self._connect()
            self._start(wanted)
            self._looked = time.monotonic()
        return len(self._actors)

    def give(self, worker: str, person: Person, again: bool) -> None:
        placed = replace(person, photos=person.photos.absolute())
        self._calls[self._actors[worker].make.remote(placed, again)] = worker

    def news(self, seconds: float) -> Sequence[News]:
        if not self._calls:
            time.sleep(seconds)
            return ()
        answered, _ = self._ray.wait(list(self._calls), timeout=seconds)
        return [self._read(call) for call in answered]

    def _read(self, call: Any) -> News:
        """Return the news from a call. Raises what a worker has raised, as on a single machine."""
        worker = self._calls.pop(call)
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            if isinstance(error, self._ray.exceptions.RayTaskError) and worker in self._open:
                raise
            return self._lose(worker, _reason(error))
        if worker in self._open:
            result, warnings = answer
            return News(worker, result, tuple(warnings))
        if answer != self._identity:
            return self._lose(worker, "its base model is a different one")
        self._open.add(worker)
        return News(worker)

    def _lose(self, worker: str, why: str) -> News:
        self._ray.kill(self._actors.pop(worker))  # It may only have been out of reach.
        self._open.discard(worker)
        del self._nodes[worker]
        return News(worker, death=why)

    def _start(self, wanted: int) -> None:
        """Start workers on nodes with room for them, up to the wanted number."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        has_gpus = any(node["Resources"].get("GPU", 0) >= 1 for node in nodes)
        taken = Counter(self._nodes.values())
        for node in nodes:
            name, resources = node["NodeID"], node["Resources"]
            gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
            room = gpus if has_gpus else min(cpus, 1)
            # Without GPUs a worker gets a whole node, and Ray sets the number of threads for all of its CPUs.
            needs = {"num_gpus": 1, "num_cpus": 1} if has_gpus else {"num_cpus": cpus}
            for _ in range(min(room - taken[name], wanted - len(self._actors))):
                self._started += 1
                worker = f"worker {self._started} on {node['NodeManagerAddress']}"
                place = NodeAffinitySchedulingStrategy(name, soft=False)
                actor = self._remote.options(scheduling_strategy=place, max_concurrency=2, **needs)
                self._actors[worker] = actor.remote(*self._arguments)
                self._nodes[worker] = name
                self._calls[self._actors[worker].open.remote()] = worker

    def _connect(self) -> None:
        if self._ray is not None:
            return
        if self._server:
            self._check_answer(self._server)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Set before importing Ray: no usage statistics are sent.
        import ray

        if not ray.is_initialized():
            if not self._server:
                # Otherwise Ray writes a token into the user's home folder, and clusters started later with `ray start` require
                # it.
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            with _own_handler():
                try:
                    own = {} if self._server else {"include_dashboard": False, "object_store_memory": _STORE}
                    ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR, **own)
                except (ConnectionError, RuntimeError, ValueError) as error:
                    raise BadConfig(f"ray = {self._address!r}: {_reason(error)}") from None
            self._owns_connection = True
        self._ray = ray
        self._remote = ray.remote(Worker)

    def _check_answer(self, server: tuple[str, int]) -> None:
        """Raise BadConfig at once if the address doesn't answer: Ray takes minutes to report it."""
        try:
            socket.create_connection(server, timeout=_ANSWER).close()
        except OSError as error:
            begin = "start a cluster with `ray start --head`, which prints its address"
            raise BadConfig(
                f"ray = {self._address!r}: the address does not answer ({error.strerror or error}); {begin}"
            ) from None


@contextmanager
def _own_handler() -> Iterator[None]:
    """Restore SIGTERM's handler after the context, since Ray may change it."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)


def _reason(error: Exception) -> str:
    """Return an error of Ray in one line, or the project's own error that caused it."""
    cause = getattr(error, "cause", None)
    lines = [line.strip() for line in str(cause if isinstance(cause, FaceLoraError) else error).strip().splitlines()]
    # An out-of-memory error starts with its message, followed by advice. Other errors end with their message.
    return (lines[0] if "memory" in lines[0] else lines[-1]) if lines else type(error).__name__


def _opened_with(base: Base) -> Opened:
    if base.opened_with is None:
        raise BadConfig(
            f"a cluster's workers read base models from their files, but {base.name} was not loaded from files"
        )
    return dict(base.opened_with)
