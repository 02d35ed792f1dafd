"""Every shipped workflow, opened from its file by ComfyUI's own frontend, and run; the first as a user's hands do it."""

import io
import json
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image
from playwright.sync_api import Locator

from core.pictures.style_pack import find_style_packs
from tests.comfyui.server import running_server
from tests.comfyui.setup_comfyui import newest_frontend
from tests.tooling import write_photos

from .conftest import IMAGES, SCREENSHOTS, write_generated_photos
from .page import ComfyPage, drop_files, prepare
from .workflows import BLUEPRINTS, FOLDER, WORKFLOWS, subgraphs

pytestmark = pytest.mark.browser

# What a CPU can do in a minute.
QUICK: dict[str, dict[str, Any]] = {
    "FaceLoRATrain": {"resolution": 64, "steps": 2, "samples": 1},
    "FaceLoRAStylePack": {"count": 2, "resolution": 64},
    "EmptyLatentImage": {"width": 128, "height": 160},
    "FaceLoRALoadPhotos": {"folder": "my-photos", "check": False},
    "KSampler": {"steps": 2},
}
SHOWN = QUICK | {
    "FaceLoRATrain": {
        "resolution": 64,
        "steps": 150,
        "learning_rate": 2e-3,
        "samples": 4,
        "settings": "batch_size = 1\nsample_guidance = 2.5",
    },
    "FaceLoRAStylePack": {"count": 4, "resolution": 144},
}
"""For the pictures, where there is something to see: not of the models whose weights are random."""
NAMES = [workflow.name for workflow in WORKFLOWS]
PACK_NAME = "ComfyUI-FaceLoRA"


def types(graph: dict[str, Any]) -> list[str]:
    """The types of its nodes and of those in its subgraphs."""
    inner = {part["id"]: part["nodes"] for part in subgraphs(graph)}
    flat = [one for node in graph["nodes"] for one in inner.get(node["type"], [node])]
    return [node["type"] for node in flat]


def test_every_workflow_opens_without_a_warning(page, server, lora, flows):
    page.reload()  # so that the loaders' lists have all files
    for name in NAMES:
        page.open(workflow_file(name), name)
        assert page.complaints() == [], name


@pytest.mark.slow
def test_every_workflow_opens_without_a_warning_in_the_newest_frontend(browser, site, lora, flows):
    with running_server(site.folder, "--front-end-root", str(newest_frontend())) as server:
        prepare(server)
        page = ComfyPage(browser, server)
        for name in NAMES:
            page.open(workflow_file(name), name)
            assert page.complaints() == [], name


def workflow_file(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


class Hands:
    """What a user does on a page, counted."""

    def __init__(self, page: ComfyPage):
        self.page = page.page
        self.actions = 0

    def click(self, what: Locator) -> None:
        self.actions += 1
        what.click()

    def type(self, what: Locator, text: str) -> None:
        self.actions += 1
        what.fill(text)

    def drop(self, what: Locator, files: list[Path]) -> None:
        self.actions += 1
        box = what.bounding_box()
        assert box
        drop_files(self.page, box["x"] + box["width"] + 20, box["y"] + 5, files)


def test_the_app_leads_from_photos_to_headshots_in_seven_actions_of_which_three_are_answers(page, server, tmp_path):
    hands, app = Hands(page), page.page
    hands.click(app.get_by_role("button", name="Templates").first)
    hands.click(app.get_by_text(PACK_NAME).first)
    card = app.get_by_text(NAMES[0]).first
    card.wait_for()
    page.problems.clear()  # the templates of ComfyUI itself are not there in tests
    hands.click(card)
    page.wait_for("() => document.querySelector('.facelora-add')?.checkVisibility()")
    assert page.complaints() == []

    opened = hands.actions
    write = write_generated_photos if SCREENSHOTS else partial(write_photos, count=6, scale=2)
    files = sorted(write(tmp_path / "me").glob("*.png"))
    hands.drop(app.locator(".facelora-add"), files)
    page.wait_for(f"() => document.querySelectorAll('.facelora-tile').length === {len(files)}")
    hands.type(app.get_by_role("textbox").first, "woman")
    hands.click(app.locator(".facelora-style").nth(1))
    assert hands.actions - opened <= 3, "answers"
    haste = SHOWN if SCREENSHOTS else QUICK  # no action
    page.set_widgets({name: haste[name] for name in ("FaceLoRATrain", "FaceLoRAStylePack")})
    with app.expect_response(lambda answer: answer.url.endswith("/prompt")) as queued:
        hands.click(app.get_by_role("button", name="Run").last)
    assert hands.actions <= 7

    result = server.wait(queued.value.json()["prompt_id"])
    assert result.status == "success", result.error
    page.wait_for("() => [...document.images].filter((one) => one.src.includes('my-face_0000')).length >= 2")
    assert page.complaints() == []
    first = next(iter(server.get("/history?max_items=1").values()))["prompt"][2]
    trained, styles = (next(node["inputs"] for node in first.values() if node["class_type"] == kind)
                       for kind in ("FaceLoRATrain", "FaceLoRAStylePack"))  # fmt: skip
    assert trained["class_word"] == "woman"
    assert styles["styles"] == find_style_packs().pick("corporate").names[1]
    if SCREENSHOTS:
        save_screenshot(page, "app")
    page.run("() => app.extensionManager.command.execute('Comfy.ToggleLinear')")
    app.wait_for_timeout(1000)
    if SCREENSHOTS:
        page.run("() => app.canvas.deselectAll()")
        save_screenshot(page, "graph")
    last = page.run("() => app.graph.nodes.find((node) => node.type === 'FaceLoRATrain').widgets.at(-1).name")
    assert last == "training", "nothing repeats the panel below it"


def save_screenshot(page: ComfyPage, name: str) -> None:
    page.page.wait_for_timeout(2000)
    page.screenshot().resize((1200, 750), Image.Resampling.LANCZOS).save(IMAGES / f"{name}.jpg", quality=85)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs(name, page, server, lora, request):
    workflow = workflow_file(name)
    is_flow = "UNETLoader" in types(workflow)
    if is_flow:
        request.getfixturevalue("flows")
        page.reload()
        page.clear()
    page.open(workflow, name)
    assert page.complaints() == []
    page.set_widgets(SHOWN if SCREENSHOTS and not is_flow else QUICK)  # what random weights draw is nothing to see
    result = server.wait(page.queue(), 900)
    assert result.status == "success", result.error + result.log
    assert "not loaded" not in result.log
    assert page.complaints() == []
    shown = [image for output in result.outputs.values() for image in output.get("images", ())]
    assert shown or name == NAMES[-1]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=NAMES)
def test_a_file_says_what_its_plan_says(workflow):
    graph = workflow_file(workflow.name)
    planned = [one for step in workflow.steps for node in step.nodes for one in node.flat]
    assert sorted(types(graph)) == sorted([node.type for node in planned] + ["MarkdownNote"] * len(workflow.steps))
    assert (FOLDER / f"{workflow.name}.jpg").exists()


def test_drawing_headshots_is_a_node_that_comfyui_offers(page, server):
    offered = {entry["name"]: key for key, entry in server.get("/global_subgraphs").items()
               if entry["info"]["node_pack"].endswith(PACK_NAME)}  # fmt: skip
    assert sorted(offered) == sorted(file.stem for file in BLUEPRINTS.glob("*.json"))
    page.open(json.loads(server.get(f"/global_subgraphs/{offered['Draw headshots']}")["data"]), "blueprint")
    (node,) = page.run("() => app.graph.nodes.map((node) => node.inputs.map((input) => input.label ?? input.name))")
    assert {"model", "clip", "vae", "photos", "prompts", "negatives", "seeds", "steps"} <= set(node)
    assert page.complaints() == []


def test_the_template_browser_lists_them_with_square_pictures(server):
    assert sorted(server.get("/api/workflow_templates")[PACK_NAME]) == sorted(NAMES)
    for name in NAMES:
        preview = Image.open(io.BytesIO(server.read(f"/api/workflow_templates/{PACK_NAME}/{quote(name)}.jpg")))
        assert preview.width == preview.height
