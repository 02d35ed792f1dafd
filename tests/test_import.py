"""What importing pulls in, and what an installation puts where."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("diffusers", "peft", "transformers", "cv2", "onnxruntime", "bitsandbytes", "prodigyopt")
COMFYUI = ("comfy", "comfy_api", "comfy_extras", "nodes", "folder_paths", "server", "execution")


def modules_after(statement: str) -> set[str]:
    """Top-level names of the modules that a fresh process has after the statement."""
    code = f"import sys\n{statement}\nprint(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_core_pulls_in_no_heavy_library_and_no_comfyui():
    modules = modules_after("import core")
    assert "core" in modules and "torch" in modules
    assert not modules & {*HEAVY, *COMFYUI}


def test_the_command_lines_help_needs_no_heavy_library():
    modules = modules_after("from core.cli import build_parser; build_parser().format_help()")
    assert not modules & {*HEAVY, *COMFYUI}


@pytest.mark.clock
def test_importing_core_is_quick_beside_torch():
    code = "import torch, PIL.Image, time; t = time.process_time(); import core; print(time.process_time() - t)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert float(done.stdout) < 1.0, done.stdout  # CPU seconds, on any machine that runs tests


@pytest.mark.slow
def test_the_wheel_has_one_top_level_name_and_everything_that_is_needed(tmp_path):
    copy = tmp_path / "source"
    # Built from a copy: setuptools leaves build folders beside the source.
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(copy)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    # ComfyUI has a top-level module called nodes: ours must not stand in its way.
    assert top_level == {"facelora"}
    assert "facelora/core/models/clip_tokenizer/vocab.json" in names
    assert any(name.startswith("facelora/core/pictures/style_packs/") for name in names)
    assert any(name.endswith("entry_points.txt") for name in names)
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = "import facelora.core, sys; sys.exit('core' in sys.modules or 'nodes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=unpacked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs git and a clone")
def test_the_registrys_package_has_what_comfyui_serves_and_nothing_of_the_tests():
    def listed(*options: str) -> set[str]:
        command = ["git", "ls-files", "--cached", *options]
        return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines())

    # comfy-cli reads the file as git reads a .gitignore.
    packed = listed() - listed("--ignored", f"--exclude-from={ROOT / '.comfyignore'}")
    folders = {name.partition("/")[0] for name in packed if "/" in name}
    assert folders == {"core", "locales", "nodes", "web", "workflows"}
    assert "web/docs/FaceLoRATrain.md" in packed
