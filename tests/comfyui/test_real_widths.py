"""Base models that ComfyUI recognises and builds by itself: a server without the narrow models of pack_for_tests.py."""

import pytest

from core.lora.file import LoraFile
from tests.tooling import write_checkpoint, write_photos

from .graphs import drawing, node, training
from .real_widths import COMFY_SD15, COMFY_SDXL
from .server import running_server

pytestmark = pytest.mark.slow

PARTS = {"sd15": {"denoiser", "text_encoder"}, "sdxl": {"denoiser", "text_encoder", "text_encoder_2"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comfyui")
    checkpoints = folder / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (folder / "models" / "loras").mkdir()
    write_checkpoint(checkpoints / "sd15.safetensors", COMFY_SD15)
    write_checkpoint(checkpoints / "sdxl.safetensors", COMFY_SDXL)
    write_photos(folder / "input" / "anna", count=3)
    with running_server(folder) as server:
        yield server


@pytest.mark.parametrize("family", PARTS)
def test_it_trains_and_comfyuis_own_loader_takes_every_key(server, family):
    checkpoint = f"{family}.safetensors"
    server.result(training(checkpoint, name=f"anna-{family}", steps=1, settings="text_encoder_lr = 0.01"))
    lora = LoraFile.read(server.folder / "models" / "loras" / f"anna-{family}.safetensors")
    assert lora.family == family
    assert {entry.part for entry in lora.entries} == PARTS[family]
    graph = {
        "base": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "loader": node(
            "LoraLoader",
            model=["base", 0], clip=["base", 1], lora_name=f"anna-{family}.safetensors", strength_model=1.0, strength_clip=1.0,
        ),
    } | drawing(["loader", 0], ["loader", 1], ["base", 2])  # fmt: skip
    drawn = server.result(graph)
    assert "not loaded" not in drawn.log
    assert "ERROR" not in drawn.log
    assert server.drawn(drawn).size == (128, 128)


def test_a_foreign_text_encoder_is_refused(server):
    wrong_clip = training(name="wrong", clip=["other", 1]) | {
        "other": node("CheckpointLoaderSimple", ckpt_name="sdxl.safetensors")
    }
    error = server.error(wrong_clip)
    assert "CLIP does not belong to MODEL, which is SD15" in error
