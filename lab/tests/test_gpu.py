"""lab/gpu/ without a GPU: failures are recorded, rows are written at once, wrong numbers are seen, and the time is kept.

lab/emulated_gpu/ runs the measurements on a simulated GPU.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.config import TrainConfig
from lab.gpu import __main__ as gpu
from lab.gpu import agreement as comparison
from lab.gpu.running import as_markdown, measure
from lab.gpu.session import Session
from tests.random_models import random_base, random_cache

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def breaks(session: Session):
    raise ValueError("no base")
    yield


def test_each_row_is_written_before_the_next_one_is_measured_and_failures_are_recorded(tmp_path):
    good, killed = {"seconds": 1.5, "predicted": 3 * 2**30, "is_good": True}, []

    def works(session: Session):
        yield "fails", lambda: {"seconds": 1 / 0}
        yield "works", lambda: good
        yield "last", lambda: killed.append((tmp_path / "some.json").read_text()) or {}

    found = measure(Session(CPU, torch.float32, tmp_path), "some", {"first": works, "second": breaks})
    failed = {"error": "ZeroDivisionError: division by zero"}
    # What is left if the process is killed during the last row.
    assert json.loads(killed[0])["stages"]["first"] == {
        "fails": failed, "works": good, "last": {"error": "not finished"},
    }  # fmt: skip
    assert found["stages"] == {
        "first": {"fails": failed, "works": good, "last": {}},
        "second": {"all": {"error": "ValueError: no base"}},
    }
    assert json.loads((tmp_path / "some.json").read_text())["stages"] == found["stages"]
    assert "| works |  | 1.5 | 3.00 GiB | yes |" in as_markdown(found) == (tmp_path / "some.md").read_text()


def test_missing_packages_are_named_first_with_the_command_that_installs_them(monkeypatch, tmp_path):
    bare = [sys.executable, "-S", "-m", "lab.gpu", "speed", "--output", tmp_path]  # without installed packages
    ended = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout.startswith("gpu: Python ") and "no torch, " in ended.stdout
    assert ended.stderr.startswith("gpu: torch is missing. ") and ended.stderr.count("\n") == 1
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "diffusers" else name)
    reason = gpu.why_not_ready()
    assert reason.startswith("missing: diffusers. ") and "--no-index --find-links gpu-wheels diffusers" in reason


def test_a_package_that_diffusers_lacks_is_named_with_the_same_command():
    lacking = (
        "import sys; sys.modules['diffusers.models.unets.unet_2d_condition'] = None; "
        "from lab.gpu.__main__ import why_not_ready; print(why_not_ready())"
    )
    ended = subprocess.run([sys.executable, "-c", lacking], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("missing: import of diffusers.models.unets")
    assert "--find-links gpu-wheels diffusers" in ended.stdout


def test_an_installed_package_that_hides_the_clones_tests_is_named(monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "tests.random_models" else name)
    assert gpu.why_not_ready() == "an installed package named `tests` hides that of this clone: uninstall it"


@pytest.mark.slow
def test_a_measurement_ends_when_the_time_is_over(tmp_path):
    run = [sys.executable, "-m", "lab.gpu", "compiled", "--output", tmp_path, "--rehearse", "--minutes", "0.75"]
    ended = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "the time is over" in ended.stderr
    assert '"not finished"' in (tmp_path / "compiled.json").read_text()


def test_a_device_that_computes_something_else_is_seen(monkeypatch):
    base = random_base("sd15", 64, CPU, torch.float32)
    cache = random_cache(base, TrainConfig(resolution=64))
    same = comparison.agreement(base, cache, CPU, torch.float32)
    assert same.is_good and same.gradient == same.loss == 0
    right = comparison.loss_and_gradient(base, cache, CPU, torch.float32)
    wrong = iter([right, (right[0], right[1] * torch.linspace(0.9, 1.1, len(right[1])))])
    monkeypatch.setattr(comparison, "loss_and_gradient", lambda *_: next(wrong))
    assert not comparison.agreement(base, cache, CPU, torch.float32).is_good
