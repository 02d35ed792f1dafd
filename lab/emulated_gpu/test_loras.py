"""LoRAs on a fake GPU: what is copied to apply them, how often a model is loaded, and what is left of drawing."""

import pytest

from lab.emulated_gpu import loras
from lab.emulated_gpu.trials import Case
from tests.tooling import mostly_slow


@pytest.fixture(scope="module")
def on_card(fake_process):
    return lambda trial, *given: fake_process.submit(trial, *given).result()


@pytest.mark.parametrize("method", mostly_slow(["lora", "loha", "lokr", "dora", "oft"], "lora", "dora"))
def test_only_the_matrices_of_a_lora_are_copied_to_the_gpu(method, on_card):
    found = on_card(loras.applied, Case("flux1"), method)
    assert 0 < found.to_device <= found.matrices and found.to_host == found.pinned == 0
    if method == "lora":
        assert found.products == found.changed and found.waits == 1


def test_weights_that_are_brought_in_are_changed_on_the_gpu_in_their_place(on_card):
    found = on_card(loras.applied, Case("flux1"), "lora", True)
    assert found.products == found.changed and found.pinned == 0
    away = found.to_host  # the changed weights of blocks; those of other layers are on the card
    assert 0 < away < found.weights and found.to_device <= found.matrices + away


def test_original_weights_are_copied_once_if_another_strength_follows(on_card):
    found = on_card(loras.applied, Case("flux1"), "lora", False, True)
    assert found.to_host == found.weights and found.to_device <= found.matrices


@pytest.mark.parametrize("brought_in", [False, True])
def test_a_lora_beside_quantised_weights_takes_no_product_and_no_weight_to_apply(brought_in, on_card):
    found = on_card(loras.applied, Case("flux1", form="scaled fp8"), "lora", brought_in)
    assert (found.to_device, found.to_host, found.products) == (0, 0, 0)  # its matrices follow with the first picture


def test_a_device_without_fp8_and_without_all_operations_applies_what_it_can(on_card):
    plain, dora = on_card(loras.applied_where_much_is_lacking)
    assert plain < 0 == dora


def test_headshots_of_all_strengths_and_their_faces_share_one_model(on_card):
    loaded, copied = on_card(loras.loaded_for_headshots, Case("zimage"))
    assert loaded == ["denoiser", "vae"]
    first, second, third, *faces = copied
    assert third == (0, 0) and faces[:2] == [(0, 0)] * 2  # the strength that is applied comes first
    # The originals are copied once, and from there to the card for each other strength.
    assert first[1] > 0 and second == faces[2] == (first[0] + first[1], 0)


def test_a_group_and_its_faces_share_one_model(on_card):
    loaded, back = on_card(loras.loaded_for_a_group, Case("zimage"), 3)
    assert loaded == ["denoiser", "vae"] and back == 0


def test_blocks_that_were_brought_in_for_a_group_stay_on_the_gpu_for_its_faces(on_card):
    for_all, for_a_face, size, live = on_card(loras.brought_in_for_a_group)
    assert for_all == pytest.approx(1 / 3) and for_a_face == 0 and size <= live < 1.1 * size


@pytest.mark.parametrize("end", ["done", "cancelled", "failed"])
def test_nothing_is_left_of_drawing_with_blocks_brought_in(end, on_card):
    error, *left = on_card(loras.left_after_drawing, Case("flux1"), end)
    assert error == {"done": "", "cancelled": "InterruptedError", "failed": "OutOfMemory"}[end]
    assert left == [0, 0, 0]
