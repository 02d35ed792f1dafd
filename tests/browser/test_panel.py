"""The live panel of Train Face LoRA, during a real training."""

import getpass
import json
import re

import pytest
import torch

from core.lora.file import LoraFile
from core.training.likeness import LIKENESS_KEY
from tests.tooling import write_photos
from tools.workflows import BUILD, FOLDER, SD15, WORKFLOWS

STATUS = ".facelora-status"
ENDLESS = 20_000
"""Steps of a training that nobody waits for the end of."""


def train_node(seed: int, folder: str = "my-photos", **widgets) -> list[dict]:
    """A graph for BUILD: photos -> Train Face LoRA."""
    quick = {
        "name": f"panel-{seed}", "steps": ENDLESS, "resolution": 64, "samples": 100,
        "training_seed": seed,
        "settings": "sample_every = 10\nsample_steps = 4",
    } | widgets  # fmt: skip
    quick["settings"] = f"batch_size = 1\ncheck_photos = false\n{quick['settings']}"
    base = {"key": "base", "type": "CheckpointLoaderSimple", "widgets": {"ckpt_name": SD15["name"]}, "links": {}}
    photos = {
        "key": "photos", "type": "FaceLoRALoadPhotos", "widgets": {"folder": folder, "check": False}, "links": {},
    }  # fmt: skip
    links = {"model": "base.MODEL", "clip": "base.CLIP", "vae": "base.VAE", "photos": "photos.photos"}
    train = {"key": "train", "type": "FaceLoRATrain", "widgets": quick, "links": links}
    nodes = [{"title": "", "height": 0, "models": []} | node for node in (base, photos, train)]
    steps = [nodes[:2], nodes[2:]]
    return [{"title": "Train", "note": "", "width": 420, "nodes": part} for part in steps]


def status(page) -> str:
    return page.page.text_content(STATUS) or ""


def is_idle(page) -> bool:
    """Whether no training is shown."""
    return not re.search(r"step \d+ of|done|stopped|failed", status(page))


def wait_for_step(page, step: int, seconds: float = 900) -> None:
    page.wait_for(
        f"() => Number(/step (\\d+) of/.exec(document.querySelector('{STATUS}')?.textContent)?.[1]) >= {step}", seconds
    )


def points(page, line: str) -> int:
    """How many points of a line are drawn."""
    return len((page.page.get_attribute(f'[data-line="{line}"]', "points") or "").split())


def wait_for_points(page, line: str, count: int) -> None:
    """Until a line has as many points: of the steps of half a second one is shown."""
    page.wait_for(
        f"() => document.querySelector('[data-line=\"{line}\"]')?.getAttribute('points').split(' ').length >= {count}"
    )


def test_a_training_is_followed_on_two_pages_through_a_reload_and_kept(page, browser, server):
    page.run(BUILD, train_node(seed=11))
    assert is_idle(page)
    page.run("""() => {
        window.bars = new Set()
        window.comfyAPI.api.api.addEventListener("progress", ({ detail }) => window.bars.add(detail.max))
    }""")
    prompt_id = page.queue()
    page.wait_for("() => document.querySelectorAll('.facelora-samples img').length > 0", 900)
    wait_for_step(page, 5)
    assert re.fullmatch(r"\d.* s · \d.* left", page.page.text_content(".facelora-time") or "")
    wait_for_points(page, "loss", 3)
    wait_for_points(page, "learning rate", 3)
    assert len(page.run("() => [...window.bars]")) >= 3, "encoding, samples and training: each has a bar of its own"
    assert page.page.locator(".facelora-photos img").count() >= 3
    graph = page.saved()

    other = type(page)(browser, server)
    other.clear()
    other.open(graph, "other")
    other.wait_for(f"() => document.querySelector('{STATUS}').textContent.includes('step')")
    # Another run in that window waits, and can be taken out of the queue.
    other.clear()
    other.run(BUILD, train_node(seed=22))
    other.queue()
    other.wait_for(f"() => document.querySelector('{STATUS}').textContent === 'waiting, runs ahead in the queue: 1'")
    other.page.click(".facelora-cancel")
    other.wait_for(f"() => document.querySelector('{STATUS}').textContent.startsWith('balanced: ')")
    other.open(graph, "other")
    other.wait_for(f"() => document.querySelector('{STATUS}').textContent.includes('step')")
    before = points(page, "loss")
    page.reload()
    wait_for_step(page, 6)
    assert points(page, "loss") >= before, "the curve begins where the training began"
    assert page.page.locator(".facelora-photos img").count() >= 3

    other.page.click(".facelora-keep")
    result = server.wait(prompt_id, 900)
    assert result.status == "success", result.error
    for each in (page, other):
        each.wait_for(f"() => document.querySelector('{STATUS}').textContent.startsWith('done: panel-11')")
        assert each.complaints() == []
    assert (server.folder / "models" / "loras" / "panel-11.safetensors").exists()
    other.close()


def test_the_cancel_button_ends_a_training_that_goes_on_when_queued_again(page, server):
    page.run(BUILD, train_node(seed=12, samples=0, settings=""))
    prompt_id = page.queue()
    wait_for_step(page, 3)
    page.page.click(".facelora-cancel")
    assert page.page.text_content(".facelora-cancel") == "Cancelling"
    assert server.wait(prompt_id, 900).status == "interrupted"
    page.wait_for(f"() => document.querySelector('{STATUS}').textContent.startsWith('stopped')")
    stopped = points(page, "loss")
    assert points(page, "learning rate") == stopped
    prompt_id = page.queue()
    for line in ("loss", "learning rate"):
        wait_for_points(page, line, stopped + 2)  # the curve goes on
    page.page.click(".facelora-keep")
    assert server.wait(prompt_id, 900).status == "success"


def test_the_panel_is_neither_saved_nor_queued(page):
    page.run(BUILD, train_node(seed=13))
    (node,) = [node for node in page.saved()["nodes"] if node["type"] == "FaceLoRATrain"]
    widgets = page.run(
        "() => window.app.graph.nodes.find((node) => node.type === 'FaceLoRATrain').widgets.map((widget) => widget.name)"
    )
    assert widgets[-2:] == ["more", "training"]
    assert len(node["widgets_values"]) == len(widgets) - 2
    (queued,) = [node for node in page.prompt().values() if node["class_type"] == "FaceLoRATrain"]
    assert "training" not in queued["inputs"]


def test_the_likeness_that_a_training_measures_is_drawn_in_both_designs(page, server, nodes_2):
    write_photos(server.folder / "input" / "frida", count=8, scale=2, person=37)
    settings = "sample_steps = 5\nlikeness_pictures = 2\nsample_guidance = 2.0"
    page.reload()  # so that the list of folders has the new one
    page.clear()
    page.run(
        BUILD,
        train_node(14, "frida", name="measured", recipe="best", steps=2, samples=2, settings=settings),
    )
    prompt_id = page.queue()
    page.wait_for("() => document.querySelector('[data-line=likeness]')", 900)
    result = server.wait(prompt_id, 900)
    assert result.status == "success", result.error
    metadata = LoraFile.read(server.folder / "models" / "loras" / "measured.safetensors").metadata
    measured = [point["likeness"] for point in json.loads(metadata[LIKENESS_KEY])["points"]]
    assert len(measured) == 2 and any(measured)
    for change_design in (lambda: None, nodes_2):
        change_design()
        page.wait_for(f"() => document.querySelector('{STATUS}')?.textContent.startsWith('done')")
        assert points(page, "likeness") == 2
        assert (
            page.page.get_attribute(".facelora-likeness", "title")
            == "0.55 or more: the same person. Below 0.4: someone else"
        )
        assert page.complaints() == []
    # Queued again, it is found, with all that there was to see.
    server.post("/free", {"free_memory": True, "unload_models": True})
    assert server.wait(page.queue(), 900).status == "success"
    assert points(page, "likeness") == 2
    assert page.page.locator(".facelora-samples img").count() >= 1
    # Another checkpoint than the one that was kept.
    offered = page.page.locator(".facelora-checkpoints button")
    assert offered.all_inner_texts() == ["1", "2"]
    pressed = [button.get_attribute("aria-pressed") for button in offered.all()]
    other = pressed.index("false")
    offered.nth(other).click()
    assert page.widgets("FaceLoRATrain")["checkpoint"] == other + 1
    assert server.wait(page.queue(), 900).status == "success"
    page.wait_for(
        f"() => document.querySelector('{STATUS}').textContent.startsWith('done: measured-step00000{other + 1}.safetensors')"
    )
    assert (server.folder / "models" / "loras" / f"measured-step00000{other + 1}.safetensors").exists()
    assert "Train longer" not in status(page), "the user has chosen it"
    assert [one["file"] for one in server.get("/facelora/people") if one["name"] == "measured"] == [
        "measured.safetensors"
    ]
    names = page.run("() => LiteGraph.registered_node_types.FaceLoRAInspect.nodeData.input.required.lora_name")
    assert "measured.safetensors" in str(names), "loaders list it"
    offered.nth(1 - other).click()
    assert page.widgets("FaceLoRATrain")["checkpoint"] == 0
    assert page.complaints() == []


def test_a_freshly_opened_template_is_a_workflow_of_its_own(page):
    template = json.loads((FOLDER / f"{WORKFLOWS[0].name}.json").read_text(encoding="utf-8"))
    ids = set()
    for name in ("first", "second"):
        page.open(template, name)
        ids.add(page.run("() => window.app.graph.id"))
        assert is_idle(page)
    assert len(ids) == 2 and not any(graph_id.startswith("00000000") for graph_id in ids)


def hear(page, **news) -> None:
    """As if the server told the page of the node's training, in the page's own workflow if none is given."""
    node = page.run("() => String(window.app.graph.nodes.find((node) => node.type === 'FaceLoRATrain').id)")
    told = {"begin": True, "node": node, "workflow": page.run("() => window.app.graph.id"), "points": {}} | news
    page.run("(news) => window.comfyAPI.api.api.dispatchCustomEvent('facelora.training', news)", told)


def test_a_node_with_the_same_id_in_another_workflow_or_in_none_shows_nothing_of_it(page):
    page.run(BUILD, train_node(seed=15))
    news = {
        "phase": "training", "steps": 60, "loss": 0.1, "learning_rate": 1e-4, "likeness": 0.521, "likeness_word": "perhaps",
        "seconds": 3700, "seconds_left": 75,
    }  # fmt: skip
    hear(page, prompt="ours", step=30, **news)
    hear(page, prompt="theirs", step=40, workflow="of somebody else", **news)
    hear(page, prompt="a script's", step=50, workflow=None, **news)
    hear(page, prompt="ours", begin=False, history=[[1, 0.3], [30, 0.1]], learning_rates=[[1, 0.003], [30, 0.001]])
    ends = page.page.locator(".facelora-loss text").all_text_contents()
    assert {"0.3", "0.1", "0.003", "0.001"} <= set(ends), "not those of the frame"
    assert status(page) == "step 30 of 60 · loss 0.1 · learning rate 1e-4 · likeness 0.52: perhaps"
    assert re.fullmatch(r"1 h 1 min · 1 min 1\d s left", page.page.text_content(".facelora-time") or "")


def test_the_settings_of_a_recipe_are_shown_before_training(page):
    page.run(BUILD, train_node(seed=21, steps=0, resolution=0))
    for recipe, does in (
        ("fast", "500 steps × 1, rank 16, learning rate 2e-4"),
        ("balanced", "800 steps × 1, rank 32, learning rate 2e-4"),
    ):
        page.set_widgets({"FaceLoRATrain": {"recipe": recipe}})
        page.wait_for(f"() => document.querySelector('{STATUS}').textContent.startsWith('{recipe}: {does}, ')")
    page.set_widgets({"FaceLoRATrain": {"steps": 7, "rank": 4}})
    plan = f"() => document.querySelector('{STATUS}').textContent.startsWith('balanced: 7 steps × 1, rank 4, ')"
    page.wait_for(plan)
    for settings, shown in (("batch_size = four", "settings: "), ("batch_size = 4", "balanced: 7 steps × 4, ")):
        page.set_widgets({"FaceLoRATrain": {"settings": settings}})
        page.wait_for(f"() => document.querySelector('{STATUS}').textContent.startsWith('{shown}')")
    page.set_widgets({"FaceLoRATrain": {"settings": ""}})
    page.wait_for(plan)
    # In the graph, the node has room for all of it.
    page.wait_for("""() => {
        const panel = document.querySelector(".facelora-panel:has(.facelora-status)")
        return panel.scrollHeight <= panel.clientHeight && panel.clientHeight > 30
    }""")
    page.run("""() => { document.querySelector(".facelora-panel:has(.facelora-status)").style.width = "230px" }""")
    assert page.run(
        f"() => document.querySelector('{STATUS}').scrollWidth <= document.querySelector('{STATUS}').clientWidth"
    )
    # An ended run isn't shown once the inputs have changed, also after F5, until it is heard of again.
    hear(page, prompt="ours", phase="stopped", seconds=3)
    assert status(page).startswith("stopped")
    page.set_widgets({"FaceLoRATrain": {"name": "renamed"}})
    assert status(page).startswith("stopped"), "the same training run"
    page.set_widgets({"FaceLoRATrain": {"steps": 7}})
    page.wait_for(plan)
    hear(page, prompt="ours", begin=False, seconds=4)
    assert status(page).startswith("stopped")


def test_the_clock_runs_between_reports_and_shows_no_time_left_after_a_stop(page):
    page.run(BUILD, train_node(seed=20))
    news = {
        "prompt": "ours",
        "step": 30,
        "steps": 60,
        "loss": 0.1,
        "learning_rate": 1e-4,
        "seconds": 10,
        "seconds_left": 50,
    }
    hear(page, phase="training", **news)
    page.wait_for("() => /^1[2-9] s · 4\\d s left$/.test(document.querySelector('.facelora-time').textContent)", 20)
    hear(page, prompt="ours", begin=False, stopping=True)
    assert re.fullmatch(r"1[2-9] s|2\d s", page.page.text_content(".facelora-time") or ""), (
        "it does not go back to 10 s"
    )
    assert status(page) == "stopping after step 30"
    hear(page, prompt="ours", begin=False, phase="samples", done=3, total=20, seconds=30)
    assert status(page) == "step 30 of 60 · loss 0.1 · drawing the last samples: 15 %"


@pytest.mark.parametrize(
    ("likeness", "word", "verdict", "advice"),
    [
        (0.61, "the same person", "good", ""),
        (0.45, "perhaps", "doubtful", "Train longer"),
        (0.07, "someone else", "rejected", "Train longer"),
        (0.0, "no face", "rejected", "Train longer"),
    ],
)
def test_the_final_status_shows_in_words_and_colour_whether_it_is_the_person(page, likeness, word, verdict, advice):
    page.run(BUILD, train_node(seed=19))
    kept = {"kept_likeness": likeness, "kept_word": word, "kept_step": 125}
    hear(page, prompt="ours", phase="done", file="x.safetensors", steps=800, history=[[1, 0.3], [250, 0.1]], **kept)
    assert "step 250" in (page.page.text_content(".facelora-loss") or ""), "where it was stopped"
    assert status(page).startswith(f"done: x.safetensors · step 125, likeness {likeness:.2f}: {word}")
    assert advice in status(page)
    assert page.page.locator(f"{STATUS}.facelora-says-{verdict}").count() == 1
    assert page.page.locator(f".facelora-bar .facelora-is-{verdict}").count() == 1


def test_no_button_of_a_narrow_panel_breaks_into_lines(page):
    page.run(BUILD, train_node(seed=18))
    hear(page, prompt="ours", phase="training", step=30, steps=60, loss=0.1, learning_rate=1e-4, seconds=82)
    page.run("""() => { document.querySelector(".facelora-panel:has(.facelora-status)").style.width = "230px" }""")
    # A box is a difference of places on the page, which are rounded: two equal ones differ by some 0.0001.
    buttons = [page.page.locator(f".facelora-{button}").bounding_box() for button in ("keep", "cancel")]
    assert round(buttons[0]["height"]) == round(buttons[1]["height"]) < 40


def test_a_click_or_a_key_enlarges_a_picture_until_the_next_key(page):
    page.run(BUILD, train_node(seed=16))
    pixel = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    hear(page, prompt="ours", phase="done", file="x.safetensors", samples=[pixel], samples_step=1)
    picture = page.page.get_by_role("button", name="samples, step 1: 1")
    for enlarge in (picture.click, lambda: picture.press("Enter"), lambda: picture.press(" ")):
        enlarge()
        page.wait_for("() => document.querySelector('.facelora-large[open] img')")
        page.page.keyboard.press("Escape")
        page.wait_for("() => !document.querySelector('.facelora-large')")


def test_the_keyboard_stays_on_a_picture_and_on_a_button_while_news_arrives(page):
    page.run(BUILD, train_node(seed=17))
    shots = [{"filename": name, "subfolder": "", "type": "output", "score": 0.6} for name in ("a.png", "b.png")]
    steps = [{"step": step, "likeness": step / 100, "kept": step == 50} for step in (25, 50)]
    hear(page, prompt="ours", phase="drawing", limits=[0.4, 0.55], headshots=shots, checkpoints=steps)
    for name in ("b.png", "25"):
        button = page.page.get_by_role("button", name=name)
        button.focus()
        hear(page, prompt="ours", begin=False, phase="drawing", done=1, total=2)
        assert button.evaluate("(button) => button === document.activeElement")
    hear(page, prompt="ours", begin=False, headshots=[*shots, {**shots[0], "filename": "c.png"}])
    assert page.page.locator(".facelora-headshot").count() == 3


def test_a_button_shows_what_the_machine_has_for_training(page, server):
    page.run(BUILD, train_node(1))
    page.page.click(".facelora-machine")
    page.page.locator(".facelora-text[open] pre", has_text="facelora doctor").wait_for()
    report = page.page.text_content(".facelora-text pre") or ""
    assert f"torch {torch.__version__}" in report and "cpu: " in report
    page.page.click(".facelora-text pre", click_count=3)  # which selects a line
    assert page.run("() => String(getSelection())").strip() in report.splitlines()
    page.page.mouse.click(
        800, 995
    )  # beside the dialog, and not on a tab, which says its name when the mouse rests on it
    page.wait_for("() => !document.querySelector('.facelora-text')")
    page.page.click(".facelora-machine")
    page.page.get_by_role("button", name="Copy").click()
    assert (
        page.run("() => String(getSelection())").strip() == (page.page.text_content(".facelora-text pre") or "").strip()
    )
    page.page.get_by_role("button", name="Close", exact=True).last.click()
    page.wait_for("() => !document.querySelector('.facelora-text')")
    assert str(server.folder) not in report and getpass.getuser() not in report.split()
    assert page.complaints() == []


def test_the_panel_speaks_the_language_of_comfyui(page, site):
    site.post("/settings/Comfy.Locale", "zh")
    try:
        page.reload()
        page.clear()
        page.run(BUILD, train_node(seed=17))
        assert page.page.locator(".facelora-add").inner_text() == "添加照片"
        news = {
            "steps": 60,
            "loss": 0.1,
            "learning_rate": 1e-4,
            "likeness": 0.5,
            "likeness_word": "perhaps",
            "seconds": 75,
        }
        hear(page, prompt="ours", phase="training", step=30, **news)
        assert status(page) == "第 30 / 60 步 · 损失 0.1 · 学习率 1e-4 · 相似度 0.50：可能是"
        assert re.fullmatch(r"1 分 1\d 秒", page.page.text_content(".facelora-time") or "")
    finally:
        site.post("/settings/Comfy.Locale", "en")
