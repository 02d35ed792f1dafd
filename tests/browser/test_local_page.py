"""The local page in a browser, with its real commands: from nothing to headshots on the demo's base model."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Page, expect

from tests.tooling import write_photos

from .page import drop_files

ROOT = Path(__file__).parents[2]
SERVE = (
    "import sys; from pathlib import Path; from facelora.nodes.page.server import serve; "
    "serve(Path(sys.argv[1]), int(sys.argv[2]), shows=False)"
)
SLOW = 300_000
"""Milliseconds that a training run may take on a busy machine."""


class LocalPage:
    """A process with the page, which can be killed and started again under the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.address = folder, 0, ""
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(self.folder), str(self.port)], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT,
        )  # fmt: skip
        assert self.process.stdout
        self.address = self.process.stdout.readline().split()[-1]
        self.port = int(re.findall(r":(\d+)/", self.address)[0])

    def kill_job(self, name: str) -> None:
        psutil.Process(json.loads((self.folder / ".page" / name / "train.json").read_text())["pid"]).kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def local(tmp_path) -> Iterator[LocalPage]:
    local = LocalPage(tmp_path / "home")
    yield local
    local.kill()
    for file in (tmp_path / "home/.page").glob("*/train.json"):
        pid = json.loads(file.read_text()).get("pid")
        if pid and psutil.pid_exists(pid) and "-m core" in " ".join(psutil.Process(pid).cmdline()):
            psutil.Process(pid).kill()


def open_page(browser, address: str, width: int, problems: list[str]) -> Page:
    page = browser.new_context(viewport={"width": width, "height": 1000}).new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    expect(page.get_by_role("button", name="Add photos")).to_be_visible(timeout=60_000)
    return page


def focus(page: Page, name: str) -> None:
    """Goes on with the Tab key until an element with this label has the focus."""
    for _ in range(60):
        page.keyboard.press("Tab")
        label = "(e) => e === document.body ? '' : e.ariaLabel ?? e.labels?.[0]?.innerText ?? e.innerText"
        if name in (page.evaluate(f"({label})(document.activeElement)") or ""):
            return
    raise AssertionError(f"the Tab key doesn't reach {name}")


def test_four_actions_lead_from_nothing_to_headshots_through_a_kill_of_everything(browser, local, tmp_path):
    photos, problems = write_photos(tmp_path / "photos", count=8, scale=2), list[str]()
    page = open_page(browser, local.address, 1600, problems)
    page.get_by_text("More", exact=True).click()  # A short run: not among the actions.
    page.get_by_label("Steps").fill("20")
    page.get_by_label("How many headshots").fill("2")

    def middle() -> tuple[float, float]:
        box = page.locator(".drop").bounding_box()
        assert box
        return box["x"] + box["width"] / 2, box["y"] + 20

    begun = time.monotonic()
    drop_files(page, middle, sorted(photos.glob("*.png")))  # 1
    expect(page.locator(".facelora-tile.facelora-good")).not_to_have_count(0, timeout=60_000)
    expect(page.locator(".facelora-headline")).to_contain_text("8 of 8 usable")
    page.get_by_label("Name").fill("Anna")  # 2
    page.get_by_label("This person has agreed to it").check()  # 3
    page.get_by_role("button", name="Start").click()  # 4
    expect(page.locator(".facelora-status")).to_contain_text(re.compile(r"step \d+ of 20"), timeout=SLOW)
    local.kill()
    local.kill_job("Anna")
    expect(page.get_by_role("alert")).to_contain_text("has ended")
    local.start()
    page.reload()
    expect(page.locator(".facelora-status")).to_contain_text("Stopped", timeout=60_000)
    page.get_by_role("button", name="Continue").click()
    second = browser.new_context(viewport={"width": 420, "height": 900}).new_page()
    second.goto(local.address)
    expect(second.locator("h2")).to_have_text("Anna", timeout=60_000)
    for one in (page, second):
        expect(one.locator(".facelora-headshot")).to_have_count(2, timeout=SLOW)
        assert one.evaluate("document.documentElement.scrollWidth <= innerWidth")
    print(f"headshots after {time.monotonic() - begun:.0f} s, killed once")
    page.locator(".facelora-headshot").first.get_by_label("Favourite").click()
    expect(second.locator("[aria-pressed=true]")).to_have_count(1)
    page.get_by_role("button", name="Delete").click()
    page.locator("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("button", name="Start")).to_be_visible()
    assert not (local.folder / "Anna").exists() and problems == []


def test_the_keyboard_alone_starts_and_cancels_on_a_narrow_page_in_chinese(browser, local, tmp_path):
    photos, problems = write_photos(tmp_path / "photos", count=3, scale=2), list[str]()
    page = open_page(browser, local.address, 420, problems)
    page.on("filechooser", lambda _: None)  # The browser is told in time to hand it over.
    focus(page, "Add photos")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(sorted(photos.glob("*.png")))
    expect(page.locator(".facelora-tile")).to_have_count(3, timeout=60_000)
    expect(page.locator(".facelora-headline")).to_contain_text("usable", timeout=60_000)
    focus(page, "Name")
    page.keyboard.type("Berta")
    focus(page, "agreed")
    page.keyboard.press("Space")
    focus(page, "Start")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Cancel")).to_be_visible(timeout=60_000)
    focus(page, "Cancel")
    page.keyboard.press("Enter")
    expect(page.locator(".facelora-status")).to_contain_text("Stopped", timeout=60_000)
    page.get_by_label("Language").select_option("zh")
    expect(page.get_by_role("button", name="新的人物")).to_be_visible(timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and problems == []
