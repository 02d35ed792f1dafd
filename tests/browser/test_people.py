"""The list of trained people: in another browser of the same user, opened, and deleted with a question first."""

import re
from datetime import date, timedelta

from playwright.sync_api import Locator

from core.storage.plain_values import parse_toml
from tests.tooling import write_photos
from tools.workflows import BUILD

from .page import ComfyPage
from .test_nodes import PHOTOS
from .test_panel import STATUS, is_idle, train_node, wait_for_step


def question(page: ComfyPage) -> Locator:
    """The dialog that asks before something is deleted."""
    return page.page.locator(".facelora-dialog[open]", has_text=re.compile(r"Delete .+\?"))


def test_a_training_is_opened_and_a_person_deleted_from_another_browser(page, browser, server):
    other = ComfyPage(browser, server)
    with other.page.expect_event("requestfailed"):  # as of a server that restarts; the next change lists people again
        other.page.route("**/facelora/people", lambda route: route.abort(), times=1)
        other.page.get_by_role("button", name="Trained people").first.click()
    page.run(BUILD, train_node(seed=61, name="petra", steps=40, samples=0, settings=""))
    prompt_id = page.queue()
    person = other.page.locator(".facelora-sidebar .facelora-person", has_text="petra")
    person.filter(has_text="training").wait_for()
    other.problems.clear()
    assert server.wait(prompt_id).status == "success"
    person.filter(has_text="done").wait_for()
    other.wait_for("() => document.querySelector('.facelora-sidebar .facelora-person img').naturalWidth > 0")
    person.get_by_role("button", name="Open").click()
    other.wait_for(f"() => document.querySelector('{STATUS}')?.textContent.startsWith('done: petra')")
    other.page.locator(".facelora-all").click()
    person = other.page.locator(".facelora-dialog .facelora-person", has_text="petra")
    person.get_by_role("button", name="Rename petra").click()
    other.page.locator(".facelora-dialog input").press("Escape")  # which leaves the list open
    person.get_by_role("button", name="Rename").click()
    other.page.locator(".facelora-dialog input").fill("petra:p")
    other.page.locator(".facelora-dialog").get_by_text("without ':', which not every system allows").wait_for()
    other.page.locator(".facelora-dialog input").fill("petra-p")
    other.page.keyboard.press("Enter")
    person.filter(has_text="petra-p").wait_for()
    assert other.widgets("FaceLoRATrain")["name"] == "petra-p", "the open graph makes no copy"
    other.wait_for(f"() => document.querySelector('{STATUS}').textContent.startsWith('done: petra-p.')")
    person.get_by_role("button", name="Delete").click()
    question(other).get_by_role("button", name="Cancel").click()
    file = server.folder / "models" / "loras" / "petra-p.safetensors"
    assert file.exists()
    person.get_by_role("button", name="Delete").click()
    question(other).get_by_role("button", name="Delete").click()
    person.wait_for(state="detached")
    assert not file.exists()
    assert other.complaints() == [f"dialog: {text}" for text in other.dialogs()]
    other.close()


def test_a_lora_that_was_deleted_on_disk_is_told_with_what_run_does_and_restored_in_seconds(page, server):
    page.run(BUILD, train_node(seed=65, name="vera", steps=20, samples=0, settings=""))
    trained = server.wait(page.queue())
    assert trained.status == "success"
    page.wait_for(f"() => document.querySelector('{STATUS}').textContent.startsWith('done: vera')")
    file = server.folder / "models" / "loras" / "vera.safetensors"
    before = file.read_bytes()
    file.unlink()
    page.run("() => window.dispatchEvent(new Event('focus'))")
    page.wait_for(f"() => document.querySelector('{STATUS}').textContent === "
                  "'vera.safetensors is missing. Run restores it in seconds'")  # fmt: skip
    page.page.locator(".facelora-all").click()
    page.page.locator(".facelora-person", has_text="vera.safetensors is missing. Run restores it in seconds").wait_for()
    page.page.keyboard.press("Escape")
    restored = server.wait(page.queue())
    assert restored.status == "success" and "vera.safetensors: already trained" in restored.log
    assert file.read_bytes() == before
    page.wait_for(f"() => document.querySelector('{STATUS}').textContent.startsWith('done: vera')")

    file.unlink()
    for kept in (server.folder / "cache" / "runs").glob("*/lora.safetensors"):  # which older versions didn't keep
        kept.unlink()
    page.reload()
    page.page.get_by_text("vera.safetensors is missing. Run trains it again").wait_for()
    page.page.get_by_text(re.compile("^Takes .* on this machine$")).wait_for()
    page.set_widgets({"FaceLoRATrain": {"class_word": "woman"}})
    page.page.get_by_text("vera.safetensors is missing").wait_for(state="detached")
    assert page.complaints() == []


def test_the_question_before_deleting_an_unfinished_run_states_that_no_lora_was_made(page, server):
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
    page.page.keyboard.press("Escape")  # the focus was on a button that is gone
    page.wait_for("() => !document.querySelector('.facelora-dialog')")
    page.wait_for(f"() => document.querySelector('{STATUS}').textContent.startsWith('balanced: 20000 steps')")


def test_a_note_of_consent_is_written_for_a_lora_and_a_withdrawal_refuses_the_photos(page, server, tmp_path):
    file = server.folder / "models" / "loras" / "noor.person.toml"
    page.run(BUILD, train_node(seed=66, name="noor", folder="(no folder)", steps=1, samples=0, settings=""))
    page.drop(PHOTOS, sorted(write_photos(tmp_path, person=40).glob("*.png")))
    page.wait_for("() => document.querySelectorAll('.facelora-tile').length === 4")
    assert server.wait(page.queue()).status == "success" and not file.exists()
    page.page.locator(".facelora-all").click()
    list_ = page.page.locator(".facelora-people")

    def write(**fields: str) -> None:
        list_.get_by_role("button", name="Consent of noor").click()
        dialog = page.page.locator(".facelora-dialog[open]", has_text="Consent of noor")
        for label, value in fields.items():
            dialog.get_by_label(label.replace("_", " ")).fill(value)
        with page.page.expect_response("**/consent"):
            dialog.get_by_role("button", name="Save").click()

    write(Who_has_agreed="Noor Blix", Until="2099-01-01")
    list_.get_by_text("must be at most 10 years after").wait_for()
    assert not file.exists()
    until = date.today() + timedelta(days=365)
    write(Who_has_agreed="Noor Blix", Until=f"{until}")
    list_.get_by_text("must be at most").wait_for(state="detached")
    expected = {"agreed": True, "agreed_by": "Noor Blix", "agreed_on": date.today(), "agreed_until": until}
    assert parse_toml(file.read_text()) == expected
    (beside_photos,) = (server.folder / "input" / "photos").glob("noor*/person.toml")
    beside_photos.write_text("class_word = 'woman'")  # as of a studio, without an agreement
    write(What_for="portraits")
    expected |= {"agreed_for": "portraits"}
    assert parse_toml(file.read_text()) == expected
    assert parse_toml(beside_photos.read_text()) == {"class_word": "woman"} | expected
    write(Withdrawn=f"{date.today()}")
    assert parse_toml(file.read_text()) == {**expected, "withdrawn": date.today()}
    page.page.keyboard.press("Escape")
    page.set_widgets({"FaceLoRATrain": {"training_seed": 67}})
    assert "person.toml: the person has withdrawn the agreement" in server.wait(page.queue()).error
    assert not (server.folder / "models" / "loras" / "noor-2.safetensors").exists()


def test_people_of_one_name_are_told_apart_and_their_photos_leave_the_open_page_with_the_last(page, server, tmp_path):
    page.run(BUILD, train_node(seed=63, name="jules", folder="(no folder)", steps=1, samples=0, settings=""))
    page.drop(PHOTOS, sorted(write_photos(tmp_path).glob("*.png")))
    page.wait_for("() => document.querySelectorAll('.facelora-tile').length === 4")
    assert server.wait(page.queue()).status == "success"
    page.run("""() => {
        const train = window.app.graph.nodes.find((node) => node.type === "FaceLoRATrain")
        train.widgets.find((widget) => widget.name === "training_seed").value = 64
    }""")
    assert server.wait(page.queue()).status == "success"
    page.page.locator(".facelora-all").click()
    people = page.page.locator(".facelora-dialog .facelora-person", has_text="jules")
    people.nth(1).wait_for()
    names = people.locator("b").all_inner_texts()
    assert len(set(names)) == 2 and "jules" in names, names
    for left, tiles in ((1, 4), (0, 0)):  # the photos are of both runs
        people.first.get_by_role("button", name="Delete").click()
        question(page).get_by_role("button", name="Delete").click()
        page.wait_for(f"""() => document.querySelectorAll('.facelora-tile').length === {tiles}
            && [...document.querySelectorAll('.facelora-dialog .facelora-person b')]
                .filter((name) => name.textContent.startsWith('jules')).length === {left}""")
    assert is_idle(page)
