"""Workflows that version 0.1.0 saved, opened by today's pack."""

import json
from pathlib import Path

import pytest

from core.storage.drawn import DRAWN, read_mark

from .page import ComfyPage
from .test_workflows import QUICK, types

OLD_APP = Path(__file__).with_name("saved_by_0.1.0") / "1 Photos to headshots.app.json"


@pytest.fixture
def page(new_page) -> ComfyPage:
    """A new page with the app of 0.1.0."""
    new_page.open(json.loads(OLD_APP.read_text(encoding="utf-8")), "old")
    return new_page


def test_headshots_of_an_old_workflow_are_marked_and_saved_once_and_shown_in_todays_app(page, server):
    page.page.get_by_text("It replaces Save Image").wait_for()
    page.set_widgets(QUICK | {"FaceLoRATrain": QUICK["FaceLoRATrain"] | {"name": "old", "training_seed": 81}})
    folder = server.folder / "output" / "headshots"
    for count in (2, 3):
        page.set_widgets({"FaceLoRAStylePack": {"count": count}})
        before = {*folder.glob("*.png")}
        result = server.wait(page.queue())
        assert result.status == "success", result.error
        (shown,) = (output["images"] for output in result.outputs.values() if "images" in output
                    and output["images"][0]["type"] == "output")  # fmt: skip
        assert len(shown) == count
        new = {*folder.glob("*.png")} - before
        assert len(new) == (2 if count == 2 else 1), "those of the first run are not saved again"
        assert all(file.name.startswith("old_") for file in new), "named after the LoRA"
        assert {read_mark(file) for file in new} == {DRAWN}
    page.page.get_by_role("button", name="Open today's app with these values").click()
    page.page.locator(".facelora-more").wait_for()
    page.page.locator(".facelora-status", has_text="done: old").wait_for()
    assert page.problems == []


def test_an_old_app_is_opened_as_that_of_today_with_its_values(page, server):
    page.set_widgets({"FaceLoRATrain": {"name": "maria", "class_word": "woman", "recipe": "best"},
                      "FaceLoRAStylePack": {"pack": "outdoor", "count": 5},
                      "FaceLoRALoadPhotos": {"folder": "my-photos"}})  # fmt: skip
    kept = [
        page.widgets(name) for name in ("FaceLoRATrain", "FaceLoRAStylePack", "FaceLoRALoadPhotos", "FaceLoRAApply")
    ]
    assert not page.page.locator(".facelora-more").is_visible()
    page.page.get_by_role("button", name="Open today's app with these values").click()
    page.page.locator(".facelora-more").wait_for()
    page.page.get_by_text("This app is from an older version").wait_for(state="hidden")
    assert "FaceLoRASampler" in types(page.saved()) and "SaveImage" not in types(page.saved())
    assert page.widgets("FaceLoRASaveHeadshots")["filename_prefix"] == "headshots/%lora_name%"
    now = [page.widgets(name) for name in ("FaceLoRATrain", "FaceLoRAStylePack", "FaceLoRALoadPhotos", "FaceLoRAApply")]
    assert now == kept
    assert page.problems == []
