"""The page of a batch of headshots, opened from the folder as a user does."""

from pathlib import Path

import pytest
from PIL import Image

from core import Job
from core.pictures.gallery import gallery_page
from core.pictures.headshot import FaceOutcome, Headshot

pytestmark = pytest.mark.browser


@pytest.fixture
def gallery(browser, tmp_path: Path):
    shots = []
    for number, (style, score) in enumerate([("Office", 0.61), ("Park", 0.5), ("Office", 0.3), ("Park", None)]):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (64, 80), (40 * number, 90, 120)).save(path)
        job = Job(f"a <b>photo</b> in {style}", number, "blurry", (64, 80), style=style)
        outcome = FaceOutcome(0.25, 0.35, 0.41, 0.5) if number == 1 else None
        shots.append(Headshot(path, job, score, kept=number < 2, face_pass=outcome))
    (tmp_path / "gallery.html").write_text(gallery_page(shots, "4 pictures", compared=True), "utf-8")
    page = browser.new_page()
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((tmp_path / "gallery.html").as_uri())
    yield page
    page.close()
    assert problems == []


def test_kept_pictures_come_first_each_with_its_likeness_and_facts(gallery) -> None:
    assert gallery.locator("h2").all_inner_texts() == ["Kept 2", "The others 2"]
    assert gallery.locator("figure > b").all_inner_texts() == ["0.61", "0.50", "0.30", "no face"]
    assert gallery.locator("figure img").evaluate_all("(all) => all.every((image) => image.naturalWidth === 64)")
    gallery.locator("summary").nth(1).click()
    facts = gallery.locator("figure").nth(1).inner_text()
    assert "a <b>photo</b> in Park" in facts and "likeness 0.41 → 0.50, taken" in facts


def test_a_style_can_be_looked_at_alone(gallery) -> None:
    gallery.get_by_role("button", name="Park").click()
    assert gallery.locator("figure:visible > b").all_inner_texts() == ["0.50", "no face"]
    gallery.get_by_role("button", name="All styles").click()
    assert gallery.locator("figure:visible").count() == 4


def test_a_picture_opens_large_and_the_arrow_keys_go_on(gallery) -> None:
    gallery.locator("figure a").first.click()
    shown = gallery.locator("dialog img")
    assert shown.get_attribute("src").endswith("/0.png")
    gallery.keyboard.press("ArrowRight")
    assert shown.get_attribute("src").endswith("/1.png")
    gallery.keyboard.press("Escape")
    assert not gallery.locator("dialog").is_visible()
