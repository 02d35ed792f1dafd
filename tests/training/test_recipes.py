"""core/training/recipes.py: settings that a run takes, the same photos seen whatever the batch size."""

import argparse

import pytest

from core.cli.train import run_train
from core.cli.training_arguments import add_train
from core.config import config_from
from core.errors import BadConfig
from core.lora.file import LoraFile
from core.models.families import FAMILIES
from core.training.methods import peak_rate
from core.training.recipes import MEASUREMENTS, RECIPES, recipe_settings


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_every_recipe_and_a_run_takes_it(family):
    assert tuple(FAMILIES[family].recipes) == RECIPES
    photos = []
    for name in RECIPES:
        config = config_from(recipe_settings(name, family))
        photos.append(config.steps * config.batch_size)
    assert photos == sorted(photos)


def test_a_larger_batch_means_fewer_steps_at_a_higher_rate():
    one = recipe_settings("balanced", "sd15", {"batch_size": 1})
    four = recipe_settings("balanced", "sd15", {"batch_size": 4})
    assert one["steps"] == 4 * four["steps"] == 2000
    assert four["learning_rate"] == pytest.approx(2 * one["learning_rate"])  # the square root of 4


def test_accumulated_photos_count_like_those_of_a_batch():
    together = recipe_settings("fast", "sdxl", {"batch_size": 4})
    in_turns = recipe_settings("fast", "sdxl", {"batch_size": 1, "accumulation": 4})
    assert [in_turns[name] for name in ("steps", "learning_rate")] == [
        together[name] for name in ("steps", "learning_rate")
    ]


def test_what_is_given_wins():
    settings = recipe_settings("fast", "sdxl", {"steps": 7, "learning_rate": 3e-4, "resolution": 512})
    assert (settings["steps"], settings["learning_rate"], settings["resolution"]) == (7, 3e-4, 512)


def test_another_method_has_the_rate_that_suits_it():
    lora, dreambooth = (recipe_settings("fast", "sd15", {"method": method}) for method in ("lora", "dreambooth"))
    assert (lora["learning_rate"], dreambooth["learning_rate"]) == (2e-4, 2e-5)
    with pytest.raises(BadConfig, match="method"):
        recipe_settings("fast", "sd15", {"method": "magic"})


def test_prodigy_finds_the_rate_by_itself():
    assert peak_rate(config_from(recipe_settings("fast", "sd15", {"optimizer": "prodigy"}))) == 1.0


def test_held_out_photos_are_measured_a_few_times():
    settings = recipe_settings("best", "sd15")
    assert settings["hold_out"] and settings["steps"] // settings["sample_every"] == MEASUREMENTS


def test_a_batch_that_is_no_number_is_refused():
    with pytest.raises(BadConfig, match="batch_size"):
        recipe_settings("fast", "sd15", {"batch_size": "4"})


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(BadConfig, match="fast, balanced, best"):
        recipe_settings("slow", "sd15")


def test_the_command_line_takes_the_recipe_of_the_base_s_family(small_sdxl, photo_folder, tmp_path):
    parser = argparse.ArgumentParser()
    add_train(parser)
    given = ["--recipe", "fast", "--steps", "1", "--resolution", "32", "--upscale", "--device", "cpu", "--output"]
    output = tmp_path / "lora.safetensors"
    run_train(parser.parse_args([str(photo_folder), "--base", str(small_sdxl), *given, str(output)]))
    metadata = LoraFile.read(output).metadata
    expected = FAMILIES["sdxl"].recipes["fast"]
    assert metadata["ss_network_dim"] == str(expected.rank)
    assert float(metadata["ss_learning_rate"]) == recipe_settings("fast", "sdxl")["learning_rate"]
