"""The form of the workflow on InvokeAI's own page."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.browser.page import running_browser
from tests.tooling import write_photos

from .conftest import BASE
from .form import Form, change_workflow
from .test_server import QUICK

pytestmark = pytest.mark.slow


def test_a_user_fills_in_the_form_and_gets_headshots_and_sees_what_is_missing(invoke, tmp_path):
    photos = sorted(write_photos(tmp_path / "person", count=5, scale=3).glob("*.png"))
    change_workflow(invoke, {"train": QUICK | {"name": "form"}, "headshots": {"count": 1, "resolution": 72}})

    def fill_in() -> None:
        with running_browser() as browser:
            form = Form(browser, invoke)
            form.choose_model(BASE)
            form.invoke()
            form.page.get_by_text("no photos: add 10 to 20 photos of one person").first.wait_for()
            form.add_photos(photos)
            form.invoke()
            invoke.wait_for(lambda: "form" in invoke.models())
            form.page.wait_for_function("() => [...document.images].some((one) => one.naturalWidth === 64)")

    # A thread can run Playwright only once, and the browser tests may have started it in this one.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(fill_in).result()
    assert invoke.models()["form"]["trigger_phrases"] == ["sks man"]
