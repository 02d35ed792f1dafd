"""What a page of the server needs, and a browser, for the whole session."""

import os
from collections.abc import Callable, Iterator

import pytest

from core.errors import MissingPackage
from tests.comfyui.graphs import training
from tests.comfyui.server import ComfyServer
from tests.tooling import write_photos
from tools.workflows import FLOWS, LORA, MOSS, SD15, SDXL

from .page import ComfyPage, prepare, running_browser


@pytest.fixture(scope="session")
def site(server) -> ComfyServer:
    """The server with the files that the workflows name, and a user who has seen the tour."""
    checkpoints, photos = server.folder / "models" / "checkpoints", server.folder / "input"
    (checkpoints / SD15["name"]).symlink_to(checkpoints / "sd15.safetensors")
    (checkpoints / SDXL["name"]).symlink_to(checkpoints / "sdxl.safetensors")
    for name, person in (("my-photos", 35), ("class-photos", 36)):
        write_photos(photos / name, count=6, scale=2, person=person)
    prepare(server)
    return server


@pytest.fixture(scope="session")
def lora(site) -> str:
    """The name of a trained LoRA in the server's folder."""
    graph = training(SD15["name"], "my-photos", name=LORA.removesuffix(".safetensors"), training_seed=2)
    site.result(graph)
    return LORA


@pytest.fixture(scope="session")
def flows(site, flow_models) -> None:
    """The files of the diffusion transformers that the workflows name, small and random."""
    models = site.folder / "models"
    for family, base in [*FLOWS.items(), ("flux2", MOSS)]:  # which ComfyUI 0.30 lacks
        for file in (file for node in base.nodes for file in node.models):
            if not (path := models / file["directory"] / file["name"]).exists():
                path.symlink_to(models / "diffusion_models" / f"{family}.safetensors")


@pytest.fixture(scope="session")
def browser():
    """A chromium. Where there is none the tests are reported as not run, which in continuous integration is a failure."""
    try:
        with running_browser() as browser:
            yield browser
    except MissingPackage as problem:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(problem))


@pytest.fixture
def new_page(browser, site) -> Iterator[ComfyPage]:
    page = ComfyPage(browser, site)
    page.clear()
    yield page
    page.close()


@pytest.fixture(scope="session")
def used_pages() -> list[ComfyPage]:
    """Open pages that another test can use. To load a new one takes 3 seconds of both processors."""
    return []


@pytest.fixture
def page(request, browser, site, used_pages) -> Iterator[ComfyPage]:
    page, failed = used_pages.pop() if used_pages else ComfyPage(browser, site), request.session.testsfailed
    page.start_over()
    yield page
    if page.is_as_opened() and request.session.testsfailed == failed:
        used_pages.append(page)
    else:
        page.close()


@pytest.fixture(params=["classic", "nodes-2"])
def either_page(request, browser, site) -> Iterator[ComfyPage]:
    """A page that draws its nodes on the canvas, and one that makes elements of them (the setting "Nodes 2.0")."""
    site.post("/settings/Comfy.VueNodes.Enabled", request.param == "nodes-2")
    page = ComfyPage(browser, site)
    page.clear()
    yield page
    page.close()
    site.post("/settings/Comfy.VueNodes.Enabled", False)


@pytest.fixture
def nodes_2(page, site) -> Iterator[Callable[[], None]]:
    """Lets the open page have its nodes drawn as elements (the setting "Nodes 2.0"), until the test is over."""

    def change() -> None:
        site.post("/settings/Comfy.VueNodes.Enabled", True)
        page.reload()

    yield change
    site.post("/settings/Comfy.VueNodes.Enabled", False)
