"""People handed out to workers that may die: in their order, each made once, and nobody given away for ever."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from core.errors import FaceLoraError
from core.studio import Person, Result
from core.studio.queue import MOST_DEATHS, News, hand_out
from core.training import Callbacks


class FakeCrew:
    """Workers that make whom they are given at once, but for those who are deadly or whom a worker has died with."""

    def __init__(self, room: int = 1, deadly: Sequence[str] = (), deaths: int = 99, stillborn: int = 0):
        self.room, self.deadly, self.deaths, self.stillborn = room, deadly, deaths, stillborn
        self.alive: list[str] = []
        self.started = 0
        self.given: list[tuple[str, str, bool]] = []
        """The worker, the person, and whether another had died with the person."""
        self.unheard: list[News] = []

    def hire(self, wanted: int) -> int:
        while len(self.alive) < min(self.room, wanted):
            self.started += 1
            self.alive.append(worker := f"worker {self.started}")
            dead = self.started <= self.stillborn
            self.unheard.append(News(worker, death="no base model here" if dead else ""))
        return len(self.alive)

    def give(self, worker: str, person: Person, again: bool) -> None:
        assert worker in self.alive and worker not in {news.worker for news in self.unheard}
        self.given.append((worker, person.name, again))
        if person.name in self.deadly and self.deaths:
            self.deaths -= 1
            self.unheard.append(News(worker, death="killed"))
        else:
            self.unheard.append(News(worker, Result(person.name, "made"), warnings=("dark photos",)))

    def news(self, seconds: float) -> Sequence[News]:
        heard, self.unheard = self.unheard, []
        for news in heard:
            if news.death:
                self.alive.remove(news.worker)
        return heard


def people(names: str) -> list[Person]:
    return [Person(name, Path(name), agreed=True) for name in names]


def nobody(person: Person) -> None:
    """Of no one anything is found."""


def found(names: str) -> Callable[[Person], Result | None]:
    return lambda person: Result(person.name, "found") if person.name in names else None


def test_people_are_made_in_their_order_and_whoever_is_found_costs_no_worker():
    crew, said = FakeCrew(), list[str]()
    results = list(hand_out(people("abcd"), crew, found("b"), Callbacks(on_warning=said.append)))
    assert [name for _, name, _ in crew.given] == ["a", "c", "d"] and crew.started == 1
    assert sorted((one.name, one.status) for one in results) == [
        ("a", "made"), ("b", "found"), ("c", "made"), ("d", "made"),
    ]  # fmt: skip
    assert said == ["a: dark photos", "c: dark photos", "d: dark photos"]


def test_no_worker_is_wanted_where_everybody_is_found():
    crew = FakeCrew()
    assert len(list(hand_out(people("abc"), crew, found("abc")))) == 3 and not crew.started


def test_no_more_workers_are_started_than_there_are_people_to_make():
    crew = FakeCrew(room=9)
    list(hand_out(people("abcde"), crew, found("abc")))
    assert crew.started <= 2


def test_the_person_of_a_dead_worker_is_the_next_one_of_another():
    crew, said = FakeCrew(deadly="b", deaths=2), list[str]()
    results = list(hand_out(people("abc"), crew, nobody, Callbacks(on_warning=said.append)))
    assert crew.given == [
        ("worker 1", "a", False), ("worker 1", "b", False), ("worker 2", "b", True), ("worker 3", "b", True),
        ("worker 3", "c", False),
    ]  # fmt: skip
    assert [one.name for one in results] == ["a", "b", "c"] and {one.status for one in results} == {"made"}
    assert [line for line in said if "ended" in line] == [
        "worker 1 ended: killed",
        "worker 2 ended: killed",
    ]


def test_whoever_has_seen_three_workers_die_fails_and_the_others_are_made():
    crew = FakeCrew(room=2, deadly="b")
    results = {one.name: one for one in hand_out(people("abc"), crew, nobody)}
    assert [name for _, name, _ in crew.given].count("b") == MOST_DEATHS == 3
    assert results["b"].status == "failed" and "3 workers ended" in results["b"].reason
    assert "killed" in results["b"].reason and results["a"].status == results["c"].status == "made"


def test_workers_that_end_before_they_are_ready_are_started_anew_but_not_for_ever():
    assert len(list(hand_out(people("ab"), FakeCrew(stillborn=2), nobody))) == 2
    crew = FakeCrew(stillborn=99)
    with pytest.raises(FaceLoraError, match="no worker could be started; the last one ended with: no base model here"):
        list(hand_out(people("ab"), crew, nobody))
    assert crew.started == 3


def test_where_there_is_no_room_it_is_said_once_and_waited_for():
    crew, said = FakeCrew(room=0), list[str]()

    def make_room(phase: str, done: int, total: int) -> None:
        turns.append((phase, done, total))
        crew.room = int(len(turns) > 4)

    turns: list[tuple[str, int, int]] = []
    (result,) = hand_out(people("a"), crew, nobody, Callbacks(on_phase=make_room, on_warning=said.append))
    assert result.status == "made" and [line for line in said if "no room" in line] == said[:1]
    assert turns[0] == ("people", 0, 1) and turns[-1] == ("people", 1, 1)
    assert [turn for turn in turns if turn[0] == "at work"] == [("at work", 1, 1), ("at work", 0, 1)]


def test_the_caller_can_stop_between_two_looks():
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(hand_out(people("a"), FakeCrew(room=0), nobody, Callbacks(on_phase=stop)))
