"""Every shipped workflow, opened from its file by ComfyUI's own frontend, and run."""

import json
from typing import Any

import pytest
from PIL import Image

from .conftest import IMAGES, SCREENSHOTS
from .workflows import FOLDER, SDXL, WORKFLOWS

pytestmark = pytest.mark.browser

# What a CPU can do in a minute.
QUICK: dict[str, dict[str, Any]] = {
    "FaceLoRATrain": {"resolution": 64, "steps": 2, "samples": 1},
    "FaceLoRAStylePack": {"count": 2, "resolution": 64},
    "EmptyLatentImage": {"width": 128, "height": 160},
    "FaceLoRALoadPhotos": {"check": False},
    "KSampler": {"steps": 2},
}
SHOWN = QUICK | {
    "FaceLoRATrain": {"resolution": 64, "steps": 8, "samples": 1},
    "FaceLoRAStylePack": {"count": 3, "resolution": 144},
    "KSampler": {"steps": 12, "cfg": 2.5},
}
"""For the pictures, where there is something to see: not of the models whose weights are random."""
NAMES = [workflow.name for workflow in WORKFLOWS]


def types(graph: dict[str, Any]) -> list[str]:
    return [node["type"] for node in graph["nodes"]]


def test_every_workflow_opens_without_a_warning(page, server, lora, flows):
    page.reload()  # so that the loaders' lists have all files
    for name in NAMES:
        page.open(workflow_file(name), name)
        assert page.complaints() == [], name


def workflow_file(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.startswith(("1-", "8-")) else pytest.mark.slow) for name in NAMES]
)
def test_a_workflow_runs(name, page, server, lora, request):
    workflow = workflow_file(name)
    is_flow = "UNETLoader" in types(workflow)
    if is_flow:
        request.getfixturevalue("flows")
        page.reload()
        page.clear()
    page.open(workflow, name)
    assert page.complaints() == []
    is_random = is_flow or SDXL["name"] in json.dumps(workflow)  # what these draw
    page.set_widgets(SHOWN if SCREENSHOTS and not is_random else QUICK)
    result = server.wait(page.queue(), 900)
    assert result.status == "success", result.error + result.log
    assert "not loaded" not in result.log
    assert page.complaints() == []
    shown = [image for output in result.outputs.values() for image in output.get("images", ())]
    assert shown or name == "6-inspect-and-convert-lora"
    if SCREENSHOTS:
        page.page.set_viewport_size({"width": 1920, "height": 1200})
        page.fit()
        picture = page.screenshot()
        picture.save(IMAGES / f"workflow-{name[0]}.jpg", quality=70)
        picture.resize((800, picture.height * 800 // picture.width), Image.Resampling.LANCZOS).save(
            FOLDER / f"{name}.jpg", quality=85
        )


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=NAMES)
def test_a_file_says_what_its_plan_says(workflow):
    graph = workflow_file(workflow.name)
    planned = [node for step in workflow.steps for node in step.nodes]
    assert sorted(types(graph)) == sorted([node.type for node in planned] + ["MarkdownNote"] * len(workflow.steps))
    assert len(graph["links"]) == sum(len(node.links) for node in planned)
    assert (FOLDER / f"{workflow.name}.jpg").exists()


def test_the_template_browser_lists_them_and_opens_one(page, server, lora):
    pack = "ComfyUI-FaceLoRA"
    assert sorted(server.get("/api/workflow_templates")[pack]) == sorted(NAMES)
    page.go(f"/?template={NAMES[2]}&source={pack}")
    page.wait_for("() => window.app.graph.nodes.some((node) => node.type === 'FaceLoRAApply')")
    preview = server.read(f"/api/workflow_templates/{pack}/{NAMES[2]}.jpg")
    assert preview[:2] == b"\xff\xd8"
