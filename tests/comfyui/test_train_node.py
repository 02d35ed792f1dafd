"""Train Face LoRA and Apply LoRA in a real server: the wiring. What is found again: tests/training/test_store.py."""

import json
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from core.cli.command import command_parser
from core.config import config_from
from core.lora.file import KEY, LoraFile
from core.lora.hashes import model_hash
from core.models.families import FAMILIES
from core.storage.safetensors_file import SafetensorsFile, copy_with_metadata
from core.training.likeness import LIKENESS_KEY
from core.training.recipes import recipe_settings
from core.training.store import train
from core.training.training_adapter import METADATA_KEY
from tests.tooling import SMALL_SD15, write_checkpoint, write_photos

from .graphs import BASE, drawing, load_photos, node, training


def loras(server):
    return server.folder / "models" / "loras"


APPLY = {"model": ["base", 0], "clip": ["base", 1], "strength_model": 1.0, "strength_clip": 1.0}
ENDLESS = 20_000
"""Steps of a training that nobody waits for the end of."""
CONNECTED = "(the connected LoRA)"


@pytest.fixture(scope="module")
def trained(server):
    """The result of training, applying and drawing; the file is loras/anna.safetensors."""
    apply = {"apply": node("FaceLoRAApply", lora=["train", 0], lora_name=CONNECTED, **APPLY)}
    graph = training() | apply | drawing(["apply", 0], ["apply", 1], ["base", 2], prompt=["apply", 3])
    result = server.result(graph)
    return result


def test_photos_become_a_lora_in_the_loras_folder_and_a_picture(server, trained):
    lora = LoraFile.read(loras(server) / "anna.safetensors")
    assert lora.family == "sd15"
    assert lora.metadata["modelspec.trigger_phrase"] == "sks person"
    assert lora.metadata["ss_sd_model_name"] == "sd15.safetensors"
    assert server.drawn(trained).size == (64, 64)
    assert (
        "anna.safetensors" in server.get("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]
    )


def test_the_denoiser_of_a_training_is_gone_when_ksampler_begins(server):
    """ComfyUI collects garbage only after a prompt, so on a GPU it would take KSampler's memory."""
    apply = {"apply": node("FaceLoRAApply", lora=["train", 0], lora_name=CONNECTED, **APPLY)}
    count = {"count": node("TestDenoisersOfTrainings", model=["apply", 0])}
    graph = training(name="gone", training_seed=78) | apply | count | drawing(["count", 0], ["apply", 1], ["base", 2])
    result = server.result(graph)
    assert result.outputs["count"]["alive"] == [0]


def test_comfyuis_own_loader_takes_every_key_and_the_picture_changes(server, trained):
    loader = {"loader": node("LoraLoader", lora_name="anna.safetensors", **APPLY)}
    plain = server.run(BASE | drawing(["base", 0], ["base", 1], ["base", 2]))
    with_lora = server.run(BASE | loader | drawing(["loader", 0], ["loader", 1], ["base", 2]))
    assert "not loaded" not in with_lora.log
    assert "ERROR" not in with_lora.log
    assert pixels_differ(server.drawn(plain), server.drawn(with_lora))
    assert not pixels_differ(server.drawn(with_lora), server.drawn(trained))


def pixels_differ(a, b) -> bool:
    return a.tobytes() != b.tobytes()


def test_a_file_gives_the_same_picture_as_the_connected_lora(server, trained):
    apply = {"apply": node("FaceLoRAApply", lora_name="anna.safetensors", **APPLY)}
    result = server.result(BASE | apply | drawing(["apply", 0], ["apply", 1], ["base", 2], prompt=["apply", 3]))
    assert not pixels_differ(server.drawn(result), server.drawn(trained))


def test_a_queued_graph_that_has_not_changed_does_not_train_again(server, trained):
    server.run(training())
    result = server.run(training())
    assert "train" in result.cached


def test_the_file_is_found_by_its_content_when_comfyui_has_forgotten_the_result(server, trained):
    before = (loras(server) / "anna.safetensors").stat().st_mtime_ns
    for _ in range(5):  # a graph that comes at the same moment may be run before what is to be freed is freed
        server.post("/free", {"free_memory": True, "unload_models": True})
        result = server.result(training())
        if "train" not in result.cached:
            break
    else:
        pytest.fail("ComfyUI has forgotten nothing")
    assert (loras(server) / "anna.safetensors").stat().st_mtime_ns == before
    assert not (loras(server) / "anna-2.safetensors").exists()


@pytest.mark.parametrize("sent", [None, {"workflow": None}, {"workflow": {"id": "of a page"}}])
def test_what_else_a_client_sends_with_a_prompt_does_not_matter(server, trained, sent):
    graph = training(name=f"sent-{len(str(sent))}")
    answer = server.post("/prompt", {"prompt": graph, "extra_data": {"extra_pnginfo": sent}})
    result = server.wait(answer["prompt_id"])
    server.post("/history", {"delete": [answer["prompt_id"]]})  # ComfyUI's own list of jobs fails at it
    assert result.status == "success", result.error
    assert training_state(server)["workflow"] == ("of a page" if sent and sent["workflow"] else None)


def test_a_deleted_file_is_made_again(server, trained):
    file = loras(server) / "deleted.safetensors"
    assert server.run(training(name="deleted", training_seed=8)).status == "success"
    first = tensors(server, "deleted")
    file.unlink()
    assert server.run(training(name="deleted", training_seed=8)).status == "success"
    assert "learning_rates" in training_state(server), "it was trained"
    assert same(tensors(server, "deleted"), first)
    server.run(training(name="deleted", training_seed=8))
    assert "train" in server.run(training(name="deleted", training_seed=8)).cached


def test_a_changed_photo_trains_again(server, trained):
    folder = write_photos(server.folder / "input" / "bert", count=2, person=36)
    first = server.run(training(folder="bert", name="bert"))
    (folder / "1.png").unlink()
    second = server.run(training(folder="bert", name="bert"))
    assert first.status == second.status == "success"
    assert "train" not in second.cached
    assert (loras(server) / "bert-2.safetensors").exists()


def test_comfyuis_own_nodes_take_the_lora_and_save_it(server, trained):
    graph = training() | {
        "model": node("LoraModelLoader", model=["base", 0], lora=["train", 0], strength_model=1.0, bypass=False),
        "save": node("SaveLoRA", lora=["train", 0], prefix="loras/by_comfyui"),
    } | drawing(["model", 0], ["base", 1], ["base", 2])  # fmt: skip
    result = server.result(graph)
    assert "not loaded" not in result.log
    assert not pixels_differ(server.drawn(result), server.drawn(trained))
    (saved,) = (server.folder / "output" / "loras").glob("by_comfyui*.safetensors")
    assert set(LoraFile.read(saved).tensors) == set(LoraFile.read(loras(server) / "anna.safetensors").tensors)


def cancel_after_three_steps(server, prompt_id: str, step: int) -> tuple[int, float]:
    """The last step, and the seconds that it took to end, of a training that goes on from `step`."""
    wait_for(lambda: training_state(server).get("phase") == "training", "the training to go on")
    assert training_state(server)["step"] > step
    wait_for(lambda: training_state(server)["step"] >= step + 3, "three steps")
    seconds = seconds_to_cancel(server, prompt_id)
    return training_state(server)["step"], seconds


def seconds_to_cancel(server, prompt_id: str) -> float:
    asked = time.monotonic()
    server.post("/interrupt", {})
    assert server.wait(prompt_id).status == "interrupted"
    return time.monotonic() - asked


def test_cancelled_it_goes_on_from_there_and_can_be_stopped_with_what_it_has_learned(server, trained):
    graph = training(name="long", steps=ENDLESS)
    step, _ = cancel_after_three_steps(server, server.queue(graph), 0)
    assert not (loras(server) / "long.safetensors").exists()

    prompt_id = server.queue(graph, workflow={"id": "of another tab"})
    wait_for(lambda: training_state(server).get("phase") == "training", "the training to go on")
    for curve in ("history", "learning_rates"):
        assert training_state(server)[curve][0][0] <= 3, "the curve begins where the training began"
    stop(server)
    kept = server.wait(prompt_id)
    assert kept.status == "success", kept.error
    lora = LoraFile.read(loras(server) / "long.safetensors")
    assert step < int(lora.metadata["ss_steps"]) < ENDLESS


@pytest.mark.clock
def test_it_is_cancelled_within_a_second(server, trained):
    graph, step, times = training(name="cancelled", steps=ENDLESS, training_seed=21), 0, []
    for _ in range(3):  # a busy machine may delay one of them
        step, seconds = cancel_after_three_steps(server, server.queue(graph), step)
        times.append(seconds)
    assert min(times) < 1, times


@pytest.mark.parametrize("body", [None, [], {}, {"node": "train"}, {"prompt": "any", "node": "nobody"}])
def test_a_stop_of_what_does_not_train_is_refused(server, body):
    assert "error" in server.post("/facelora/stop", body)


def test_a_form_on_another_sites_page_cannot_stop_a_training(server):
    request = urllib.request.Request(
        server.url + "/facelora/stop", b'{"prompt": "any", "node": "train"}', {"Content-Type": "text/plain"}
    )
    with pytest.raises(urllib.error.HTTPError, match="415"):
        urllib.request.urlopen(request, timeout=60)


def training_state(server) -> dict:
    """What a page of the server's user is told of the last training."""
    return next((state for state in reversed(server.get("/facelora/training")) if state["node"] == "train"), {})


def stop(server) -> Any:
    """Ends the training and keeps what it has learned, as the panel's button does."""
    state = training_state(server)
    return server.post("/facelora/stop", {"prompt": state["prompt"], "node": state["node"]})


def wait_for(condition, what: str, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_tells_later_forecasts_how_fast_this_machine_trains(server):
    asked = "/facelora/forecast?base=sd15.safetensors&resolution=64"
    before = server.get(asked)
    prompt = server.queue(training(name="timed", steps=ENDLESS, training_seed=91))
    wait_for(lambda: training_state(server).get("seconds", 0) > 15, "ten seconds of training")
    stop(server)
    assert server.wait(prompt).status == "success"
    ((least, most), (low, high)) = before["best"], server.get(asked)["best"]
    assert high / low < 0.8 * most / least, "a narrower range, of this machine"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("rnak = 4", ["rnak", "rank"]),
        ("rank = many", ["settings", "NAME = VALUE"]),
        ("steps = 0", ["steps = 0"]),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_runs(server, settings, words):
    answer = server.refusal(training(settings=settings))
    assert all(word in answer for word in words), answer


@pytest.mark.parametrize(
    "settings", ["hold_out = 2", "optimizer = 'prodigy'", "thumbnail = true", "stop_early = true", "warmup_steps = 900"]
)
def test_a_setting_that_needs_the_recipe_or_the_widgets_is_not_refused(server, settings):
    graph = training(settings=settings, recipe="best", steps=1000, samples=1, learning_rate=0.0)
    wired = {"photos": load_photos(pictures=["name", 0]), "name": node("PrimitiveString", value="gone.png")}
    assert "gone.png: this picture doesn't exist" in server.run(graph | wired).error, "it was begun"


def test_settings_from_another_node_are_read_when_the_node_runs(server):
    graph = training() | {"text": node("PrimitiveString", value="rnak = 4")}
    graph["train"]["inputs"]["settings"] = ["text", 0]
    assert "rnak" in server.run(graph).error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "../anna"}, ["name", "folder of LoRAs"]),
        ({"trigger_word": " "}, ["trigger_word"]),
        ({"captions": "only one"}, ["1 captions for 3 photos"]),
    ],
)
def test_a_wrong_input_is_one_clear_line_in_the_node(server, changes, words):
    error = server.error(training(**changes))
    assert all(word in error for word in words), error
    assert error.startswith("FaceLoRA.Bad"), "not the path of the pack on the server"


def test_a_checkpoint_without_text_encoder_or_vae_is_named_in_one_clear_line(server):
    whole = SafetensorsFile.open(server.folder / "models" / "checkpoints" / "sd15.safetensors")
    denoiser = whole.path.with_name("denoiser.safetensors")
    save_file({key: whole[key] for key in whole if key.startswith("model.")}, denoiser)
    bare = {"bare": node("CheckpointLoaderSimple", ckpt_name=denoiser.name)}
    for input_name, output in (("clip", 1), ("vae", 2)):
        changes: dict[str, Any] = {input_name: ["bare", output]}
        error = server.error(training(**changes) | bare)
        assert (
            f"{input_name}: the checkpoint doesn't contain one. Load the {input_name.upper()} of this base model"
            in error
        )
    denoiser.unlink()  # an app takes the first checkpoint


def test_training_leaves_the_model_that_it_was_given_as_it_was(server, trained):
    def drawn(negative):
        graph = BASE | drawing(["base", 0], ["base", 1], ["base", 2])
        graph["negative"]["inputs"]["text"] = negative  # at cfg 1 it changes nothing but the key of ComfyUI's cache
        return server.drawn(server.run(graph))

    before = drawn("one")
    assert server.run(training(training_seed=3, settings="text_encoder_lr = 0.01")).status == "success"
    assert not pixels_differ(before, drawn("another"))


def tensors(server, name: str) -> dict:
    """Those of a file in loras, for comparison."""
    return dict(LoraFile.read(loras(server) / f"{name}.safetensors").tensors)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_same_training_through_core_gives_the_same_tensors(server, trained):
    given = {"steps": 2, "rank": 4, "learning_rate": 0.01, "resolution": 64, "batch_size": 1, "check_photos": False}
    config = config_from(recipe_settings("fast", FAMILIES["sd15"].recipes, given, photos=3))
    checkpoint = server.folder / "models" / "checkpoints" / "sd15.safetensors"
    output = server.folder / "core.safetensors"
    train(server.folder / "input" / "anna", checkpoint, config, output=output)
    assert same(dict(LoraFile.read(output).tensors), tensors(server, "anna"))


def test_the_checkpoints_own_resolution_is_trained_at(server, trained):
    checkpoints = server.folder / "models" / "checkpoints"
    whole = SafetensorsFile.open(checkpoints / "sd15.safetensors")
    copy_with_metadata(whole, checkpoints / "small.safetensors", {"modelspec.resolution": "64x64"})
    base = {"small": node("CheckpointLoaderSimple", ckpt_name="small.safetensors")}
    inputs = {"model": ["small", 0], "clip": ["small", 1], "vae": ["small", 2], "resolution": 0, "steps": 1}
    server.result(training(name="small", **inputs) | base)
    assert LoraFile.read(loras(server) / "small.safetensors").metadata["ss_resolution"] == "(64, 64)"


def test_the_layer_that_is_set_on_clip_is_trained_on(server, trained):
    skipping = {"skip": node("CLIPSetLastLayer", clip=["base", 1], stop_at_clip_layer=-2)}
    server.result(training(name="skip", clip=["skip", 0]) | skipping)
    assert LoraFile.read(loras(server) / "skip.safetensors").metadata["ss_clip_skip"] == "2"
    assert not same(tensors(server, "skip"), tensors(server, "anna"))


def test_a_base_with_a_lora_on_it_is_another_base_even_half_loaded(server, trained):
    loader = {"loader": node("LoraLoader", lora_name="anna.safetensors", **APPLY)}
    server.result(training(name="on-lora", model=["loader", 0], clip=["loader", 1]) | loader)
    assert not same(tensors(server, "on-lora"), tensors(server, "anna"))

    half = {"half": node("TestPartlyLoaded", model=["loader", 0])}
    before = server.mark()
    server.result(training(name="on-lora", model=["half", 0], clip=["loader", 1]) | loader | half)
    assert training_state(server)["file"] == "on-lora.safetensors", "the same weights, so the same file is found"
    assert "loaded partially" in server.log(before) or "Unloaded partially" in server.log(before)


def test_weights_in_8_bits_can_be_trained_on(server, trained):
    unets = server.folder / "models" / "diffusion_models"
    unets.mkdir(exist_ok=True)
    (unets / "unet.safetensors").symlink_to(server.folder / "models" / "checkpoints" / "sd15.safetensors")
    eight = {"unet": node("UNETLoader", unet_name="unet.safetensors", weight_dtype="fp8_e4m3fn")}
    loader = {"loader": node("LoraLoader", lora_name="fp8.safetensors", **APPLY | {"model": ["unet", 0]})}
    server.result(training(name="fp8", model=["unet", 0]) | eight)
    assert not same(tensors(server, "fp8"), tensors(server, "anna"))
    graph = BASE | eight | loader | drawing(["loader", 0], ["loader", 1], ["base", 2])
    drawn = server.result(graph)
    assert "not loaded" not in drawn.log


def test_a_training_that_fails_says_why_in_its_panel(server, trained):
    before = {"train before": training()["train"]}
    result = server.run(training(name="failed", rank=8, continue_from=["train before", 0]) | before)
    assert "LoraMisfit" in result.error
    state = training_state(server)
    assert state["phase"] == "failed" and "has rank 4" in state["error"]


def test_the_panel_shows_the_photos_that_are_trained_on(server):
    folder = write_photos(server.folder / "input" / "hanna", count=1, scale=2, person=2)
    (folder / "0.png").rename(folder / "a friend.png")
    write_photos(folder, count=6, scale=2)
    graph = training(name="hanna", folder="hanna")
    graph["train"]["inputs"]["settings"] = "batch_size = 1"
    server.result(graph)
    assert LoraFile.read(loras(server) / "hanna.safetensors").metadata["ss_num_train_images"] == "6"
    assert len(training_state(server)["photos"]) == 6


def test_a_checkpoint_that_was_never_trained_is_refused_before_training(server, trained):
    graph = training(name="too-early", training_seed=91)
    graph["train"]["inputs"]["checkpoint"] = 1
    result = server.run(graph)
    assert "checkpoint = 1: these photos and settings have not been trained yet" in result.error
    assert not (loras(server) / "too-early.safetensors").exists()


def test_a_training_whose_headshots_cannot_be_drawn_is_refused(server):
    styles = {"pack": "corporate", "styles": "baroque", "count": 1, "first_seed": 1, "family": "sd15", "resolution": 64}
    graph = training(name="for-nothing", training_seed=92) | {
        "apply": node("FaceLoRAApply", lora=["train", 0], lora_name=CONNECTED, **APPLY),
        "styles": node("FaceLoRAStylePack", subject=["apply", 2], **styles),
        "shown": node("PreviewAny", source=["styles", 0]),
    }
    assert "no style 'baroque'" in server.refusal(graph)
    graph["styles"]["inputs"]["styles"] = ""
    assert server.run(graph).status == "success"


def test_the_panel_ends_with_the_likeness_and_samples_of_the_kept_step(server, trained):
    write_photos(server.folder / "input" / "frida", count=8, person=37, scale=2)
    settings = "sample_steps = 1\nlikeness_pictures = 1\nsample_guidance = 1.0\nsample_every = 50"
    graph = training("sdxl.safetensors", "frida", name="kept", recipe="best", steps=ENDLESS, settings=settings)
    prompt_id = server.queue(graph)
    wait_for(lambda: training_state(server).get("step", 0) >= 3, "some steps")
    stop(server)
    assert server.wait(prompt_id).status == "success"
    state = training_state(server)
    points = json.loads(LoraFile.read(loras(server) / "kept.safetensors").metadata[LIKENESS_KEY])
    kept = points["points"][points["kept"]]
    assert (state["kept_step"], state["samples_step"]) == (kept["step"], kept["step"])
    assert state["kept_likeness"] == pytest.approx(kept["likeness"], abs=1e-4)
    assert state["kept_word"] == "no face", "of a random model"


def test_a_script_leaves_out_the_advanced_inputs_and_finds_the_name_in_the_history_and_progress_in_the_log(server):
    graph = training(name="short")
    given = graph["train"]["inputs"]
    for name in ("rank", "learning_rate", "training_seed", "sample_prompts"):
        del given[name]
    result = server.result(graph)
    assert result.outputs["train"]["lora_name"] == ["short.safetensors"]
    assert "Train Face LoRA: short: step 2 of 2, loss " in result.log


def test_a_training_adapter_is_beside_the_model_while_it_is_trained_on(server, trained):
    graph = training(name="adapted", training_adapter=["train before", 0]) | {"train before": training()["train"]}
    server.result(graph)
    adapter, made = (LoraFile.read(loras(server) / f"{name}.safetensors") for name in ("anna", "adapted"))
    assert made.metadata[METADATA_KEY] == model_hash(adapter.tensors)
    assert not same(tensors(server, "adapted"), tensors(server, "anna"))


def test_masks_class_photos_and_a_lora_to_go_on_from_change_what_is_learned(server, trained):
    write_photos(server.folder / "input" / "others", count=2, person=36)
    graph = training(
        name="more", masks=["mask", 0], class_photos=["others", 0], continue_from=["train before", 0], steps=3
    ) | {
        "others": load_photos("others"),
        "train before": training()["train"],
        "mask": node("SolidMask", value=0.5, width=92, height=112),
    }
    result = server.run(graph)
    assert result.status == "error"
    assert "1 masks for 3 photos" in result.error
    graph["three"] = node("RepeatImageBatch", image=["mask image", 0], amount=3)
    graph["mask image"] = node("MaskToImage", mask=["mask", 0])
    graph["masks"] = node("ImageToMask", image=["three", 0], channel="red")
    graph["train"]["inputs"]["masks"] = ["masks", 0]
    result = server.result(graph)
    assert not same(tensors(server, "more"), tensors(server, "anna"))


def test_opaque_masks_are_ignored(server, trained):
    graph = training(name="opaque", masks=["masks", 0]) | {
        "mask": node("SolidMask", value=0.0, width=64, height=64),
        "mask image": node("MaskToImage", mask=["mask", 0]),
        "three": node("RepeatImageBatch", image=["mask image", 0], amount=3),
        "masks": node("ImageToMask", image=["three", 0], channel="red"),
    }
    server.result(graph)
    assert (
        LoraFile.read(loras(server) / "opaque.safetensors").metadata[KEY]
        == LoraFile.read(loras(server) / "anna.safetensors").metadata[KEY]
    )


def test_the_default_recipe_is_that_of_the_command_line(server):
    _, options = server.get("/object_info/FaceLoRATrain")["FaceLoRATrain"]["input"]["required"]["recipe"]
    assert options["default"] == command_parser("train").get_default("recipe") == "balanced"


def test_a_training_that_went_on_shows_the_likeness_of_all_steps_at_its_end(server, trained):
    write_photos(server.folder / "input" / "frida", count=8, person=37, scale=2)
    settings = "sample_steps = 1\nlikeness_pictures = 1\nsample_guidance = 1.0\nsample_every = 2"
    graph = training(folder="frida", name="measured twice", recipe="best", steps=ENDLESS, settings=settings)
    prompt_id = server.queue(graph)
    wait_for(lambda: "likenesses" in training_state(server), "a measurement")
    seconds_to_cancel(server, prompt_id)
    prompt_id = server.queue(graph)
    wait_for(lambda: "likenesses" in training_state(server), "another")
    stop(server)
    assert server.wait(prompt_id).status == "success"
    metadata = LoraFile.read(loras(server) / "measured twice.safetensors").metadata
    measured = [point["step"] for point in json.loads(metadata[LIKENESS_KEY])["points"]]
    assert [step for step, _ in training_state(server)["likenesses"]] == measured and measured[0] == 2


def states(server) -> list[Path]:
    """What is kept of the trainings that are not done."""
    return list((server.folder / "cache" / "runs").rglob("*.state.safetensors"))


def test_cancelled_while_a_sample_is_drawn_it_ends_at_once_and_goes_on(server, trained):
    before = set(states(server))
    graph = training(name="sampling", steps=3, samples=3, settings="sample_steps = 1000\nsample_guidance = 1.0")
    prompt_id = server.queue(graph)
    wait_for(lambda: training_state(server).get("phase") == "samples", "the first sample")
    assert seconds_to_cancel(server, prompt_id) < 10, "a thousand steps of sampling take minutes"
    assert "step" not in training_state(server), "the first step was not reported yet: it draws its sample"
    (state,) = set(states(server)) - before
    assert SafetensorsFile.open(state).metadata["step"] == "1"


def test_a_model_of_another_family_is_refused_with_the_choices(server):
    shape = replace(
        SMALL_SD15,
        unet={
            **SMALL_SD15.unet,
            "block_out_channels": (64, 128),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
    )
    unets = server.folder / "models" / "diffusion_models"
    unets.mkdir(exist_ok=True)
    write_checkpoint(unets / "sd2.safetensors", shape)
    graph = training(model=["unet", 0]) | {
        "unet": node("UNETLoader", unet_name="sd2.safetensors", weight_dtype="default")
    }
    error = server.error(graph)
    assert "UnknownFamily: MODEL is SD20. Train Face LoRA can train: Stable Diffusion 1.x" in error
    (unets / "sd2.safetensors").unlink()
