"""What a person costs, what others will by it, and where a user sees that: before a run, during it, and in the report."""

import html
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tqdm.utils import disp_len

from core.cli.studio_progress import StudioProgress, planned
from core.demo import BASE_FILE
from core.device import processor
from core.errors import BadConfig
from core.models import load_base
from core.pictures import find_style_packs
from core.progress import LOADING
from core.storage.files import read_json
from core.storage.plain_values import read_as
from core.studio import Cost, Person, Plan, Result, Terms, Work, plan_people
from core.studio.cost import PHASES, Stopwatch
from core.studio.report import read_report, write_report
from core.training import Callbacks
from core.training.callbacks import StepReport
from tests.tooling import write_photos


class Clock:
    """A clock that stands still until it is set forward."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def report(step: int, seconds_per_step: float = 1.0, steps: int = 3) -> StepReport:
    return StepReport(step, steps, 1e-3, seconds_per_step, 0.0, 0, None, torch.zeros(()))


WORK = Work(1, 5, 100, 2)


def cost(seconds: float = 10.0, work: Work = WORK, device: str = "cpu", base: str = "b") -> Cost:
    """A cost with as many seconds of each phase."""
    same: dict[str, float] = dict.fromkeys(PHASES, seconds)
    half: dict[str, float] = dict.fromkeys(PHASES, seconds / 2)
    return Cost(device, processor(torch.device("cpu")), base, work, same, half)


def test_each_phase_has_the_time_until_the_next_begins() -> None:
    now, worked, heard = Clock(), Clock(), list[str]()
    watch = Stopwatch(now, worked)
    callbacks = watch.listening(Callbacks(on_phase=lambda name, done, total: heard.append(f"{name} {done}/{total}")))

    def pass_by(seconds: float) -> None:
        now.time += seconds
        worked.time += seconds / 2

    pass_by(1)
    watch.enter("encode")
    pass_by(2)
    callbacks.on_phase("encoding", 1, 2)
    pass_by(3)
    callbacks.on_phase("encoding", 2, 2)
    callbacks.on_phase(LOADING, 0, 0)
    pass_by(6)  # the denoiser is loaded in 4, and the first step takes 2
    callbacks.on_step(report(1, seconds_per_step=2))
    pass_by(7)
    callbacks.on_phase("pictures", 0, 1)
    pass_by(11)
    callbacks.on_phase("pictures", 1, 1)
    pass_by(13)
    measured = watch.cost(torch.device("cpu"), "b", photos=5)
    assert measured.seconds == {"check": 1, "encode": 5, "load": 4, "train": 9, "draw": 24}
    assert measured.processor_seconds == {"check": 0.5, "encode": 2.5, "load": 2, "train": 4.5, "draw": 12}
    assert measured.work == Work(1, 5, 1, 1)
    assert ", ".join(heard) == "encoding 1/2, encoding 2/2, loading the model 0/0, pictures 0/1, pictures 1/1"


def test_where_likeness_is_measured_first_the_training_begins_with_it() -> None:
    now = Clock()
    watch = Stopwatch(now, Clock())
    callbacks = watch.listening(Callbacks())
    callbacks.on_phase(LOADING, 0, 0)
    now.time += 4
    callbacks.on_phase("samples", 1, 9)
    now.time += 5
    callbacks.on_step(report(1, seconds_per_step=2))
    measured = watch.cost(torch.device("cpu"), "b", photos=5)
    assert (measured.seconds["load"], measured.seconds["train"]) == (4, 5)


def test_a_cost_that_is_no_cost_is_refused() -> None:
    values = json.loads(json.dumps({**vars(cost()), "work": vars(Work(1))}))
    assert read_as(Cost, values) == replace(cost(), work=Work(1))
    for damaged in (
        values | {"device": 3}, values | {"work": {"people": "many"}}, values | {"work": {"time": 1}},
        values | {"seconds": {}}, values | {"seconds": dict.fromkeys(PHASES, "long")}, values | {"more": 1},
    ):  # fmt: skip
        with pytest.raises(BadConfig):
            read_as(Cost, damaged)


def test_the_plan_counts_what_is_to_make(tmp_path, monkeypatch) -> None:
    base, output = load_base(BASE_FILE), tmp_path / "out"
    terms = Terms(find_style_packs().packs, "corporate", count=4, settings={"steps": 30})
    photos = write_photos(tmp_path / "photos", count=5)
    anna, ben = Person("anna", photos, agreed=True), Person("ben", photos, agreed=True, count=7)
    others = [
        Person("dora", photos), Person("ed", tmp_path / "none", agreed=True),
        Person("fay", photos, agreed=True, style_pack="none"), Person("gil", photos, agreed=True, problem="?"),
    ]  # fmt: skip
    monkeypatch.setattr("core.studio.many.is_made", lambda order, *_: order.name == "carl")
    output.mkdir()
    everybody = [anna, ben, replace(anna, name="carl"), *others]
    first = plan_people(everybody, base, output, terms)
    assert first.to_make == {"anna": Work(1, 5, 30, 4), "ben": Work(1, 5, 30, 7)}
    assert first.made_before == ("carl",) and [*first.refused] == ["dora", "ed", "fay", "gil"]
    assert first.work == Work(2, 10, 60, 11)
    assert planned(first) == "to make: 2 people (1 made before, 4 refused): 10 photos, at most 60 steps, 11 pictures"
    one = plan_people([replace(anna, count=1)], base, output, terms)
    assert planned(one) == "to make: 1 person: 5 photos, at most 30 steps, 1 picture"


def progress(capsys, terminal: bool = False, monkeypatch=None) -> StudioProgress:
    if terminal and monkeypatch:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    names = [
        "anna",
        "ben",
        "a person with a very long name who needs more than a line of a terminal to be named in full",
    ]
    return StudioProgress(names, Plan(dict.fromkeys(names, Work(1, 5, 100, 2)), (), {}))


def test_the_line_says_who_is_done_how_fast_it_goes_and_when_it_ends(capsys) -> None:
    shown = progress(capsys)
    shown.step(report(20, seconds_per_step=0.5, steps=100))
    assert shown.line == "0 of 3 done | 2 steps/s | training 20/100: anna"
    shown.ended(Result("anna", "made", pictures=("a", "b"), kept=1, likeness=0.6, cost=cost(100.0)))
    assert shown.line.startswith("1 of 3 done | 17 min left | ")  # twice 500 s
    shown.step(report(50, seconds_per_step=0.5, steps=100))
    assert shown.line == "1 of 3 done | 17 min left | 2 steps/s | training 50/100: ben"
    shown.phase("pictures", 1, 2)
    assert shown.line == "1 of 3 done | 17 min left | 2 steps/s | pictures 1/2: ben"
    shown.ended(Result("ben", "failed", "too dark"))
    assert shown.line.startswith("2 of 3 done, 1 failed | 8 min left")
    printed = capsys.readouterr().err.splitlines()
    assert printed == [
        "1 of 3: anna: made, pictures kept: 1 of 2, mean likeness 0.60, 8 min",
        "2 of 3: ben: failed: too dark",
    ]


def test_the_time_left_is_shared_by_those_at_work(capsys) -> None:
    shown = progress(capsys)
    shown.ended(Result("anna", "made", cost=cost(100.0)))
    assert "| 17 min left |" in shown.line
    shown.phase("people", 1, 3)
    shown.phase("at work", 2, 3)
    assert "| 8 min left |" in shown.line and shown.line.endswith("| 2 at work")


def test_on_a_terminal_the_line_fits_into_80_columns_and_elsewhere_there_are_no_control_characters(
    capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with progress(capsys, terminal=True, monkeypatch=monkeypatch) as shown:
        for _ in range(2):
            shown.ended(Result("anna", "found"))
        monkeypatch.setattr("core.cli.studio_progress.REDRAWN", 0.0)
        shown.step(report(20, steps=100))
        assert disp_len(shown.line) > 80
    drawn = capsys.readouterr().err
    states = [part for part in drawn.replace("\n", "\r").split("\r") if "of 3 done" in part]
    assert any("training 20/100: a person" in state for state in states)
    assert all(disp_len(state.rstrip()) < 80 for state in states)

    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr("core.cli.studio_progress.PRINTED", 0.0)
    with progress(capsys) as shown:
        shown.step(report(20, steps=100))
    plain = capsys.readouterr().err
    assert plain.endswith("training 20/100: anna\n") and min(plain.replace("\n", "")) >= " "


def result(name: str, likeness: float, leakage: float | None = None, **others) -> Result:
    return Result(name, "made", likeness=likeness, leakage=leakage, lora=f"{name}/{name}.safetensors", **others)


def test_the_report_begins_with_those_to_look_at_and_says_what_all_have_cost(tmp_path: Path) -> None:
    write_report(tmp_path, [
        result("good", 0.7, 0.0, cost=cost(360.0)), result("leaks", 0.7, 0.5, cost=cost(360.0)), result("other", 0.3),
        replace(result("old", 0.8, cost=cost(1e6)), status="found"), Result("bad", "failed", "too <few> photos"),
    ])  # fmt: skip
    values = read_json(tmp_path / "report.json")
    assert [one["name"] for one in values["people"]] == ["bad", "leaks", "other", "good", "old"]
    assert values["gpu_hours"] is None and values["processor_hours"] == 0.5 and values["seconds"] == 3600
    assert values["phases"] == dict.fromkeys(PHASES, 720)
    assert [one.leakage for one in read_report(tmp_path)] == [None, 0.5, None, 0.0, None]
    page = (tmp_path / "report.html").read_text()
    assert "<few>" not in page and "CPU-hours" in page and "GPU-hours" not in page
    assert "0.50 processor hours" in page and "check 20%" in page


def test_someone_of_whom_no_picture_is_alike_is_not_just_called_made(tmp_path: Path, capsys) -> None:
    results = [
        Result("anna", "made", pictures=("anna/001-1.png",), kept=1), Result("ben", "found", "No picture is the person."),
        Result("carl", "failed", "too few photos"), Result("eve", "made", pictures=("eve/001-1.png", "eve/002-2.png")),
    ]  # fmt: skip
    write_report(tmp_path, results)
    page = (tmp_path / "report.html").read_text()
    assert "<title>Studio: 2 made, 1 none alike, 1 failed</title>" in page and "<td>none alike</td>" in page
    assert read_json(tmp_path / "report.json")["none_alike"] == 1
    shown = StudioProgress(["anna", "ben", "carl", "eve"], Plan({}, (), {}))
    for one in results:
        shown.ended(one)
    assert capsys.readouterr().err.splitlines() == [
        "1 of 4: anna: made, pictures kept: 1 of 1, 0 s",
        "2 of 4: ben: none alike, pictures kept: 0 of 0: No picture is the person.",
        "3 of 4: carl: failed: too few photos",
        "4 of 4: eve: made, pictures kept: 2, not ranked, 0 s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("/home/jane doe/photos/17: no readable photo in this folder", "17: no readable photo in this folder"),
        ("cannot be read: [Errno 13] '/home/jane doe/17/a.jpg'", "cannot be read: [Errno 13] 'a.jpg'"),
        ("OUTPUT/anna/studio.json: another process is writing this file (lock: OUTPUT/anna/.studio.json.lock)",
         "anna/studio.json: another process is writing this file (lock: anna/.studio.json.lock)"),
        (r"C:\Users\Jane Doe\17\: holds no photo", "17: holds no photo"),
        ("../../jane/17: holds no photo", "17: holds no photo"),
        ("the base is in /mnt/jane/sd15.safetensors, which is gone", "the base is in sd15.safetensors, which is gone"),
        ("style_pack = 'a/b': choose one of x, y and/or z", "style_pack = 'a/b': choose one of x, y and/or z"),
    ],
)  # fmt: skip
def test_a_reason_in_the_report_names_no_folder_of_the_machine(tmp_path: Path, reason: str, shown: str) -> None:
    output = tmp_path / "jane doe" / "out"
    output.mkdir(parents=True)
    write_report(output, [Result("anna", "failed", reason.replace("OUTPUT", str(output)))])
    assert [one.reason for one in read_report(output)] == [shown]
    assert html.escape(shown) in (output / "report.html").read_text()


def test_a_link_leads_to_the_folder_whatever_the_person_is_called(tmp_path: Path) -> None:
    write_report(tmp_path, [result('eve #1 "50%"', 0.7, pictures=('eve #1 "50%"/001-1.png',))])
    page = (tmp_path / "report.html").read_text()
    assert 'href="eve%20%231%20%2250%25%22/gallery.html"' in page and 'src="eve%20%231%20%2250%25%22/001-1.png"' in page


def test_gpu_hours_are_said_where_there_is_a_gpu(tmp_path: Path) -> None:
    write_report(tmp_path, [result("anna", 0.7, cost=cost(360.0, device="cuda"))])
    page = (tmp_path / "report.html").read_text()
    assert (
        read_json(tmp_path / "report.json")["gpu_hours"] == 0.5 and "0.50 GPU-hours" in page and "CPU-hours" not in page
    )
