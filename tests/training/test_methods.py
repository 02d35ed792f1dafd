"""Methods on frozen networks: which modules, how they start, what is read out, and what does not fit."""

import json
import math
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import get_args

import pytest
import torch

from core.cli import main
from core.config import MethodName, TrainConfig
from core.errors import BadConfig, LoraMisfit, MissingPackage
from core.lora.file import LoraFile
from core.models.families import FAMILIES
from core.training import methods
from core.training.job import check_base_options
from core.training.methods import METHODS
from core.training.methods.lora import attach as attach_lora
from core.training.methods.method import Method

CPU = torch.device("cpu")
CONFIG = TrainConfig(rank=4, alpha=2.0)


def attach(base, config=CONFIG, parts=("denoiser",), continue_from=None):
    networks = {part: base.load(part, CPU, torch.float32) for part in parts}
    return attach_lora(networks, base.family, config, continue_from)


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_a_method_whose_package_is_missing_is_refused(base, method, monkeypatch):
    check_base_options(base, replace(CONFIG, method=method))
    monkeypatch.setattr("core.training.job.find_spec", lambda package: None)
    check_base_options(base, CONFIG)
    with pytest.raises(MissingPackage, match=f"'{method}' needs a package. Install it: pip install peft"):
        check_base_options(base, replace(CONFIG, method=method))


def test_down_is_drawn_kaiming_uniform_and_up_is_zero(base):
    parameters = attach(base).parameters()
    assert {name.rpartition(".")[2] for name in parameters} == {"down", "up"}
    for name, value in parameters.items():
        if name.endswith(".up"):
            assert not value.any()
        else:
            # Kaiming uniform with a = sqrt 5 has the bound 1 / sqrt(fan in): what sd-scripts and peft draw.
            bound = 1 / math.sqrt(value.shape[1:].numel())
            assert 0.8 * bound < value.abs().max() <= bound


def test_rank_and_alpha_follow_the_patterns_of_names(base):
    config = replace(CONFIG, rank_pattern={r"attn1\.": 2, r"ff\.": 6}, alpha_pattern={r"ff\.net\.2": 3.0})
    modules = attach(base, config).modules()
    ranks = {path: (module.rank, module.alpha) for (_, path), module in modules.items()}
    assert {value for path, value in ranks.items() if "attn1." in path} == {(2, 2.0)}
    assert {value for path, value in ranks.items() if path.endswith("ff.net.2")} == {(6, 3.0)}
    assert {value for path, value in ranks.items() if path.endswith("ff.net.0.proj")} == {(6, 2.0)}
    assert {value for path, value in ranks.items() if "attn2." in path} == {(4, 2.0)}


def test_without_an_alpha_it_is_each_modules_own_rank(base):
    config = replace(CONFIG, alpha=None, rank_pattern={r"attn1\.": 2})
    modules = attach(base, config).modules().values()
    assert modules and all(module.alpha == module.rank for module in modules)


def test_attention_targets_are_the_attentions_alone(base):
    paths = {path for _, path in attach(base, replace(CONFIG, targets="attention")).layers}
    assert paths and all(".attn1.to_" in path or ".attn2.to_" in path for path in paths)


def test_a_rank_above_the_layers_is_refused_with_the_layer_and_the_limit(base):
    with pytest.raises(BadConfig, match=r"rank 33 is larger than .* \(32 x \d+\) allows\. Use at most 32"):
        attach(base, replace(CONFIG, rank=33))


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_adapted_module_is_refused(base, setting):
    with pytest.raises(BadConfig, match=rf"{setting}: 'atn1' matches none of the \d+ adapted modules, e\.g\. \w+"):
        attach(base, replace(CONFIG, **{setting: {r"attn1\.": 2, "atn1": 2}}))


def test_a_lora_of_another_rank_or_other_targets_to_go_on_from_is_refused(base):
    lora = LoraFile.from_modules("sd15", attach(base).modules(), {})
    with pytest.raises(LoraMisfit, match=r"has rank 4 at .*, these settings 8"):
        attach(base, replace(CONFIG, rank=8), continue_from=lora)
    with pytest.raises(LoraMisfit, match=r"They differ at .*Choose the same targets"):
        attach(base, replace(CONFIG, targets="attention"), continue_from=lora)


@pytest.mark.clock
def test_a_full_size_sdxl_is_adapted_in_seconds_with_patterns_for_every_module():
    """peft compares each module with each pattern: one pattern for each of 722 modules took minutes."""
    import time

    from tests.tooling import FULL_SDXL

    with torch.device("meta"):
        denoiser = FAMILIES["sdxl"].build("denoiser", FULL_SDXL.unet)
        started = time.process_time()
        adapter = attach_lora({"denoiser": denoiser}, FAMILIES["sdxl"], replace(CONFIG, rank_pattern={"attn": 8}), None)
    assert time.process_time() - started < 20
    assert len(adapter.layers) == 722  # as in sd-scripts (reference/kohya_sdxl.json)


def test_the_settings_name_every_method_and_no_other():
    modules = (import_module(f"{methods.__name__}.{found.name}") for found in iter_modules(methods.__path__))
    defined = {id(value) for module in modules for value in vars(module).values() if isinstance(value, Method)}
    assert set(get_args(MethodName)) == set(METHODS)
    assert defined == set(map(id, METHODS.values()))


@pytest.mark.parametrize("method", METHODS)
def test_the_command_trains_with_every_method_once_and_draws_with_the_file(
    small_sd15, photo_folder, tmp_path, method, capsys
):
    output = tmp_path / "me.safetensors"
    command = ["train", str(photo_folder), "--base", str(small_sd15), "--output", str(output), "--method", method]
    command += ["--recipe", "none", "--resolution", "32", "--rank", "2", "--steps", "2", "--no-check-photos"]
    kind = {"textual-inversion": "embedding", "dreambooth": "checkpoint"}.get(method, "rank 2")
    assert main(command) == 0 and f" MB, {kind});" in capsys.readouterr().out
    before = output.read_bytes()
    assert main([*command, "--json"]) == 0 and json.loads(capsys.readouterr().out.splitlines()[-1])["found"]
    assert output.read_bytes() == before
    assert main([*command, "--seed", "2"]) == 1 and "already exists" in capsys.readouterr().err
    drawn_on = ["--base", str(output)] if kind == "checkpoint" else ["--base", str(small_sd15), "--lora", str(output)]
    options = ["--size", "32x32", "--steps", "1", "--count", "1", "--prompt"]
    assert main(["generate", *drawn_on, "--output", str(tmp_path), *options, "a photo of sks person"]) == 0


NO_LORA = [name for name, method in METHODS.items() if method.makes != "lora"]


@pytest.mark.parametrize("method", NO_LORA)
def test_what_is_no_lora_has_no_files_that_describe_a_lora(small_sd15, photo_folder, tmp_path, method, capsys):
    command = ["train", str(photo_folder), "--base", str(small_sd15), "--output", str(tmp_path / "me.safetensors")]
    command += ["--method", method, "--recipe", "none", "--resolution", "32", "--no-check-photos", "--sidecars"]
    assert main(command) == 1
    assert f"--sidecars: method '{method}' doesn't make a LoRA" in capsys.readouterr().err and not [*tmp_path.iterdir()]
