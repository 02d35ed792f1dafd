"""tools/gpu.py without a GPU: failures are recorded, and the time is kept. tests/gpu/ runs the measurements."""

import json
import time

import pytest
import torch

from tools import bench, gpu
from tools.gpu import Session

CPU = torch.device("cpu")


def works(session: Session):
    yield "fails", lambda: {"seconds": 1 / 0}
    yield "works", lambda: {"seconds": 1.5, "predicted": 3 * 2**30, "is_good": True}


def breaks(session: Session):
    raise ValueError("no base")
    yield


def is_late(session: Session):
    session.until = time.monotonic() + gpu.LONGEST - 1
    yield "late", lambda: pytest.fail("begun")


def test_failures_are_recorded_and_nothing_begins_when_the_time_is_nearly_over(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "COMMANDS", {"some": {"first": works, "second": breaks, "third": is_late}})
    monkeypatch.setattr(gpu, "_forget", lambda device: None)
    session = Session(CPU, torch.float32, time.monotonic() + 1000)
    found = gpu.measure(session, "some", tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["stages"] == found["stages"]
    assert found["stages"] == {
        "first": {
            "fails": {"error": "ZeroDivisionError: division by zero"},
            "works": {"seconds": 1.5, "predicted": 3 * 2**30, "is_good": True},
        },
        "second": {"all": {"error": "ValueError: no base"}},
        "third": {"late": {"skipped": "no time left for this and the rest"}},
    }
    text = gpu.as_markdown(found, "make gpu")
    assert "| works |  | 1.5 | 3.00 GiB | yes |" in text and "`make gpu`" in text


def test_no_round_begins_after_the_time_but_the_first():
    taken = bench.take_turns({}, lambda: None, CPU, rounds=9, block=1, until=time.monotonic() - 1)
    assert len(taken["matmul"]) == 1


def test_what_runs_in_another_process_comes_back():
    assert gpu.apart(sorted, [2, 1]) == [1, 2]
