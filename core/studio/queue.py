"""Hand people out to workers, one each. When a worker dies, its person loses only the steps since the last saved state."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import FaceLoraError
from ..training.callbacks import NO_CALLBACKS, Callbacks
from .people import Person
from .result import Result

MOST_DEATHS = 3
"""A person fails after this many workers died while making them. No more workers are started after this many in a row ended
before they were ready."""
PATIENCE = 1.0
"""The most seconds to wait for news before checking again for room for workers, and returning to the caller."""


@dataclass(frozen=True)
class News:
    """News of a worker: it is ready, it has made a person and is ready again, or it has ended."""

    worker: str
    """Its name, which includes its location."""
    result: Result | None = None
    warnings: tuple[str, ...] = ()
    """What the user should know about the person, in sentences."""
    death: str = ""
    """Why the worker has ended; empty if it is ready."""


class Crew(Protocol):
    """The workers of a cluster, each with the base model loaded."""

    def hire(self, wanted: int) -> int:
        """Start workers where there is room, up to the wanted number, and return how many there are."""
        ...

    def give(self, worker: str, person: Person, again: bool) -> None:
        """Tell the worker to make the person; `again` if another worker died making them and may still hold the lock."""
        ...

    def news(self, seconds: float) -> Sequence[News]:
        """Return what has happened since the last call; wait at most this long for the first news."""
        ...


def hand_out(
    people: Iterable[Person], crew: Crew, look: Callable[[Person], Result | None], callbacks: Callbacks = NO_CALLBACKS
) -> Iterator[Result]:
    """Yield the result of each person as soon as it is ready: what `look` finds, or else what a worker makes.

    A dead worker's person is handed out next. `callbacks.on_phase` is called repeatedly with ("people", done, all), and with
    ("at work", workers, all) when that changes. Raises FaceLoraError if workers end before they are ready and none is left.
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
    """The people whom workers have yet to make, and those being made."""

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
        """Whether the user has been told that room is lacking."""

    def turn(self, seconds: float) -> list[Result]:
        """Take care of the crew, hand out people, and return the results that have arrived."""
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
            raise FaceLoraError(f"no worker could be started; the last one ended with: {self._last_words}")
        if not workers and not self._told:
            self._told = True
            self._callbacks.on_warning("the cluster has no room for a worker; waiting")
        return self._crew.news(seconds)

    def _hear(self, news: News) -> Result | None:
        """Return the result in the news; also the failure of a person with whom too many workers have died."""
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
        self._callbacks.on_warning(f"{news.worker} ended: {news.death}")
        return None if person is None else self._bereave(person, news.death)

    def _bereave(self, person: Person, death: str) -> Result | None:
        """Return a dead worker's person to the queue, or the failed result after too many deaths."""
        self._deaths[person.name] += 1
        if self._deaths[person.name] == MOST_DEATHS:
            return Result(
                person.name, "failed", f"{MOST_DEATHS} workers ended while making this person; the last one: {death}"
            )
        self.waiting.appendleft(person)
        return None
