"""The demo, on the base model that comes with the package."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from core import LoraFile, recipe_config
from core.cli import main
from core.demo import BASE_FILE, CONFIG
from core.storage.drawn import PARTLY_DRAWN, read_mark
from lab.pretrain_demo_base import RECIPES
from tests.lora.test_file import kohya_tensors, some


def test_the_embedded_base_is_small_enough_and_reads_as_stable_diffusion_1(base) -> None:
    assert BASE_FILE.stat().st_size <= 16_000_000
    assert (base.family.name, base.size_multiple, base.resolution) == ("sd15", 8, 72)


def test_the_embedded_base_has_the_recipes_that_its_program_gives_it(base) -> None:
    assert json.loads(base.own_recipes) == RECIPES
    config = recipe_config("balanced", base, 6)
    assert (config.steps, config.learning_rate, config.rank) == (CONFIG.steps, CONFIG.learning_rate, CONFIG.rank)


def test_the_demo_takes_fewer_steps_than_its_own_warm_up(tmp_path: Path, monkeypatch, capsys) -> None:
    configs = []
    monkeypatch.setattr(
        "core.demo.run", lambda *_, config, **__: configs.append(config) or SimpleNamespace(text="done")
    )
    for steps in ("1", "40"):
        assert main(["demo", "--output", str(tmp_path), "--steps", steps]) == 0
    assert [(config.steps, config.warmup_steps) for config in configs] == [(1, 0), (40, CONFIG.warmup_steps)]


@pytest.mark.parametrize("name", ["lora.safetensors", "report.json", "contact_sheet.png"])
def test_the_demo_refuses_to_replace_foreign_files(tmp_path, capsys, name):
    if name == "lora.safetensors":
        lora = LoraFile.from_tensors(kohya_tensors(some("sd15")), {"ss_sd_model_name": "mine.safetensors"})
        lora.save(tmp_path / name)
    else:
        (tmp_path / name).write_text("mine")
    before = (tmp_path / name).read_bytes()
    assert main(["demo", "--output", str(tmp_path), "--steps", "1"]) == 1
    assert f"{name}: the demo would replace this file" in capsys.readouterr().err
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


@pytest.mark.slow
def test_the_demo_writes_a_lora_a_sheet_and_a_report(tmp_path: Path) -> None:
    assert main(["demo", "--output", str(tmp_path), "--steps", "40"]) == 0
    transformers, layers = 7, 12  # 2 down, 1 middle, 4 up; q, k, v, out twice, 2 of feed-forward, 2 around
    assert len(LoraFile.read(tmp_path / "lora.safetensors").modules()) == transformers * layers
    assert Image.open(tmp_path / "contact_sheet.png").width > 1000
    assert read_mark(tmp_path / "contact_sheet.png") == PARTLY_DRAWN
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["person"] == 35
    assert report["likeness_of_photos"] == pytest.approx(0.85, abs=0.02)  # SFace on ORL, tests/test_faces.py's network
