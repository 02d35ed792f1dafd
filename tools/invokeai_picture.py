"""Takes the picture of `docs/invokeai.md`: `python -m tools.invokeai_picture`, which takes some minutes.

The form is gone through on the demo's base model. No photo of a person may be seen: the photos are faces that the base has
drawn, as in the pictures of ComfyUI.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from core.demo import FOLDER
from tests.browser.page import running_browser
from tests.invokeai.form import Form, change_workflow
from tests.invokeai.server import REPOSITORY, running_server
from tests.invokeai.wide_base import write_wide_base
from tools.page_pictures import write_drawn_photos

PICTURE = REPOSITORY / "docs" / "images" / "invokeai.jpg"
BASE = "Small faces"
VALUES = {
    "train": {
        "steps": 100,
        "settings": "rank = 16\nlearning_rate = 3e-3\nresolution = 72\nbatch_size = 4\ntargets = 'transformer+conv'\n"
        "prior_loss_weight = 2.0\nmin_snr_gamma = 0.0\nsample_guidance = 2.5\nsample_steps = 10",
    },
    "headshots": {"resolution": 72, "count": 8},
}
"""What suits the demo's base, of which InvokeAI sees an SD1.5."""


def main() -> None:
    with tempfile.TemporaryDirectory() as name, running_browser() as browser:
        folder = Path(name)
        root, clone = folder / "root", folder / "ComfyUI-FaceLoRA"
        (root / "style_packs").mkdir(parents=True)
        shutil.copy(FOLDER / "demo.json", root / "style_packs")
        subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
        with running_server(root) as server:
            server.install_pack(clone)
            server.add_model(write_wide_base(folder / "base"), BASE)
            change_workflow(server, VALUES)
            form = Form(browser, server)
            form.add_photos(write_drawn_photos(folder / "photos"))
            form.choose_model(BASE)
            form.choose_styles("What the demo's base model knows")
            form.page.get_by_role("textbox").first.fill("woman")
            form.invoke()
            server.wait_for(lambda: server.call("GET", "/api/v1/queue/default/status")["queue"]["completed"] == 1)
            form.page.get_by_role("tab", name="Images").or_(form.page.get_by_text("Images/Videos")).first.click()
            form.page.mouse.move(700, 780)
            form.page.wait_for_timeout(5000)
            form.page.screenshot(path=PICTURE, type="jpeg", quality=80)


if __name__ == "__main__":
    main()
