"""InvokeAI's page in headless chromium: the form of the workflow Photos to headshots, filled in as a user does it."""

from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect

from .server import InvokeServer

SIZE: Any = {"width": 1360, "height": 800}
TITLE = "Photos to headshots"
PAGE_PATIENCE = 120_000
"""Milliseconds for whatever the page does without a training run."""


def change_workflow(server: InvokeServer, values: dict[str, dict[str, Any]]) -> None:
    """Gives fields of the imported workflow, by node, other values than it comes with."""
    (found,) = server.call("GET", "/api/v1/workflows/?categories=user")["items"]
    workflow = server.call("GET", f"/api/v1/workflows/i/{found['workflow_id']}")["workflow"]
    for node in workflow["nodes"]:
        for name, value in values.get(node["id"], {}).items():
            node["data"]["inputs"][name]["value"] = value
    server.call("PATCH", f"/api/v1/workflows/i/{found['workflow_id']}", {"workflow": workflow})


class Form:
    """A page on which the form was opened from the library for the first time."""

    def __init__(self, browser: Browser, server: InvokeServer):
        self.page: Page = browser.new_page(viewport=SIZE)
        self.page.set_default_timeout(PAGE_PATIENCE)
        self.page.goto(server.url)
        self.page.get_by_label("Workflows").first.click()
        self.page.get_by_text("Browse and load existing workflows").click()
        self.page.get_by_text("Your Workflows").click()
        self.page.get_by_text(TITLE).first.click()
        load = self.page.get_by_role("button", name="Load", exact=True)
        load.or_(self.page.get_by_text("Workflow Loaded")).first.wait_for()
        if load.is_visible():  # the page asks where an empty workflow counts as unsaved
            load.click()
        self.page.get_by_text("Workflow Loaded").wait_for()

    def add_photos(self, photos: list[Path]) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.locator("button[aria-label*=pload]").first.click()
        chooser.value.set_files(photos)
        expect(self.page.get_by_label("Remove Image from Collection")).to_have_count(len(photos), timeout=PAGE_PATIENCE)

    def choose_model(self, name: str) -> None:
        option = self.page.get_by_role("option", name=name)
        for _ in range(60):  # a form that is still loading drops the list that it has just opened
            self.page.get_by_role("combobox").first.press("ArrowDown")
            self.page.wait_for_timeout(500)
            if option.is_visible():
                break
        option.click()

    def choose_styles(self, title: str) -> None:
        self.page.get_by_role("combobox").nth(1).select_option(label=title)

    def invoke(self) -> None:
        self.page.get_by_role("button", name="Invoke", exact=True).click()
