"""InvokeAI's page in headless chromium: the form of the workflow Photos to headshots, filled in as a user does it."""

from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect

from .server import PATIENCE, InvokeServer

SIZE: Any = {"width": 1360, "height": 800}
TITLE = "Photos to headshots"


class Form:
    """One open page with the form. `problems` are errors that the page's console has told."""

    def __init__(self, browser: Browser, server: InvokeServer):
        self.page: Page = browser.new_page(viewport=SIZE)
        self.page.set_default_timeout(PATIENCE * 1000)
        self.page.goto(server.url)
        self.page.get_by_label("Workflows").first.click()
        self.page.get_by_text("Browse and load existing workflows").click()
        self.page.get_by_text("Your Workflows").click()
        self.page.get_by_text(TITLE).first.click()
        load = self.page.get_by_role("button", name="Load", exact=True)
        expect(load.or_(self.page.get_by_text("Workflow Loaded")).first).to_be_visible()
        if load.is_visible():  # the page asks where an empty workflow counts as unsaved
            load.click()
        expect(self.page.get_by_role("heading", name=TITLE)).to_be_visible()

    def add_photos(self, photos: list[Path]) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.get_by_label("Upload").first.click()
        chooser.value.set_files(photos)

    def choose(self, label: str, choice: str) -> None:
        """Chooses from the list of a field."""
        self.page.get_by_text(label, exact=True).locator(
            "xpath=following::*[@role='combobox' or self::select][1]"
        ).click()
        self.page.get_by_text(choice, exact=True).last.click()

    def invoke(self) -> None:
        self.page.get_by_role("button", name="Invoke", exact=True).click()
