"""The same on SDXL, in a base model that already has a LoRA on it."""

import pytest

from core.lora_file import LoraFile

from .graphs import drawing, node, training

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]


def test_sdxl_trains_and_comfyuis_own_loader_takes_every_key(server, sdxl_checkpoint):
    result = server.run(training(sdxl_checkpoint, name="xl-anna", steps=1, settings="text_encoder_lr = 0.01"), 500)
    assert result.status == "success", result.error
    lora = LoraFile.read(server.folder / "models" / "loras" / "xl-anna.safetensors")
    assert lora.family == "sdxl"
    assert {entry.part for entry in lora.entries} == {"denoiser", "text_encoder", "text_encoder_2"}
    graph = {
        "base": node("CheckpointLoaderSimple", ckpt_name=sdxl_checkpoint),
        "loader": node(
            "LoraLoader",
            model=["base", 0], clip=["base", 1], lora_name="xl-anna.safetensors", strength_model=1.0, strength_clip=1.0,
        ),
    } | drawing(["loader", 0], ["loader", 1], ["base", 2])  # fmt: skip
    drawn = server.run(graph, 500)
    assert drawn.status == "success", drawn.error
    assert "not loaded" not in drawn.log
    assert "ERROR" not in drawn.log
    assert server.drawn(drawn).size == (64, 64)


def test_an_sdxl_lora_on_sd15_and_a_foreign_text_encoder_are_refused(server, sdxl_checkpoint):
    wrong_clip = training(name="wrong", clip=["other", 1]) | {
        "other": node("CheckpointLoaderSimple", ckpt_name=sdxl_checkpoint)
    }
    result = server.run(wrong_clip, 300)
    assert result.status == "error"
    assert "CLIP does not belong to MODEL, which is SD15" in result.error
