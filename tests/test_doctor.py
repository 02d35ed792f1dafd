"""core/doctor.py: a report on the machine that can be pasted into a discussion."""

import getpass
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core import doctor
from core.cli import main


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.examine(torch.device("cpu"))


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
