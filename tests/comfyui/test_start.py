"""How the pack starts: quickly, from any folder, beside other packs."""

import re

import pytest

from .graphs import load_photos, node, training
from .server import running_server

pytestmark = pytest.mark.comfyui

OTHER_PACK = """
import os, sys
sys.path.insert(0, os.path.dirname(__file__))
import core, nodes_of_other, utils_of_other
assert core.OWNER == nodes_of_other.OWNER == utils_of_other.OWNER == "other"
NODE_CLASS_MAPPINGS = {}
"""


def test_the_pack_starts_fast_in_a_folder_of_any_name_beside_a_pack_with_a_core_of_its_own(comfy_folder, tmp_path):
    other = tmp_path / "custom_nodes" / "a-pack-with-core"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text(OTHER_PACK)
    for name in ("core", "nodes_of_other", "utils_of_other"):
        (other / f"{name}.py").write_text("OWNER = 'other'\n")
    for name in ("models", "input"):
        (tmp_path / name).symlink_to(comfy_folder / name, target_is_directory=True)
    pack_name = "Gesichter für ComfyUI (v1.0)"
    with running_server(tmp_path, pack_name=pack_name) as server:
        nodes = server.get("/object_info")
        assert {name for name in nodes if name.startswith("FaceLoRA")} >= {"FaceLoRATrain", "FaceLoRAApply"}
        log = server.log()
        seconds = re.search(r"([\d.]+) seconds: \S*.*" + re.escape(pack_name), log)
        assert seconds, log
        assert float(seconds[1]) < 0.6  # about 0.1 s on a free core; the test machine may be busy
        assert "IMPORT FAILED" not in log
        refusal = server.refusal(training(settings="rnak = 1"))
        assert "rnak" in refusal
        show = {"show": node("PreviewAny", source=["photos", 3])}
        photos = {"photos": load_photos("anna", strict=True)}
        result = server.run(photos | show)
        assert result.status == "success", result.error
