"""The nodes under a user's hands, in both designs of ComfyUI's frontend."""

import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from core.pictures.style_pack import find_style_packs
from tests.tooling import write_photos
from tools.page_pictures import write_drawn_photos
from tools.workflows import BUILD, SD15, SDXL

PHOTOS, STYLES, TRAIN = "FaceLoRALoadPhotos", "FaceLoRAStylePack", "FaceLoRATrain"


def node(key: str, node_type: str, widgets: dict, links: dict) -> dict:
    """A node for BUILD."""
    return {"key": key, "type": node_type, "widgets": widgets, "links": links, "title": "", "height": 0, "models": []}


def basenames(page) -> list[str]:
    return [name.rpartition("/")[2] for name in page.widgets(PHOTOS)["pictures"].split("\n")]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three pictures and a text."""
    made = [tmp_path / f"holiday {number}.png" for number in range(3)]
    for number, file in enumerate(made):
        Image.new("RGB", (300, 200), (80 * number, 90, 120)).save(file)
    (tmp_path / "notes.txt").write_text("no picture")
    return [*made, tmp_path / "notes.txt"]


def test_several_pictures_dropped_on_load_face_photos_are_its_photos(either_page, server, files):
    page = either_page
    page.add(PHOTOS)
    page.drop(PHOTOS, files)
    page.wait_for("() => document.querySelectorAll('.facelora-tile').length === 3")
    page.wait_for(
        "() => [...document.querySelectorAll('.facelora-tile img')].every((image) => image.naturalWidth === 160)"
    )
    (queued,) = page.prompt().values()
    names = queued["inputs"]["pictures"].split("\n")
    (folder,) = {name.rpartition("/")[0] for name in names}
    assert folder.startswith("photos/")
    # ComfyUI writes the graph into saved pictures: it says no file's own name.
    kept = [f"photo {number:02}.png" for number in (1, 2, 3)]
    assert basenames(page) == kept == sorted(file.name for file in (server.folder / "input" / folder).glob("*.png"))
    assert "holiday 0.png" in page.run("() => document.querySelector('.facelora-tile').title")
    page.wait_for(  # it is uploaded last
        "() => document.querySelector('.facelora-refused').innerText.startsWith('✕ notes.txt: not a photo')"
    )
    Image.new("RGB", (300, 200)).save(files[0].with_name("another.webp"))
    page.drop(PHOTOS, [files[0], files[0].with_name("another.webp")])  # the first is there already
    page.wait_for("() => document.querySelectorAll('.facelora-tile').length === 4")
    assert basenames(page) == [*kept, "photo 04.webp"]

    for tile in (3, 1):
        with page.page.expect_response(lambda answer: answer.request.method == "DELETE"):
            page.page.locator(".facelora-tile button").nth(tile).click(force=True)
    assert page.widgets(PHOTOS)["pictures"].split("\n") == [names[0], names[2]]
    left = sorted(file.name for file in (server.folder / "input" / folder).glob("photo *.*"))
    assert left == ["photo 01.png", "photo 03.png"], "no training run has the removed ones"
    page.open(page.saved(), "again")
    page.wait_for("() => document.querySelectorAll('.facelora-tile').length === 2")
    page.page.click(".facelora-remove-all")
    page.page.get_by_role("button", name="Keep the files").click()
    assert page.widgets(PHOTOS)["pictures"] == ""
    page.set_widgets({PHOTOS: {"folder": folder}})  # it can be chosen again
    assert folder in page.run("() => app.graph.nodes[0].widgets.find((one) => one.name === 'folder').options.values")
    assert page.complaints() == []
    shutil.rmtree(server.folder / "input" / folder)  # for the other design


def test_a_tile_shows_the_verdict_on_its_photo_and_the_node_one_headline(either_page, server):
    page = either_page
    folder = server.folder / "input" / "ines"
    if not folder.exists():
        photos = write_drawn_photos(folder)
        photos[-1].unlink()  # somebody else's
        Image.open(photos[4]).filter(ImageFilter.GaussianBlur(4)).save(photos[4])
    page.reload()
    page.clear()
    nodes = [
        node("photos", PHOTOS, {"folder": "ines"}, {}), node("shown", "PreviewAny", {}, {"source": "photos.report"}),
    ]  # fmt: skip
    page.run(BUILD, [{"title": "", "note": "", "width": 400, "nodes": nodes}])
    assert server.wait(page.queue()).status == "success"
    page.wait_for("() => document.querySelectorAll('.facelora-rejected').length === 1")
    assert page.page.locator(".facelora-rejected .facelora-word").inner_text() == "✕ left out"
    name, _, reasons = (page.page.get_attribute(".facelora-rejected", "title") or "").partition("\n")
    assert name == "4.png" and "the face is blurred" in reasons
    assert page.page.locator(".facelora-headline").inner_text().startswith("7 of 8 usable, too few to measure")
    assert page.complaints() == []


def test_the_reason_why_a_node_failed_is_shown_on_the_page(page, server):
    nodes = [node("photos", PHOTOS, {}, {}), node("shown", "PreviewAny", {}, {"source": "photos.report"})]
    page.run(BUILD, [{"title": "", "note": "", "width": 400, "nodes": nodes}])
    assert server.wait(page.queue()).status == "error"
    page.wait_for("() => document.querySelector('.p-toast-message')")
    (message,) = page.toasts()
    assert message == "Load Face Photos\nno photos: add 10 to 20 photos of one person, or choose a folder of them"


def test_pictures_of_a_dropped_folder_become_photos_and_masks_stay_masks(page, server, files):
    Image.new("L", (300, 200), 255).save(files[1].with_name("holiday 1-masklabel.png"))
    page.add(PHOTOS)
    page.drop(PHOTOS, [files[0].parent])
    page.wait_for("() => document.querySelector('.facelora-quiet').textContent === '3 added'")
    assert sorted(basenames(page)) == [f"photo {number:02}.png" for number in (1, 2, 3)]
    titles = page.page.locator(".facelora-tile").evaluate_all("(all) => all.map((one) => one.title)")
    masked = page.widgets(PHOTOS)["pictures"].split("\n")[titles.index("holiday 1.png")]
    assert (server.folder / "input" / masked.replace(".png", "-masklabel.png")).exists()
    assert page.complaints() == []


def mixed(folder: Path) -> list[Path]:
    """Three photos of one person and three of another."""
    return [
        file
        for person in (2, 5)
        for file in sorted(write_photos(folder / str(person), count=3, scale=2, person=person).glob("*.png"))
    ]


def photos_and_training(page, **widgets) -> None:
    """A checkpoint, Load Face Photos and Train Face LoRA, connected."""
    links = {"model": "base.MODEL", "clip": "base.CLIP", "vae": "base.VAE", "photos": "photos.photos"}
    steps = [[node("base", "CheckpointLoaderSimple", {"ckpt_name": SD15["name"]}, {}),
              node("photos", PHOTOS, {}, {"model": "base.MODEL"})], [node("train", TRAIN, widgets, links)]]  # fmt: skip
    page.run(BUILD, [{"title": "", "note": "", "width": 400, "nodes": nodes} for nodes in steps])


def test_dropped_photos_are_checked_before_a_run_and_all_is_there_after_f5(page, tmp_path):
    photos_and_training(page, name="Gerda", resolution=64)
    files = sorted(write_photos(tmp_path / "mine", count=6, scale=2, person=37).glob("*.png"))
    (tmp_path / "mine" / "garbage.jpg").write_bytes(b"no picture")
    page.drop(PHOTOS, [*files, tmp_path / "mine" / "garbage.jpg"])
    page.wait_for("() => document.querySelector('.facelora-headline').textContent.startsWith('6 of 6 usable')")
    assert (
        page.page.locator(".facelora-refused:not(:empty)").inner_text() == "✕ garbage.jpg: this picture cannot be read"
    )
    assert page.widgets(PHOTOS)["pictures"].startswith("photos/Gerda/photo 01.png\n")
    for resolution, usable in ((1024, 0), (64, 6)):  # they are checked again for another resolution
        page.set_widgets({TRAIN: {"resolution": resolution}})
        page.wait_for(
            f"() => document.querySelector('.facelora-headline').textContent.startsWith('{usable} of 6 usable')"
        )
    with page.page.expect_request("**/facelora/check") as checked, page.page.expect_request("**/facelora/recipe?*"):
        page.set_widgets({"CheckpointLoaderSimple": {"ckpt_name": SDXL["name"]}})
    assert checked.value.post_data_json["base"] == SDXL["name"]
    page.set_widgets({"CheckpointLoaderSimple": {"ckpt_name": SD15["name"]}})
    page.page.wait_for_timeout(1500)  # the frontend writes its draft
    page.reload()
    page.wait_for("() => document.querySelector('.facelora-headline')?.textContent.startsWith('6 of 6 usable')")
    titles = page.page.locator(".facelora-tile").evaluate_all("(all) => all.map((one) => one.title.split('\\n')[0])")
    assert titles == [f"{number}.png" for number in range(6)]
    assert page.complaints() == []


def test_the_captions_of_photos_are_read_and_edited_below_them(either_page, server, tmp_path):
    page = either_page
    name = f"Frieda{page.run('() => Number(LiteGraph.vueNodesMode)')}"
    photos_and_training(page, name=name, resolution=64)
    page.drop(PHOTOS, sorted(write_photos(tmp_path, count=2, scale=2, person=37).glob("*.png")))
    page.wait_for("() => document.querySelector('.facelora-headline').textContent.startsWith('2 of 2 usable')")
    page.set_widgets({TRAIN: {"checkpoint": 250}})
    page.page.get_by_text("Captions", exact=True).click()
    caption = page.page.get_by_label("Caption").first
    assert (caption.get_attribute("placeholder"), caption.input_value()) == ("a photo of sks person", "")
    caption.fill("a photo with a red hat")
    caption.press("Tab")
    page.page.get_by_text("The trigger word sks is missing").wait_for()
    assert (server.folder / "input" / "photos" / name / "photo 01.txt").read_text() == "a photo with a red hat"
    assert page.widgets(TRAIN)["checkpoint"] == 0, "another LoRA will be trained"
    page.open(page.saved(), "again")
    page.wait_for("() => document.querySelector('.facelora-headline').textContent.startsWith('2 of 2 usable')")
    page.page.get_by_text("Captions", exact=True).click()
    assert caption.input_value() == "a photo with a red hat"
    for _ in range(2):
        with page.page.expect_response(lambda answer: answer.request.method == "DELETE"):
            page.page.locator(".facelora-tile button").first.click()
    page.drop(PHOTOS, sorted(write_photos(tmp_path, count=1, scale=2, person=36).glob("0.png")))
    page.wait_for("() => document.querySelector('.facelora-headline').textContent.startsWith('1 of 1 usable')")
    assert caption.input_value() == "", "another photo has the number of the deleted one"
    assert page.complaints() == []


def test_photos_removed_during_the_check_get_no_headline(page, files):
    held = []
    page.page.route("**/facelora/check", lambda route: held.append(route), times=1)
    page.add(PHOTOS)
    page.set_widgets({PHOTOS: {"check": True}})
    page.drop(PHOTOS, files[:3])
    while not held:
        page.page.wait_for_timeout(50)
    page.page.click(".facelora-remove-all")
    with page.page.expect_response(lambda answer: answer.request.method == "DELETE") as deleted:
        page.page.get_by_role("button", name="Delete the files").click()
    # A mask that another test has dropped for one of the same photos is deleted with it.
    assert len([name for name in deleted.value.json()["deleted"] if "masklabel" not in name]) == 3
    with page.page.expect_response("**/facelora/check"):
        held[0].continue_()
    page.page.wait_for_timeout(300)
    assert page.page.locator(".facelora-headline").inner_text() == ""


def test_a_deleted_persons_photo_is_not_shown_for_the_next_of_that_name(page, server, files):
    page.add(PHOTOS)
    page.drop(PHOTOS, files[:1])
    page.wait_for("() => document.querySelector('.facelora-tile img')?.naturalWidth === 160")
    name = page.widgets(PHOTOS)["pictures"]
    shutil.rmtree((server.folder / "input" / name).parent)
    gone = f"() => document.dispatchEvent(new CustomEvent('facelora.deleted', {{ detail: ['input/{name}'] }}))"
    page.run(gone)
    page.wait_for("() => document.querySelectorAll('.facelora-tile').length === 0")
    Image.new("RGB", (200, 300)).save(files[1])
    page.drop(PHOTOS, files[1:2])
    page.wait_for("() => document.querySelector('.facelora-tile img')?.naturalWidth === 107")
    assert page.widgets(PHOTOS)["pictures"] == name


def test_run_asks_which_person_where_the_photos_show_two(page, server, tmp_path):
    photos_and_training(page, name="Hilde", resolution=64, steps=1, samples=0)
    page.drop(PHOTOS, mixed(tmp_path / "two"))
    page.wait_for("() => document.querySelector('.facelora-says-rejected.facelora-headline')")
    assert (
        page.page.locator(".facelora-headline")
        .inner_text()
        .startswith("different people: person 1 on 3 photos, person 2")
    )
    words = page.page.locator(".facelora-tile .facelora-word").all_inner_texts()
    assert words == ["person 1"] * 3 + ["person 2"] * 3
    page.run("() => { window.app.queuePrompt(0) }")
    dialog = page.page.locator(".facelora-dialog[open]")
    dialog.get_by_role("button", name="Cancel").click()
    assert server.get("/queue")["queue_running"] == [], "nothing was queued"
    page.run("() => { window.app.queuePrompt(0) }")
    with page.page.expect_response(lambda answer: answer.url.endswith("/prompt")) as answered:
        dialog.get_by_role("button", name="Keep only these").nth(1).click()
    assert page.widgets(PHOTOS)["pictures"].count("photo") == 2 * 3
    assert server.wait(answered.value.json()["prompt_id"]).status == "success"


def test_one_photo_is_trained_on_and_the_page_says_what_cannot_be_known(page, server, tmp_path):
    photos_and_training(page, name="Ilse", resolution=64, steps=1, samples=0)
    page.drop(PHOTOS, sorted(write_photos(tmp_path / "one", count=1, scale=2, person=36).glob("*.png")))
    page.wait_for("() => /^1 of 1 usable, too few to measure likeness; add /.test("
                  "document.querySelector('.facelora-says-doubtful.facelora-headline')?.textContent)")  # fmt: skip
    assert server.wait(page.queue()).status == "success"
    page.wait_for(
        "() => [...document.querySelectorAll('.facelora-warning')].some("
        "(one) => one.textContent.startsWith('1 photo is too few to hold any out: likeness is not measured'))"
    )
    assert page.complaints() == []


def test_run_asks_nothing_about_mixed_photos_where_training_is_muted(page, server, tmp_path):
    photos_and_training(page, name="Helga")
    page.drop(PHOTOS, mixed(tmp_path / "two"))
    page.wait_for("() => document.querySelector('.facelora-says-rejected.facelora-headline')")
    page.run("() => { app.graph.nodes.find((one) => one.type === 'FaceLoRATrain').mode = LiteGraph.NEVER }")
    assert server.wait(page.queue()).status == "success"


def test_mixed_photos_are_an_error_on_the_server_unless_it_is_overruled(page, server, tmp_path):
    photos_and_training(page, name="Ida", resolution=64, steps=1, samples=0, settings="batch_size = 1")
    page.drop(PHOTOS, mixed(tmp_path / "two"))
    page.wait_for("() => document.querySelector('.facelora-says-rejected.facelora-headline')")
    graph = page.prompt()
    result = server.run(graph)
    assert "different people: person 1 on 3 photos, person 2 on 3 photos" in result.error
    assert "To train on all photos anyway: choose 'all photos' instead of 'good photos' in Train on" in result.error
    page.run("() => { window.app.queuePrompt(0) }")
    with page.page.expect_response(lambda answer: answer.url.endswith("/prompt")) as answered:
        page.page.locator(".facelora-dialog[open]").get_by_role("button", name="Train on all").click()
    assert server.wait(answered.value.json()["prompt_id"]).status == "success"


def test_a_checkpoint_is_forgotten_when_photos_or_settings_change(page, files):
    photos_and_training(page, name="Jutta")
    for change in (
        lambda: page.drop(PHOTOS, files[:1]),
        lambda: page.set_widgets({TRAIN: {"class_word": "woman"}}),
    ):
        page.set_widgets({TRAIN: {"checkpoint": 250}})
        change()
        page.wait_for("() => app.graph.nodes.find((one) => one.type === 'FaceLoRATrain').widgets"
                      ".find((one) => one.name === 'checkpoint').value === 0")  # fmt: skip
    page.set_widgets({TRAIN: {"checkpoint": 250}})
    page.open(page.saved(), "again")
    assert page.widgets(TRAIN)["checkpoint"] == 250, "opening a file changes nothing"


def test_styles_of_another_pack_are_forgotten_when_the_pack_is_changed(page):
    page.add(STYLES)
    page.set_widgets({STYLES: {"styles": find_style_packs().pick("corporate").names[0]}})
    page.set_widgets({STYLES: {"pack": "outdoor"}})
    page.wait_for("() => document.querySelector('[data-name=Seaside]')")
    assert page.widgets(STYLES)["styles"] == ""


def test_pictures_chosen_with_the_button_are_added_to_those_that_are_there(page, files):
    page.add(PHOTOS)
    for chosen in (files[:1], files[1:3]):
        with page.page.expect_file_chooser() as chooser:
            page.page.click(".facelora-add")
        chooser.value.set_files(chosen)
        page.wait_for(f"() => document.querySelectorAll('.facelora-tile').length >= {len(chosen)}")
    page.wait_for("() => document.querySelectorAll('.facelora-tile').length === 3")
    assert basenames(page) == [f"photo {number:02}.png" for number in (1, 2, 3)]
    assert len({name.rpartition("/")[0] for name in page.widgets(PHOTOS)["pictures"].split("\n")}) == 1
    with page.page.expect_file_chooser() as chooser:
        page.page.click(".facelora-add")
    chooser.value.set_files(files[:1])
    page.page.get_by_text(f"{files[0].name} was already added").wait_for()
    assert page.page.locator(".facelora-tile").count() == 3


def test_styles_are_chosen_by_their_pictures(either_page):
    page = either_page
    page.add(STYLES)
    names = find_style_packs().pick("corporate").names
    page.wait_for(f"() => document.querySelectorAll('.facelora-style').length === {len(names)}")
    page.wait_for(
        "() => [...document.querySelectorAll('.facelora-style img')].every((image) => image.naturalWidth > 0)"
    )
    for name in (names[2], names[0]):
        page.page.click(f'[data-name="{name}"]')
    assert page.widgets(STYLES)["styles"] == f"{names[2]}, {names[0]}"
    page.page.click(f'[data-name="{names[2]}"]')
    assert page.widgets(STYLES)["styles"] == names[0]
    assert page.page.locator(".facelora-style[aria-pressed=true]").get_attribute("data-name") == names[0]
    assert (
        page.run("""() => {
        const grid = document.querySelector(".facelora-styles"), end = grid.getBoundingClientRect().bottom
        return [...grid.children].map((card) => card.getBoundingClientRect())
            .filter(({ top, bottom }) => top < end - 1 && bottom > end + 1).length
    }""")
        == 0
    ), "no row is cut"

    page.set_widgets({STYLES: {"pack": "outdoor", "styles": ""}})
    page.wait_for("() => document.querySelector('[data-name=Seaside]')")
    assert page.page.locator(".facelora-dim").count() == 0, "all are drawn where none is named"
    assert page.complaints() == []


def test_a_node_still_describes_its_lora_when_it_is_not_run_again(either_page, server, lora):
    page = either_page
    nodes = [
        node("base", "CheckpointLoaderSimple", {"ckpt_name": SD15["name"]}, {}),
        node("apply", "FaceLoRAApply", {"lora_name": lora}, {"model": "base.MODEL"}),
        node("shown", "PreviewAny", {}, {"source": "apply.prompt"}),
        node("inspect", "FaceLoRAInspect", {"lora_name": lora}, {}),
    ]
    page.run(BUILD, [{"title": "", "note": "", "width": 400, "nodes": nodes}])
    graph = page.saved()
    page.open(graph, "what-it-is")

    def is_shown() -> bool:
        texts = page.page.locator(".facelora-result-text").all_inner_texts()
        return [f"{lora}: sd15, rank 4\ntrigger phrase: sks person" in text for text in texts] == [True, False] and (
            "arXiv:2106.09685" in texts[1]
        )

    assert server.wait(page.queue()).status == "success"
    page.page.wait_for_timeout(500)
    assert is_shown()

    page.clear()  # another tab, and back
    page.page.get_by_text("what-it-is").first.click()
    page.page.wait_for_timeout(1000)
    assert is_shown()

    page.reload()
    page.clear()
    page.open(graph, "again")
    result = server.wait(page.queue())
    assert len(result.cached) == 4
    page.page.wait_for_timeout(500)
    assert is_shown()

    page.page.click(".facelora-about")
    page.page.locator(".facelora-text[open]", has_text="arXiv:2106.09685").wait_for()
    assert page.complaints() == []


def test_a_node_in_a_subgraph_still_describes_its_lora_after_its_tab_is_reopened(page, server, lora):
    nodes = [node(key, "FaceLoRAInspect", {"lora_name": lora}, {}) for key in ("outside", "inside")]
    page.run(BUILD, [{"title": "", "note": "", "width": 400, "nodes": nodes}])
    page.run("() => { app.graph.convertToSubgraph(new Set([app.graph.nodes.at(-1)])) }")
    page.open(page.saved(), "subgraph")
    shown = """() => app.graph.nodes.flatMap((node) => node.subgraph?.nodes ?? [node])
        .map((node) => node.widgets.find(({ name }) => name === "result_text").element.textContent.includes("sks person"))"""
    both = f"() => String(({shown})()) === 'true,true'"
    assert page.run(shown) == [False, False]
    assert server.wait(page.queue()).status == "success"
    page.wait_for(both)

    page.clear()  # another tab, and back
    page.page.get_by_text("subgraph").first.click()
    page.wait_for(both)
    assert page.problems == []


def test_group_portrait_shows_what_is_read_in_which_place_and_takes_braces_as_they_are(page, server, lora):
    nodes = [
        node("base", "CheckpointLoaderSimple", {"ckpt_name": SD15["name"]}, {}),
        node("anna", "FaceLoRAPerson", {"lora_name": lora}, {}),
        node("group", "FaceLoRAGroup", {"prompt": "{anna} at home"},
             {"model": "base.MODEL", "clip": "base.CLIP", "people.person0": "anna.person"}),
        node("saved", "SaveLatent", {}, {"samples": "group.latent"}),
    ]  # fmt: skip
    page.run(BUILD, [{"title": "", "note": "", "width": 400, "nodes": nodes}])
    result = server.wait(page.queue())
    assert result.status == "success", result.error
    page.wait_for(
        "() => document.querySelector('.facelora-result-text')?.textContent.includes('scene: person at home')"
    )
    assert "anna: sks person at home" in (page.page.text_content(".facelora-result-text") or "")
    assert page.complaints() == []


@pytest.mark.parametrize(("language", "word"), [("en", "Recipes"), ("zh", "预设")])
def test_the_help_of_a_node_is_shown_in_the_language_of_comfyui_without_a_request_in_vain(page, site, language, word):
    site.post("/settings/Comfy.Locale", language)
    try:
        page.reload()
        page.clear()
        page.add(TRAIN)
        answers = []
        page.page.on("response", lambda answer: "/docs/" in answer.url and answers.append((answer.url, answer.status)))
        page.run("() => { app.canvas.selectNode(app.graph.nodes[0]); app.canvas.centerOnNode(app.graph.nodes[0]) }")
        page.page.get_by_test_id("info-button").click()
        page.page.get_by_role("heading", name=word, exact=True).wait_for()
        picture = f"images/{TRAIN}.jpg"
        page.wait_for(f"() => [...document.images].some((one) => one.src.endsWith('/{picture}') && one.naturalWidth)")
        asked = [(url.rpartition("/docs/")[2], status) for url, status in answers]
        assert asked == [(f"{TRAIN}/{language}.md", 200), (picture, 200)]
        assert page.complaints() == []
    finally:
        site.post("/settings/Comfy.Locale", "en")
