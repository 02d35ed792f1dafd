"""How far a LoRA moves the weights of its base model: told by `inspect --base` and at the end of a training run."""

import json
from dataclasses import replace
from statistics import median

import pytest
import torch

from core.cli import main
from core.config import TrainConfig
from core.errors import BadFile, LoraMisfit
from core.lora import MOVEMENT_KEY, LoraFile, LoraModule, doubt_of_movement, format_movement, movement_of
from core.models import load_base
from core.models.families import FAMILIES
from core.training import Callbacks, train
from tests.tooling import write_photos

PATHS = [f"mid_block.attentions.0.transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_k", "to_v")]


@pytest.fixture(scope="module")
def base():
    return load_base("demo")


@pytest.fixture
def lora(base):
    """A LoRA of three layers. Each moves farther than the previous one."""
    shapes, modules = base.module_shapes(), {}
    for number, path in enumerate(PATHS, start=1):
        outputs, inputs = shapes["denoiser", path]
        draw = torch.Generator().manual_seed(number)
        down, up = torch.randn(4, inputs, generator=draw), torch.randn(outputs, 4, generator=draw)
        modules["denoiser", path] = LoraModule(down, number * up, alpha=2.0)
    return LoraFile.from_modules(base.family.name, modules, {}, names=base.names)


def test_the_movement_is_the_norm_of_the_change_as_a_share_of_the_weight(base, lora, tmp_path, capsys):
    weights = base.components["denoiser"].tensors
    changes = {path: 0.5 * module.up @ module.down for (_, path), module in lora.modules().items()}
    shares = {path: (change.norm() / weights[f"{path}.weight"].norm()).item() for path, change in changes.items()}
    moved = movement_of(lora, base)
    assert moved and moved["median"] == pytest.approx(median(shares.values()), rel=5e-3)
    assert moved["largest"] == pytest.approx(max(shares.values()), rel=5e-3) and moved["layer"].endswith("attn1_to_v")
    lora.save(path := tmp_path / "me.safetensors", torch.float32)
    assert main(["inspect", str(path), "--base", "demo"]) == 0
    said = capsys.readouterr().out
    assert f"moves         {format_movement(moved)}" in said and "more than 10%" in said
    assert main(["inspect", str(path), "--base", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["movement"] == moved


def test_what_cannot_be_told_is_not_told(base, lora):
    magnitudes = {
        key.replace("lora_down.weight", "dora_scale"): torch.ones(64, 1) for key in lora.tensors if "down" in key
    }
    assert movement_of(LoraFile.from_tensors({**lora.tensors, **magnitudes}, {}), base) is None
    assert "not known" in format_movement(None) and not doubt_of_movement(None)
    with pytest.raises(LoraMisfit, match=r"is for sd15, but .* is sdxl"):
        movement_of(lora, replace(base, family=FAMILIES["sdxl"]))


@pytest.mark.parametrize(("share", "said"), [(0.002, "Train longer"), (0.02, ""), (0.2, "Train less")])
def test_only_an_unusual_movement_is_doubted(share, said):
    doubt = doubt_of_movement({"median": share, "largest": share, "layer": "x"})
    assert said in doubt and bool(doubt) == bool(said)


def test_a_trained_lora_and_the_command_tell_its_movement(base, tmp_path, capsys):
    photos, output = write_photos(tmp_path / "photos", count=2), tmp_path / "me.safetensors"
    made = train(photos, base, TrainConfig(steps=1, rank=2), output=output)
    assert isinstance(made, LoraFile) and json.loads(made.metadata[MOVEMENT_KEY])["median"] > 0
    words = ["train", str(photos), "--base", "demo", "--output", str(output), "--restart"]
    assert main([*words, "--recipe", "none", "--steps", "1", "--rank", "2"]) == 0
    assert "it moves 0." in capsys.readouterr().out


def test_a_base_model_that_is_gone_at_the_end_does_not_cost_the_lora(base, tmp_path, monkeypatch):
    def gone(*_):
        raise BadFile("demo.safetensors: the file is gone")

    monkeypatch.setattr("core.training.run_job.movement_of", gone)
    photos, output, told = write_photos(tmp_path / "photos", count=2), tmp_path / "me.safetensors", []
    callbacks = Callbacks(on_warning=told.append)
    train(photos, base, TrainConfig(steps=1, rank=2), output=output, callbacks=callbacks)
    assert LoraFile.read(output).entries and "how far the LoRA moves the weights is not known: demo" in told[-1]
