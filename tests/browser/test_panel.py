"""The live panel of Train Face LoRA, during a real training."""

import pytest

from .conftest import IMAGES, SCREENSHOTS
from .workflows import BUILD, SD15

pytestmark = [pytest.mark.browser, pytest.mark.slow]

STATUS = ".facelora-status"


def train_node(seed: int, **widgets) -> list[dict]:
    """A graph for BUILD: photos -> Train Face LoRA."""
    quick = {
        "name": f"panel-{seed}", "steps": 60 if SCREENSHOTS else 400, "resolution": 64, "samples": 100, "training_seed": seed,
        "settings": "sample_steps = 4" if not SCREENSHOTS else "sample_every = 6\nsample_steps = 12",
    } | widgets  # fmt: skip
    base = {"key": "base", "type": "CheckpointLoaderSimple", "widgets": {"ckpt_name": SD15["name"]}, "links": {}}
    photos = {
        "key": "photos", "type": "FaceLoRALoadPhotos", "widgets": {"folder": "my-photos", "check": False}, "links": {},
    }  # fmt: skip
    links = {"model": "base.MODEL", "clip": "base.CLIP", "vae": "base.VAE", "photos": "photos.photos"}
    train = {"key": "train", "type": "FaceLoRATrain", "widgets": quick, "links": links}
    nodes = [{"title": "", "height": 0, "model": None} | node for node in (base, photos, train)]
    steps = [nodes[:2], nodes[2:]]
    return [{"title": "Train", "note": "", "width": 420, "nodes": part} for part in steps]


def status(page) -> str:
    return page.page.text_content(STATUS) or ""


def wait_for_step(page, step: int, seconds: float = 300) -> None:
    page.wait_for(
        f"() => Number(/step (\\d+) of/.exec(document.querySelector('{STATUS}')?.textContent)?.[1]) >= {step}", seconds
    )


def points(page, line: str) -> int:
    """How many points of a line are drawn."""
    return len((page.page.get_attribute(f'[data-line="{line}"]', "points") or "").split())


def test_a_training_is_followed_on_two_pages_through_a_reload_and_kept(page, browser, server):
    page.run(BUILD, train_node(seed=11))
    assert "shows here" in status(page)
    prompt_id = page.queue()
    page.wait_for("() => document.querySelectorAll('.facelora-samples img').length > 0", 300)
    wait_for_step(page, 5)
    assert "left" in status(page)
    assert points(page, "loss") >= 3
    assert points(page, "learning rate") >= 3
    assert page.page.locator(".facelora-photos img").count() >= 3
    graph = page.saved()

    other = type(page)(browser, server)
    other.clear()
    other.open(graph, "other")
    other.wait_for(f"() => document.querySelector('{STATUS}').textContent.includes('step')")
    page.reload()
    wait_for_step(page, 6)
    assert points(page, "loss") >= 4, "the curve begins where the training began"
    assert page.page.locator(".facelora-photos img").count() >= 3
    if SCREENSHOTS:
        wait_for_step(page, 30, 600)
        page.fit()
        page.screenshot("FaceLoRATrain").save(IMAGES / "panel.jpg", quality=88)

    other.page.click(".facelora-keep")
    result = server.wait(prompt_id, 300)
    assert result.status == "success", result.error
    for each in (page, other):
        each.wait_for(f"() => document.querySelector('{STATUS}').textContent.startsWith('done: panel-11')")
        assert each.complaints() == []
    assert (server.folder / "models" / "loras" / "panel-11.safetensors").exists()
    other.close()


def test_the_cancel_button_ends_a_training_that_goes_on_when_queued_again(page, server):
    page.run(BUILD, train_node(seed=12, samples=0))
    prompt_id = page.queue()
    wait_for_step(page, 3)
    page.page.click(".facelora-cancel")
    assert server.wait(prompt_id, 60).status == "interrupted"
    page.wait_for(f"() => document.querySelector('{STATUS}').textContent.startsWith('cancelled')")
    prompt_id = page.queue()
    wait_for_step(page, 4)
    assert points(page, "loss") >= 3, "the curve goes on"
    page.page.click(".facelora-keep")
    assert server.wait(prompt_id, 120).status == "success"


def test_the_panel_is_no_part_of_what_is_saved_or_queued(page):
    page.run(BUILD, train_node(seed=13))
    (node,) = [node for node in page.saved()["nodes"] if node["type"] == "FaceLoRATrain"]
    widgets = page.run(
        "() => window.app.graph.nodes.find((node) => node.type === 'FaceLoRATrain').widgets.map((widget) => widget.name)"
    )
    assert widgets[-1] == "training"
    assert len(node["widgets_values"]) == len(widgets) - 1
    (queued,) = [node for node in page.prompt().values() if node["class_type"] == "FaceLoRATrain"]
    assert "training" not in queued["inputs"]


def tell(page, news: dict) -> None:
    """News of a training, as the server sends them."""
    page.run("(news) => window.comfyAPI.api.api.dispatchCustomEvent('facelora.training', news)", news)


def test_the_likeness_is_drawn_once_it_is_measured(page):
    page.run(BUILD, train_node(seed=14))
    node_id = page.run("() => String(window.app.graph.nodes.find((node) => node.type === 'FaceLoRATrain').id)")
    workflow = page.run("() => window.app.graph.id")
    tell(page, {"node": node_id, "begin": True, "workflow": workflow, "history": [], "photos": []})
    for step, likeness in ((10, 0.2), (20, None), (30, 0.5)):
        news = {"phase": "training", "step": step, "steps": 40, "loss": 0.1, "learning_rate": 1e-4, "seconds_left": 75}
        tell(page, {"node": node_id} | news | ({"likeness": likeness} if likeness else {}))
    assert points(page, "likeness") == 2
    assert status(page) == "step 30 of 40 · loss 0.1 · rate 1e-4 · likeness 0.50 · 1 min 15 s left"
    tell(page, {"node": node_id, "begin": True, "workflow": "of somebody else", "history": [], "photos": []})
    assert status(page).startswith("step 30"), "a node with the same id in another workflow"
