"""core/bench/doctor.py: a report on the machine that can be pasted into a discussion."""

import getpass
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.bench import doctor
from core.bench.random_models import random_base, random_cache
from core.cli import main
from core.config import TrainConfig
from core.models.memory_plan import PLANS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.examine(CPU, False)


@pytest.mark.parametrize(("flags", "precision"), [("avx512f", "fp32"), ("avx512f avx512_bf16", "bf16")])
def test_it_says_what_there_is_and_what_is_missing_for_what(flags, precision, report, capsys, monkeypatch):
    monkeypatch.setattr("core.device.described_processor", lambda: f"flags: {flags}")
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["versions"]["torch"] == torch.__version__ and said["precision"] == precision and said["device"] == "cpu"
    said = doctor.format_doctor(replace(report, free_memory=3 * 2**30, precision=precision)).splitlines()[1]
    assert said.endswith(f", free 3.00 GiB, precision auto is {precision} for published models")
    lacking = replace(report, missing={"onnxruntime": doctor.OPTIONAL["onnxruntime"]})
    assert "missing: onnxruntime (check photos" in doctor.format_doctor(lacking)


def test_it_says_no_path_and_no_name(report):
    said = doctor.format_doctor(report) + json.dumps(report.as_dict())
    for secret in (str(Path.home()), os.getcwd(), getpass.getuser() + "@", socket.gethostname()):
        assert secret not in said


def test_a_device_that_computes_something_else_is_seen(monkeypatch):
    base = random_base(doctor.FAMILY, 64, CPU, torch.float32)
    cache = random_cache(base, TrainConfig(resolution=64))
    same = doctor.agreement(base, cache, CPU, torch.float32)
    assert same.is_good and same.gradient == same.loss == 0
    right = doctor.loss_and_gradient(base, cache, CPU, torch.float32)
    wrong = iter([right, (right[0], right[1] * torch.linspace(0.9, 1.1, len(right[1])))])
    monkeypatch.setattr(doctor, "loss_and_gradient", lambda *_: next(wrong))
    assert not doctor.agreement(base, cache, CPU, torch.float32).is_good


def test_a_plan_that_fails_is_named_by_the_kind_of_its_error(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("CUDA error: out of memory in /home/me")

    monkeypatch.setattr(doctor, "predicted_memory", fails)
    base = random_base(doctor.FAMILY, 64, CPU, torch.float32)
    tried = doctor.trial(
        random_cache(base, TrainConfig(resolution=64)), base, TrainConfig(), CPU, torch.float32, PLANS[0]
    )
    assert tried.error == "out of memory" and tried.seconds is None
