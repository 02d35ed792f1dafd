"""Every shipped workflow, opened from its file by ComfyUI's own frontend, and run; the first as a user's hands do it."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image
from playwright.sync_api import Locator

from core.lora.file import LoraFile
from core.pictures.style_pack import find_style_packs
from core.storage.drawn import DRAWN, read_mark
from tests.comfyui.server import ComfyServer, running_server
from tests.comfyui.setup_comfyui import newest_frontend
from tests.tooling import write_photos
from tools.workflows import BLUEPRINTS, CONNECTED, FOLDER, SD15, WORKFLOWS, subgraphs

from .page import ComfyPage, drop_files, prepare
from .test_panel import hear

# What a CPU can do in a minute.
QUICK: dict[str, dict[str, Any]] = {
    "FaceLoRATrain": {"resolution": 64, "steps": 2, "samples": 1},
    "FaceLoRAStylePack": {"count": 2, "resolution": 64},
    "EmptyLatentImage": {"width": 128, "height": 160},
    "FaceLoRALoadPhotos": {"folder": "my-photos", "check": False},
    "FaceLoRAGroup": {"width": 256, "height": 160},
    "KSampler": {"steps": 2},
    "ImageScaleToTotalPixels": {"megapixels": 0.01},
    "FaceLoRAChooseAlike": {"required": False},
}
NAMES = [workflow.name for workflow in WORKFLOWS]
PACK_NAME = "ComfyUI-FaceLoRA"


@pytest.fixture
def page(new_page) -> ComfyPage:
    """A new page: templates are found, and apps begin, on one that nobody has used."""
    return new_page


def types(graph: dict[str, Any]) -> list[str]:
    """The types of its nodes and of those in its subgraphs."""
    inner = {part["id"]: part["nodes"] for part in subgraphs(graph)}
    flat = [one for node in graph["nodes"] for one in inner.get(node["type"], [node])]
    return [node["type"] for node in flat]


FILLED = """(names) => {
    for (const node of app.graph.nodes.filter((node) => node.type === "FaceLoRALoadPhotos")) {
        const pictures = node.widgets.find((widget) => widget.name === "pictures")
        pictures.value = names.join("\\n")
        pictures.callback()
        const photos = names.map((name) => ({ name, verdict: "good" }))
        node.onExecuted({ facelora_photos: [{ photos, headline: "20 usable", verdict: "good" }] })
    }
    for (const node of app.graph.nodes.filter((node) => node.type === "FaceLoRAInspect"))
        node.onExecuted({ text: Array(60).fill("a line of its report") })
    for (const node of app.graph.nodes.filter((node) => node.type === "FaceLoRALikeness")) {
        const [subfolder, filename] = names[0].split("/")
        const told = { node: node.id, output: { images: [{ filename, subfolder, type: "input" }] } }
        window.comfyAPI.api.api.dispatchCustomEvent("executed", told)
    }
}"""
OVERLAPS = """() => {
    const boxes = app.graph.nodes.map(({ title, pos: [x, y], size: [width, height] }) =>
        ({ title, left: x, top: y - 30, right: x + width, bottom: y + height }))
    return boxes.flatMap((one, index) => boxes.slice(index + 1)
        .filter((other) => one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom)
        .map((other) => `${one.title} lies on ${other.title}`))
}"""


UNDER_THE_BAR = """() => {
    const { bottom, left, right } = document.querySelector("[data-testid=queue-button]").getBoundingClientRect()
    const { scale, offset } = app.canvas.ds, at = (x) => (x + offset[0]) * scale
    const isUnder = ({ pos: [x, y], size: [width] }) =>
        (y - 30 + offset[1]) * scale < bottom && at(x) < right && at(x + width) > left
    return app.graph.nodes.filter(isUnder).map(({ title }) => title)
}"""


def check_all(page: ComfyPage) -> None:
    """Opens every workflow, and puts 20 photos and what a run says of them, of a LoRA and of likeness into it."""
    for name in NAMES:
        page.open(workflow_file(name), name)
        assert (
            page.run("() => !document.querySelector('#graph-canvas').checkVisibility()")
            or page.run(UNDER_THE_BAR) == []
        )
        page.run(FILLED, [f"my-photos/{number % 6}.png" for number in range(20)])
        page.wait_for("() => [...document.images].every((one) => one.complete)")
        assert page.run(OVERLAPS) == [], name
        assert page.complaints() == [], name


def test_every_workflow_opens_without_a_warning_and_with_room_for_20_photos(page, server, lora, flows):
    check_all(page)


def test_templates_for_a_lora_open_with_the_users_own_files_and_ask_for_a_lora_once(page, server, lora):
    there = {file.name for folder in ("checkpoints", "loras") for file in (server.folder / "models" / folder).iterdir()}
    for name in [name for name in NAMES if name[0] in "6789I"]:
        page.open(workflow_file(name), name)
        chosen = page.run("""() => app.graph.nodes.flatMap(({ widgets = [] }) =>
            widgets.filter(({ name }) => /^(ckpt|lora)_name$/.test(name)).map(({ value }) => value))""")
        assert set(chosen) <= there | {CONNECTED}, name
    assert types(workflow_file("9 Compare strengths and steps")).count("FaceLoRAInspect") == 1
    assert "safetensors" not in json.dumps([node.get("widgets_values") for name in NAMES[5:]
                                            if "photo" not in name for node in workflow_file(name)["nodes"]])  # fmt: skip


@pytest.mark.parametrize("choices", [[[]], ["COMBO", {"options": []}]], ids=["of V1", "of V3"])
def test_a_user_without_checkpoints_is_offered_the_one_of_the_template(page, choices):
    page.run("""(choices) => {
        const { input } = LiteGraph.registered_node_types.CheckpointLoaderSimple.nodeData
        input.required.ckpt_name = choices
    }""", choices)  # fmt: skip
    page.open(workflow_file("9 Compare strengths and steps"), "9 Compare")
    assert page.run("() => app.graph.findNodesByType('CheckpointLoaderSimple')[0].widgets[0].value") == SD15["name"]
    gone = json.dumps(workflow_file(NAMES[0])).replace(SD15["name"], "gone.safetensors")
    page.open(json.loads(gone), NAMES[0])
    page.page.get_by_role("link", name="checkpoints/gone.safetensors").wait_for()  # the app lists it too


@pytest.mark.slow
def test_every_workflow_opens_without_a_warning_where_nodes_are_elements(page, server, lora, flows, nodes_2):
    nodes_2()
    check_all(page)


@pytest.fixture(scope="module")
def newest(site) -> Iterator[ComfyServer]:
    """The server's folder behind the newest frontend."""
    with running_server(site.folder, "--front-end-root", str(newest_frontend())) as server:
        prepare(server)
        yield server


@pytest.fixture
def newest_page(newest, browser) -> Iterator[ComfyPage]:
    page = ComfyPage(browser, newest)
    page.clear()
    yield page
    page.close()


@pytest.mark.slow
def test_every_workflow_opens_without_a_warning_in_the_newest_frontend(newest_page, newest, lora, flows):
    check_all(newest_page)
    newest.post("/settings/Comfy.VueNodes.Enabled", True)
    check_all(newest_page)
    newest.post("/settings/Comfy.VueNodes.Enabled", False)


def workflow_file(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


class Hands:
    """What a user does on a page, counted."""

    def __init__(self, page: ComfyPage):
        self.comfy, self.page = page, page.page
        self.actions = 0

    def click(self, what: Locator) -> None:
        self.actions += 1
        what.click()

    def type(self, what: Locator, text: str) -> None:
        self.actions += 1
        what.fill(text)

    def type_into_node(self, node_type: str, widget: str, text: str) -> None:
        """Clicks a widget on the canvas and types into what opens."""
        self.actions += 1
        x, y = self.comfy.run(
            """([type, name]) => {
                const node = app.graph.nodes.find((node) => node.type === type)
                const widget = node.widgets.find((widget) => widget.name === name)
                const { scale, offset } = app.canvas.ds
                return [(node.pos[0] + node.size[0] / 2 + offset[0]) * scale, (node.pos[1] + widget.y + 8 + offset[1]) * scale]
            }""",
            [node_type, widget],
        )
        self.page.mouse.click(x, y)
        field = self.page.locator(".graphdialog input, .graphdialog textarea")
        field.fill(text)
        field.press("Enter")

    def drop(self, what: Locator, files: list[Path]) -> None:
        def beside() -> tuple[float, float]:
            box = what.bounding_box()
            assert box
            return box["x"] + box["width"] + 20, box["y"] + 5

        self.actions += 1
        drop_files(self.page, beside, files)

    def find_template(self) -> Locator:
        """The card of the first template, which is the first of them, from an empty ComfyUI."""
        self.click(self.page.get_by_role("button", name="Templates").first)
        self.click(self.page.get_by_text(PACK_NAME).first)
        card = self.page.get_by_text(NAMES[0]).first
        card.wait_for()
        titles = dict.fromkeys(self.page.get_by_text(re.compile(r"^(\d|Inspect|MOSS-|One).*[a-z]")).all_inner_texts())
        assert [title for title in titles if title in NAMES] == NAMES
        self.comfy.problems.clear()  # the templates of ComfyUI itself are not there in tests
        return card

    def open_template(self) -> None:
        self.click(self.find_template())
        self.comfy.wait_for("() => document.querySelector('.facelora-add')?.checkVisibility()")
        assert self.comfy.complaints() == []

    def add_photos(self, files: list[Path]) -> None:
        button = self.page.locator(".facelora-add")
        button.click(trial=True)  # which waits until nothing moves or covers it
        self.drop(button, files)
        self.comfy.wait_for(f"() => document.querySelectorAll('.facelora-tile').length === {len(files)}")

    def choose_style(self) -> None:
        self.click(self.page.locator(".facelora-style").nth(1))

    def press_run(self, button: Locator, server: ComfyServer) -> dict[str, Any]:
        """The inputs of each node, by its type, once the run has succeeded without a complaint."""
        self.comfy.set_widgets({name: QUICK[name] for name in ("FaceLoRATrain", "FaceLoRAStylePack")})  # no action
        with self.page.expect_response(lambda answer: answer.url.endswith("/prompt")) as queued:
            self.click(button)
        prompt = queued.value.json()["prompt_id"]
        result = server.wait(prompt)
        assert result.status == "success", result.error
        saved = [image["filename"] for output in result.outputs.values() for image in output.get("images", ())
                 if re.match(r"my-face(-\d+)?_0000", image["filename"])]  # fmt: skip  # the LoRA's name
        assert len(saved) >= 2
        assert {read_mark(server.folder / "output" / "headshots" / name) for name in saved} == {DRAWN}
        shown = """(names) => {
            const pictures = [...document.images, ...app.graph.nodes.flatMap((node) => node.imgs ?? [])]
            return names.every((name) => pictures.some((one) => one.src.includes(name)))
        }"""
        self.page.wait_for_function(shown, arg=saved[:2])
        assert self.comfy.complaints() == []
        nodes = server.get(f"/history/{prompt}")[prompt]["prompt"][2].values()
        return {node["class_type"]: node["inputs"] for node in nodes}


def my_photos(folder: Path) -> list[Path]:
    """Six of one person and one of another."""
    write_photos(folder / "friend", count=1, scale=2, person=2)
    photos = write_photos(folder / "me", count=6, scale=2)
    (folder / "friend" / "0.png").rename(photos / "friend.png")
    return sorted(photos.glob("*.png"))


def lead_to_headshots(page: ComfyPage, server: ComfyServer, files: list[Path]) -> None:
    """From an empty ComfyUI to headshots on the app's page, as a user does it and counted."""
    hands = Hands(page)
    hands.open_template()
    opened = hands.actions
    hands.add_photos(files)
    hands.type(page.page.get_by_role("textbox").nth(1), "woman")
    hands.choose_style()
    assert hands.actions - opened <= 3, "answers"
    asked = hands.press_run(page.page.get_by_role("button", name="Run").last, server)
    assert hands.actions == 7, "five, and two choices: the class word and the style"
    assert asked["FaceLoRATrain"]["class_word"] == "woman"
    assert asked["FaceLoRAStylePack"]["styles"] == find_style_packs().pick("corporate").names[1]
    rejected = page.page.locator(".facelora-tile.facelora-rejected").evaluate_all(
        "(all) => all.map((one) => one.title)"
    )
    assert [title.split("\n")[0] for title in rejected] == ["friend.png"]
    style = asked["FaceLoRAStylePack"]["styles"]
    drawn = """(style) => [...document.querySelectorAll(".facelora-style")].filter((card) =>
        card.querySelector("img").src.includes("my-face") === (card.dataset.name === style)).length === 10"""
    page.page.wait_for_function(drawn, arg=style)  # the card of that style shows the person, and no other does
    trained = (page.page.text_content(".facelora-status") or "").removeprefix("done: ")
    lora = LoraFile.read(server.folder / "models" / "loras" / trained)
    assert lora.metadata["ss_num_train_images"] == "6"
    draw_more_like_one(page, server)
    page.set_widgets({"FaceLoRATrain": {"class_word": "man"}})  # which may be someone else
    page.page.wait_for_function(drawn, arg="")


def draw_more_like_one(page: ComfyPage, server: ComfyServer) -> None:
    """Presses a headshot's button for more like it, which draws three beside it, though the graph has changed since."""
    names = page.page.locator(".facelora-headshot img").evaluate_all("(all) => all.map((one) => one.alt)")
    assert re.fullmatch(r"[A-Z].*, (no face|likeness -?[\d.]+: .+)", names[0]), names
    buttons = page.page.get_by_role("button", name="More like this one")
    assert buttons.count() == 2
    shown = page.page.locator(".facelora-headshot img").last.get_attribute("src")
    page.set_widgets({"FaceLoRAStylePack": {"first_seed": 77}})
    with page.page.expect_response(lambda answer: answer.url.endswith("/prompt")) as queued:
        buttons.last.click()
    assert server.wait(queued.value.json()["prompt_id"]).status == "success"
    page.wait_for("() => document.querySelectorAll('.facelora-headshot').length === 4")
    assert buttons.count() == 1, "not of variations"
    assert shown in page.page.locator(".facelora-headshot img").evaluate_all(
        "(all) => all.map((one) => one.getAttribute('src'))"
    )


def test_the_app_leads_from_photos_to_headshots_in_seven_actions_of_which_three_are_answers(page, server, tmp_path):
    lead_to_headshots(page, server, my_photos(tmp_path))
    page.run("() => app.extensionManager.command.execute('Comfy.ToggleLinear')")
    page.page.wait_for_timeout(1000)
    last = page.run("() => app.graph.nodes.find((node) => node.type === 'FaceLoRATrain').widgets.at(-1).name")
    assert last == "training", "nothing repeats the panel below it"


def test_the_app_states_how_long_a_run_takes_and_what_it_lacks_and_folds_what_few_people_change(page):
    page.open(workflow_file(NAMES[0]), NAMES[0])
    page.page.get_by_text("Still needed: 10 to 20 photos").wait_for()
    assert page.page.get_by_text("Strength", exact=True).count() == 0
    hidden = page.page.locator(".facelora-styles").evaluate("(cards) => cards.scrollHeight - cards.clientHeight")
    assert hidden == 0, "all ten styles are visible"
    page.page.locator(".facelora-more summary").click()
    page.page.get_by_text(re.compile(r"^Takes [\d.]+( to [\d.]+)? (s|min|h) on this machine$")).wait_for()
    recipe = page.page.get_by_label("Recipe")
    assert re.fullmatch(r"best · [\d.]+( to [\d.]+)? (s|min|h)", recipe.locator("option").last.inner_text())
    recipe.select_option("best")
    page.page.get_by_label("Strength").fill("1.1")
    page.page.get_by_label("Add to each prompt").fill("smiling")
    page.page.get_by_role("button", name="Other pictures").click()
    drawn = [node["class_type"] for node in page.prompt().values()]
    page.page.get_by_title(re.compile("A picture with one takes about a third longer")).get_by_role("checkbox").check()
    added = [node["class_type"] for node in page.prompt().values()]
    assert sorted(added) == sorted([*drawn, "FaceLoRARedraw"])
    page.page.get_by_role("textbox").nth(1).fill("")
    page.page.get_by_text("Still needed: 10 to 20 photos, a class word").wait_for()
    assert page.widgets("FaceLoRATrain")["recipe"] == "best"
    assert page.widgets("FaceLoRAApply")["strength_model"] == 1.1
    styles = page.widgets("FaceLoRAStylePack")
    assert (styles["extra"], styles["first_seed"]) == ("smiling", 1 + styles["count"])
    page.page.locator(".facelora-machine").click()
    page.page.locator(".facelora-text pre", has_text="best: ").wait_for()
    page.page.keyboard.press("Escape")
    assert page.complaints() == []


def test_the_app_tells_what_is_wrong_with_a_name_as_it_is_typed_and_why_a_run_failed(page):
    page.open(workflow_file(NAMES[0]), NAMES[0])
    name, run = page.page.get_by_role("textbox").first, page.page.get_by_role("button", name="Run").last
    for wrong, part in (("Anna: 1", "':'"), ("CON", "'CON'"), (".anna", "'.anna'")):
        name.fill(wrong)
        page.page.get_by_text(f"without {part}, which not every system allows").wait_for()
    name.fill("Anna")
    page.page.get_by_text("which not every system allows").wait_for(state="detached")
    run.click()
    failure = page.page.locator(".facelora-refused")
    failure.filter(has_text="Load Face Photos: no photos: add 10 to 20 photos of one person").wait_for()
    page.set_widgets({"FaceLoRALoadPhotos": {"folder": "my-photos"}, "FaceLoRATrain": {"settings": "nonsense = 1"}})
    run.click()
    failure.filter(has_text="unknown setting 'nonsense'").wait_for()
    # Beside the result of an earlier run, too.
    page.set_widgets({"FaceLoRATrain": {"settings": ""}})
    hear(page, prompt="ours", phase="done", file="Anna.safetensors", ended=True)
    name.fill("CON")
    page.page.locator(".facelora-line", has_text="without 'CON', which not every system allows").wait_for()
    run.click()
    failure.filter(has_text="Train Face LoRA: name 'CON'").wait_for()


def test_the_labels_of_the_app_are_in_the_language_of_comfyui(page, site, browser):
    app = workflow_file(NAMES[0])
    labels = labels_of(app)
    site.post("/settings/Comfy.Locale", "zh")
    try:
        page.reload()
        page.clear()
        page.open(app, NAMES[0])
        page.page.get_by_text("形象照数量").wait_for()
        page.page.locator(".facelora-more summary").click()
        assert [label for label in labels if page.page.get_by_text(label, exact=True).count()] == []
        assert labels_of(page.saved()) == labels_of(app), "a shared file has no Chinese labels"
    finally:
        site.post("/settings/Comfy.Locale", "en")
    other = ComfyPage(browser, site)
    other.open(json.loads(json.dumps(app).replace('"How many headshots"', '"形象照数量"')), "of an older version")
    other.page.get_by_text("How many headshots").wait_for()
    other.close()


def labels_of(graph: dict[str, Any]) -> list[str]:
    return sorted(
        one["label"] for node in graph["nodes"] for one in node["inputs"] if one.get("widget") and "label" in one
    )


def test_the_photo_check_and_the_options_are_in_chinese(page, site):
    site.post("/settings/Comfy.Locale", "zh")
    try:
        page.reload()
        page.clear()
        page.open(workflow_file(NAMES[0]), NAMES[0])
        page.set_widgets({"FaceLoRALoadPhotos": {"folder": "my-photos"}})
        headline = page.page.locator(".facelora-headline", has_text="张可用")
        headline.wait_for()
        assert not re.search("[a-z]", headline.inner_text())
        verdicts = page.page.locator(".facelora-tile img").evaluate_all("(all) => all.map((one) => one.alt)")
        assert any("几乎是同一张图片" in verdict for verdict in verdicts), verdicts
        page.page.get_by_text("经典灰色影棚").wait_for()
        page.page.get_by_text("均衡：", exact=False).first.wait_for()
        page.page.locator(".facelora-more summary").click()
        assert {"快速", "合格的照片"} <= {
            text.split(" · ")[0] for text in page.page.locator(".facelora-settings option").all_inner_texts()
        }
        for wrong, reason in (("a:b", "名称 'a:b' 不能使用：请去掉 ':'"), (200 * "名", "名称太长"), (" ", "还缺少：")):
            page.page.get_by_role("textbox").first.fill(wrong)
            page.page.locator(".facelora-line", has_text=re.compile(f"^{reason}")).wait_for()
        page.set_widgets({"FaceLoRALoadPhotos": {"folder": "(no folder)"}})
        page.page.get_by_role("button", name="运行").last.click()
        page.page.locator(".facelora-refused", has_text="没有照片：请添加").wait_for()
    finally:
        site.post("/settings/Comfy.Locale", "en")


def test_without_a_lora_templates_say_where_to_put_one(page):
    label = """(values) => app.graph.nodes.flatMap((node) => node.widgets ?? []).flatMap((one) => {
        if (one.name !== "lora_name") return []
        one.options.values = values ?? one.options.values.slice(0, 1)
        one.value = one.options.values[0]
        return one.options.getOptionLabel(one.value)
    })"""
    for name, count in (("6", 1), ("7", 2), ("Inspect", 1)):
        name = next(one for one in NAMES if one.startswith(name))
        page.open(workflow_file(name), name)
        shown = page.run(label, [] if name.startswith("Inspect") else None)
        assert shown == ["No LoRA yet. Put a file into models/loras, then press R"] * count
    page.open(workflow_file(NAMES[5]), NAMES[5])
    assert page.run(label, [CONNECTED, "anna.safetensors"]) == ["Choose a LoRA"]
    page.set_widgets({"FaceLoRAApply": {"lora_name": "anna.safetensors"}})
    (saved,) = [node["inputs"] for node in page.prompt().values() if node["class_type"] == "FaceLoRASaveHeadshots"]
    assert saved["filename_prefix"] == "headshots/anna", "the pictures of people are kept apart"


def test_two_tabs_with_the_same_app_both_show_it(page):
    for name in ("one", "two"):
        page.open(workflow_file(NAMES[0]) | {"id": "11111111-2222-3333-4444-555555555555"}, name)
        page.page.locator(".facelora-style:visible").first.wait_for()
        assert page.page.locator(".facelora-status").is_visible()


@pytest.mark.slow
def test_the_app_leads_from_photos_to_headshots_in_the_newest_frontend(newest_page, newest, tmp_path):
    lead_to_headshots(newest_page, newest, my_photos(tmp_path))


def test_the_graph_leads_from_photos_to_headshots_in_nine_actions(page, server, tmp_path):
    hands = Hands(page)
    hands.open_template()
    hands.click(page.page.get_by_role("button", name="Enter node graph"))
    page.page.wait_for_timeout(1000)
    hands.add_photos(my_photos(tmp_path))
    hands.type_into_node("FaceLoRATrain", "class_word", "woman")
    hands.choose_style()
    asked = hands.press_run(page.page.get_by_test_id("queue-button"), server)
    assert hands.actions <= 9
    assert asked["FaceLoRATrain"]["class_word"] == "woman"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if "MOSS" not in name])  # which ComfyUI 0.30 lacks
def test_a_workflow_runs(name, page, server, lora, request):
    workflow = workflow_file(name)
    if "UNETLoader" in types(workflow):
        request.getfixturevalue("flows")
        page.reload()
        page.clear()
    page.open(workflow, name)
    assert page.complaints() == []
    page.set_widgets(QUICK)
    for node_type in {"FaceLoRAApply", "FaceLoRAPerson"} & set(types(workflow)):
        page.set_widgets({node_type: {"lora_name": lora}})  # where one is connected it stays without effect
    result = server.wait(page.queue(), 900)
    assert result.status == "success", result.error + result.log
    assert "not loaded" not in result.log
    assert page.complaints() == []
    shown = [image for output in result.outputs.values() for image in output.get("images", ())]
    assert shown or name == "Inspect and convert a LoRA"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=NAMES)
def test_a_workflow_file_has_the_planned_nodes(workflow):
    graph = workflow_file(workflow.name)
    planned = [one for step in workflow.steps for node in step.nodes for one in node.flat]
    assert sorted(types(graph)) == sorted([node.type for node in planned] + ["MarkdownNote"] * len(workflow.steps))
    assert not {"PreviewImage", "SaveImage"} & {*types(graph)}, "they don't mark pictures as drawn"
    assert (FOLDER / f"{workflow.name}.jpg").exists()


def test_drawing_headshots_is_a_node_that_comfyui_offers(page, server):
    offered = {entry["name"]: key for key, entry in server.get("/global_subgraphs").items()
               if entry["info"]["node_pack"].endswith(PACK_NAME)}  # fmt: skip
    assert sorted(offered) == sorted(file.stem for file in BLUEPRINTS.glob("*.json"))
    page.open(json.loads(server.get(f"/global_subgraphs/{offered['Draw headshots']}")["data"]), "blueprint")
    (node,) = page.run("() => app.graph.nodes.map((node) => node.inputs.map((input) => input.label ?? input.name))")
    assert {"model", "clip", "vae", "photos", "prompts", "negatives", "seeds", "steps"} <= set(node)
    assert page.complaints() == []


def test_the_template_browser_lists_them_with_square_pictures(server):
    assert sorted(server.get("/api/workflow_templates")[PACK_NAME]) == sorted(NAMES)
    for name in NAMES:
        preview = Image.open(io.BytesIO(server.read(f"/api/workflow_templates/{PACK_NAME}/{quote(name)}.jpg")))
        assert preview.width == preview.height
