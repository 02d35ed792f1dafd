"""tools/method_tables.py: each method at its own rate, and a table over the people."""

from dataclasses import replace

import pytest

from core.demo.people import person_photos
from tools.method_tables import CONFIG, MethodResult, config_of, measure, summary_rows


def test_each_method_trains_at_its_own_rate():
    rates = {method: config_of(method).learning_rate for method in ("lora", "dreambooth", "lokr", "textual-inversion")}
    assert rates == {
        "lora": 4e-3,
        "dreambooth": pytest.approx(4e-4),
        "lokr": pytest.approx(12e-3),
        "textual-inversion": 4e-3,
    }


def test_the_table_has_the_mean_and_the_spread_over_the_people():
    lora = MethodResult("a", "lora", 1e-3, 2, 0.5, 10.0, 2_000_000, 0.75, 0.1, 3.0, 10**8)
    rows = summary_rows([lora, replace(lora, person="b", likeness=0.7, seconds=14.0), replace(lora, method="oft")])
    assert rows[0][:5] == ("lora", "2", "0.60 ± 0.10", "12 ± 2", "2.000 ± 0.000")
    assert rows[1][2] == "0.50 ± 0.00"


@pytest.mark.slow
def test_methods_of_every_kind_of_file_are_trained_measured_and_not_made_again(tmp_path):
    (folder := tmp_path / "anna").mkdir()
    for index, image in enumerate(person_photos(35)):
        image.save(folder / f"{index}.png")
    methods = ("lora", "textual-inversion", "dreambooth")
    results = measure(
        [folder], tmp_path / "out", methods, replace(CONFIG, steps=2, warmup_steps=0, batch_size=2, sample_steps=2)
    )
    assert [one.method for one in results] == ["base", *methods]
    before, *trained = results
    lora, words, checkpoint = trained
    assert before.drift == before.leakage == words.drift == 0 and min(lora.drift, checkpoint.drift) > 0
    assert all(0 <= one.adherence <= 1 for one in results) and all(one.steps == 2 for one in trained)
    assert words.file_bytes < 10_000 < lora.file_bytes < checkpoint.file_bytes
    (tmp_path / "out" / "anna-lora.safetensors").unlink()
    assert measure([folder], tmp_path / "out", methods) == results
    assert not (tmp_path / "out" / "anna-lora.safetensors").exists(), "nothing was trained again"
