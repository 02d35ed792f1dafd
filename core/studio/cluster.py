"""Make people on a Ray cluster: with a worker for each GPU, or for each node if no node has a GPU.

The workers are Ray's actors. Ray chooses their nodes, starts a dead one again where there is room, and repeats its call: the
person continues from the last saved state.
"""

import logging
import os
import secrets
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import BadConfig, BadFile, FaceLoraError, MissingPackage
from ..models.base import Base
from ..models.opening import load_base
from ..pictures.drawing_model import with_speed_lora
from ..progress import AT_WORK, PEOPLE, READING
from ..training.callbacks import Callbacks
from .people import Person
from .result import Result, Terms, failed, find, find_or_make

LOCAL = "local"
"""Use instead of an address for a Ray on this machine, started and stopped with the run."""
MOST_DEATHS = 3
"""A person fails after this many workers died while making them. No more workers are started after this many in a row could
not open the base model."""
_ANSWER = 5.0
"""The seconds that a cluster has to answer."""
_TURN = 1.0
"""The most seconds to wait for a worker before looking for new nodes, and returning to the caller."""
_LOCK = 150.0
"""The seconds to wait for the lock of a dead worker: NFS releases it after 90."""
_STORE = 100_000_000
"""The bytes of Ray's shared memory, which is hardly used here. Ray's default is a third of the memory."""
_LAST_STEP = 20.0
"""The seconds that stopping workers have to finish their step and save its state."""


class Worker:
    """The code of an actor."""

    def __init__(
        self,
        opened_with: Sequence[tuple[Mapping[str, Any], Path | None] | None],
        identity: str,
        output: Path,
        terms: Terms,
    ):
        import ray

        self._opened_with, self._identity, self._output, self._terms = opened_with, identity, output, terms
        self._base: Base | None = None
        self._restarted: bool = bool(ray.get_runtime_context().was_current_actor_reconstructed)

    def open(self) -> None:
        """Open the base models, once. Raises BadFile if they aren't the driver's."""
        if self._base:
            return
        base, drawn_on = (_opened(*one) if one else None for one in self._opened_with)
        assert base
        self._terms = replace(self._terms, drawn_on=drawn_on)
        if self._terms.identity(base) != self._identity:
            raise BadFile("its base model is a different one")
        self._base = base

    def make(self, person: Person) -> tuple[Result, list[str], bool]:
        """Make a person, and return the result, warnings, and whether Ray has started this actor again."""
        warnings = ["a worker ended, and Ray started it again"] if self._restarted else []
        wait = _LOCK if self._restarted else 0.0
        callbacks = Callbacks(
            on_step=_check_cancelled, on_phase=_check_cancelled, on_warning=warnings.append,
            check_cancelled=_check_cancelled,
        )  # fmt: skip
        try:
            self.open()  # Ray may have started it again.
            assert self._base
            result = find_or_make(person, self._base, self._output, self._terms, callbacks=callbacks, wait=wait)
        except Exception as error:
            result = failed(person, error)
        return result, warnings, self._restarted


def _opened(arguments: Mapping[str, Any], speed_lora: Path | None) -> Base:
    base = load_base(**arguments)
    return with_speed_lora(base, speed_lora) if speed_lora else base


def _check_cancelled(*_: object) -> None:
    """Raise KeyboardInterrupt in an actor whose call was cancelled."""
    import ray

    if ray.get_runtime_context().is_canceled():
        raise KeyboardInterrupt


def make_on_cluster(
    people: Sequence[Person], base: Base, output: Path, terms: Terms, callbacks: Callbacks, address: str
) -> Iterator[Result]:
    """Yield the result of each person as soon as it is ready. The cluster is needed only for those who aren't made yet.

    The address is the head node's HOST:PORT, or LOCAL. `callbacks.on_phase` is called repeatedly with ("people", done, all),
    and with ("at work", workers, all) when that changes. Raises BadConfig or MissingPackage if the cluster can't be used, and
    FaceLoraError if no worker can open the base model.
    """
    if find_spec("ray") is None:
        raise MissingPackage(
            'a cluster requires Ray, which is not installed: pip install ".[ray]" in a clone of this project'
        )
    host, _, port = address.rpartition(":")
    if address != LOCAL and (not host or not port.isdecimal() or "/" in address):
        raise BadConfig(f"ray = {address!r}: expected the head node's HOST:PORT, such as 10.0.0.5:6379, or {LOCAL}")
    for one in (base, terms.drawn_on):
        if one and one.opened_with is None:
            raise BadConfig(
                f"a cluster's workers read base models from their files, but {one.name} was not loaded from files"
            )
    terms.compute_hashes(base, callbacks.progress(READING))
    waiting = deque[Person]()
    for number, person in enumerate(people, start=1):
        try:
            result = find(person, base, output, terms)
        except Exception as error:
            result = failed(person, error)
        if result is None:
            waiting.append(person)
        callbacks.on_phase(PEOPLE, number - len(waiting), len(people))
        if result:
            yield result
    if not waiting:
        return
    opened_with = [
        one and (one.opened_with, one.speed_lora and Path(os.path.abspath(one.speed_lora.path)))
        for one in (base, terms.drawn_on)
    ]
    arguments = (opened_with, terms.identity(base), output, replace(terms, drawn_on=None))
    done, at_work = len(people) - len(waiting), 0
    with _connected(address) as ray, _Workers(ray, arguments, waiting, callbacks) as workers:
        while waiting or at_work:
            workers.start()
            result = workers.next_result()
            done += result is not None
            if workers.at_work != at_work:
                at_work = workers.at_work
                callbacks.on_phase(AT_WORK, at_work, len(people))
            callbacks.on_phase(PEOPLE, done, len(people))
            if result:
                yield result


class _Workers:
    """The actors. Each opens the base model, then makes one person after the other as long as people are waiting."""

    def __init__(self, ray: Any, arguments: tuple[Any, ...], waiting: deque[Person], callbacks: Callbacks):
        self._ray, self._arguments, self._waiting, self._callbacks = ray, arguments, waiting, callbacks
        # Only deaths are limited: on a lost node, Ray repeats a call many times before it knows that the actor is dead.
        restarts = MOST_DEATHS - 1
        self._actor = ray.remote(max_restarts=restarts, max_task_retries=-1, scheduling_strategy="SPREAD")(Worker)
        self._calls: dict[Any, tuple[Any, Person | None]] = {}
        """The actor of each unanswered call, and the person it makes; None while it opens the base model."""
        self._failed_starts: int = 0
        """How many actors in a row could not open the base model."""
        self._is_told: bool = False
        """Whether the user has been told that room is lacking."""

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        """End all actors. Those at work first finish their step and save its state."""
        busy = [call for call, (_actor, person) in self._calls.items() if person]
        for call in busy:
            self._ray.cancel(call)
        if busy:
            self._ray.wait(busy, num_returns=len(busy), timeout=_LAST_STEP)
        for actor, _person in self._calls.values():
            self._ray.kill(actor)

    @property
    def at_work(self) -> int:
        return sum(person is not None for _, person in self._calls.values())

    def start(self) -> None:
        """Start an actor for each person, but no more than there is room for."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room, needs = sum(int(node.get("GPU", 0)) for node in nodes), {"num_gpus": 1, "num_cpus": 1}
        if not room:  # Ray sets the number of threads for all of a node's processors.
            processors = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
            room, needs = len(processors), {"num_cpus": min(processors, default=1)}
        if not room and not self._is_told:
            self._is_told = True
            self._callbacks.on_warning("the cluster has no room for a worker; waiting")
        if self._failed_starts < MOST_DEATHS:
            for _ in range(min(room, len(self._waiting) + self.at_work) - len(self._calls)):
                actor = self._actor.options(**needs).remote(*self._arguments)
                self._calls[actor.open.remote()] = actor, None

    def next_result(self) -> Result | None:
        """Wait a moment for an answer, give its actor the next person, and return the result in it, if any.

        Raises FaceLoraError if no actor is left.
        """
        if not self._calls:
            time.sleep(_TURN)
            return None
        answered, _ = self._ray.wait([*self._calls], timeout=_TURN)
        if not answered:
            return None
        actor, person = self._calls.pop(answered[0])
        try:
            answer: Any = self._ray.get(answered[0])
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)
            if person:
                ended = f"{MOST_DEATHS} workers ended while making this person; the last one: {_reason(error)}"
                return Result(person.name, "failed", ended)
            self._failed_starts += 1
            self._callbacks.on_warning(f"a worker could not start: {_reason(error)}")
            if not self._calls and self._failed_starts >= MOST_DEATHS:
                ended = f"no worker could be started; the last one ended with: {_reason(error)}"
                raise FaceLoraError(ended) from None
            return None
        self._failed_starts = 0
        result, restarted = None, False
        if person:
            result, warnings, restarted = answer
            for warning in warnings:
                self._callbacks.on_warning(f"{person.name}: {warning}")
        if self._waiting and not restarted:
            person = self._waiting.popleft()
            self._calls[actor.make.remote(person)] = actor, person
        else:  # One that Ray starts again may need the room. A new actor may die as often as any.
            self._ray.kill(actor)
        return result


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Connect to the cluster, or start one for LOCAL, unless the program is connected already. Raises BadConfig."""
    if address != LOCAL:
        host, _, port = address.rpartition(":")
        try:  # Ray itself takes minutes to give up.
            socket.create_connection((host, int(port)), timeout=_ANSWER).close()
        except OSError as error:
            begin = "start a cluster with `ray start --head`, which prints its address"
            raise BadConfig(
                f"ray = {address!r}: the address does not answer ({error.strerror or error}); {begin}"
            ) from None
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Set before importing Ray: no usage statistics are sent.
    import ray

    if ray.is_initialized():
        yield ray
        return
    own: dict[str, Any] = {}
    if address == LOCAL:
        own = {"include_dashboard": False, "object_store_memory": _STORE}
        # Otherwise Ray writes a token into the user's home folder, and clusters started later with `ray start` require it.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BadConfig(f"ray = {address!r}: {_reason(error)}") from None
    finally:
        if signal.getsignal(signal.SIGTERM) is not handler:  # Ray may change it.
            signal.signal(signal.SIGTERM, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _reason(error: Exception) -> str:
    """Return an error of Ray in one line, or the project's own error that caused it."""
    cause = getattr(error, "cause", None)
    lines = [line.strip() for line in str(cause if isinstance(cause, FaceLoraError) else error).strip().splitlines()]
    # An out-of-memory error starts with its message, followed by advice. Other errors end with their message.
    return (lines[0] if "memory" in lines[0] else lines[-1]) if lines else type(error).__name__
