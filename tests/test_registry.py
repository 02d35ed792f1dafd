"""What ComfyUI's own program for its registry says of this repository, and the package that it makes of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from .setup_comfy_cli import COMFY_CLI

ROOT = Path(__file__).parents[1]
MOST_BYTES = 3_000_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMFY_CLI.exists(), reason="comfy-cli is not there: python tests/setup_comfy_cli.py"),
    pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs git and a clone"),
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A repository with the files that git knows here, as they are now; comfy-cli packs what git knows."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for command in (["init", "--quiet"], ["add", "--all", "--force"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / "not-known-to-git.txt").write_text("a user's")
    return folder


def comfy_node(command: str, clone: Path, home: Path) -> str:
    """What `comfy node <command>` says. It asks nothing, tells nobody of it, and keeps its settings in `home`."""
    variables = {"PYTHONPATH": str(COMFY_CLI), "DO_NOT_TRACK": "1", "HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-m", "comfy_cli", "--skip-prompt", "node", command],
        cwd=clone, env=os.environ | variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_comfy_cli_finds_nothing_to_say_about_the_repository(clone, tmp_path):
    said = comfy_node("validate", clone, tmp_path)
    assert "All validation checks passed successfully" in said
    assert "warning" not in said.lower()


def test_comfy_cli_packs_what_comfyui_needs_in_a_few_megabytes(clone, tmp_path):
    assert "warning" not in comfy_node("pack", clone, tmp_path).lower()
    assert (clone / "node.zip").stat().st_size < MOST_BYTES
    with ZipFile(clone / "node.zip") as packed:
        names = set(packed.namelist())
        packed.extractall(tmp_path / "facelora")
    assert {name.partition("/")[0] for name in names if "/" in name} == {
        "core", "locales", "nodes", "subgraphs", "web", "workflows",
    }  # fmt: skip
    assert {"__init__.py", "install.py", "requirements.txt", "pyproject.toml", "LICENSE", "NOTICE"} <= names
    help_page = {f"web/docs/{name}" for name in ("FaceLoRATrain.md", "FaceLoRATrain/zh.md", "images/FaceLoRATrain.jpg")}
    assert help_page <= names and not [name for name in names if "not-known" in name]
    # The library works as it lies there, and says what it has not got.
    command = [sys.executable, "-m", "core", "demo", "--output", str(tmp_path / "demo")]
    done = subprocess.run(command, cwd=tmp_path / "facelora", capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("facelora: base.safetensors: the demo's base model is missing")
