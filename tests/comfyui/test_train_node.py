"""Train Face LoRA and Apply LoRA in a real server."""

import time

import numpy as np
import pytest
import torch
from PIL import ImageChops

from core.lora_file import LoraFile, LoraModule
from core.lora_tools import convert_lora
from tests.tooling import write_photos

from .graphs import drawing, node, training

pytestmark = pytest.mark.comfyui


def loras(server):
    return server.folder / "models" / "loras"


APPLY = {"model": ["base", 0], "clip": ["base", 1], "strength_model": 1.0, "strength_clip": 1.0}
BASE = {"base": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")}
CONNECTED = "(the connected LoRA)"


@pytest.fixture(scope="module")
def trained(server):
    """The result of training, applying and drawing; the file is loras/anna.safetensors."""
    apply = {"apply": node("FaceLoRAApply", lora=["train", 0], lora_name=CONNECTED, **APPLY)}
    graph = training() | apply | drawing(["apply", 0], ["apply", 1], ["base", 2], prompt=["apply", 3])
    result = server.run(graph)
    assert result.status == "success", result.error + result.log
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
    result = server.run(BASE | apply | drawing(["apply", 0], ["apply", 1], ["base", 2], prompt=["apply", 3]))
    assert result.status == "success", result.error
    assert not pixels_differ(server.drawn(result), server.drawn(trained))


def test_a_queued_graph_that_has_not_changed_does_not_train_again(server, trained):
    server.run(training())
    result = server.run(training())
    assert "train" in result.cached
    assert result.seconds < 2


def test_the_file_is_found_by_its_content_when_comfyui_has_forgotten_the_result(server, trained):
    before = (loras(server) / "anna.safetensors").stat().st_mtime_ns
    server.post("/free", {"free_memory": True, "unload_models": True})
    result = server.run(training())
    assert result.status == "success", result.error
    assert "train" not in result.cached
    assert (loras(server) / "anna.safetensors").stat().st_mtime_ns == before
    assert not (loras(server) / "anna-2.safetensors").exists()


def test_another_setting_trains_a_second_file_and_leaves_the_first_alone(server, trained):
    before = (loras(server) / "anna.safetensors").read_bytes()
    result = server.run(training(training_seed=2))
    assert result.status == "success", result.error
    assert (loras(server) / "anna-2.safetensors").exists()
    assert (loras(server) / "anna.safetensors").read_bytes() == before


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
    result = server.run(graph)
    assert result.status == "success", result.error
    assert "not loaded" not in result.log
    assert not pixels_differ(server.drawn(result), server.drawn(trained))
    (saved,) = (server.folder / "output" / "loras").glob("by_comfyui*.safetensors")
    assert set(LoraFile.read(saved).tensors) == set(LoraFile.read(loras(server) / "anna.safetensors").tensors)


def test_cancelled_within_a_second_it_goes_on_from_there(server, trained):
    graph = training(name="long", steps=400)
    mark, prompt_id = server.mark(), server.queue(graph)
    wait_for(lambda: training_state(server).get("step", 0) >= 3, "the training to begin")
    asked = time.monotonic()
    server.post("/interrupt", {})
    result = server.wait(prompt_id, mark=mark)
    assert result.status == "interrupted"
    step = training_state(server)["step"]
    assert not (loras(server) / "long.safetensors").exists()
    seconds_a_step = (training_state(server)["seconds_left"]) / (400 - step)
    assert time.monotonic() - asked < 2 + 3 * seconds_a_step

    prompt_id = server.queue(graph)
    wait_for(lambda: training_state(server).get("phase") == "training", "the training to go on")
    assert training_state(server)["step"] > step
    assert training_state(server)["history"][0][0] <= 3, "the curve begins where it was cancelled"
    server.post("/facelora/stop", {"node": "train"})
    kept = server.wait(prompt_id)
    assert kept.status == "success", kept.error
    lora = LoraFile.read(loras(server) / "long.safetensors")
    assert step < int(lora.metadata["ss_steps"]) < 400


def training_state(server) -> dict:
    return server.get("/facelora/training").get("train", {})


def wait_for(condition, what: str, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


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
    ("changes", "words"),
    [
        ({"name": "../anna"}, ["name", "loras folder"]),
        ({"trigger_word": " "}, ["trigger_word"]),
        ({"captions": "only one"}, ["1 captions for 3 photos"]),
    ],
)
def test_a_wrong_input_is_one_clear_line_in_the_node(server, changes, words):
    result = server.run(training(**changes))
    assert result.status == "error"
    assert all(word in result.error for word in words), result.error


def test_training_leaves_the_model_that_it_was_given_as_it_was(server, trained):
    def drawn(negative):
        graph = BASE | drawing(["base", 0], ["base", 1], ["base", 2])
        graph["negative"]["inputs"]["text"] = negative  # at cfg 1 it changes nothing but the key of ComfyUI's cache
        return server.drawn(server.run(graph))

    before = drawn("one")
    assert server.run(training(training_seed=3, settings="text_encoder_lr = 0.01")).status == "success"
    assert not pixels_differ(before, drawn("another"))


def test_a_lora_of_another_family_is_an_error_in_the_node(server, trained):
    path = "mid_block.attentions.0.transformer_blocks.9.attn2.to_k"
    modules = {("denoiser", path): LoraModule(torch.randn(4, 2048), torch.randn(1280, 4), 4.0)}
    LoraFile.from_modules("sdxl", modules, {}).save(loras(server) / "xl.safetensors")
    apply = {"apply": node("FaceLoRAApply", lora_name="xl.safetensors", **APPLY)}
    result = server.run(BASE | apply | drawing(["apply", 0], ["apply", 1], ["base", 2]))
    assert result.status == "error"
    assert "LoraMisfit: xl.safetensors: is a LoRA for sdxl and does not fit MODEL, which is SD15" in result.error


def test_a_lora_in_a_naming_that_comfyui_skips_is_loaded_all_the_same(server, trained):
    kohya = LoraFile.read(loras(server) / "anna.safetensors")
    convert_lora(kohya, "diffusers")[0].save(loras(server) / "peft.safetensors")
    skipped = server.run(
        BASE
        | {"loader": node("LoraLoader", lora_name="peft.safetensors", **APPLY)}
        | drawing(["loader", 0], ["loader", 1], ["base", 2])
    )
    assert "lora key not loaded" in skipped.log
    apply = {"apply": node("FaceLoRAApply", lora_name="peft.safetensors", **APPLY)}
    result = server.run(BASE | apply | drawing(["apply", 0], ["apply", 1], ["base", 2]))
    assert result.status == "success", result.error
    assert "not loaded" not in result.log
    difference = np.asarray(ImageChops.difference(server.drawn(result), server.drawn(trained)))
    assert difference.max() <= 2  # fp16 rounds alpha / rank times the matrix anew
