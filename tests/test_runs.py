"""Whose training is whose (nodes/comfyui/app/runs.py): who sees a run, and who may end it. With real pages: tests/browser."""

import os
import stat

import pytest

from core.storage.cache_folder import clear_cache
from tests.tooling import nodes_module


@pytest.fixture
def module(monkeypatch, tmp_path):
    monkeypatch.setenv("FACELORA_CACHE", str(tmp_path / "cache"))
    return nodes_module("app.runs")


def begun(module, runs, user, prompt="p1", workflow: str | None = "w", node="5", **news):
    run = module.QueuedRun(user, prompt, workflow, node)
    runs.begin(run)
    runs.add(run, {"begin": True, "phase": "training", "photos": [f"a photo of {user}"], **news})
    return run


def test_each_user_sees_only_their_own_runs_and_runs_without_a_user_stay_hidden(module):
    runs = module.Runs()
    for user, prompt in (("anna", "p1"), ("berta", "p2"), (None, "p3")):
        begun(module, runs, user, prompt)
    assert [state["prompt"] for state in runs.of("anna")] == ["p1"]
    assert [state["photos"] for state in runs.of("berta")] == [["a photo of berta"]]
    assert runs.of(None) == runs.of("somebody else") == []


@pytest.mark.parametrize(
    ("user", "prompt", "node"),
    [("berta", "p1", "5"), (None, "p1", "5"), ("anna", "p2", "5"), ("anna", "p1", "6")],
)
def test_a_run_is_ended_by_its_user_alone_who_names_it(module, user, prompt, node):
    runs = module.Runs()
    run = begun(module, runs, "anna")
    assert runs.stop(user, prompt, node) is None
    assert not runs.stop_is_wanted(run)
    assert runs.stop("anna", "p1", "5") == run
    assert runs.stop_is_wanted(run)


def test_the_clock_of_a_run_continues_between_reports_and_stops_at_the_end(module, monkeypatch):
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    runs = module.Runs()
    run = begun(module, runs, "anna", seconds=10.0, seconds_left=20.0)
    runs.add(run, {"stopping": True})
    now = 105.0
    (state,) = runs.of("anna")
    assert (state["seconds"], state["seconds_left"]) == (15.0, 15.0)
    runs.add(run, {"phase": "done", "seconds": 16.0})
    now = 200.0
    assert runs.of("anna")[0]["seconds"] == 16.0


@pytest.mark.parametrize("phase", ["reading the model", "encoding", "done", "stopped", "failed"])
def test_where_nothing_is_learned_nothing_can_be_kept(module, phase):
    runs = module.Runs()
    begun(module, runs, "anna", phase=phase)
    assert runs.stop("anna", "p1", "5") is None


def test_a_run_without_a_user_cannot_be_ended_by_a_stranger(module):
    runs = module.Runs()
    begun(module, runs, None)
    assert runs.stop(None, "p1", "5") is None


def test_nodes_of_one_number_in_two_workflows_are_two_and_a_later_run_takes_the_place(module):
    runs = module.Runs()
    begun(module, runs, "anna", "p1", "w1", step=3, loss=0.5)
    begun(module, runs, "anna", "p2", "w2")
    begun(module, runs, "anna", "p3", None)
    begun(module, runs, "anna", "p4", "w1")
    assert [(state["prompt"], state["workflow"]) for state in runs.of("anna")] == [
        ("p2", "w2"), ("p3", None), ("p4", "w1"),
    ]  # fmt: skip
    assert "history" not in runs.of("anna")[-1]


def test_a_run_that_continues_another_of_its_job_goes_on_with_its_curves_and_clock(module):
    runs, news = module.Runs(), {"step": 3, "loss": 0.5, "learning_rate": 1e-3, "seconds": 10.0, "job": "j"}
    runs.add(begun(module, runs, "anna", "p1", **news), {"phase": "stopped", "seconds": 12.0})
    run = begun(module, runs, "anna", "p2")
    assert runs.resumed("j") == {"history": [(3, 0.5)], "learning_rates": [(3, 1e-3)], "seconds": 12.0}
    assert runs.resumed("another") == {}
    runs.add(run, {"phase": "done", **news})
    begun(module, runs, "anna", "p3")
    assert "seconds" not in runs.resumed("j"), "it was not interrupted"


def test_a_stop_that_comes_too_late_does_not_end_the_next_run(module):
    runs = module.Runs()
    begun(module, runs, "anna", "p1")
    runs.stop("anna", "p1", "5")
    assert not runs.stop_is_wanted(begun(module, runs, "anna", "p2"))


def test_panel_states_survive_a_restart_and_are_deleted_with_the_cache(module, tmp_path):
    begun(module, runs := module.Runs(), "anna", step=3, loss=0.5)
    begun(module, runs, "berta")
    begun(module, runs, None)
    (state,) = module.Runs().of("anna")
    assert (state["phase"], state["photos"]) == ("stopped", ["a photo of anna"])
    files = list((tmp_path / "cache" / "panels").iterdir())
    assert [file.read_text().count("a photo of") for file in files] == [1, 1], (
        "a file for each user, and none for nobody"
    )
    assert not any("anna" in file.name for file in files)
    if os.name != "nt":
        assert [stat.S_IMODE(path.stat().st_mode) for path in (files[0].parent, *files)] == [0o700, 0o600, 0o600]
    assert clear_cache() == 2
    assert not (tmp_path / "cache").exists()
    assert module.Runs().of("anna") == []


@pytest.mark.parametrize(
    "text", ["[1]", "{}", '[{"node": "5"}]', '[{"prompt": 1, "workflow": [], "node": 2}]', "[", '"x"']
)
def test_a_file_with_other_content_is_not_read_as_state(module, tmp_path, text):
    begun(module, module.Runs(), "anna")
    (file,) = (tmp_path / "cache" / "panels").iterdir()
    file.write_text(text)
    assert module.Runs().of("anna") == []


def test_only_the_latest_states_of_a_user_are_kept(module):
    runs = module.Runs()
    for number in range(module.KEPT + 3):
        begun(module, runs, "anna", str(number), node=str(number))
    assert [state["node"] for state in runs.of("anna")] == [str(number) for number in range(3, module.KEPT + 3)]
