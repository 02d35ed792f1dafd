"""What the README and the pages of docs/ tell their readers to type, typed."""

import ast
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import core
from core.cli import main
from core.cli.command import command_parser
from core.demo import BASE_FILE
from core.lora.file import LoraFile
from core.models.families import FAMILIES
from core.models.recipe import RECIPES_KEY
from core.pictures import find_style_packs
from core.storage.safetensors_file import SafetensorsFile, copy_with_metadata
from tests.tooling import write_photos

pytestmark = pytest.mark.ci

ROOT = Path(__file__).parent.parent


PAGES = {
    page.name: page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
}
SCRIPTS = {
    name: "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    for name, text in PAGES.items()
    if "```python" in text
}
"""The Python code of each page that has any, as one script."""


def commands_of(text: str) -> list[list[str]]:
    """The words of each line of a page's blocks of code that calls `facelora`."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("facelora ")]


def run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "script.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(folder)
    runpy.run_path("script.py", run_name="__main__")


def test_the_python_of_the_readme_runs(tmp_path, small_sd15, monkeypatch):
    # The same code on small numbers: those of the training are the base's own.
    short, changed = re.subn(r"negative=", "size=(64, 64), steps=2, negative=", SCRIPTS["README.md"])
    assert changed == 1
    recipe = {"photos": 2, "rate": 1e-3, "rank": 4, "settings": {"resolution": 64}}
    metadata = {RECIPES_KEY: json.dumps({"balanced": recipe})}
    copy_with_metadata(SafetensorsFile.open(small_sd15), tmp_path / "sd15.safetensors", metadata)
    write_photos(tmp_path / "photos", count=6)
    run(short, tmp_path, monkeypatch)
    assert LoraFile.read(tmp_path / "me.safetensors").metadata["ss_steps"] == "2"
    for seed in range(4):
        with Image.open(tmp_path / f"{seed}.png") as picture:
            assert "sks person" in picture.info["parameters"] and "<lora:me:0.9>" in picture.info["parameters"]


def test_the_example_with_a_loop_of_its_own_trains_and_draws(tmp_path, monkeypatch):
    code = (ROOT / "docs" / "examples" / "lora_by_hand.py").read_text(encoding="utf-8")
    short, changed = re.subn(r"(STEPS, PICTURES_PER_STEP, RANK, LEARNING_RATE) = 300, 4,", r"\1 = 2, 2,", code)
    assert changed == 1 and len(code.splitlines()) <= 120
    write_photos(tmp_path / "photos", count=2)
    monkeypatch.setattr(sys, "argv", ["lora_by_hand.py", "photos", "demo"])
    run(short, tmp_path, monkeypatch)
    lora = LoraFile.read(tmp_path / "by_hand.safetensors")
    assert all(module.rank == 16 and module.up.abs().max() > 0 for module in lora.modules().values())
    assert lora.family == "sd15" and (tmp_path / "by_hand.png").exists()


def test_the_python_about_lora_files_runs(tmp_path, monkeypatch, capsys):
    path = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{path}.lora_down.weight": torch.randn(4, 1280), f"{path}.lora_up.weight": torch.randn(1280, 4)}
    LoraFile.from_tensors(tensors, {}).save(tmp_path / "face.safetensors")
    run(SCRIPTS["formats.md"], tmp_path, monkeypatch)
    assert "denoiser mid_block.attentions.0.transformer_blocks.0.attn1.to_q 4 " in capsys.readouterr().out
    (small,) = LoraFile.read(tmp_path / "small.safetensors").modules().values()
    assert small.rank == 2


def test_the_python_about_style_packs_runs(tmp_path, monkeypatch, capsys):
    run(SCRIPTS["style-packs.md"], tmp_path, monkeypatch)
    assert "sks person" in capsys.readouterr().out


def write_quick_base(path: Path) -> Path:
    """The demo's base model with a recipe of seconds."""
    recipe = {"photos": 2, "rate": 1e-3, "rank": 4, "settings": {"min_snr_gamma": 0.0}}
    whole = SafetensorsFile.open(BASE_FILE)
    copy_with_metadata(whole, path, {**whole.metadata, RECIPES_KEY: json.dumps({"balanced": recipe})})
    return path


@pytest.mark.slow
def test_the_tutorials_on_the_small_base_can_be_followed(tmp_path, monkeypatch, capsys):
    page = PAGES["tutorials.md"]
    monkeypatch.setattr("core.models.opening.DEMO_FILE", write_quick_base(tmp_path / "base.safetensors"))
    write_photos(tmp_path / "photos", count=6)
    for name in ("other-photos", "edits"):  # of the same person
        for photo in sorted(write_photos(tmp_path / name, count=9).iterdir())[:6]:
            photo.unlink()
    agreement = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    for name, person in (("anna", 36), ("ben", 37)):
        (write_photos(tmp_path / "people" / name, count=5, person=person) / "person.toml").write_text(*agreement)
    monkeypatch.chdir(tmp_path)
    followed = set()
    for words in commands_of(page):
        if words[0] == "demo":
            words = [*words, "--steps", "2"]
        elif "sd_xl_base_1.0.safetensors" in words or "--measure" in words:
            continue  # what 12 GB are for
        assert main(words) == 0, (words, capsys.readouterr().err)
        followed.add(words[0])
    assert followed == {
        "demo", "doctor", "check", "train", "generate", "score", "inspect", "verify", "convert", "publish", "studio", "forget",
    }  # fmt: skip
    made = (
        "report.html",
        "pictures/gallery.html",
        "for-diffusers.safetensors",
        "upload/page.txt",
        "studio/report.html",
    )
    assert all(Path(name).exists() for name in made)
    assert Path("studio", "ben", "ben.safetensors").exists() and not Path("studio", "anna").exists()


@pytest.mark.slow
def test_the_script_of_the_tutorials_runs(tmp_path, monkeypatch, capsys):
    write_quick_base(tmp_path / "sd15.safetensors")
    write_photos(tmp_path / "photos", count=6)
    short, changed = re.subn(r"count=40", "count=3", SCRIPTS["tutorials.md"])
    assert changed == 1
    run(short, tmp_path, monkeypatch)
    assert "6 of 6 usable" in capsys.readouterr().out
    assert (
        len(list((tmp_path / "headshots").glob("0*.png"))) == 3 and (tmp_path / "headshots" / "gallery.html").exists()
    )


def names_in(code: str) -> Iterator[tuple[str, ...]]:
    """The names that code takes from facelora, each as ("room", "name") or ("name",)."""
    tree, aliases = ast.parse(code), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            for alias in node.names:
                assert (module or alias.name).partition(".")[0] in {"facelora", *sys.stdlib_module_names}
                if "facelora" in (module, alias.name):
                    aliases[alias.asname or alias.name] = (alias.name,) if module else ()
    yield from (path for path in aliases.values() if path)
    for node in ast.walk(tree):
        path, inner = [], node
        while isinstance(inner, ast.Attribute):
            path.insert(0, inner.attr)
            inner = inner.value
        if path and isinstance(inner, ast.Name) and inner.id in aliases:
            yield *aliases[inner.id], *path


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_options_that_the_pages_give_them(page):
    commands = commands_of(PAGES[page])
    assert len(commands) == len(re.findall(r"^[ $]*facelora [a-z]", PAGES[page], re.MULTILINE)), (
        "each is a line of a block"
    )
    for words in commands:
        command_parser(words[0]).read(words[1:])


@pytest.mark.parametrize("page", SCRIPTS)
def test_scripts_take_only_what_the_package_and_its_rooms_hand_out(page):
    found = {*names_in(SCRIPTS[page])}
    assert found
    for names in found:
        place: object = core
        for name in names:
            if isinstance(place, ModuleType):  # what is in a class is its own
                handed_out = getattr(place, "__all__", None) or [one for one in vars(place) if not one.startswith("_")]
                assert name in handed_out, f"{page}: {'.'.join(names)}"
            place = getattr(place, name)


def test_the_form_for_faults_lists_every_family():
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    options = re.findall(
        r"^        - (.+)$", form.partition("id: family")[2].partition("validations:")[0], re.MULTILINE
    )
    assert options == [*(family.title for family in FAMILIES.values()), "the demo's base", "another, or none"]


def test_style_packs_named_on_the_studio_page_exist():
    wanted = re.findall(r'^style_pack = "(.+)"$', PAGES["studio.md"], re.MULTILINE)
    assert wanted and {*wanted} <= find_style_packs().packs.keys()
