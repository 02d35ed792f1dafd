"""A ComfyUI server whose SD1.5 draws faces, with photos, and a browser, for the whole session.

With FACELORA_SCREENSHOTS=1 the tests also take the pictures of `docs/images/` and the previews in `workflows/`. The photos
are then generated ones, since no photo of a person may be seen in them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.comfyui.conftest import COMFY_SDXL
from tests.comfyui.demo_checkpoint import write_demo_checkpoint
from tests.comfyui.graphs import node, training
from tests.comfyui.server import PACK, ComfyServer, running_server
from tests.tooling import write_checkpoint, write_photos

from .page import ComfyPage, prepare, running_browser
from .workflows import LORA, SD15, SDXL

SCREENSHOTS = os.environ.get("FACELORA_SCREENSHOTS") == "1"
IMAGES = PACK / "docs" / "images"


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[ComfyServer]:
    folder = tmp_path_factory.mktemp("browser")
    checkpoints = folder / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (folder / "models" / "loras").mkdir()
    write_demo_checkpoint(checkpoints / SD15["name"])
    with running_server(folder) as server:
        for name, person in (("my-photos", 35), ("class-photos", 36)):
            if SCREENSHOTS:
                write_generated_photos(server, folder / "input" / name, seed=person)
            else:
                write_photos(folder / "input" / name, count=3, scale=2, person=person)
        prepare(server)
        yield server


@pytest.fixture(scope="session")
def lora(server) -> str:
    """The name of a trained LoRA in the server's folder."""
    graph = training(SD15["name"], "my-photos", name=LORA.removesuffix(".safetensors"), training_seed=2)
    result = server.run(graph)
    assert result.status == "success", result.error
    return LORA


@pytest.fixture(scope="session")
def sdxl(server) -> str:
    write_checkpoint(server.folder / "models" / "checkpoints" / SDXL["name"], COMFY_SDXL)
    return SDXL["name"]


@pytest.fixture(scope="session")
def browser():
    with running_browser() as browser:
        yield browser


@pytest.fixture
def page(browser, server) -> Iterator[ComfyPage]:
    page = ComfyPage(browser, server)
    page.clear()
    yield page
    page.close()


def write_generated_photos(server: ComfyServer, folder: Path, seed: int, count: int = 6) -> None:
    """Faces that the demo's base model draws, alike since each begins from the same picture."""
    sampling = {
        "positive": ["positive", 0], "negative": ["negative", 0], "model": ["base", 0], "cfg": 2.5,
        "sampler_name": "dpmpp_2m", "scheduler": "karras", "steps": 25,
    }  # fmt: skip
    graph = {
        "base": node("CheckpointLoaderSimple", ckpt_name=SD15["name"]),
        "positive": node("CLIPTextEncode", clip=["base", 1], text="a photo of person"),
        "negative": node("CLIPTextEncode", clip=["base", 1], text=""),
        "empty": node("EmptyLatentImage", width=128, height=160, batch_size=1),
        "first": node("KSampler", latent_image=["empty", 0], seed=seed, denoise=1.0, **sampling),
        "repeated": node("RepeatLatentBatch", samples=["first", 0], amount=count),
        "varied": node("KSampler", latent_image=["repeated", 0], seed=seed + 1, denoise=0.5, **sampling),
        "decoded": node("VAEDecode", samples=["varied", 0], vae=["base", 2]),
        "picture": node("PreviewImage", images=["decoded", 0]),
    }
    result = server.run(graph)
    assert result.status == "success", result.error
    folder.mkdir(parents=True)
    for number, entry in enumerate(result.outputs["picture"]["images"]):
        picture = server.picture(entry)
        size = (4 * picture.width, 4 * picture.height)
        picture.resize(size, Image.Resampling.LANCZOS).save(folder / f"{number}.png")
