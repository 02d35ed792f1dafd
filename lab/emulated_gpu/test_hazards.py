"""Faults that a real card would show, on the fake one: memory that stays, odd cards, settings of other programs."""

import pytest
import torch

from core.models.memory_plan import PLANS
from lab.emulated_gpu import hazards, trials
from lab.emulated_gpu.trials import SHORT, Case
from tests.tooling import mostly_slow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def on_card(fake_process):
    return lambda trial, *given: fake_process.submit(trial, *given).result()


@pytest.mark.parametrize("end", ["done", "cancelled", "failed"])
@pytest.mark.parametrize("family", mostly_slow(["flux1", "sdxl"], "sdxl"))
def test_nothing_is_left_on_the_card_after_a_training(family, end, on_card, photo_folder, small_sdxl, tmp_path):
    case = Case(family, small_sdxl if family == "sdxl" else None, settings=SHORT)
    error, left, pinned, _ = on_card(hazards.left_after, case, photo_folder, tmp_path / "me.safetensors", end)
    wanted = {"done": "", "cancelled": "FaceLoraError: stopped", "failed": "OutOfMemory: "}[end]
    assert error.startswith(wanted) and bool(error) == bool(wanted)
    assert left == pinned == 0


@pytest.mark.parametrize("form", ["cudnn GET", "cudnn FIND"])
def test_a_convolution_for_which_memory_is_lacking_leads_to_the_next_plan(form, on_card, small_sd15):
    """cuDNN hides the allocator's error and reports that it has no engine."""
    found = on_card(trials.out_of_memory_in_steps, Case("sd15", small_sd15), (0.3,), (form,))
    assert found == [(str(PLANS[1]), "")]


@pytest.mark.parametrize("end", ["done", "cancelled", "failed"])
def test_page_locked_memory_is_given_back_after_a_training(end, on_card, photo_folder, tmp_path):
    case = Case("flux1", settings={**SHORT, "memory_limit": 0.001})
    error, *left = on_card(hazards.left_after, case, photo_folder, tmp_path / "me.safetensors", end)
    assert bool(error) == (end != "done") and left == [0, 0, 0]


def test_a_second_person_is_trained_and_drawn_as_the_first_one_was(on_card, photo_folder, small_sdxl, tmp_path):
    settings = {**SHORT, "gradient_checkpointing": "auto"}
    size = on_card(hazards.room_for_one, Case("sdxl", small_sdxl), settings)
    case = Case("sdxl", small_sdxl, size=size, settings=settings)
    chosen, offloads = on_card(hazards.two_people, case, photo_folder, tmp_path)
    assert [choice.plan for choice in chosen] == [str(PLANS[0])] * 2
    assert [choice.live for choice in chosen] == [0, 0] and set(offloads) == {0.0} and len(offloads) == 4


@pytest.mark.parametrize("workspace", [None, ":16:8", ""])
def test_a_deterministic_training_works_unless_the_process_has_used_the_gpu_otherwise(
    on_card, photo_folder, tmp_path, workspace
):
    error = on_card(hazards.deterministic_after_a_product, photo_folder, tmp_path / "me.safetensors", workspace)
    assert ("Start the program with CUBLAS_WORKSPACE_CONFIG=:4096:8" in error) == (workspace == "")
    assert workspace == "" or not error


def test_a_card_is_compared_in_float32_without_tf32(on_card):
    assert on_card(hazards.rounded_in_a_comparison) == (0, True)


@pytest.mark.parametrize("plan", [PLANS[0], PLANS[-1]], ids=str)
@pytest.mark.parametrize("form", ["scaled fp8", "fp8", "nvfp4"])
def test_fp8_weights_are_dequantised_for_a_device_without_fp8(form, plan, on_card):
    dtypes, offered, pictures = on_card(hazards.fp8_where_there_is_none, form, plan)
    assert dtypes <= {BF16, FP32, torch.int8} and (torch.int8 in dtypes) == (plan.weights == "8 bits")
    assert offered == ["8 bits", "full"] and pictures == 1


def test_page_locked_memory_leaves_memory_to_other_programs(on_card):
    pinned, pageable = on_card(hazards.pinned_with_little_memory)
    assert pinned == 0 < pageable


@pytest.mark.parametrize("ram", [6, 64])
def test_text_encoders_give_page_locked_memory_back_before_the_denoiser_takes_it(ram, on_card, photo_folder, tmp_path):
    """Each takes a slab of 4 MiB. The smaller computer has room for one, as one of 16 GB has for T5 or FLUX.1's blocks."""
    pageable, left, unused = on_card(hazards.pinned_after_texts, ram * 2**20, photo_folder, tmp_path / "me.safetensors")
    assert pageable == [0, 0] and left == unused == 0


def test_what_comfyui_sets_for_its_process_is_off_in_a_training_and_on_after_it(on_card, photo_folder, tmp_path):
    in_steps, after = on_card(hazards.settings_in_a_step, photo_folder, tmp_path / "me.safetensors")
    assert set(in_steps) == {(False, False)} and after == (True, True)


def test_a_training_reports_its_own_memory_alone(on_card, photo_folder, tmp_path):
    assert 0 < on_card(hazards.memory_reported_after_more, photo_folder, tmp_path / "me.safetensors") < 2**29


def test_a_card_that_torch_has_no_kernels_for_is_named(on_card):
    """cuDNN would say that it finds no engine, as it does when memory runs out."""
    error, said = on_card(hazards.card_without_kernels)
    assert "no kernels for the NVIDIA GeForce GTX 1080 (compute capability 6.1)" in error and error in said


@pytest.mark.parametrize("system", ["windows", "wsl"])
def test_where_the_driver_spills_over_a_node_is_bound_to_free_memory_and_its_bound_ends_with_it(system, on_card):
    """Half a GiB of the six that are free stays free, for kernels and libraries that torch does not count."""
    assert on_card(hazards.share_on_windows_in_comfyui, system, 16, 6.5, 3.5) == ((5.5 + 3.5) / 16, 1.0)


def test_on_linux_there_is_no_bound(on_card):
    assert on_card(hazards.share_on_windows_in_comfyui, "linux", 16, 6.5, 3.5) == (None, None)


# What ComfyUI 0.30 chooses: comfy/model_management.py, should_use_bf16 and should_use_fp16. The last column is for models that
# overflow in fp16.
CARDS = {
    "NVIDIA GeForce GTX 1660 Ti": ((7, 5), FP32, FP32),
    "NVIDIA T1200 Laptop GPU": ((7, 5), FP32, FP32),
    "NVIDIA GeForce RTX 2060": ((7, 5), FP16, FP32),
    "Tesla V100-SXM2-16GB": ((7, 0), FP16, FP32),
    "NVIDIA GeForce RTX 3060": ((8, 6), BF16, BF16),
    "NVIDIA GeForce RTX 4090": ((8, 9), BF16, BF16),
    "NVIDIA H100 80GB HBM3": ((9, 0), BF16, BF16),
    "NVIDIA GeForce RTX 5090": ((12, 0), BF16, BF16),
}


@pytest.mark.parametrize("name", CARDS)
def test_auto_is_the_fastest_precision_that_is_right_on_the_card(name, on_card):
    capability, *wanted = CARDS[name]
    assert on_card(hazards.dtypes_of_card, capability, name) == tuple(wanted)
