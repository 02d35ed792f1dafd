"""Apply LoRA in a real server."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from core.lora.convert import convert_lora
from core.lora.file import LoraFile
from core.lora.modules import LoraModule
from core.storage.safetensors_file import save_safetensors

from .graphs import BASE, drawing, node, training

STRENGTHS = {"strength_model": 1.0, "strength_clip": 1.0}
ROUNDING = 2
"""Grey levels by which a picture may differ where 16-bit weights were summed in another order."""


@pytest.fixture(scope="module")
def lora(server) -> str:
    """The name of a LoRA that was trained here, of denoiser and text encoder."""
    server.result(training(name="apply", settings="text_encoder_lr = 0.01"))
    return "apply.safetensors"


def picture(server, *applied: dict) -> Image.Image:
    """The picture with these nodes in a row, none: the base's own."""
    graph, model, clip = dict(BASE), ["base", 0], ["base", 1]
    for index, one in enumerate(applied):
        one["inputs"] |= {"model": model, "clip": clip}
        graph[f"lora {index}"] = one
        model, clip = [f"lora {index}", 0], [f"lora {index}", 1]
    result = server.result(graph | drawing(model, clip, ["base", 2]))
    assert "not loaded" not in result.log.lower()
    return server.drawn(result)


def apply(lora: str, **changes) -> dict:
    return node("FaceLoRAApply", lora_name=lora, **(STRENGTHS | changes))


def difference(a: Image.Image, b: Image.Image) -> int:
    """The largest, in grey levels."""
    return int(np.asarray(ImageChops.difference(a, b)).max())


@pytest.fixture(scope="module")
def plain(server, lora) -> Image.Image:
    return picture(server)


@pytest.fixture(scope="module")
def whole(server, lora) -> Image.Image:
    return picture(server, apply(lora))


def test_the_node_shows_what_the_lora_is(server, lora):
    graph = BASE | {"apply": apply(lora, model=["base", 0]), "show": node("PreviewAny", source=["apply", 3])}
    graph["label"] = node("PreviewAny", source=["apply", 4])
    result = server.run(graph)
    (text,) = result.outputs["apply"]["text"]
    for words in (lora, "sd15", "rank 4", "base model: sd15.safetensors", "trigger phrase: sks person"):
        assert words in text
    assert result.outputs["show"]["text"] == ["a photo of sks person"]
    assert result.outputs["label"]["text"] == ["apply at 1"]


def test_off_passes_the_model_through_and_still_outputs_the_trigger(server, lora, plain, whole):
    assert difference(plain, whole) > 3 * ROUNDING
    assert difference(picture(server, apply(lora, mode="off")), plain) == 0


def test_beside_the_weights_it_draws_the_same_picture(server, lora, plain, whole):
    beside = picture(server, apply(lora, mode="bypass"))
    assert difference(beside, whole) <= ROUNDING < difference(beside, plain)


def test_two_halves_of_the_steps_are_the_whole_and_each_is_something_else(server, lora, plain):
    strong = {"strength_model": 8.0, "strength_clip": 0.0}
    # Of two steps in the scheduler 'simple' the second begins half-way.
    first = {"start_percent": 0.0, "end_percent": 0.4, **strong}
    second = {"start_percent": 0.4, "end_percent": 1.0, **strong}
    whole = picture(server, apply(lora, **strong))
    halves = [picture(server, apply(lora, **half)) for half in (first, second)]
    both = picture(server, apply(lora, **first), apply(lora, **second))
    assert difference(both, whole) <= ROUNDING
    assert [difference(half, other) > ROUNDING for half in halves for other in (whole, plain)] == [True] * 4
    assert difference(picture(server), plain) == 0, "nothing of it stays on the model"


def test_blocks_at_zero_are_left_out(server, lora, plain, whole):
    nothing = "text_encoder=0, down_blocks=0, mid_block=0, up_blocks=0"
    assert difference(picture(server, apply(lora, block_weights=nothing)), plain) == 0
    some = picture(server, apply(lora, block_weights="up_blocks=0"))
    assert difference(some, plain) > 0 < difference(some, whole)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_weights": "up=1"}, ["has no block 'up'", "up_blocks"]),
        ({"start_percent": 0.6, "end_percent": 0.4}, ["start_percent = 0.6 must be less than end_percent = 0.4"]),
    ],
)
def test_wrong_settings_are_an_error_in_the_node(server, lora, changes, words):
    error = server.error(BASE | {"apply": apply(lora, model=["base", 0], **changes)} | shown("apply"))
    assert all(word in error for word in words), error


def shown(name: str) -> dict:
    """An output node that has a node of that name run."""
    return {"shown": node("PreviewAny", source=[name, 2])}


def test_a_missing_file_is_refused_before_anything_runs(server):
    answer = server.refusal(BASE | {"apply": apply("nowhere.safetensors", model=["base", 0])} | shown("apply"))
    assert "nowhere.safetensors" in answer


def test_a_lora_that_would_draw_black_is_an_error_in_the_node(server, lora):
    folder = server.folder / "models" / "loras"
    file = LoraFile.read(folder / lora)
    name = next(entry.name for entry in file.entries if entry.part == "denoiser")
    up = f"{name}.lora_up.weight"
    for value, words in ((float("nan"), "NaN or infinity"), (6e4, "too large for a weight")):
        tensors = {**file.tensors, up: torch.full_like(file.tensors[up], value)}
        save_safetensors(folder / "black.safetensors", tensors, file.metadata)
        graph = {"apply": apply("black.safetensors", model=["base", 0], strength_model=10.0)}
        error = server.error(BASE | graph | shown("apply"))
        assert f"black.safetensors: {name}: its change contains" in error and words in error


def test_dora_cannot_be_limited_to_some_steps_and_says_so(server, lora):
    folder = server.folder / "models" / "loras"
    file = LoraFile.read(folder / lora)
    name = next(entry.name for entry in file.entries if entry.part == "denoiser")
    out = file.tensors[f"{name}.lora_up.weight"].shape[0]
    tensors = {**file.tensors, f"{name}.dora_scale": torch.ones(out, 1)}
    LoraFile.from_tensors(tensors, file.metadata).save(folder / "one-dora.safetensors")
    error = server.error(
        BASE | {"apply": apply("one-dora.safetensors", model=["base", 0], end_percent=0.5)} | shown("apply")
    )
    assert "1 module of one-dora.safetensors, e.g. " in error and "can only be added to the weights" in error


def test_training_on_a_lora_in_bypass_mode_is_refused(server, lora):
    error = server.error(
        training(name="beside", model=["apply", 0]) | {"apply": apply(lora, model=["base", 0], mode="bypass")}
    )
    assert "training needs LoRAs in the weights" in error


def test_a_lora_of_another_family_is_an_error_in_the_node(server, lora):
    path = "mid_block.attentions.0.transformer_blocks.9.attn2.to_k"
    modules = {("denoiser", path): LoraModule(torch.randn(4, 2048), torch.randn(1280, 4), 4.0)}
    LoraFile.from_modules("sdxl", modules, {}).save(server.folder / "models" / "loras" / "xl.safetensors")
    error = server.error(BASE | {"apply": apply("xl.safetensors", model=["base", 0])} | shown("apply"))
    assert (
        "LoraMisfit: xl.safetensors: does not fit the base model: it is for sdxl, but the base model is sd15" in error
    )


def test_an_error_names_a_file_from_its_folder_on_and_not_where_that_is_on_the_server(server):
    (server.folder / "models" / "loras" / "page.safetensors").write_text("<!DOCTYPE html><html></html>")
    result = server.run(BASE | {"apply": apply("page.safetensors", model=["base", 0])} | shown("apply"))
    (server.folder / "models" / "loras" / "page.safetensors").unlink()
    assert result.error.startswith(
        "FaceLoRA.BadFile: loras/page.safetensors: this is a web page, not a safetensors file"
    )
    assert str(server.folder) not in result.error


def test_a_lora_with_names_that_comfyui_skips_is_loaded(server, lora, whole):
    folder = server.folder / "models" / "loras"
    convert_lora(LoraFile.read(folder / lora), "diffusers")[0].save(folder / "peft.safetensors")
    skipped = server.run(
        BASE
        | {"loader": node("LoraLoader", model=["base", 0], clip=["base", 1], lora_name="peft.safetensors", **STRENGTHS)}
        | drawing(["loader", 0], ["loader", 1], ["base", 2])
    )
    assert "lora key not loaded" in skipped.log
    assert difference(picture(server, apply("peft.safetensors")), whole) <= ROUNDING  # alpha / rank is multiplied in
