"""People handed out to workers one at a time. Any worker may die: that costs its person the steps since the last state."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import FaceLoraError
from ..training.callbacks import NO_CALLBACKS, Callbacks
from .people import Person
from .result import Result

MOST_DEATHS = 3
"""The number of workers that may die with a person, who then fails, and the number that may end before they are ready, one
after the other, whereupon no more are started."""
PATIENCE = 1.0
"""The most seconds to wait for news before asking again whether there is room for a worker, and whether the caller goes on."""


@dataclass(frozen=True)
class News:
    """What is heard of a worker: that it is ready, that it has made a person and is ready again, or that it is no more."""

    worker: str
    """Its name, which also says where it is."""
    result: Result | None = None
    warnings: tuple[str, ...] = ()
    """What the user should know about the person, in sentences."""
    death: str = ""
    """Why it is no more; empty where it is ready."""


class Crew(Protocol):
    """The workers of a cluster, each with the base model opened."""

    def hire(self, wanted: int) -> int:
        """The number of workers that there are, when some have been started where there was room, up to the wanted number."""
        ...

    def give(self, worker: str, person: Person, again: bool) -> None:
        """Has the worker make the person; `again` where another one has died doing so, which may still hold the lock."""
        ...

    def news(self, seconds: float) -> Sequence[News]:
        """What has happened since the last call; waits at most so long for the first of it."""
        ...


def hand_out(
    people: Iterable[Person], crew: Crew, look: Callable[[Person], Result | None], callbacks: Callbacks = NO_CALLBACKS
) -> Iterator[Result]:
    """The result of each person as soon as it is there: what `look` finds, or else what a worker of the crew makes.

    The person of a dead worker is the next to be given away. `callbacks.on_phase` is called with ("people", done, all) again
    and again, and with ("at work", workers, all) where that has changed. Raises FaceLoraError when workers end before they
    are ready and there is no other.
    """
    unseen = deque(people)
    queue, done, at_work, everybody = _Queue(crew, callbacks), 0, 0, len(unseen)
    while unseen or queue.waiting or queue.busy:
        results = []
        if unseen:
            person = unseen.popleft()
            if found := look(person):
                results.append(found)
            else:
                queue.waiting.append(person)
        results += queue.turn(0 if unseen else PATIENCE)
        done += len(results)
        if len(queue.busy) != at_work:
            at_work = len(queue.busy)
            callbacks.on_phase("at work", at_work, everybody)
        callbacks.on_phase("people", done, everybody)
        yield from results


class _Queue:
    """The people whom workers are to make, and those whom they are making."""

    def __init__(self, crew: Crew, callbacks: Callbacks):
        self.waiting: deque[Person] = deque()
        self.busy: dict[str, Person] = {}
        self._idle: deque[str] = deque()
        self._crew, self._callbacks = crew, callbacks
        self._deaths: Counter[str] = Counter()
        """How many workers have died with each person."""
        self._failed_starts: int = 0
        """How many workers have ended before they were ready, since the last good news."""
        self._last_words: str = ""
        self._told: bool = False
        """Whether the user knows that there is no room."""

    def turn(self, seconds: float) -> list[Result]:
        """The results that have come in, when the crew has been looked after and has been given people."""
        results = [result for news in self._news(seconds) if (result := self._hear(news))]
        while self._idle and self.waiting:
            worker, person = self._idle.popleft(), self.waiting.popleft()
            self.busy[worker] = person
            self._crew.give(worker, person, again=self._deaths[person.name] > 0)
        return results

    def _news(self, seconds: float) -> Sequence[News]:
        wanted = len(self.waiting) + len(self.busy)
        if not wanted:
            return ()
        may_start = self._failed_starts < MOST_DEATHS
        workers = self._crew.hire(wanted if may_start else 0)
        if not workers and not may_start:
            raise FaceLoraError(f"no worker becomes ready; the last one: {self._last_words}")
        if not workers and not self._told:
            self._told = True
            self._callbacks.on_warning("the cluster has no room for a worker; waiting for some")
        return self._crew.news(seconds)

    def _hear(self, news: News) -> Result | None:
        """The result in the news; also that of a person with whom too many workers have died."""
        person = self.busy.pop(news.worker, None)
        for warning in news.warnings:
            self._callbacks.on_warning(f"{person.name}: {warning}" if person else warning)
        if not news.death:
            self._failed_starts = 0
            self._idle.append(news.worker)
            return news.result
        if news.worker in self._idle:
            self._idle.remove(news.worker)
        elif person is None:
            self._failed_starts += 1
        self._last_words = news.death
        self._callbacks.on_warning(f"{news.worker} has ended: {news.death}")
        return None if person is None else self._bereave(person, news.death)

    def _bereave(self, person: Person, death: str) -> Result | None:
        """Puts the person of a dead worker back into the queue; the result where that has been done often enough."""
        self._deaths[person.name] += 1
        if self._deaths[person.name] == MOST_DEATHS:
            return Result(person.name, "failed", f"{MOST_DEATHS} workers have ended while making it; the last: {death}")
        self.waiting.appendleft(person)
        return None
