"""Takes the pictures that show ComfyUI, in `docs/images/` and `web/docs/images/`: `python -m tools.page_pictures`.

The app of the first workflow is gone through on the demo's base model, with the recipe that this base brings along. No photo of
a person may be seen in the pictures: the photos are faces that the base has drawn, on `docs/demo.png`.
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from core.demo import BASE_FILE, FOLDER, PICTURE_SIZE, STYLE_PACK
from tests.browser.page import SIZE, ComfyPage, prepare, running_browser
from tests.browser.test_workflows import Hands
from tests.comfyui.server import PACK, TEST_PACK, running_server
from tests.tooling import write_in_16_bits

IMAGES, HELP_IMAGES = PACK / "docs" / "images", PACK / "web" / "docs" / "images"
PERSON, SOMEONE_ELSE = 284, 498
"""Upper edge of two rows of `docs/demo.png`, in pixels: a person whom the base has learnt, and other people."""
RECIPE = {
    "FaceLoRATrain": {
        "steps": 300,
        "rank": 16,
        "learning_rate": 3e-3,
        "resolution": 72,
        "settings": "batch_size = 4\ntargets = 'transformer+conv'\nprior_loss_weight = 2.0\nmin_snr_gamma = 0.0\n"
        "sample_guidance = 2.5\nsample_steps = 10",
    },
    "FaceLoRAApply": {"strength_model": 1.0, "strength_clip": 1.0},
    "FaceLoRAStylePack": {"pack": STYLE_PACK},
}
"""What the demo's base brings along as "balanced", for nodes that see an SD1.5."""
DRAWN = {"width": 2 * PICTURE_SIZE[0], "height": 2 * PICTURE_SIZE[1]}
"""What is typed into Draw headshots, in place of what the style pack has for an SD1.5. The base has half as many
pixels a latent."""
PATIENCE = 3 * 3600
"""Seconds for the run, which takes minutes where nothing else is running."""
HALFWAY = """() => {
    const status = document.querySelector(".facelora-status").textContent
    return Number(/step (\\d+) of .*likeness/.exec(status)?.[1]) >= 150
}"""
TYPE_SIZE = """(sizes) => {
    const node = app.graph.nodes.find((node) => node.title === "Draw headshots")
    for (const [name, value] of Object.entries(sizes)) {
        node.disconnectInput(node.inputs.findIndex((input) => input.name === name))
        node.widgets.find((widget) => widget.name === name).value = value
    }
}"""
LOOK_AT = """(type) => {
    const node = app.graph.nodes.find((node) => node.type === type)
    const { ds } = app.canvas
    ds.scale = 1
    ds.offset = [200 - node.pos[0], 100 - node.pos[1]]
    app.canvas.setDirty(true, true)
    return { x: 190, y: 60, width: node.size[0] + 20, height: node.size[1] + 50 }
}"""
HELP = ("FaceLoRALoadPhotos", "FaceLoRATrain", "FaceLoRAApply", "FaceLoRAStylePack")
"""Nodes with a picture in their help page."""


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(comfy_folder(Path(folder))) as server,
        running_browser() as browser,
    ):
        prepare(server)
        page = ComfyPage(browser, server)
        prompt = press_run(page, write_drawn_photos(Path(folder) / "photos"))
        page.wait_for(HALFWAY, PATIENCE)
        change_view(page)
        page.page.set_viewport_size({"width": 1280, "height": 1300})
        page.run(LOOK_AT, "FaceLoRATrain")
        save(page, "panel", ".facelora-panel:has(.facelora-status)")
        page.page.set_viewport_size(SIZE)  # pyright: ignore
        change_view(page)
        result = server.wait(prompt, PATIENCE)
        assert result.status == "success", result.error
        page.wait_for("() => [...document.images].some((one) => one.src.includes('my-face_00001'))")
        save(page, "app")
        change_view(page)
        page.run("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        save(page, "graph")
        page.page.set_viewport_size({"width": 1280, "height": 2000})
        for node in HELP:
            clip = page.run(LOOK_AT, node)
            page.page.wait_for_timeout(2000)
            page.page.screenshot(path=HELP_IMAGES / f"{node}.jpg", quality=85, clip=clip)


def comfy_folder(folder: Path) -> Path:
    """The folder of a server whose one checkpoint, and one more style pack, are the demo's."""
    for name in ("models/checkpoints", "models/loras", "models/style_packs", "custom_nodes"):
        (folder / name).mkdir(parents=True)
    write_in_16_bits(BASE_FILE, folder / "models" / "checkpoints" / "demo-base.safetensors")
    (folder / "models" / "style_packs" / "demo.json").symlink_to(FOLDER / "demo.json")
    (folder / "custom_nodes" / TEST_PACK.name).symlink_to(TEST_PACK)
    return folder


def write_drawn_photos(folder: Path) -> list[Path]:
    """Eight pictures of one person and one of somebody else, with grain as photos have it."""
    folder.mkdir()
    sheet, grain = Image.open(PACK / "docs" / "demo.png").convert("RGB"), np.random.default_rng(1)
    places = [*((PERSON, number) for number in range(8)), (SOMEONE_ELSE, 4)]
    for number, (top, place) in enumerate(places):
        left = 8 + 136 * place
        face = sheet.crop((left, top, left + 128, top + 160)).resize((400, 500), Image.Resampling.LANCZOS)
        photo = np.asarray(face) + grain.normal(0, 10, (500, 400, 1))
        Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return sorted(folder.glob("*.png"))


def press_run(page: ComfyPage, photos: list[Path]) -> str:
    """The id of the prompt, once the first template is open, filled in and queued."""
    hands = Hands(page)
    hands.find_template()
    save(page, "templates", "[role=dialog]")
    page.reload()
    hands.open_template()
    hands.add_photos(photos)
    hands.type(page.page.get_by_role("textbox").nth(1), "woman")
    page.set_widgets(RECIPE)
    page.run(TYPE_SIZE, DRAWN)
    with page.page.expect_response(lambda answer: answer.url.endswith("/prompt")) as queued:
        hands.click(page.page.get_by_role("button", name="Run").last)
    return queued.value.json()["prompt_id"]


def change_view(page: ComfyPage) -> None:
    """From the app to the graph, or back."""
    page.run("() => app.extensionManager.command.execute('Comfy.ToggleLinear')")
    page.page.wait_for_timeout(1000)
    page.run("() => app.canvas.deselectAll()")


def save(page: ComfyPage, name: str, part: str = "body") -> None:
    """Writes a picture of a part of the page, by its selector."""
    page.page.wait_for_timeout(2000)
    page.page.locator(part).first.screenshot(path=IMAGES / f"{name}.jpg", quality=85)


if __name__ == "__main__":
    main()
