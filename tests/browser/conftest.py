"""A ComfyUI server whose SD1.5 draws faces, with photos, and a browser, for the whole session.

With FACELORA_SCREENSHOTS=1 the tests also take the pictures of `docs/images/` and the previews in `workflows/`. The photos
are then generated ones, since no photo of a person may be seen in them.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageEnhance, ImageOps

from core.base import load_base
from core.demo import BASE_FILE, GUIDANCE
from core.generate import GenerateConfig, Job, generate
from tests.comfyui.conftest import COMFY_SDXL, TEST_PACK
from tests.comfyui.demo_checkpoint import PICTURE_SIZE, write_demo_checkpoint
from tests.comfyui.flow_files import write_denoisers, write_text_encoders, write_vae
from tests.comfyui.graphs import training
from tests.comfyui.server import PACK, ComfyServer, running_server
from tests.tooling import write_checkpoint, write_photos

from .page import ComfyPage, prepare, running_browser
from .workflows import FLOWS, LORA, SD15, SDXL

SCREENSHOTS = os.environ.get("FACELORA_SCREENSHOTS") == "1"
IMAGES = PACK / "docs" / "images"


@pytest.fixture(scope="package")
def server(tmp_path_factory) -> Iterator[ComfyServer]:
    folder = tmp_path_factory.mktemp("browser")
    checkpoints = folder / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (folder / "models" / "loras").mkdir()
    write_demo_checkpoint(checkpoints / SD15["name"])
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / TEST_PACK.name).symlink_to(TEST_PACK)
    IMAGES.mkdir(exist_ok=True)
    with running_server(folder) as server:
        for name, person in (("my-photos", 35), ("class-photos", 36)):
            if SCREENSHOTS:
                write_generated_photos(folder / "input" / name, seed=person)
            else:
                write_photos(folder / "input" / name, count=3, scale=2, person=person)
        prepare(server)
        yield server


@pytest.fixture(scope="package")
def lora(server) -> str:
    """The name of a trained LoRA in the server's folder."""
    graph = training(SD15["name"], "my-photos", name=LORA.removesuffix(".safetensors"), training_seed=2)
    result = server.run(graph)
    assert result.status == "success", result.error
    return LORA


@pytest.fixture(scope="package")
def sdxl(server) -> str:
    write_checkpoint(server.folder / "models" / "checkpoints" / SDXL["name"], COMFY_SDXL)
    return SDXL["name"]


@pytest.fixture(scope="package")
def flows(server) -> None:
    """The files of the diffusion transformers that the workflows name, small and random."""
    models = server.folder / "models"
    for family, base in FLOWS.items():
        for file in (file for node in base.nodes for file in node.models):
            folder = models / file["directory"]
            if file["directory"] == "diffusion_models":
                write_denoisers(folder, {family: file["name"]})
            elif file["directory"] == "vae":
                write_vae(folder / file["name"])
            else:
                write_text_encoders(folder, [file["name"]])


@pytest.fixture(scope="package")
def browser():
    with running_browser() as browser:
        yield browser


@pytest.fixture
def page(browser, server) -> Iterator[ComfyPage]:
    page = ComfyPage(browser, server)
    page.clear()
    yield page
    page.close()


@pytest.fixture(params=["classic", "nodes-2"])
def either_page(request, browser, server) -> Iterator[ComfyPage]:
    """A page that draws its nodes on the canvas, and one that makes elements of them (the setting "Nodes 2.0")."""
    server.post("/settings/Comfy.VueNodes.Enabled", request.param == "nodes-2")
    page = ComfyPage(browser, server)
    page.clear()
    yield page
    page.close()
    server.post("/settings/Comfy.VueNodes.Enabled", False)


@pytest.fixture
def nodes_2(page, server) -> Iterator[Callable[[], None]]:
    """Lets the open page have its nodes drawn as elements (the setting "Nodes 2.0"), until the test is over."""

    def change() -> None:
        server.post("/settings/Comfy.VueNodes.Enabled", True)
        page.reload()

    yield change
    server.post("/settings/Comfy.VueNodes.Enabled", False)


def write_generated_photos(folder: Path, seed: int) -> None:
    """A face that the demo's base model draws, and views of it."""
    job = Job("a photo of person", seed, size=PICTURE_SIZE, guidance=GUIDANCE)
    (drawn,) = generate(load_base(BASE_FILE), [], [job], GenerateConfig())
    width, height = PICTURE_SIZE
    face = drawn.image.resize((4 * width, 4 * height), Image.Resampling.LANCZOS)
    views = [
        face,
        ImageOps.mirror(face.rotate(3, Image.Resampling.BICUBIC)),
        ImageEnhance.Brightness(ImageOps.crop(face, 12)).enhance(0.8),
        ImageEnhance.Contrast(face.rotate(-4, Image.Resampling.BICUBIC)).enhance(1.2),
    ]
    folder.mkdir(parents=True)
    for number, view in enumerate(views):
        ImageOps.crop(view, 8).save(folder / f"{number}.png")
