"""Likeness while training: what is measured on real faces, which checkpoint is kept, when a run ends by itself."""

import copy
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core.cli import main
from core.cli.train import format_likeness
from core.config import TrainConfig
from core.demo import BASE_FILE
from core.demo.people import person_photos
from core.errors import BadConfig, BadPhoto
from core.faces import (
    Face,
    FaceNetwork,
    copy_paste,
    embed_images,
    likeness,
    load_faces,
    mean_face,
)
from core.lora.file import LoraFile
from core.models import Base, load_base
from core.models.families import FAMILIES
from core.photos import Photo, Thresholds, make_ready
from core.storage.cache_folder import cache_in, clear_cache, made_folder
from core.training.callbacks import Callbacks, likeness_word
from core.training.likeness import (
    LIKENESS_KEY,
    NEUTRAL_PROMPTS,
    PATIENCE,
    Figures,
    LikenessPoint,
    LikenessWatch,
    Selection,
    faces_of,
    pictures_per_measurement,
)
from core.training.samples import build_draw_shots, sample_size, sampling_steps
from core.training.store import train
from tests.tooling import random_lora, save_mean_colour, write_photos

CONFIG = TrainConfig(
    rank=4, steps=4, batch_size=2, learning_rate=3e-3, sample_every=2, sample_guidance=1.0, sample_steps=1,
    likeness_pictures=2, hold_out=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(BASE_FILE)


@pytest.fixture
def train_on(base, network) -> Callable[..., LoraFile]:
    """Train with the settings on the photos of a person, that of 35 if none is given."""

    def trained(config: TrainConfig, person: int = 35, **options: Any) -> LoraFile:
        return train(photos_of(person), base, config, faces=network, **options)  # pyright: ignore

    return trained


def photos_of(person: int) -> list[Photo]:
    return [Photo.from_image(image, f"{number}.png") for number, image in enumerate(person_photos(person), start=1)]


@pytest.fixture(scope="module")
def watch(network) -> LikenessWatch:
    return watch_on(network, photos_of(36)[:6], photos_of(36)[6:8], replace(CONFIG, likeness_pictures=2))


def watch_on(
    network: FaceNetwork,
    training: list[Photo],
    held_out: list[Photo],
    config: TrainConfig = CONFIG,
    judge: LikenessWatch | None = None,
) -> LikenessWatch:
    return LikenessWatch(network, faces_of(network, training), faces_of(network, held_out), config, judge)


def pictures(of_person: list[Image.Image], of_class: Image.Image, grey: int = 90) -> list[Image.Image]:
    """Those of a look with two pictures of the person: one of the class and one of nobody."""
    return [*of_person, *base_pictures(of_class, grey)]


def base_pictures(of_class: Image.Image, grey: int = 90) -> list[Image.Image]:
    return [of_class, Image.new("RGB", (64, 80), (grey, grey, grey))]


def point(step: int, *scores: float, copying=0.0, leakage=0.0, drift=0.0) -> LikenessPoint:
    return LikenessPoint(step, float(np.mean(scores)), scores, copying, leakage, drift)


def test_pictures_are_measured_against_photos_that_were_held_out(watch, network):
    own, other = person_photos(36), person_photos(1)
    watch.set_base_pictures(base_pictures(other[2]))
    measured = watch.measure(5, pictures(own[8:], other[2]))
    person = mean_face(embed_images(network, own[6:8]))
    assert person is not None
    assert measured.scores == pytest.approx(likeness(embed_images(network, own[8:]), person[None])[:, 0].tolist())
    assert measured.likeness == pytest.approx(np.mean(measured.scores)) and measured.likeness > 0.55
    assert measured.leakage == pytest.approx(0, abs=1e-6) and measured.drift == 0
    assert watch.measure(5, pictures(other[:2], other[2])).likeness < 0.4


def test_a_judge_measures_the_same_pictures_and_changes_no_number(watch, tmp_path):
    save_mean_colour(tmp_path / "mean.onnx")
    photos, judge = photos_of(36), load_faces(tmp_path / "mean.onnx")
    alone = watch_on(judge, photos[:6], photos[6:8])
    judged = watch_on(watch.network, photos[:6], photos[6:8], judge=watch_on(judge, photos[:6], photos[6:8]))
    other = person_photos(1)
    drawn, of_base = pictures(person_photos(36)[8:], other[0]), base_pictures(other[2])
    for each in (watch, judged, alone):
        each.set_base_pictures(of_base)
    measured = judged.measure(5, drawn)
    assert measured.judged == alone.measure(5, drawn)
    assert replace(measured, judged=None) == watch.measure(5, drawn)


def test_copies_of_training_photos_leaks_and_drift_show(watch):
    own, other = person_photos(36), person_photos(1)
    watch.set_base_pictures(base_pictures(other[2]))
    copied = watch.measure(5, pictures(own[:2], own[8], grey=100))
    fresh = watch.measure(5, pictures(own[8:], other[2], grey=93))
    assert copied.copying > fresh.copying + 0.05 and copied.copying > watch.own_copying
    assert copied.leakage > 0.4 and abs(fresh.leakage) < 1e-6
    assert (copied.drift, fresh.drift) == (10, 3)
    assert watch.cost(copied) > watch.cost(fresh)


def test_a_single_training_photo_copies_none_of_the_others(watch):
    assert watch_on(watch.network, photos_of(36)[:1], photos_of(36)[8:]).own_copying == 0
    assert watch.own_copying > -0.5


def test_a_picture_without_a_face_counts_nothing(watch):
    nothing = Image.new("RGB", (64, 80), (120, 90, 60))
    watch.set_base_pictures(base_pictures(nothing))
    measured = watch.measure(1, pictures([nothing, person_photos(36)[8]], nothing))
    assert measured.scores[0] == 0 and measured.scores[1] > 0.5
    grey = [Photo.from_image(nothing, "grey.png")]
    with pytest.raises(BadPhoto, match="no face was found in the 1 photo held out"):
        watch_on(watch.network, photos_of(36), grey)
    with pytest.raises(BadPhoto, match="no face was found in the 1 photo trained on"):
        watch_on(watch.network, grey, photos_of(36))


def test_the_cheapest_of_those_shown_to_be_as_alike_as_the_best_is_kept(watch):
    cheap = point(100, 0.50, 0.40, 0.45, 0.42, leakage=0.05, drift=5)
    good = point(200, 0.600, 0.528, 0.558, 0.538, leakage=0.10, drift=9)
    best = point(300, 0.600, 0.530, 0.560, 0.540, leakage=0.30, drift=20)
    assert watch.choose([cheap, good, best]) is good
    assert watch.choose([cheap, best]) is best  # 0.11 less in every picture
    copied = replace(good, copying=watch.own_copying + 0.3)
    assert watch.choose([copied, best]) is best


def test_a_cheaper_checkpoint_that_may_be_less_alike_is_not_kept(watch):
    """Pictures that scatter prove nothing: the mean shortfall of 0.015 here is its own standard error."""
    best = point(300, 0.60, 0.53, 0.56, 0.54, leakage=0.30, drift=20)
    unsure = point(150, 0.60, 0.53, 0.56, 0.48, leakage=0.01)
    assert watch.choose([unsure, best]) is best


def test_the_scale_of_likeness_is_the_person_and_the_network(watch):
    """A network whose cosines are packed five times closer chooses the same."""
    other = person_photos(1)
    watch.set_base_pictures(base_pictures(other[2]))
    points = [
        point(100, 0.50, 0.51, 0.52, leakage=0.02, drift=5),
        point(200, 0.60, 0.61, 0.62, leakage=0.05, drift=7),
        point(300, 0.605, 0.615, 0.625, leakage=0.20, drift=7),
    ]
    packed = copy.copy(watch)
    packed.own, packed._base_class, packed.own_copying = watch.own / 5, watch._base_class / 5, watch.own_copying / 5
    smaller = [
        replace(
            one, likeness=one.likeness / 5, scores=tuple(s / 5 for s in one.scores), copying=one.copying / 5,
            leakage=one.leakage / 5,
        )
        for one in points
    ]  # fmt: skip
    assert watch.choose(points) is points[1] and packed.choose(smaller) is smaller[1]
    assert packed.cost(smaller[1]) == pytest.approx(watch.cost(points[1]))


def test_a_run_has_enough_when_likeness_is_flat_or_the_class_is_lost(watch):
    other = person_photos(1)
    watch.set_base_pictures(base_pictures(other[2]))
    rising = [point(step, step / 1000, step / 1000) for step in (100, 200, 300, 400)]
    assert watch.enough([]) is None  # of the steps before the first measurement
    assert watch.enough(rising[:1]) is None and watch.enough(rising) is None
    flat = [*rising, *(point(step, 0.405, 0.395) for step in (500, 600, 700))]
    assert watch.enough(flat[:-1]) is None
    assert "step 400" in (watch.enough(flat) or "")
    leaking = [*rising, point(500, 0.5, 0.5, leakage=0.6), point(600, 0.6, 0.6, leakage=0.6)]
    assert watch.enough(leaking[:-1]) is None and "trigger" in (watch.enough(leaking) or "")


def test_a_selection_of_checkpoints_survives_packing(watch):
    selection = Selection(watch)
    for number in range(8):
        score = 0.1 * number
        measured = point(number, score, score + 0.01, score - 0.01)
        selection.add(replace(measured, judged=point(number, 0.9)), {"x": torch.full((2,), float(number))})
    kept, values = selection.choose()
    assert kept.step == 7 and values["x"].tolist() == [7.0, 7.0]
    tensors, points = selection.pack()
    assert {key.split(".")[1] for key in tensors} == {"4", "5", "6", "7"}
    again = Selection(watch)
    again.unpack(tensors | {"adapter.x": torch.zeros(1)}, json.loads(json.dumps(points)))
    assert again.points == selection.points and again.choose()[0] == selection.choose()[0]


def held_out(photos: list[Photo], count: int, network: FaceNetwork) -> tuple[list[Photo], list[Photo]]:
    """The photos that are left to train on, and those that are held out."""
    limits = Thresholds.for_resolution(1024, network.name)
    ready = make_ready(photos, network, limits, check=False, hold_out=count)
    return [item.photo for item in ready.training], [item.photo for item in ready.held_out]


def test_typical_photos_are_held_out_but_never_one_of_a_pair(network):
    photos = photos_of(37)
    kept, out = held_out(photos, 2, network)
    assert len(kept) == 8 and len(out) == 2 and not {p.name for p in kept} & {p.name for p in out}
    twins = [Photo.from_image(photo.image().resize((184, 224)), f"copy-{photo.name}") for photo in out]
    _, others = held_out([*photos, *twins], 2, network)
    assert not {p.name for p in others} & {p.name for p in (*out, *twins)}
    vectors = embed_images(network, [photo.image() for photo in photos])
    nearest = photos[int((vectors @ vectors.mean(0)).argmax())]
    assert nearest in kept, "the most typical photo teaches most"
    with pytest.raises(BadPhoto, match="hold_out = 8"):
        held_out(photos, 8, network)


class PackedFaces:
    """A face network with dlib's closely packed cosines: 0.97 between any two photos."""

    name = "dlib"

    def __init__(self):
        self.seen = 0

    def detect(self, image):
        return [Face((0, 0, *image.size), np.zeros((5, 2), np.float32), 1.0)]

    def embed(self, images, faces):
        self.seen += 1
        vector = np.zeros(20, np.float32)
        vector[[0, self.seen]] = math.sqrt(0.97), math.sqrt(0.03)
        return vector[None]


def test_what_repeats_a_photo_is_judged_by_the_networks_own_limit():
    photos = [Photo.from_image(person_photos(37)[0], str(number)) for number in range(5)]
    kept, out = held_out(photos, 2, PackedFaces())
    assert len(kept) == 3 and len(out) == 2


def test_the_checkpoint_that_is_kept_comes_back_with_the_curve(tmp_path, train_on, monkeypatch):
    # At this rate every pair of steps spoils more of the pictures: the last checkpoint cannot be the one to keep.
    monkeypatch.setattr("core.training.likeness.FACES_NEEDED", 0)
    config = replace(CONFIG, steps=4, learning_rate=0.1, save_every=2, save_precision="fp32", likeness_pictures=1)
    seen = []
    callbacks = Callbacks(on_step=lambda report: seen.append(report.likeness))
    lora = train_on(config, output=tmp_path / "a.safetensors", callbacks=callbacks)
    curve = json.loads(lora.metadata[LIKENESS_KEY])
    measured, kept = curve["points"], curve["points"][curve["kept"]]
    assert [entry["step"] for entry in measured] == [2, 4]
    assert [report and report.step for report in seen] == [None, 2, 2, 4]
    assert curve["network"] == "sface" and 0.7 < curve["photos"] < 1
    assert lora.metadata["ss_steps"] == str(kept["step"]) and lora.metadata["ss_num_train_images"] == "8"
    assert kept["step"] < 4
    # The last one is there too, though another was kept.
    saved = {step: LoraFile.read(tmp_path / f"a-step{step:06d}.safetensors").tensors for step in (2, 4)}
    same = [step for step, tensors in saved.items() if all(torch.equal(tensors[n], lora.tensors[n]) for n in tensors)]
    assert same == [kept["step"]]


def test_pictures_without_a_face_choose_no_step(train_on):
    config = replace(CONFIG, steps=4, learning_rate=0.1, likeness_pictures=1, stop_early=True)
    warnings: list[str] = []
    lora = train_on(config, callbacks=Callbacks(on_warning=warnings.append))
    assert lora.metadata["ss_steps"] == "4" and json.loads(lora.metadata[LIKENESS_KEY])["kept"] == 1
    assert [line for line in warnings if "a face was found in only 0 of 1 pictures" in line]


def test_a_model_that_draws_slowly_chooses_a_step_only_with_a_speed_lora(watch, base):
    slow = replace(base, family=replace(base.family, draws_slowly=True))
    selection = Selection(watch)
    selection.add(point(1, 0.5, 0.6), {})
    assert selection.why_not_to_choose(base) is None
    assert "only in many steps, or with a speed LoRA" in (selection.why_not_to_choose(slow) or "")
    assert (base.draws_roughly, slow.draws_roughly) == (False, True)
    words = [likeness_word(likeness, rough) for rough in (False, True) for likeness in (0.0, 0.2, 0.5, 0.7)]
    assert words[:4] == ["no face", "someone else", "perhaps", "the same person"]
    assert words[4:] == ["drawn too roughly to tell"] * 3 + ["the same person"]
    fast = replace(slow, says_distilled=True)
    assert fast.few_steps and selection.why_not_to_choose(fast) is None


@pytest.mark.slow
def test_the_last_checkpoint_is_kept_where_it_is_asked_for(train_on):
    # At this rate the first step spoils every picture, and the second one changes more besides.
    config = replace(CONFIG, steps=2, sample_every=1, likeness_pictures=1, learning_rate=0.1, keep="last")
    last = train_on(config)
    curve = json.loads(last.metadata[LIKENESS_KEY])
    first, second = curve["points"]
    assert first["likeness"] == second["likeness"] == 0 and first["drift"] < second["drift"]
    assert last.metadata["ss_steps"] == "2" and curve["kept"] == 1


@pytest.fixture
def drawn(monkeypatch, tmp_path) -> list[list[tuple[str, int]]]:
    """The shots of each call of the sampler, with an empty cache folder."""
    monkeypatch.setenv("FACELORA_CACHE", str(tmp_path / "cache"))
    found: list[list[tuple[str, int]]] = []

    def count(*arguments):
        sample = build_draw_shots(*arguments)
        return lambda denoiser, encoders, shots: found.append(list(shots)) or sample(denoiser, encoders, shots)

    monkeypatch.setattr("core.training.run_job.build_draw_shots", count)
    return found


def test_a_picture_that_is_shown_and_measured_is_drawn_once(train_on, drawn):
    shown = []
    config = replace(CONFIG, steps=2, likeness_pictures=1, sample_prompts=("a photo of sks person", "another"))
    train_on(config, callbacks=Callbacks(on_sample=lambda step, images: shown.append(len(images))))
    assert shown == [2] and [len(shots) for shots in drawn] == [2, 3 + 1]


def test_the_base_models_pictures_are_drawn_once_for_all_people(train_on, drawn, tmp_path):
    config = replace(CONFIG, steps=1, sample_every=1, likeness_pictures=1)
    with cache_in(tmp_path / "of a person"):  # as in a studio
        first = train_on(config)
    of_base = drawn.pop(0)
    assert of_base == [("a photo of person", 1), (NEUTRAL_PROMPTS[0], 1)] and len(drawn) == 1
    drawn.clear()
    train_on(config, 36)
    assert len(drawn) == 1 and ("a photo of sks person", 1) in drawn[0]
    # A damaged file is drawn again, and what is measured by kept pictures is what is measured by new ones.
    drawn.clear()
    for kept in made_folder("base").glob("*/00.png"):
        kept.write_bytes(b"no picture")
    again = train_on(config)
    assert drawn[0] == of_base and again.metadata[LIKENESS_KEY] == first.metadata[LIKENESS_KEY]
    clear_cache()
    assert not list(made_folder("base").iterdir())


@pytest.mark.parametrize(("pictures", "at_a_look"), [(1, (1, 1, 1)), (4, (4, 2, 2)), (8, (8, 4, 3))])
def test_a_look_has_half_as_many_pictures_without_the_person(pictures, at_a_look):
    assert pictures_per_measurement(replace(CONFIG, likeness_pictures=pictures)) == at_a_look


@pytest.mark.slow
def test_a_run_that_was_stopped_chooses_as_one_that_was_not(tmp_path, train_on):
    config = replace(CONFIG, likeness_pictures=1)
    whole, output = train_on(config, output=tmp_path / "whole.safetensors"), tmp_path / "part.safetensors"

    def stop(report):
        if report.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_on(config, output=output, callbacks=Callbacks(on_step=stop))
    resumed = train_on(config, output=output, resume=True)
    assert resumed.metadata[LIKENESS_KEY] == whole.metadata[LIKENESS_KEY]
    assert all(torch.equal(whole.tensors[name], resumed.tensors[name]) for name in whole.tensors)


def test_a_run_that_was_cancelled_in_its_last_step_takes_no_other(tmp_path, train_on):
    config = replace(CONFIG, steps=9, learning_rate=1e-9, sample_every=1, likeness_pictures=1, stop_early=True)
    steps: list[int] = []

    def cancel(report):
        steps.append(report.step)
        if report.step == PATIENCE + 1:
            raise KeyboardInterrupt

    output, callbacks = tmp_path / "part.safetensors", Callbacks(on_step=cancel)
    with pytest.raises(KeyboardInterrupt):
        train_on(config, output=output, callbacks=callbacks)
    train_on(config, output=output, resume=True, callbacks=callbacks)
    assert steps == [*range(1, PATIENCE + 2)]


def test_the_command_line_shows_the_curve(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", count=6)
    settings = "--rank 4 --batch-size 1 --steps 1 --hold-out 2 --sample-every 1 --sample-steps 1 --sample-guidance 1"
    options = [*settings.split(), "--likeness-pictures", "1"]
    command = ["train", str(photos), "--base", str(BASE_FILE), "--output", str(tmp_path / "a.safetensors")]
    assert main([*command, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("<- kept" in line for line in lines) == 1 and any("held-out" in line for line in lines)
    assert not any("speed LoRA" in line for line in lines)
    speed = tmp_path / "speed_2step.safetensors"
    random_lora(load_base(BASE_FILE), r".*attn1\.to_q").save(speed)
    assert main([*command, *options, "--seed", "2", "--restart", "--json", "--speed-lora", str(speed)]) == 0
    steps = [entry for line in capsys.readouterr().out.splitlines() if (entry := json.loads(line)).get("step")]
    assert steps[-1]["likeness"]["step"] == 1
    measured = json.loads(LoraFile.read(tmp_path / "a.safetensors").metadata[LIKENESS_KEY])
    assert "drawn with a speed LoRA" in format_likeness(measured)


def test_pictures_are_scored_sorted_and_doubted(tmp_path, capsys):
    reference = write_photos(tmp_path / "reference", count=4, person=36)
    images = tmp_path / "images"
    images.mkdir()
    person_photos(36)[8].save(images / "own.png")
    person_photos(36)[9].resize((46, 56)).save(images / "tiny.png")
    person_photos(1)[0].save(images / "other.png")
    Image.new("RGB", (90, 110), (120, 90, 60)).save(images / "wall.png")
    command = ["score", str(images), "--reference", str(reference)]
    command += ["--sheet", str(images / "sheet.png")]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[3].split() == ["-", "(no", "face)", "wall.png"]
    assert main([*command, "--json"]) == 0  # among whose pictures the first one's sheet is none
    scores = json.loads(capsys.readouterr().out)["pictures"]
    assert [score["image"] for score in scores] == ["own.png", "tiny.png", "other.png", "wall.png"]
    assert scores[0]["likeness"] > 0.55 > 0.4 > scores[2]["likeness"]
    assert [score["doubt"] is None for score in scores] == [True, False, True, False]
    assert "px" in scores[1]["doubt"] and scores[3]["doubt"] == "no face" and scores[3]["likeness"] is None
    with Image.open(images / "sheet.png") as sheet:
        assert sheet.width > 4 * 180 and sheet.height > 224


def direction(*degrees: float) -> np.ndarray:
    """Vectors of length 1 at these angles to the first axis, (N, 2)."""
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1).astype(np.float32)


def test_copy_paste_is_the_measure_of_the_paper():
    """(to truth - to reference) / between them, arXiv:2510.14975; worked out by hand."""
    copied = copy_paste(direction(10, 45, 0, 90), direction(0, 200), direction(90))
    assert copied == pytest.approx([(80 - 10) / 90, 0, 1, -1], abs=1e-3)
    nearer = copy_paste(direction(10), direction(0), direction(90, 40))
    assert nearer == pytest.approx([(30 - 10) / 40], abs=1e-3)


def test_figures_of_pictures_count_those_without_a_face_as_nothing():
    nobody = np.full((1, 2), np.nan, np.float32)
    pictures = np.concatenate([direction(0), nobody])
    figures = Figures.of(pictures, direction(10, -10), direction(0))
    assert figures.likeness == 0.5
    assert figures.photos == pytest.approx(math.cos(math.radians(20)), abs=1e-4) and figures.copy_paste == 1
    alone = Figures.of(nobody, direction(10), direction(0))
    assert (alone.likeness, alone.photos, alone.share, alone.copy_paste) == (0, None, None, None)
    with pytest.raises(BadPhoto, match="no face was found in the 1 photo to compare with"):
        Figures.of(pictures, nobody)


def test_the_score_of_pictures_has_the_figures_of_papers(tmp_path, capsys):
    own = person_photos(36)
    for folder, photos in {"trained": own[:6], "reference": own[6:8], "copies": own[:2], "fresh": own[8:]}.items():
        (tmp_path / folder).mkdir()
        for number, photo in enumerate(photos):
            photo.save(tmp_path / folder / f"{number}.png")
    papers = ["--reference", str(tmp_path / "reference"), "--trained-on", str(tmp_path / "trained")]
    found = {}
    for folder in ("copies", "fresh"):
        assert main(["score", str(tmp_path / folder), *papers, "--json"]) == 0
        found[folder] = json.loads(capsys.readouterr().out)["figures"]["sface"]
    assert found["copies"]["copy_paste"] == pytest.approx(1, abs=1e-3) and found["fresh"]["copy_paste"] < 0.8
    assert found["fresh"]["share"] == pytest.approx(found["fresh"]["likeness"] / found["fresh"]["photos"], abs=1e-3)
    assert main(["score", str(tmp_path / "fresh"), *papers]) == 0
    said = capsys.readouterr()
    assert "of the photos' own" in said.out.splitlines()[-1] and not said.err
    twice = [*papers[:3], papers[1]]
    assert main(["score", str(tmp_path / "fresh"), *twice]) == 1
    assert "are in --reference too" in capsys.readouterr().err


def test_photos_to_compare_with_are_in_memory_one_at_a_time(tmp_path, monkeypatch):
    """Twenty photos of a phone were gigabytes."""
    photos, read = write_photos(tmp_path / "photos", count=4), Photo.image
    images: list[weakref.ref[Image.Image]] = []

    def counted(photo: Photo, *arguments) -> Image.Image:
        assert sum(image() is not None for image in images) <= 1
        image = read(photo, *arguments)
        images.append(weakref.ref(image))
        return image

    monkeypatch.setattr(Photo, "image", counted)
    assert main(["score", str(photos), "--reference", str(photos)]) == 0
    assert len(images) == 8


def test_one_network_selects_and_another_judges_from_the_command_line(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", count=6)
    save_mean_colour(tmp_path / "mean.onnx")
    output, network = tmp_path / "a.safetensors", ["--face-network", str(tmp_path / "mean.onnx")]
    training = ["train", str(photos), "--base", str(BASE_FILE), "--output", str(output), "--rank", "4", "--steps", "1"]
    measured = ["--hold-out", "2", "--sample-every", "1", "--sample-steps", "1", "--likeness-pictures", "1"]
    measured += ["--sample-guidance", "1", "--batch-size", "1"]
    assert (
        main([*training, "--no-check-photos", *network]) == 1
        and "--face-network has no effect" in capsys.readouterr().err
    )
    assert main([*training, *measured, *network, "--judge", "sface"]) == 0
    curve = json.loads(LoraFile.read(output).metadata[LIKENESS_KEY])
    assert (curve["network"], curve["judge"]["network"]) == ("mean", "sface")
    (measurement,) = curve["points"]
    assert measurement["judged"].keys() == measurement.keys() - {"judged"}
    assert measurement["judged"]["likeness"] < 0.9 < curve["photos"]
    assert "judged by sface" in capsys.readouterr().out
    score = ["score", str(photos), "--reference", str(photos), "--json"]
    assert main(score) == 0 and main([*score, *network]) == 0
    judged, selected = (json.loads(text) for text in capsys.readouterr().out.replace("}\n{", "}\0{").split("\0"))
    # The mean colour of grey pictures is grey: all of one likeness.
    assert len({entry["likeness"] for entry in judged["pictures"]}) == 6
    assert {entry["likeness"] for entry in selected["pictures"]} == {1.0}
    assert main([*score, *network, "--judge", "sface"]) == 0
    found = json.loads(capsys.readouterr().out)
    both = found["pictures"]
    assert found["figures"].keys() == {"mean", "sface"}
    assert {entry["likeness"] for entry in both} == {1.0} and len({entry["judged"] for entry in both}) == 6
    assert main([*score[:-1], *network, "--judge", "sface"]) == 0
    assert f" 1.00 {both[0]['judged']:5.2f} " in capsys.readouterr().out.splitlines()[0]


def test_a_judge_that_would_judge_nothing_or_itself_is_refused(tmp_path, watch, capsys):
    photos = str(write_photos(tmp_path / "photos", count=4))
    training = ["train", photos, "--base", str(BASE_FILE), "--output", str(tmp_path / "a.safetensors")]
    assert main([*training, "--judge", "sface"]) == 1 and "--judge requires held-out photos" in capsys.readouterr().err
    assert main(["score", photos, "--reference", photos, "--judge", "sface"]) == 1
    assert "judge sface: a judge must be a different network" in capsys.readouterr().err
    with pytest.raises(BadConfig, match="judge sface"):
        watch_on(watch.network, photos_of(36)[:6], photos_of(36)[6:8], judge=watch)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sample_every": 0}, "sample_every"),
        ({"hold_out": 0, "stop_early": True}, "hold_out"),
        ({"likeness_pictures": 0}, "likeness_pictures"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(BadConfig, match=words):
        replace(CONFIG, **settings)


@pytest.mark.parametrize(
    ("photos", "samples"),
    [((64, 80), (64, 80)), ((512, 512), (512, 512)), ((1024, 1024), (768, 768)), ((576, 576), (512, 512))],
)
def test_samples_are_smaller_than_large_photos(photos, samples, base):
    """Three quarters of the sides, but not below the 512 pixels that every base model draws."""
    assert sample_size(replace(base, family=replace(base.family, size_multiple=8)), photos) == samples


@pytest.mark.parametrize(("photos", "samples"), [(512, 768), (768, 768), (1024, 768), (1280, 960)])
def test_samples_are_as_large_as_the_model_needs(photos, samples, base):
    sdxl = replace(base, resolution=1024, family=replace(FAMILIES["sdxl"], size_multiple=8))
    assert sample_size(sdxl, (photos, photos)) == (samples, samples)


@pytest.mark.parametrize(("family", "steps"), [("sd15", 20), ("sdxl", 20), ("flux1", 25), ("zimage", 25)])
def test_samples_take_the_steps_that_the_model_needs(family, steps, base):
    other = replace(base, name="base", family=replace(FAMILIES[family], is_distilled=lambda config: False))
    assert sampling_steps(other, TrainConfig()) == steps
    assert sampling_steps(other, TrainConfig(sample_steps=7)) == 7
    assert sampling_steps(replace(other, says_distilled=True), TrainConfig()) <= 8
