"""tools/gpu.py without a GPU: failures are recorded, wrong numbers are seen, and the time is kept.

tests/gpu/ runs the measurements.
"""

import json
import time

import pytest
import torch

from core.config import TrainConfig
from core.models.memory_plan import PLANS
from tools import bench, gpu, trials
from tools.gpu import Session
from tools.random_models import random_base, random_cache

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


def test_a_device_that_computes_something_else_is_seen(monkeypatch):
    base = random_base("sd15", 64, CPU, torch.float32)
    cache = random_cache(base, TrainConfig(resolution=64))
    same = trials.agreement(base, cache, CPU, torch.float32)
    assert same.is_good and same.gradient == same.loss == 0
    right = trials.loss_and_gradient(base, cache, CPU, torch.float32)
    wrong = iter([right, (right[0], right[1] * torch.linspace(0.9, 1.1, len(right[1])))])
    monkeypatch.setattr(trials, "loss_and_gradient", lambda *_: next(wrong))
    assert not trials.agreement(base, cache, CPU, torch.float32).is_good


def test_a_plan_that_fails_is_named_by_the_kind_of_its_error(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("CUDA error: out of memory in /home/me")

    monkeypatch.setattr(trials, "predicted_memory", fails)
    base = random_base("sd15", 64, CPU, torch.float32)
    tried = trials.trial(
        random_cache(base, TrainConfig(resolution=64)), base, TrainConfig(), CPU, torch.float32, PLANS[0]
    )
    assert tried.error == "out of memory" and tried.seconds is None
