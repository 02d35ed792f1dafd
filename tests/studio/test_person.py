"""One person's job from photos to a gallery: interrupted anywhere it goes on, and it says when no picture is the person."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from core.cli import main
from core.config import TrainConfig
from core.demo import BASE_FILE
from core.errors import BadPhoto
from core.faces import YuNet
from core.lora.file import LoraFile
from core.models import load_base
from core.photos import read_photos
from core.pictures import find_style_packs, headshots
from core.storage.cache_folder import cache_in
from core.studio import Order, Outcome, person, ready_photos, train_and_draw
from core.training import Callbacks, store
from tests.tooling import random_lora, write_photos, write_quick_pack

ROOT = Path(__file__).parents[2]
CONFIG = TrainConfig(steps=4, rank=2, learning_rate=1e-3, min_snr_gamma=0.0, state_interval=0.0)
PLACES = ("encoding 2", "in step 3", "trained", "pictures 1", "gallery")
"""Where the job is interrupted: one place in each stage."""


class Interrupted(BaseException):
    """Whatever ends a process."""


def do(folder: Path, place: str, end: Callable[[], None]) -> Outcome:
    """The job on the photos in the folder, ended at the place; `done.txt` says what was done."""
    last = ""

    def note(text: str) -> None:
        nonlocal last
        last = text
        with (folder / "done.txt").open("a") as file:
            print(text, file=file)
        if text == place:
            end()

    def within_step() -> None:
        if place == "in step 3" and last == "step 2":
            end()

    def noted(text: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            note(text)
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "_clear", noted("trained", store._clear))
        patched.setattr(headshots, "gallery_page", noted("gallery", headshots.gallery_page))
        callbacks = Callbacks(
            on_step=lambda report: note(f"step {report.step}"),
            on_phase=lambda phase, done, total: note(f"{phase} {done}"),
            check_cancelled=within_step,
        )
        base, pack = load_base(BASE_FILE), find_style_packs([folder / "packs"]).pick("quick")
        ready = ready_photos(read_photos(folder / "photos"), base, CONFIG, callbacks)
        return train_and_draw(ready, base, Order("anna", CONFIG, pack, count=3), folder / "out", callbacks=callbacks)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def process(folder: Path, place: str) -> int:
    """The exit code of a process that does the job and is killed at the place."""
    program = f"from tests.studio.test_person import *; do(Path({str(folder)!r}), {place!r}, kill)"
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Makes a folder with five photos and a pack of one style, and a cache of its own."""

    def make_desk(name: str) -> Path:
        folder = tmp_path / name
        write_photos(folder / "photos", count=5)
        write_quick_pack(folder / "packs")
        monkeypatch.setenv("FACELORA_CACHE", str(folder / "cache"))
        return folder

    return make_desk


def assert_the_same_files_and_nothing_done_twice(folder: Path, whole: Path) -> None:
    done = (folder / "done.txt").read_text().split("\n")
    once = [line for line in done if line.startswith(("step", "pictures")) and line != "pictures 0"]  # begun, not made
    assert once == [f"step {number}" for number in (1, 2, 3, 4)] + [f"pictures {number}" for number in (1, 2, 3)]
    names = sorted(path.name for path in (whole / "out").iterdir())
    # The empty lock of a killed process, which locks nothing, may stay beside a LoRA that is found and not written again.
    assert sorted(path.name for path in (folder / "out").iterdir() if path.suffix != ".lock") == names
    for name in names:
        if name.endswith(".json"):
            assert (folder / "out" / name).read_bytes() == (whole / "out" / name).read_bytes(), name
        if name.endswith(".png"):  # Two signatures of the same picture differ.
            ours, theirs = (Image.open(place / "out" / name) for place in (folder, whole))
            assert ours.tobytes() == theirs.tobytes() and ours.info == theirs.info, name
    tensors, expected = (LoraFile.read(place / "out" / "anna.safetensors").tensors for place in (folder, whole))
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_pictures_are_drawn_with_the_layer_that_was_trained_with_and_in_the_same_precision(desk, monkeypatch):
    folder, given = desk("anna"), []
    monkeypatch.setattr(person, "make_headshots", lambda *arguments, **_: given.append(arguments[4]) or [])
    config = replace(CONFIG, steps=1, clip_skip=2, precision="fp32")
    base, pack = load_base(BASE_FILE), find_style_packs([folder / "packs"]).pick("quick")
    ready = ready_photos(read_photos(folder / "photos"), base, config)
    monkeypatch.setattr(person, "_advice", lambda *_: ())
    train_and_draw(ready, base, Order("anna", config, pack, count=1), folder / "out")
    assert (given[0].clip_skip, given[0].precision) == (2, "fp32")


def test_interrupted_the_job_goes_on_where_it_was(desk):
    whole = desk("whole")
    outcome = do(whole, "", lambda: None)
    assert not outcome.trained.found and len(outcome.shots) == 3
    folder = desk("part")

    def interrupt() -> None:
        raise Interrupted

    for place in ("in step 3", "pictures 1"):
        with pytest.raises(Interrupted):
            do(folder, place, interrupt)
    assert do(folder, "", interrupt).trained.found
    assert_the_same_files_and_nothing_done_twice(folder, whole)


@pytest.mark.slow
def test_killed_at_five_places_the_job_makes_the_same_files_and_does_nothing_twice(desk):
    whole = desk("whole")
    assert process(whole, "") == 0
    folder = desk("part")
    for place in PLACES:
        assert process(folder, place) == -signal.SIGKILL, place
    assert process(folder, "") == 0
    assert_the_same_files_and_nothing_done_twice(folder, whole)


def quickly(folder: Path) -> list[str]:
    """Options of the command line, for a training of seconds."""
    (folder / "quick.toml").write_text(
        "rank = 2\nsteps = 2\nbatch_size = 1\nwarmup_steps = 0\nprior_prediction = 0.0\n"
    )
    return ["--config", str(folder / "quick.toml"), "--style-folder", str(folder / "packs")]


def test_where_no_picture_is_the_person_it_says_what_would_help(desk, capsys):
    folder = desk("anna")
    (folder / "photos").rename(folder / "mary-private")
    command = ["headshots", str(folder / "mary-private"), "--base", "demo", "--count", "2", "--yes", *quickly(folder)]
    command += ["--style-pack", "quick", "--output", str(folder / "out")]
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "2 pictures, none alike enough" in said or "2 pictures\n" in said
    assert "No picture is like the person" in said and "Add photos: " in said and "Train for more than 2 steps." in said
    assert list((folder / "out" / "kept").iterdir()) == []
    assert main([*command, "--json"]) == 1
    outcome = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert outcome["kept"] == [] and len(outcome["advice"]) == 3
    files = [path for path in (folder / "out").rglob("*") if path.is_file()]
    assert len(files) > 4 and not any(b"mary-private" in path.read_bytes() for path in files)
    assert outcome["lora"] == str(folder / "out" / "sks.safetensors")


def test_what_is_not_in_force_any_more_is_set_aside_and_comes_back_untrained_and_undrawn(desk):
    folder = desk("anna")
    base, pack = load_base(BASE_FILE), find_style_packs([folder / "packs"]).pick("quick")
    report, done = ready_photos(read_photos(folder / "photos"), base, CONFIG), []
    theirs = folder / "out" / "900-1.png"
    theirs.parent.mkdir()
    theirs.write_text("somebody's, with a name as ours have")
    callbacks = Callbacks(
        on_step=lambda report: done.append(f"step {report.step}"),
        on_phase=lambda phase, number, total: (
            done.append(f"{phase} {number}") if phase == "pictures" and number else None
        ),
    )

    def made(steps: int, count: int, seed: int = 1) -> list[str]:
        """What was done for it; the LoRA and the pictures in the folder are then these, and no others."""
        done.clear()
        order = Order("anna", replace(CONFIG, steps=steps), pack, count=count, seed=seed)
        outcome = train_and_draw(report, base, order, folder / "out", callbacks=callbacks)
        assert outcome.trained.path == folder / "out" / "anna.safetensors"
        assert sorted((folder / "out").glob("*-*.png")) == sorted([*(shot.path for shot in outcome.shots), theirs])
        return list(done)

    assert made(1, 2) == ["step 1", "pictures 1", "pictures 2"]
    assert made(1, 1) == []
    assert made(2, 1, seed=5) == ["step 1", "step 2", "pictures 1"]
    assert made(1, 2) == []
    assert sorted(path.name for path in (folder / "out" / "earlier").iterdir()) == ["001-5.png", "anna (2).safetensors"]


def test_photos_that_show_no_one_person_stop_the_job_before_anything_is_made(desk):
    folder = desk("anna")
    for file in (folder / "photos").glob("*.png"):
        Image.new("RGB", (80, 80)).save(file)
    with pytest.raises(BadPhoto, match="0 of 5 usable: all without a face"):
        do(folder, "", lambda: None)
    assert not (folder / "out").exists() and not (folder / "done.txt").exists()


@pytest.mark.slow
def test_on_a_terminal_three_questions_are_asked_and_an_estimate_is_given(desk, monkeypatch, capsys):
    folder = desk("anna")
    Image.new("RGB", (8, 8)).save(folder / "photos" / "small.png")
    answers = iter(["woman", "quick", "1"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    command = ["headshots", str(folder / "photos"), "--base", "demo", *quickly(folder)]
    main([*command, "--output", str(folder / "out")])
    assert next(answers, "none") == "none"
    said = "".join(capsys.readouterr())
    assert (
        "about " in said and " and 0." in said and said.count("5 of 6 usable") == 1 and "small.png is left out" in said
    )
    lora = LoraFile.read(folder / "out" / "sks.safetensors")
    assert lora.metadata["modelspec.trigger_phrase"] == "sks woman"
    assert len(list((folder / "out").glob("0*.png"))) == 1


def test_a_job_that_finds_everything_made_leaves_the_measured_speed(desk, monkeypatch, tmp_path):
    folder, cache = desk("anna"), tmp_path / "cache"
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    command = ["headshots", str(folder / "photos"), "--base", "demo", *quickly(folder), "--output", str(folder / "out")]
    command += ["--class-word", "person", "--style-pack", "quick", "--count", "1"]
    with cache_in(cache):
        main(command)
        (file,) = (cache / "speeds").iterdir()
        reached = json.loads(file.read_text())
        assert reached.keys() == {"train", "draw"} and all(0 < share < 2 for share in reached.values())
        main(command)
        assert json.loads(file.read_text()) == reached
        (folder / "out" / "001-1.png").unlink()
        main(command)
        assert json.loads(file.read_text())["train"] == reached["train"]


def test_faces_are_looked_for_once_in_each_photo_of_a_whole_job(desk, monkeypatch):
    """Checked, held out, measured while training and compared with pictures: all from one look at each photo."""
    folder = desk("anna")
    write_photos(folder / "photos", count=8)
    looked: list[tuple[int, int]] = []
    detect = YuNet.detect
    monkeypatch.setattr(YuNet, "detect", lambda self, image: looked.append(image.size) or detect(self, image))
    config = replace(CONFIG, hold_out=2, sample_every=4, sample_steps=1, sample_guidance=1.0, likeness_pictures=1)
    base, pack = load_base(BASE_FILE), find_style_packs([folder / "packs"]).pick("quick")
    photos = read_photos(folder / "photos")
    made = train_and_draw(
        ready_photos(photos, base, config), base, Order("anna", config, pack, count=1), folder / "out"
    )
    assert made.trained.likenesses() and made.report.network
    assert looked.count((92, 112)) == 8  # pictures are smaller


def drawn_as(folder: Path) -> str:
    """The parameters of the one picture in a folder."""
    (picture,) = folder.glob("0*.png")
    return Image.open(picture).info["parameters"]


def test_a_lora_is_trained_on_one_base_model_and_draws_on_another(desk):
    folder = desk("anna")
    other = shutil.copy(BASE_FILE, folder / "other.safetensors")
    command = ["headshots", str(folder / "photos"), "--base", "demo", "--count", "1", "--yes", *quickly(folder)]
    command += ["--style-pack", "quick"]
    main([*command, "--draw-on", str(other), "--output", str(folder / "out")])
    assert "Model: other" in drawn_as(folder / "out")
    lora = LoraFile.read(folder / "out" / "sks.safetensors")
    assert lora.metadata["ss_sd_model_name"] == BASE_FILE.name
    main([*command, "--output", str(folder / "out")])  # The same LoRA draws on its own base model.
    assert LoraFile.read(folder / "out" / "sks.safetensors").model_hash == lora.model_hash
    assert f"Model: {BASE_FILE.stem}," in drawn_as(folder / "out")


def test_a_speed_lora_is_for_the_pictures_only(desk, capsys):
    folder = desk("anna")
    speed = folder / "lightning_2step_lora.safetensors"
    random_lora(load_base(BASE_FILE), r".*attn1\.to_q").save(speed)
    command = ["headshots", str(folder / "photos"), "--base", "demo", "--count", "1", "--yes", *quickly(folder)]
    command += ["--style-pack", "quick"]
    main([*command, "--output", str(folder / "out")])
    lora = LoraFile.read(folder / "out" / "sks.safetensors")
    main([*command, "--speed-lora", str(speed), "--output", str(folder / "out")])
    assert LoraFile.read(folder / "out" / "sks.safetensors").model_hash == lora.model_hash
    drawn = drawn_as(folder / "out")
    assert "<lora:sks:1> <lora:lightning_2step_lora:1>" in drawn and "Steps: 2, Sampler: Euler" in drawn
    assert "CFG scale: 1," in drawn and "--speed-lora=lightning" in (folder / "out" / "gallery.html").read_text()
    assert "gives no number of steps" not in capsys.readouterr().err
    unsaid = shutil.copy(speed, folder / "fast.safetensors")
    main([*command, "--speed-lora", str(unsaid), "--output", str(folder / "more"), "--dry-run"])
    assert "fast.safetensors: its name gives no number of steps, so pictures are drawn in 8" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["SDXL", "wider", "without a VAE"])
def test_a_base_model_that_cannot_be_drawn_on_is_refused_before_training(desk, request, other, capsys):
    folder = desk("anna")
    given, words = {
        "SDXL": (lambda: request.getfixturevalue("small_sdxl"), "drawn on Stable Diffusion 1.x, the family of base."),
        "wider": (lambda: request.getfixturevalue("small_sd15"), "is larger or smaller than base.safetensors"),
        "without a VAE": (lambda: write_unet(folder / "unet.safetensors"), "unet.safetensors: has no vae"),
    }[other]
    command = ["headshots", str(folder / "photos"), "--base", "demo", "--yes", *quickly(folder)]
    assert main([*command, "--draw-on", str(given()), "--output", str(folder / "out")]) == 1
    assert words in capsys.readouterr().err and not (folder / "out").exists()


def test_a_speed_lora_that_does_not_fit_is_refused_before_training(desk, small_sdxl, capsys):
    folder = desk("anna")
    random_lora(load_base(small_sdxl), r".*attn1\.to_q").save(folder / "speed.safetensors")
    command = ["headshots", str(folder / "photos"), "--base", "demo", "--yes", *quickly(folder)]
    assert main([*command, "--speed-lora", str(folder / "speed.safetensors"), "--output", str(folder / "out")]) == 1
    assert "speed.safetensors: does not fit the base model" in capsys.readouterr().err and not (folder / "out").exists()


def test_an_unknown_style_pack_is_refused_before_the_photos_are_read(desk, monkeypatch, capsys):
    monkeypatch.setattr("core.photos.read_photos", lambda *_, **__: pytest.fail("photos were read"))
    command = ["headshots", str(desk("anna") / "photos"), "--base", "demo", "--yes", "--style-pack", "none"]
    assert main(command) == 1
    assert "no style pack 'none'; choose one of: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["headshots", "studio"])
def test_syntax_of_other_programs_in_a_style_pack_is_warned_of(desk, capsys, command):
    folder = desk("anna")
    pack = folder / "packs" / "quick.json"
    pack.write_text(pack.read_text().replace("{framing} photo", "<lora:film:0.7> ({framing}:1.2) photo"))
    if command == "headshots":
        photos, style = folder / "photos", ["--style-pack", "quick"]
    else:
        photos, style = folder / "people.csv", ["--output", str(folder / "out")]
        photos.write_text("name,photos,agreed,style_pack\nanna,photos,true,quick\n")
    assert main([command, str(photos), "--base", "demo", "--dry-run", *style, *quickly(folder)]) == 0
    warned = capsys.readouterr().err
    assert "'({framing}:1.2)' is read as ordinary text: words cannot have weights" in warned
    assert "'<lora:film:0.7>' is read as ordinary text: use facelora generate --lora for the file" in warned


def test_files_beside_the_two_base_models_are_for_the_one_that_is_no_diffusers_folder(desk):
    folder = desk("anna")
    base, tensors = load_base(BASE_FILE), load_file(BASE_FILE)
    base.pipeline().save_pretrained(folder / "base")
    rest = {name: one for name, one in tensors.items() if name.startswith("first_stage_model.")}
    save_file(rest, folder / "vae.safetensors")
    unet = write_unet(folder / "unet.safetensors")
    command = ["headshots", str(folder / "photos"), "--dry-run", *quickly(folder)]
    command += ["--no-check-photos", "--vae", str(folder / "vae.safetensors"), "--text-encoder", str(BASE_FILE)]
    for one, other in ((folder / "base", unet), (unet, folder / "base")):
        assert main([*command, "--base", str(one), "--draw-on", str(other)]) == 0
    assert main([*command, "--base", str(folder / "base"), "--draw-on", str(folder / "base")]) == 1


def write_unet(path: Path) -> Path:
    """The demo's denoiser alone."""
    save_file({name: one for name, one in load_file(BASE_FILE).items() if name.startswith("model.")}, path)
    return path


def test_photos_in_a_folder_without_a_name_need_an_output(capsys):
    assert main(["headshots", "/", "--base", "demo"]) == 1
    assert (
        capsys.readouterr().err == "facelora: /: pictures can't be saved beside this folder: choose one with --output\n"
    )
