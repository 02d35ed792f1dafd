"""The page of a batch of headshots, opened from the folder as a user does."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from core import PictureJob
from core.pictures.gallery import gallery_page
from core.pictures.headshot import FaceOutcome, Headshot
from core.studio import Result
from core.studio.report import write_report
from tests.tooling import command_options


def models(job: PictureJob) -> list[str]:
    return ["--base=../it's a base.safetensors", f"--lora=anna.safetensors:{job.strength:g}"]


@pytest.fixture
def gallery(browser, tmp_path: Path):
    shots = []
    for number, (style, score) in enumerate([("Office", 0.61), ("Park", 0.5), ("Office", 0.3), ("Park", None)]):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (64, 80), (40 * number, 90, 120)).save(path)
        job = PictureJob(f"a <b>photo</b> in {style}", number, "blurry", (64, 80), style=style)
        outcome = FaceOutcome(0.25, 0.35, 0.41, 0.5) if number == 1 else None
        shots.append(Headshot(path, job, score, kept=number < 2, face_pass=outcome))
    (tmp_path / "gallery.html").write_text(gallery_page(shots, "4 pictures", compared=True, models=models), "utf-8")
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
    assert "a <b>photo</b> in Park" in facts and "likeness 0.41 → 0.50, used" in facts


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


def stars(gallery) -> list[str]:
    return gallery.locator(".star").evaluate_all("(all) => all.map((star) => star.getAttribute('aria-pressed'))")


def test_favourites_are_kept_over_a_reload_and_looked_at_alone(gallery) -> None:
    gallery.locator(".star").nth(1).click()
    gallery.locator(".star").nth(2).click()
    gallery.locator(".star").nth(2).click()
    assert re.search(r"/gallery\.html#1\.png:[0-9a-f]{8}$", gallery.url)
    gallery.reload()
    assert stars(gallery) == ["false", "true", "false", "false"]
    gallery.get_by_role("button", name="Favourites 1", exact=False).first.click()
    assert gallery.locator("figure:visible > b").all_inner_texts() == ["0.50"]


def test_favourites_do_not_pass_to_another_batchs_pictures_of_the_same_names(gallery, tmp_path) -> None:
    gallery.locator(".star").nth(1).click()
    page = tmp_path / "gallery.html"
    page.write_text(re.sub('data-made="[0-9a-f]{8}"', 'data-made="00000000"', page.read_text("utf-8")), "utf-8")
    gallery.goto(page.as_uri())
    assert stars(gallery) == ["false"] * 4


def test_the_names_of_favourites_are_copied(gallery) -> None:
    button = gallery.locator("[data-names]")
    assert button.is_disabled()
    for number in (3, 0):
        gallery.locator(".star").nth(number).click()
    button.click()
    assert pasted(gallery) == "0.png\n3.png"


def copied(gallery, index: int, name: str) -> str:
    """What the button puts where a paste takes it from."""
    figure = gallery.locator("figure").nth(index)
    figure.locator("summary").click()
    figure.get_by_role("button", name=name).click()
    return pasted(gallery)


def pasted(gallery) -> str:
    gallery.evaluate("() => document.body.append(document.createElement('textarea'))")
    area = gallery.locator("textarea")
    area.focus()
    gallery.keyboard.press("Control+V")
    return area.input_value()


def test_a_prompt_is_copied(gallery) -> None:
    assert copied(gallery, 2, "Copy prompt") == "a <b>photo</b> in Office"
    gallery.locator("figure button", has_text="Copy prompt").evaluate_all(
        "(all) => all.forEach((one) => one.dataset.copy = 'facelora woman')"
    )
    gallery.locator("textarea").evaluate("(area) => area.remove()")
    assert copied(gallery, 1, "Copy prompt") == "facelora woman", "no command"


def test_a_command_that_draws_more_like_a_picture_is_copied(gallery, tmp_path) -> None:
    words = shlex.split(copied(gallery, 2, "more like this"))
    assert words[:5] == ["cd", f"{tmp_path}/", "&&", "facelora", "generate"]
    options = command_options("generate", *words[5:])
    assert options.base == "../it's a base.safetensors" and options.lora == ["anna.safetensors:1"]
    assert (options.prompt, options.negative, options.seed) == (["a <b>photo</b> in Office"], "blurry", 2)
    assert (options.size, options.count, options.output) == ((64, 80), 4, Path("more/2"))


def test_the_report_of_a_studio_fits_a_phone_and_leads_to_each_gallery(browser, tmp_path: Path) -> None:
    (tmp_path / "anna").mkdir()
    Image.new("RGB", (64, 80)).save(tmp_path / "anna" / "001-1.png")
    (tmp_path / "anna" / "gallery.html").write_text("<h1>Anna</h1>")
    made = Result("anna", "made", "Add photos. " * 20, "anna/anna.safetensors", ("anna/001-1.png",), 1, 0.6, 0.1)
    write_report(tmp_path, [made, Result("ben", "failed", "too dark")])
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("tbody th").all_inner_texts()[0] == "ben\ntoo dark"
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("img").evaluate("(image) => image.naturalWidth") == 64
    page.get_by_role("link", name="anna").click()
    assert page.locator("h1").inner_text() == "Anna"
    page.close()
