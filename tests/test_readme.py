"""What the README tells its readers to type, typed."""

import json
import re
import runpy
from pathlib import Path

from PIL import Image

from core.lora.file import LoraFile
from core.models.recipe import RECIPES_KEY
from core.storage.safetensors_file import SafetensorsFile, copy_with_metadata
from tests.tooling import write_photos

README = Path(__file__).parent.parent / "README.md"


def test_the_python_of_the_readme_runs(tmp_path, small_sd15, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    # The same code on small numbers: those of the training are the base's own.
    short, changed = re.subn(r"negative=", "size=(64, 64), steps=2, negative=", code)
    assert changed == 1
    recipe = {"photos": 2, "rate": 1e-3, "rank": 4, "settings": {"resolution": 64}}
    metadata = {RECIPES_KEY: json.dumps({"balanced": recipe})}
    copy_with_metadata(SafetensorsFile.open(small_sd15), tmp_path / "sd15.safetensors", metadata)
    write_photos(tmp_path / "photos", count=5)
    (tmp_path / "readme.py").write_text(short, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("readme.py", run_name="__main__")
    assert LoraFile.read(tmp_path / "me.safetensors").metadata["ss_steps"] == "2"
    for seed in range(4):
        with Image.open(tmp_path / f"{seed}.png") as picture:
            assert "sks person" in picture.info["parameters"]
