"""Comparing methods: what is measured, kept, shown; one slow run over the demo's base."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from core.bench.compare import (
    Comparison,
    MethodResult,
    MethodTrial,
    compare,
    known_results,
    summary_rows,
    write_results,
)
from core.cli import main
from core.config import TrainConfig
from core.demo import BASE_FILE
from core.demo.people import person_photos
from core.errors import BadConfig
from core.faces import load_faces
from core.models import load_base
from core.photos import Photo
from core.training.methods import peak_rate

CONFIG = TrainConfig(steps=2, batch_size=2, sample_steps=2, sample_guidance=2.5, learning_rate=1e-3, precision="fp32")


def result(person: str, method: str, **changes) -> MethodResult:
    values = {
        "likeness": 0.5,
        "seconds": 10.0,
        "file_bytes": 2_000_000,
        "adherence": 0.75,
        "leakage": 0.1,
        "drift": 3.0,
    }
    return MethodResult(person, method, 1e-3, 2, memory=10**8, **{**values, **changes})


@pytest.fixture(scope="module")
def base():
    return load_base(BASE_FILE)


def test_the_table_has_the_mean_and_the_spread_over_the_people(base):
    header, lora, words = summary_rows(
        [result("a", "lora"), result("b", "lora", likeness=0.7, seconds=14.0), result("a", "textual-inversion")]
    )
    assert header[:4] == ("method", "people", "likeness (to held-out photos)", "time (seconds)")
    assert lora[:5] == ("lora", "2", "0.60 ± 0.10", "12 ± 2", "2.000 ± 0.000")
    assert words[2] == "0.50 ± 0.00"


def test_the_learning_rate_is_the_settings_times_the_methods_factor_unless_one_is_given(base):
    comparison = Comparison(base, ("lora", "dreambooth", "oft"), CONFIG, {"oft": 0.5})
    rates = {method: comparison.config_of(method).learning_rate for method in comparison.methods}
    assert rates == {"lora": 1e-3, "dreambooth": pytest.approx(1e-4), "oft": 0.5}
    plain = Comparison(base, ("lora", "dreambooth"), TrainConfig())
    assert [peak_rate(plain.config_of(method)) for method in plain.methods] == [1e-4, 1e-5]
    assert plain.identity == replace(plain, config=TrainConfig(learning_rate=1e-4)).identity


def test_the_rate_of_textual_inversion_is_that_of_its_vectors(base):
    comparison = Comparison(base, ("lora", "textual-inversion"), CONFIG, {"textual-inversion": 0.02})
    assert peak_rate(comparison.config_of("textual-inversion")) == 0.02
    assert peak_rate(replace(comparison, rates={}).config_of("textual-inversion")) == TrainConfig.embedding_lr


def test_photos_are_checked_once_for_all_methods_and_a_strangers_is_left_out_with_a_word(base, monkeypatch):
    monkeypatch.setattr(MethodTrial, "_pictures", lambda *_: ([], [], []))
    images = [*person_photos(35)[:9], person_photos(36)[0]]
    photos = [Photo.from_image(image, f"{index}.png") for index, image in enumerate(images)]
    checked, unchecked = (Comparison(base, ("lora",), replace(CONFIG, check_photos=value)) for value in (True, False))
    assert checked.identity != unchecked.identity
    assert checked.config_of("lora") == unchecked.config_of("lora"), "not checked once more"
    for comparison, count in ((checked, 7), (unchecked, 8)):
        told: list[str] = []
        trial = MethodTrial(comparison, photos, load_faces(), torch.device("cpu"), told.append)
        assert len(trial.training) == count
        assert ("9.png is left out" in " ".join(told)) is (comparison is checked)


def test_results_of_other_settings_are_not_taken_for_known(base, tmp_path):
    comparison = Comparison(base, ("lora",), CONFIG)
    write_results(tmp_path / "a.json", comparison.identity, [result("a", "lora")])
    assert known_results(tmp_path / "a.json", comparison.identity) == [result("a", "lora")]
    assert known_results(tmp_path / "a.json", replace(comparison, methods=("lora", "dora")).identity) != []
    assert known_results(tmp_path / "a.json", replace(comparison, config=replace(CONFIG, steps=3)).identity) == []
    other = replace(base, prediction_type="v_prediction")
    assert known_results(tmp_path / "a.json", replace(comparison, base=other).identity) == []
    assert known_results(tmp_path / "missing.json", comparison.identity) == []


@pytest.mark.parametrize("value", ["0.5", None, [0.5], math.inf, 10**400])
def test_results_that_are_no_numbers_are_measured_again(base, tmp_path, value):
    comparison = Comparison(base, ("lora",), CONFIG)
    write_results(tmp_path / "a.json", comparison.identity, [replace(result("a", "lora"), drift=value)])
    assert known_results(tmp_path / "a.json", comparison.identity) == []


def test_results_of_other_photos_in_a_folder_of_the_same_name_are_not_taken_for_known(base, tmp_path, monkeypatch):
    judged = []
    monkeypatch.setattr("core.bench.compare.MethodTrial", lambda *_: judged.append(1) or Stub())
    photos = [Photo.from_image(image, f"{index}.png") for index, image in enumerate(person_photos(35)[:6])]
    others = [*photos[:5], replace(photos[5], caption="sks person at the sea")]
    comparison, faces = Comparison(base, ("lora",), CONFIG), load_faces()
    for given, judges in ((photos, 1), (photos, 1), (others, 2), (photos[:5], 3)):
        compare({"anna": given}, comparison, tmp_path, faces)
        assert len(judged) == judges


def test_progress_counts_the_methods_of_this_comparison_alone(base, tmp_path, monkeypatch):
    monkeypatch.setattr("core.bench.compare.MethodTrial", lambda *_: Stub())
    photos = [Photo.from_image(image, f"{index}.png") for index, image in enumerate(person_photos(35)[:6])]
    seen, faces = [], load_faces()
    for methods in (("lora", "dora"), ("oft",)):
        compare(
            {"anna": photos}, Comparison(base, methods, CONFIG), tmp_path, faces,
            on_phase=lambda phase, done, total: seen.append((done, total)),
        )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3), (2, 2)]


def test_folders_that_the_results_would_mix_with_are_refused(photo_folder, tmp_path, capsys):
    shutil.copytree(photo_folder, photos := tmp_path / "anna")
    options = ["--base", str(BASE_FILE), "--methods", "lora", "--output"]
    assert main(["compare", str(photos), *options, str(photos)]) == 1
    assert "this command reads this folder" in capsys.readouterr().err
    assert main(["compare", str(photos), *options, str(tmp_path / "out"), "--rate", "lora=1", "--rate", "lora=2"]) == 1
    assert "give each method one rate" in capsys.readouterr().err
    photos = photos.rename(tmp_path / "compare")
    assert main(["compare", str(photos), *options, str(tmp_path / "out")]) == 1
    assert "one folder is called compare" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Stub:
    """A judge that knows without looking."""

    def result(self, person, method, output):
        return result(person, method), [Image.new("RGB", (8, 8))]


def test_how_the_base_predicts_is_what_the_settings_say(photo_folder, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("core.cli.compare.compare", lambda people, comparison, *_, **__: given.append(comparison) or [])
    options = ["--base", str(BASE_FILE), "--output", str(tmp_path), "--json"]
    assert main(["compare", str(photo_folder), *options, "--prediction-type", "v_prediction"]) == 0
    assert given[0].base.prediction_type == "v_prediction"


def test_a_person_has_the_folders_name_however_it_is_given(photo_folder, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("core.cli.compare.compare", lambda people, *_, **__: given.append(people) or [])
    monkeypatch.chdir(photo_folder)
    assert main(["compare", ".", "--base", str(BASE_FILE), "--output", str(tmp_path), "--json"]) == 0
    assert list(given[0]) == [photo_folder.name]


def test_the_command_prints_a_line_for_each_measure_that_fits_a_narrow_terminal(
    photo_folder, tmp_path, monkeypatch, capsys
):
    results = [result("a", method) for method in ("lora", "dreambooth", "textual-inversion")]
    monkeypatch.setattr("core.cli.compare.compare", lambda *_, **__: results)
    assert main(["compare", str(photo_folder), "--base", str(BASE_FILE), "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 80 and lines[0].split() == ["method", "lora", "dreambooth", "textual-inversion"]
    leakage = next(line for line in lines if line.startswith("leakage (into the class)"))
    assert leakage.count("0.10 ± 0.00") == 3 and leakage.index("0.10") == lines[0].index("lora")


def test_an_unknown_method_is_refused_with_the_choices(base):
    with pytest.raises(BadConfig, match="method 'dreamboth': choose one of dora, dreambooth, "):
        Comparison(base, ("lora", "dreamboth"), CONFIG)


def test_what_cannot_be_measured_is_refused(base):
    with pytest.raises(BadConfig, match="held_out = 0: "):
        Comparison(base, ("lora",), CONFIG, held_out=0)
    with pytest.raises(BadConfig, match=r"scenes \['left'\]: "):
        Comparison(base, ("lora",), CONFIG, settings=("left",))
    with pytest.raises(BadConfig, match="method 'lora' is given twice"):
        Comparison(base, ("lora", "dora", "lora"), CONFIG)
    with pytest.raises(BadConfig, match="rate of 'oft': this method is not compared; the methods are lora"):
        Comparison(base, ("lora",), CONFIG, {"oft": 1e-3})
    with pytest.raises(BadConfig, match="learning_rate = -1"):
        Comparison(base, ("lora", "oft"), CONFIG, {"oft": -1.0})


@pytest.mark.slow
def test_methods_of_every_kind_of_file_are_trained_measured_and_not_made_again(base, tmp_path):
    photos = [Photo.from_image(image, f"{index}.png") for index, image in enumerate(person_photos(35))]
    comparison = Comparison(base, ("lora", "textual-inversion", "dreambooth"), CONFIG)
    done = []
    results = compare({"anna": photos}, comparison, tmp_path, load_faces(), on_phase=lambda *phase: done.append(phase))
    assert [one.method for one in results] == ["base", "lora", "textual-inversion", "dreambooth"]
    assert done[-1] == ("comparing", 4, 4)
    by_method = {one.method: one for one in results}
    assert by_method["base"].drift == by_method["base"].leakage == 0
    assert all(0 <= one.adherence <= 1 for one in results)
    sizes = [by_method[method].file_bytes for method in ("textual-inversion", "lora", "dreambooth")]
    assert sizes == sorted(sizes) and sizes[0] < 10_000
    assert json.loads((tmp_path / "compare.json").read_text())["results"][1]["steps"] == 2
    assert (tmp_path / "anna-lora.png").exists()
    again = compare({"anna": photos}, comparison, tmp_path, load_faces(), on_phase=lambda *phase: done.append(phase))
    assert again == results and len(done) == 4
