"""Training, drawing and encoding on a fake GPU, as users would: on small cards, on old ones, on Windows."""

import json

import pytest
import torch

from core.models.memory_plan import PLANS
from lab.emulated_gpu import trials
from lab.emulated_gpu.fake_cuda import MESSAGES
from tests.tooling import SMALL_FLOWS, UNETS, mostly_slow

MANY_BLOCKS = {"num_layers": 6, "num_single_layers": 12}
SHORT = {"steps": 2, "batch_size": 1, "check_photos": False, "sample_every": 2, "sample_steps": 1, "resolution": 64}


@pytest.mark.parametrize("family", ["zimage", pytest.param("flux1", marks=pytest.mark.slow)])
def test_samples_are_drawn_in_the_precision_that_is_trained_in(family, fake_process):
    trained, drawn = fake_process.submit(trials.training_and_drawing, trials.Case(family)).result()
    assert trained and trained == drawn


@pytest.mark.parametrize(
    ("size", "least", "most"),
    [
        pytest.param(0.03, 0, 0, marks=pytest.mark.slow),
        pytest.param(0.012, 0.4, 0.8, marks=pytest.mark.slow),
        pytest.param(0.0085, 0.8, 1, marks=pytest.mark.slow),
    ],
)
def test_a_small_card_draws_with_as_much_of_the_denoiser_as_it_can_hold(size, least, most, fake_process):
    drawn = fake_process.submit(trials.generated, trials.Case("flux1", size=size, denoiser=MANY_BLOCKS)).result()
    assert least <= drawn.offload <= most and drawn.sizes == ((64, 64),) * 2 and drawn.peak <= size * 2**30


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 1])
@pytest.mark.parametrize("family", [*UNETS, *SMALL_FLOWS])
def test_each_family_draws_with_its_denoiser_there_and_away(family, room, fake_process, small_sd15, small_sdxl):
    checkpoint = {"sd15": small_sd15, "sdxl": small_sdxl}.get(family)
    drawn = fake_process.submit(trials.generated, trials.Case(family, checkpoint), 2, room).result()
    assert drawn.offload == 1 - room and len(drawn.sizes) == 2


@pytest.mark.parametrize("room", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_quantised_weights_with_a_lora_draw_there_and_away(room, fake_process):
    drawn = fake_process.submit(trials.generated, trials.Case("flux1", form="scaled fp8"), 1, room).result()
    assert drawn.offload == 1 - room and len(drawn.sizes) == 1


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_a_gpu_converts_the_weights_that_it_loads_unless_that_means_more_bytes_to_copy(stored, fake_process):
    copied, converted = fake_process.submit(trials.loaded_as_bf16, stored).result()
    assert converted == 0 and copied == min(stored.itemsize, 2)


def test_a_lora_needs_no_second_denoiser_on_the_gpu(fake_process):
    plain, changed = (
        fake_process.submit(trials.generated, trials.Case("flux1", denoiser=MANY_BLOCKS, adapted=adapted)).result()
        for adapted in (False, True)
    )
    assert changed.peak < 1.1 * plain.peak


def test_offloaded_weights_that_a_lora_changed_are_page_locked(fake_process):
    drawn = fake_process.submit(trials.generated, trials.Case("flux1", adapted=True), 1, room=0).result()
    assert drawn.offloaded and all(copy.pinned for copy in drawn.offloaded)


def test_a_text_encoder_that_does_not_fit_is_run_on_the_gpu_layer_by_layer(fake_process):
    place, shape, peak, whole = fake_process.submit(trials.encoded, 0.0012).result()
    assert (place, shape) == ("cuda", (1, 16, 64)) and peak < whole / 4
    place, _, peak, whole = fake_process.submit(trials.encoded, 1).result()
    assert place == "cuda" and peak > whole


def test_a_text_encoder_in_fp8_is_kept_so_where_it_does_not_fit_otherwise(fake_process):
    place, shape, peak, whole = fake_process.submit(trials.encoded, 0.00125, torch.float8_e4m3fn).result()
    assert (place, shape) == ("cuda", (1, 16, 64)) and whole < peak < 1.6 * whole
    _, _, peak, whole = fake_process.submit(trials.encoded, 1, torch.float8_e4m3fn).result()
    assert peak > 1.9 * whole  # in bf16
    _, _, peak, whole = fake_process.submit(trials.encoded, 0.0005, torch.float8_e4m3fn).result()
    assert peak < whole / 2  # layer by layer


@pytest.mark.parametrize("family", mostly_slow([*UNETS, *SMALL_FLOWS], "zimage"))
def test_a_vae_works_on_tiles_where_the_whole_picture_does_not_fit(family, fake_process, small_sd15, small_sdxl):
    checkpoint = {"sd15": small_sd15, "sdxl": small_sdxl}.get(family)
    case = trials.Case(family, checkpoint, latents=640)
    *whole, tiled, peak = fake_process.submit(trials.through_the_vae, case, 80).result()
    assert not tiled
    size = 0.7 * peak / 2**30
    assert fake_process.submit(trials.through_the_vae, case, size).result()[:3] == (*whole, True)


@pytest.mark.slow
def test_blocks_come_from_ordinary_memory_if_it_cannot_be_page_locked(fake_process):
    step = fake_process.submit(trials.without_pinned_memory).result()
    assert step.copies and not any(copy.pinned for copy in step.copies) and step.early == 0


def test_what_overflows_in_fp16_is_computed_in_float32_on_old_cards(fake_process):
    old, new = (7, 5), (8, 6)
    assert fake_process.submit(trials.dtypes_of, "zimage", old).result() == (torch.float32, torch.float32)
    assert fake_process.submit(trials.dtypes_of, "flux1", old).result() == (torch.float16, torch.float32)
    assert fake_process.submit(trials.dtypes_of, "zimage", new).result() == (torch.bfloat16, torch.bfloat16)


def test_on_windows_a_command_takes_no_more_than_is_free(fake_process):
    assert fake_process.submit(trials.share_on_windows, 16, 3.5).result() == 0.75


def test_a_training_goes_from_photos_to_its_samples(fake_process, small_sd15, photo_folder, tmp_path):
    case = trials.Case("sd15", small_sd15, settings=SHORT)
    whole = fake_process.submit(trials.whole_training, case, photo_folder, tmp_path / "me.safetensors").result()
    assert (whole.error, whole.steps, whole.sampled) == ("", 2, 1)
    (warning,) = whole.warnings
    assert "4 photos are too few to hold any out" in warning
    assert (tmp_path / "me.safetensors").exists()


def test_a_sample_needs_no_gradients_and_no_copy_of_the_parameters(fake_process, small_sd15):
    case = trials.Case("sd15", small_sd15, settings={"method": "dreambooth"})
    freed, of_parameters = fake_process.submit(trials.memory_left_to_a_sample, case).result()
    assert freed >= of_parameters


@pytest.mark.parametrize("family", mostly_slow(["sd15", "flux1"], "sd15"))
def test_weights_that_become_quantised_are_freed_one_by_one(family, fake_process, small_sd15):
    settings = {"eight_bit_products": "off"}  # timing products takes memory of its own
    case = trials.Case(family, {"sd15": small_sd15}.get(family), plan=PLANS[4], settings=settings)
    needed, largest = fake_process.submit(trials.memory_to_quantise_weights, case).result()
    assert needed < 3 * largest


@pytest.mark.slow
@pytest.mark.parametrize("form", MESSAGES)
def test_out_of_memory_anywhere_in_a_training_leads_to_its_end_or_to_a_sentence(
    form, fake_process, photo_folder, tmp_path
):
    case = trials.Case("flux1", settings=SHORT)
    whole = fake_process.submit(trials.whole_training, case, photo_folder, tmp_path / "me.safetensors").result()
    for part in range(5):
        at = 1 + part * (whole.allocations - 1) // 4
        output = tmp_path / f"{part}.safetensors"
        ended = fake_process.submit(trials.whole_training, case, photo_folder, output, at, form).result()
        if ended.error:
            assert ended.error.startswith("OutOfMemory: ") and "\n" not in ended.error
        else:
            assert ended.steps == 2 and output.exists()


@pytest.mark.slow
def test_a_training_is_resumed(fake_process, photo_folder, tmp_path):
    assert fake_process.submit(trials.resumed, photo_folder, tmp_path).result() == (2, [3, 4])


@pytest.mark.slow
def test_a_card_that_is_too_small_for_the_fastest_plan_trains_by_another(fake_process, photo_folder, tmp_path):
    settings = {**SHORT, "resolution": 256, "sample_every": 0}
    case = trials.Case("flux1", size=0.035, settings=settings, denoiser=MANY_BLOCKS)
    whole = fake_process.submit(trials.whole_training, case, photo_folder, tmp_path / "me.safetensors").result()
    assert whole.error == "" and whole.steps == 2
    (said,) = (warning for warning in whole.warnings if "a step would take" in warning)
    assert any(str(plan) in said for plan in PLANS[1:])


@pytest.mark.parametrize("command", mostly_slow(["correctness", "memory", "speed"], "correctness"))
def test_what_is_measured_on_a_gpu_is_measured_to_its_end(command, fake_process, tmp_path):
    tables = fake_process.submit(trials.measured_on_a_gpu, command, tmp_path).result()
    assert {name: row for rows in tables.values() for name, row in rows.items() if "error" in row} == {}
    assert json.loads((tmp_path / f"{command}.json").read_text())["stages"] == tables
    if command == "memory":
        locked = tables["cancelling"]["after two steps"]
        assert locked["locked while training"] > 0 == locked["locked after releasing"]
