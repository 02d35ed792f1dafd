"""The program that predicts what many workers do: exact where nothing is left to chance, and near a formula where it is."""

from dataclasses import replace

import pytest

from core.studio import Result
from core.studio.report import write_report
from tests.studio.test_cost import cost
from tools import studio_tables
from tools.studio_tables import REPLACED, STATE, Times, main, simulate

PERSON = Times(start=10.0, again=20.0, encode=30.0, train=500.0, draw=50.0)


def test_without_deaths_people_are_made_one_after_the_other_on_each_worker() -> None:
    for people, workers, rounds in ((1, 1, 1), (12, 1, 12), (12, 5, 3), (3, 1000, 1)):
        outcome = simulate(PERSON, people, workers, deaths=0.0)
        assert outcome.seconds == pytest.approx(10 + rounds * 600)
        assert (outcome.made, outcome.failed, outcome.wasted) == (people, 0, 0)


def test_a_death_loses_what_is_repeated_and_the_training_since_the_last_state() -> None:
    for before, done, kept in (
        (0, 20, 20), (0, 30, 30), (0, 30 + 59, 30), (0, 30 + 61, 90), (90, 90 + 61, 150), (90, 91, 90),
        (0, 530, 530), (0, 555, 555), (550, 560, 560),
    ):  # fmt: skip
        assert PERSON.kept(before, done) == kept


def test_whoever_has_seen_three_workers_die_fails_and_nothing_goes_on_for_ever() -> None:
    outcome = simulate(PERSON, 50, 7, deaths=3600.0)
    assert (outcome.made, outcome.failed) == (0, 50)


def test_deaths_cost_what_a_formula_says() -> None:
    long = replace(PERSON, train=50_000.0)
    outcome = simulate(long, 400, 10, deaths=0.1)
    # Of each death half a state, what is repeated, and the time until another worker is ready.
    each = STATE / 2 + long.again + REPLACED + long.start
    deaths = 400 * long.person / 3600 * 0.1
    assert outcome.wasted == pytest.approx(deaths * each, rel=0.25)
    assert outcome == simulate(long, 400, 10, deaths=0.1) != simulate(long, 400, 10, deaths=0.1, seed=2)


def test_the_table_goes_by_the_report_of_a_studio(tmp_path, monkeypatch, capsys) -> None:
    write_report(tmp_path, [Result("anna", "made", cost=cost(100.0)), Result("ben", "made", cost=cost(20.0))])
    document = tmp_path / "studio.md"
    document.write_text("before\n<!-- table: many workers -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(studio_tables, "DOCUMENT", document)
    arguments = ["studio_tables", "--report", str(tmp_path / "report.json"), "--start", "10"]
    monkeypatch.setattr("sys.argv", [*arguments, "--people", "12", "--workers", "1", "--processor"])
    main()
    # Five phases of half of 60 seconds.
    assert capsys.readouterr().out == "1810.0 s\n" and "old" in document.read_text()
    monkeypatch.setattr("sys.argv", [*arguments, "--people", "20"])
    main()
    assert "| 10 | 0 | 0.169 | 118 | 98% | 0.0% | 0 |" in document.read_text() and "old" not in document.read_text()
