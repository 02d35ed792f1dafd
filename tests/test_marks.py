"""Every picture that commands and the library write has the mark of drawn pictures, and copies of photos don't."""

import base64
import json
from pathlib import Path

import pytest
from PIL import Image

from core.cli import main
from core.config import TrainConfig
from core.lora import LoraFile, edit_metadata, write_sidecars
from core.photos import read_photos
from core.pictures.generate import Picture, PictureJob
from core.pictures.headshot import FaceOutcome
from core.pictures.headshots import make_headshots, save_outcome
from core.pictures.publication import publish
from core.storage.cache_folder import cache_in
from core.storage.drawn import DRAWN, PARTLY_DRAWN, save_png
from core.training.job import TrainingJob
from core.training.samples import make_class_images
from core.training.store import LoraFolders, find_or_train, train
from core.version import __version__
from tests.marks import c2pa, mark_in
from tests.pictures.test_publication import write_lora
from tests.tooling import random_lora, write_photos

MARK, PARTLY = ((kind, f"FaceLoRA {__version__}") for kind in (DRAWN, PARTLY_DRAWN))
JOB = PictureJob("a photo of person", 1, size=(64, 80), steps=1, guidance=1.0)
TRAINING = TrainConfig(
    steps=1,
    rank=2,
    resolution=64,
    check_photos=False,
    sample_every=1,
    sample_steps=1,
    sample_guidance=1.0,
    thumbnail=True,
)


@pytest.fixture
def drawn(tmp_path) -> Path:
    """A picture as the library saves it, in a folder of its own."""
    (tmp_path / "drawn").mkdir()
    Picture(Image.new("RGB", (64, 80)), JOB, "sks person\nNegative prompt: \nSteps: 5").save(
        tmp_path / "drawn" / "1.png"
    )
    return tmp_path / "drawn" / "1.png"


@pytest.fixture
def photo(tmp_path) -> Path:
    return next(write_photos(tmp_path / "photos", count=1).glob("*.png"))


@pytest.fixture
def lora(tmp_path) -> Path:
    return write_lora(tmp_path / "anna.safetensors")


def thumbnail_in(metadata, path: Path) -> Path:
    """The picture in a LoRA's metadata, as a file."""
    path.write_bytes(base64.b64decode(metadata["modelspec.thumbnail"].partition(",")[2]))
    return path


def test_a_picture_that_a_script_saves(drawn):
    assert mark_in(drawn) == MARK
    with Image.open(drawn) as image:
        assert image.info["parameters"] == "sks person\nNegative prompt: \nSteps: 5"


def test_a_batch_its_sheet_and_the_kept_copies(base, tmp_path):
    make_headshots(
        base, [], [JOB], tmp_path, reference=[photo.image() for photo in read_photos(write_photos(tmp_path / "p"))]
    )
    pictures = [*tmp_path.glob("*.png"), *tmp_path.glob("kept/*.png")]
    assert len(pictures) >= 2 and {mark_in(picture) for picture in pictures} == {MARK}


def test_a_picture_with_a_redrawn_face(drawn):
    save_outcome(drawn, JOB, Image.new("RGB", (64, 80)), FaceOutcome(0.25, 0.35, 0.1, 0.2))
    assert mark_in(drawn) == MARK


def test_a_picture_of_several_people(base, tmp_path):
    words = {"modelspec.trigger_phrase": "sks woman"}
    for name in ("anna", "ben"):
        random_lora(base, r".*attn1\.to_q").with_metadata(words).save(tmp_path / f"{name}.safetensors")
    named = [f"--person={name}={tmp_path / name}.safetensors" for name in ("anna", "ben")]
    command = ["generate", "--base=demo", *named, "--prompt={anna} and {ben}", "--output", str(tmp_path / "out")]
    assert main([*command, "--count=1", "--steps=1", "--size=128x80"]) == 0
    pictures = [*(tmp_path / "out").glob("*.png")]
    assert len(pictures) == 2 and {mark_in(picture) for picture in pictures} == {MARK}


def test_samples_and_the_thumbnail_of_a_training_run(base, photo_folder, tmp_path):
    lora = train(photo_folder, base, TRAINING, output=tmp_path / "anna.safetensors")
    samples = [*tmp_path.glob("anna-samples/*.png"), thumbnail_in(lora.metadata, tmp_path / "cover.jpg")]
    assert len(samples) == 2 and {mark_in(sample) for sample in samples} == {MARK}


def test_samples_that_a_run_folder_keeps(base, photo_folder, tmp_path):
    made = find_or_train(TrainingJob.of(read_photos(photo_folder), base, TRAINING), LoraFolders("anna", [tmp_path]))
    assert {mark_in(sample) for sample in made.run.path.glob("*.png")} == {MARK}


def test_class_images(base, tmp_path):
    with cache_in(tmp_path):
        make_class_images(base, "person", 1, resolution=64)
    assert [mark_in(image) for image in tmp_path.glob("class/*/*.png")] == [MARK]


def test_a_published_picture_and_its_lora(drawn, lora, tmp_path):
    made = publish(lora, tmp_path / "out", [drawn], agreed=True)
    cover = thumbnail_in(LoraFile.read(made.lora).metadata, tmp_path / "cover.jpg")
    assert {mark_in(picture) for picture in (*made.pictures, cover)} == {MARK}


def test_a_picture_with_nothing_but_the_mark_is_not_published(drawn, lora, tmp_path):
    save_png(drawn, Image.new("RGB", (64, 80)))
    told = []
    assert publish(lora, tmp_path / "out", [drawn], agreed=True, on_warning=told.append).pictures == ()
    assert len(told) == 1 and "it may be a photo or show other people" in told[0]


def test_a_picture_beside_a_lora_is_marked_as_the_one_that_was_given(drawn, photo, lora):
    for given, mark in ((drawn, MARK), (photo, None)):
        written = [path for path in write_sidecars(lora, given) if path.suffix == ".png"]
        assert {mark_in(path) for path in written} == {mark}
        for path in written:
            path.unlink()


def test_a_cover_is_marked_as_the_picture_that_was_given(drawn, photo, lora, tmp_path):
    for given, mark in ((drawn, MARK), (photo, None)):
        assert mark_in(thumbnail_in(edit_metadata(lora, thumbnail=given), tmp_path / "cover.jpg")) == mark


@pytest.mark.parametrize(("kinds", "mark"), [("d", MARK), ("dp", PARTLY), ("p", None)])
def test_a_sheet_of_scores_is_marked_as_what_it_shows(kinds, mark, drawn, photo, tmp_path):
    for kind in kinds:
        {"d": drawn, "p": photo}[kind].rename(made(tmp_path / "shown") / f"{kind}.png")
    photos = write_photos(tmp_path / "reference")
    assert main(["score", str(tmp_path / "shown"), "--reference", str(photos), "--sheet", str(tmp_path / "s.png")]) == 0
    assert mark_in(tmp_path / "s.png") == mark


def test_the_mark_is_inspected(drawn, photo, capsys):
    assert main(["inspect", str(drawn)]) == 0
    known = "signed and unchanged since: FaceLoRA" if c2pa else "whether it is signed is unknown without c2pa-python"
    text = capsys.readouterr().out
    assert text.startswith(f"{drawn}: marked as drawn by a program ({DRAWN}), FaceLoRA {__version__}; {known}")
    assert main(["inspect", str(drawn), str(photo)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith(f"{photo}: not marked as drawn by a program; ")
    assert main(["inspect", str(drawn), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["digital_source_type"] == DRAWN and report["creator_tool"] == f"FaceLoRA {__version__}"
    assert report["signature"]["state"] == ("valid" if c2pa else "unknown")


def test_a_damaged_picture_is_refused_by_name(drawn, capsys):
    drawn.write_bytes(drawn.read_bytes()[:20])
    for others in ([], ["--json"], [str(drawn)]):
        assert main(["inspect", str(drawn), *others]) == 1
        assert capsys.readouterr().err.count("1.png: the file is damaged or incomplete") == 1


def made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
