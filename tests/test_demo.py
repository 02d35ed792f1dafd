"""The demo and the commands around it, on the base model that comes with the package."""

import json
from pathlib import Path

import pytest
from PIL import Image

from core import GenerateConfig, Job, LoraFile, load_base
from core.cli import main
from core.demo import BASE_FILE
from core.demo.people import person_photos
from core.headshots import make_headshots


@pytest.fixture(scope="module")
def base():
    return load_base(BASE_FILE)


def jobs(count: int) -> list[Job]:
    return [Job("a photo of person", seed, size=(64, 80), steps=2) for seed in range(count)]


def test_the_embedded_base_is_small_enough_and_reads_as_stable_diffusion_1(base) -> None:
    assert BASE_FILE.stat().st_size <= 16_000_000
    assert (base.family.name, base.size_multiple, base.resolution) == ("sd15", 8, 72)


def test_a_picture_depends_on_its_own_seed_and_not_on_its_batch(base, tmp_path: Path) -> None:
    alone = make_headshots(base, [], jobs(2), tmp_path / "alone")
    together = make_headshots(base, [], jobs(2), tmp_path / "together", GenerateConfig(batch_size=2))
    for one, other in zip(alone, together, strict=True):
        a, b = Image.open(one.path), Image.open(other.path)
        assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 1
    assert Image.open(alone[0].path).tobytes() != Image.open(alone[1].path).tobytes()


def test_an_interrupted_batch_makes_no_picture_twice(base, tmp_path: Path) -> None:
    def stop_at_two(phase: str, done: int, total: int) -> None:
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        make_headshots(base, [], jobs(4), tmp_path, on_progress=stop_at_two)
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*-*.png")}
    assert len(made) == 2
    shots = make_headshots(base, [], jobs(4), tmp_path)
    assert len(shots) == 4
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in made} == made


def test_jobs_that_differ_in_nothing_but_their_size_are_pictures_of_their_own(base, tmp_path: Path) -> None:
    sizes = [(64, 80), (80, 64)]
    shots = make_headshots(base, [], [Job("a photo of person", 1, size=size, steps=1) for size in sizes], tmp_path)
    assert [Image.open(shot.path).size for shot in shots] == sizes


def test_pictures_are_ranked_by_their_likeness_to_the_reference(base, tmp_path: Path) -> None:
    shots = make_headshots(base, [], jobs(3), tmp_path, reference=person_photos(1)[:2])
    scores = [-1 if shot.likeness is None else shot.likeness for shot in shots]
    assert scores == sorted(scores, reverse=True)
    described = json.loads((tmp_path / "headshots.json").read_text())
    assert [entry["file"] for entry in described["headshots"]] == [shot.path.name for shot in shots]
    assert "gallery.html" in {path.name for path in tmp_path.iterdir()}


def test_a_png_carries_its_parameters(base, tmp_path: Path) -> None:
    shot = make_headshots(base, [], jobs(1), tmp_path)[0]
    text = Image.open(shot.path).info["parameters"]
    assert text.startswith("a photo of person\nNegative prompt: \nSteps: 2, Sampler: DPM++ 2M Karras, ")
    assert f"Seed: 0, Size: 64x80, Model: base, Model hash: {base.sha256[:10]}" in text


def test_headshots_of_a_style_pack_come_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--subject", "sks person", "--style-pack", "corporate", "--count", "2", "--steps", "1"]
    assert main(["generate", "--base", str(BASE_FILE), "--output", str(tmp_path), *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["headshots"]) == 2
    assert all("sks person" in picture["prompt"] for picture in report["headshots"])


@pytest.mark.slow
def test_the_demo_writes_a_lora_a_sheet_and_a_report(tmp_path: Path) -> None:
    assert main(["demo", "--output", str(tmp_path), "--steps", "40"]) == 0
    transformers, layers = 7, 12  # 2 down, 1 middle, 4 up; q, k, v, out twice, 2 of feed-forward, 2 around
    assert len(LoraFile.read(tmp_path / "lora.safetensors").modules()) == transformers * layers
    assert Image.open(tmp_path / "contact_sheet.png").width > 1000
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["person"] == 35
    assert report["likeness_of_photos"] == pytest.approx(0.85, abs=0.02)  # SFace on ORL, tests/test_faces.py's network
