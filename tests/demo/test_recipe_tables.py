"""The program that measures recipes on the demo's base and writes their tables."""

from dataclasses import replace

import pytest

from tools import recipe_tables
from tools.recipe_tables import Row, Verdict, differences, main, read_records, summary


def row(options: str, person: int, seed: int, likeness: float, leakage: float = 0.0) -> Row:
    verdict = Verdict(likeness, own=0.8, stranger=0.1, leakage=leakage, rank1=1.0)
    return Row(options, person, seed, 300, 14.0, {"sface": verdict, "dlib": replace(verdict, likeness=0.9)})


def test_a_choice_is_compared_on_the_people_and_seeds_that_both_have():
    plain = [row("", 35, 1, 0.5), row("", 36, 1, 0.7), row("", 37, 1, 0.1)]
    choice = [row("--rank 8", 35, 1, 0.6, leakage=0.2), row("--rank 8", 36, 1, 0.7), row("--rank 8", 40, 1, 0.9)]
    ((options, who, likeness, change, leakage, by_dlib, drift),) = differences([*plain, *choice])
    assert (options, who, likeness) == ("`--rank 8`", "35, 36; 1", "0.650")
    assert change == "+0.050 ± 0.050" and leakage == "+0.100 ± 0.100"  # of 0.1 and 0, of 0.2 and 0
    assert (by_dlib, drift) == ("+0.0000 ± 0.0000", "+0.0")


def test_the_standard_error_of_the_plain_command_is_that_of_people_not_of_runs():
    plain = [row("", person, seed, 0.5 + 0.1 * (person - 35)) for person in (35, 36) for seed in (1, 2)]
    of_sface, of_dlib = summary(plain)
    assert of_sface[:3] == ("sface", "35, 36; 1, 2", "0.550 ± 0.050")
    assert of_dlib[:3] == ("dlib", "35, 36; 1, 2", "0.900 ± 0.000")


def test_a_finished_run_is_not_measured_again(tmp_path, monkeypatch):
    document, records, runs = tmp_path / "likeness.md", tmp_path / "runs.jsonl", []
    document.write_text("".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("defaults", "tried")))

    def run(options, person, seed, judges):
        runs.append((options, person, seed))
        if person == 37:
            raise KeyboardInterrupt
        return row(options, person, seed, 0.6)

    for name, value in {"run": run, "load_faces": lambda *name: None, "DOCUMENT": document}.items():
        monkeypatch.setattr(recipe_tables, name, value)
    arguments = ["--records", str(records), "--options", "", "--person", "36", "--person", "37"]
    monkeypatch.setattr("sys.argv", ["recipe_tables", *arguments])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            main()
    assert runs == [("", 36, 1), ("", 37, 1), ("", 37, 1)] and len(read_records(records)) == 1
    monkeypatch.setattr("sys.argv", ["recipe_tables", "--records", str(records)])
    main()
    assert "| sface | 36; 1 | 0.600 |" in document.read_text()
