"""Exact resume: a run that is killed, again and again, gives the file of a run that was never interrupted."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from core.cli import main
from core.cli.common import JsonProgress
from core.errors import BadConfig, BadFile
from core.pictures.sampling import sample_latents
from core.storage.safetensors_file import SafetensorsFile, save_safetensors
from core.training.state import RunState, pack_optimizer, read_state, unpack_optimizer

ROOT = Path(__file__).parents[2]


def training(folder: Path, base: Path, photos: Path, output: str, *options: str) -> list[str]:
    """Arguments of the command line."""
    return [
        "train", str(photos), "--base", str(base), "--output", str(folder / output),
        "--recipe", "none", "--resolution", "32", "--rank", "2", "--no-check-photos", "--json", *options,
    ]  # fmt: skip


def command(*arguments: Any) -> list[str]:
    """The same for a process of its own."""
    return [sys.executable, "-m", "core", *training(*arguments)]


def finish(arguments: list[str]) -> None:
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in SafetensorsFile.open(path).items()}


def assert_equal(path: Path, other: Path) -> None:
    ours, theirs = tensors_of(path), tensors_of(other)
    assert list(ours) == list(theirs)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def kill_and_resume(arguments: list[str], state: Path, kills: int, draw: random.Random) -> int:
    """Kills the run `kills` times (-9) at random moments after it has begun to step, then lets it end; how often it hit."""
    hits = 0
    for _ in range(kills):
        run = subprocess.Popen(
            [*arguments, "--resume"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert run.stdout is not None
        # The first line about a step: from here on the moment is random.
        next((line for line in run.stdout if '"training"' in line), None)
        time.sleep(draw.uniform(0, 0.3))
        if run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
            hits += 1
        run.communicate()
    finish([*arguments, "--resume"])
    assert not state.exists()
    return hits


VARIANTS = {
    "adamw, ema, dropout": ["--ema-decay", "0.9", "--dropout", "0.2", "--caption-dropout", "0.3"],
    "prodigy, cosine": ["--optimizer", "prodigy", "--learning-rate", "1", "--schedule", "cosine"],
    "adafactor, text encoder": ["--optimizer", "adafactor", "--text-encoder-lr", "1e-4", "--accumulation", "2"],
    "prior prediction": ["--prior-prediction", "0.5", "--targets", "transformer+conv", "--batch-size", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_run_killed_at_random_moments_gives_the_same_file(tmp_path, small_sd15, photo_folder, options):
    options = [*options, "--steps", "60", "--state-interval", "0"]
    finish(command(tmp_path, small_sd15, photo_folder, "whole.safetensors", *options))
    hits = kill_and_resume(
        command(tmp_path, small_sd15, photo_folder, "killed.safetensors", *options),
        tmp_path / "killed.state.safetensors",
        kills=5,
        draw=random.Random(str(options)),
    )
    assert hits >= 3  # of 5 in each of 4 variants: more than ten in all
    assert_equal(tmp_path / "whole.safetensors", tmp_path / "killed.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.safetensors", "whole.safetensors"]


DIES_WHILE_WRITING_ITS_THIRD_STATE = """
import os, signal, sys
from core.cli import main

replace, states = os.replace, []

def replace_or_die(source, target):
    if str(target).endswith(".state.safetensors"):
        states.append(target)
        if len(states) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_or_die
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_killed_while_it_writes_its_state_goes_on(tmp_path, small_sd15, photo_folder, monkeypatch):
    options = ["--steps", "4", "--state-interval", "0", *VARIANTS["adamw, ema, dropout"]]
    arguments = training(tmp_path, small_sd15, photo_folder, "killed.safetensors", *options)
    killed = subprocess.run([sys.executable, "-c", DIES_WHILE_WRITING_ITS_THIRD_STATE, *arguments], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert SafetensorsFile.open(tmp_path / "killed.state.safetensors").metadata["step"] == "2"
    assert len(list(tmp_path.iterdir())) == 3  # and what it was writing, and a lock that nobody holds
    steps = []
    monkeypatch.setattr(JsonProgress, "step", lambda progress, report: steps.append(report.step))
    assert main([*arguments, "--resume"]) == 0
    assert steps == [3, 4]
    assert main(training(tmp_path, small_sd15, photo_folder, "whole.safetensors", *options)) == 0
    assert_equal(tmp_path / "whole.safetensors", tmp_path / "killed.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.safetensors", "whole.safetensors"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_step_stops_the_run_after_it(tmp_path, small_sd15, photo_folder, number, monkeypatch, capsys):
    step = JsonProgress.step

    def step_and_signal(progress, report):
        step(progress, report)
        if report.step == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(JsonProgress, "step", step_and_signal)
    arguments = training(tmp_path, small_sd15, photo_folder, "face.safetensors", "--steps", "100000")
    before = signal.getsignal(number)
    assert main(arguments) == 1
    assert signal.getsignal(number) is before
    errors = capsys.readouterr().err
    assert (
        errors.startswith("facelora: stopped after step 2 of 100000; continue with --resume")
        and errors.count("\n") == 1
    )
    assert SafetensorsFile.open(tmp_path / "face.state.safetensors").metadata["step"] == "2"
    for changed, said in (("--seed", "7"), "other settings (seed: 1"), (("--steps", "1"), "beyond steps = 1"):
        assert main([*arguments, *changed, "--resume"]) == 1 and said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["face.state.safetensors"]


@pytest.mark.slow
def test_a_signal_while_a_sample_is_drawn_stops_the_run_before_it_is_whole(
    tmp_path, small_sd15, photo_folder, monkeypatch, capsys
):
    def sample_after_signal(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return sample_latents(*arguments, **options)

    monkeypatch.setattr("core.training.samples.sample_latents", sample_after_signal)
    options = ("--steps", "3", "--sample-every", "2", "--sample-steps", "2")
    assert main(training(tmp_path, small_sd15, photo_folder, "face.safetensors", *options)) == 1
    assert capsys.readouterr().err == "facelora: stopped; continue with --resume\n"
    assert SafetensorsFile.open(tmp_path / "face.state.safetensors").metadata["step"] == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["face.state.safetensors"]


@pytest.mark.parametrize("build", [
    lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    lambda p: prodigy(p),
    lambda p: adafactor(p),
    lambda p: eight_bit(p),
    lambda p: torch.optim.AdamW([{"params": p[:1], "lr": torch.tensor(0.02)}, {"params": p[1:]}], lr=0.01, foreach=False),
], ids=["adamw", "prodigy", "adafactor", "adamw8bit", "tensors in groups"])  # fmt: skip
def test_an_optimizer_goes_on_exactly_from_what_was_packed(tmp_path, build):
    def parameters():
        generator = torch.Generator().manual_seed(1)
        return [torch.nn.Parameter(torch.randn(64, 65, generator=generator)) for _ in range(3)]

    def step(optimizer, number):
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            generator = torch.Generator().manual_seed(100 * number + index)
            # The last one never has a gradient, like a text encoder's unused layer.
            parameter.grad = None if index == 2 else torch.randn(64, 65, generator=generator)
        optimizer.step()

    whole = build(parameters())
    for number in range(8):
        step(whole, number)
    first = build(parameters())
    for number in range(5):
        step(first, number)
    tensors, scalars = pack_optimizer(first)
    state = RunState(5, {"settings": "{}"}, tensors, scalars)
    state.save(tmp_path / "state.safetensors")
    saved = read_state(tmp_path / "state.safetensors", {"settings": "{}"})

    second = build(parameters())
    for group, before in zip(second.param_groups, first.param_groups, strict=True):
        for parameter, value in zip(group["params"], before["params"], strict=True):
            parameter.data.copy_(value.data)
    unpack_optimizer(second, saved.tensors, saved.scalars)
    for number in range(5, 8):
        step(second, number)
    for group, expected in zip(second.param_groups, whole.param_groups, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(group["params"], expected["params"], strict=True))
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in expected.items() if k != "params"}


def prodigy(parameters):
    from prodigyopt import Prodigy

    return Prodigy(parameters, lr=1.0, safeguard_warmup=True, use_bias_correction=True)  # pyright: ignore


def eight_bit(parameters):
    if torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("bitsandbytes needs the GPU that this torch is built for")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=0.01)


def adafactor(parameters):
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=0.01, scale_parameter=False, relative_step=False, warmup_init=False)


IDENTITY = {"settings": json.dumps({"rank": 4, "seed": 1}), "photos": "abc", "base model": "def"}


def saved_state(folder: Path) -> Path:
    path = folder / "run.state.safetensors"
    RunState(3, IDENTITY, {"loss": torch.zeros(())}, {}).save(path)
    return path


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"photos": "changed"}, "with other photos; use the same, delete it, or start over with restart"),
        ({"base model": "changed"}, "with other base model; use the same, delete it, or start over with restart"),
        ({"settings": json.dumps({"rank": 8, "seed": 1})}, r"other settings \(rank: 4 then, 8 now\)"),
        ({"settings": json.dumps({"rank": 4})}, r"other settings \(seed: 1 then, None now\)"),
    ],
)
def test_a_state_of_another_run_is_refused_with_what_differs(tmp_path, changed, said):
    with pytest.raises(BadConfig, match=said):
        read_state(saved_state(tmp_path), IDENTITY | changed)


def test_a_file_that_is_no_state_is_refused(tmp_path, small_sd15):
    with pytest.raises(BadFile, match="not the state of a training run"):
        read_state(small_sd15, IDENTITY)


def test_a_state_with_a_flipped_bit_is_refused(tmp_path):
    path = saved_state(tmp_path)
    good = path.read_bytes()
    for place in (len(good) - 1, good.index(b'"rank'), good.index(b'"scalars"') + 12):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(BadFile, match=r"damaged|not the state"):
            read_state(path, IDENTITY)


def test_a_state_that_is_cut_short_cannot_be_downloaded_again(tmp_path):
    path = saved_state(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadFile, match=r"truncated or damaged: .*; delete it, or start over with restart$"):
        read_state(path, IDENTITY)


def test_a_state_of_an_earlier_version_or_something_else_is_refused(tmp_path):
    path = saved_state(tmp_path)
    metadata, tensors = SafetensorsFile.open(path).metadata, tensors_of(path)
    save_safetensors(path, tensors, metadata | {"version": "1"})
    with pytest.raises(
        BadConfig, match="saved by another version of this program, so it can't be resumed; delete it, or"
    ):
        read_state(path, IDENTITY)
    save_safetensors(path, tensors, metadata | {"identity": "[1]"})
    with pytest.raises(BadFile, match="not the state of a training run"):
        read_state(path, IDENTITY)


def test_a_restart_moves_the_earlier_files_of_steps_away_and_no_others(tmp_path, small_sd15, photo_folder):
    arguments = training(tmp_path, small_sd15, photo_folder, "face.safetensors", "--sample-steps", "1")
    assert main([*arguments, "--steps", "2", "--save-every", "1", "--sample-every", "2"]) == 0
    first, samples = tmp_path / "face-step000001.safetensors", tmp_path / "face-samples"
    save_safetensors(tmp_path / "face-step000007.safetensors", tensors_of(first), {"ss_output_name": "mine"})
    (samples / "mine.png").touch()
    read = shutil.copy(first, tmp_path / "face-step000003.safetensors")
    assert main([*arguments, "--steps", "1", "--restart", "--continue-from", str(read)]) == 0
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == [
        "earlier/face-step000001.safetensors", "face-samples/earlier/step000002-0.png", "face-samples/mine.png",
        "face-step000003.safetensors", "face-step000007.safetensors", "face.safetensors",
    ]  # fmt: skip


def test_a_step_to_go_on_from_is_not_replaced_by_that_of_the_new_run(tmp_path, small_sd15, photo_folder, capsys):
    arguments = training(tmp_path, small_sd15, photo_folder, "face.safetensors", "--steps", "2", "--save-every", "1")
    assert main(arguments) == 0
    read = tmp_path / "face-step000001.safetensors"
    before = read.read_bytes()
    assert main([*arguments, "--restart", "--continue-from", str(read)]) == 1
    assert f"{read}: has the name of an intermediate LoRA of save_every" in capsys.readouterr().err
    assert read.read_bytes() == before
    assert main([*arguments, "--save-every", "2", "--restart", "--continue-from", str(read)]) == 0
    assert read.read_bytes() == before
