"""The list of trained people: in another browser of the same user, opened, and deleted with a question first."""

import pytest

from .page import ComfyPage
from .test_panel import STATUS, train_node, wait_for_step
from .workflows import BUILD

pytestmark = pytest.mark.browser


def test_a_training_is_opened_and_a_person_deleted_from_another_browser(page, browser, server):
    page.run(BUILD, train_node(seed=61, name="petra", steps=2, samples=0, settings=""))
    assert server.wait(page.queue()).status == "success"
    other = ComfyPage(browser, server)
    other.page.get_by_role("button", name="Trained people").first.click()
    person = other.page.locator(".facelora-sidebar .facelora-person", has_text="petra")
    assert "done" in person.inner_text() and person.locator("img").evaluate("(image) => image.naturalWidth > 0")
    person.get_by_role("button", name="Open").click()
    other.wait_for(f"() => document.querySelector('{STATUS}')?.textContent.startsWith('done: petra')")
    other.page.locator(".facelora-all").click()
    person = other.page.locator(".facelora-dialog .facelora-person", has_text="petra")
    person.get_by_role("button", name="Delete").click()
    other.page.locator(".facelora-dialog[open]").last.get_by_role("button", name="Cancel").click()
    file = server.folder / "models" / "loras" / "petra.safetensors"
    assert file.exists()
    person.get_by_role("button", name="Delete").click()
    other.page.locator(".facelora-dialog[open]").last.get_by_role("button", name="Delete").click()
    person.wait_for(state="detached")
    assert not file.exists()
    assert other.complaints() == [f"dialog: {text}" for text in other.dialogs()]
    other.close()


def test_the_question_before_an_unfinished_run_is_deleted_speaks_of_no_lora(page, server):
    page.run(BUILD, train_node(seed=62, name="robin", samples=0, settings=""))
    prompt_id = page.queue()
    wait_for_step(page, 1)
    page.page.click(".facelora-cancel")
    assert server.wait(prompt_id).status == "interrupted"
    page.page.locator(".facelora-all").click()
    person = page.page.locator(".facelora-dialog .facelora-person", has_text="robin")
    person.get_by_role("button", name="Delete").click()
    question = page.page.locator(".facelora-dialog[open]", has_text="No LoRA was made")
    question.press("Escape")
    question.wait_for(state="detached")
    person.get_by_role("button", name="Delete").click()
    question.get_by_role("button", name="Delete").click()
    person.wait_for(state="detached")
    page.wait_for(f"() => document.querySelector('{STATUS}').textContent.startsWith('balanced: 20000 steps')")
