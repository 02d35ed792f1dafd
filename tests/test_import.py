"""What importing pulls in, and what an installation puts where."""

import ast
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import venv
import zipfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import get_args

import pytest

import core
from core.cli import COMMANDS, main
from core.config import RecipeName, SavePrecision
from core.device import PRECISIONS
from core.training import RECIPES
from tests.test_readme import SCRIPTS

ROOT = Path(__file__).parent.parent
LIBRARIES = ("torch", "numpy", "PIL", "safetensors")
HEAVY = ("diffusers", "peft", "transformers", "cv2", "onnxruntime", "bitsandbytes", "prodigyopt")
COMFYUI = ("invokeai", "comfy", "comfy_api", "comfy_extras", "nodes", "folder_paths", "server", "execution")
ROOMS = ("faces", "lora", "models", "photos", "pictures", "storage", "studio", "tensor_names", "training")
PACKAGES = ("core", *(f"core.{room}" for room in ROOMS))
"""Those that load a name when it is asked for."""
SAID = "loaded: "


def modules_after(statement: str) -> set[str]:
    """Top-level names of the modules that a fresh process has after the statement."""
    return modules_after_each(statement)[-1]


def modules_after_each(*statements: str) -> list[set[str]]:
    """Those that it has after each of the statements, one after the other; top-level names and full ones."""
    said = f"print('{SAID}', *{{part for name in sys.modules for part in (name.partition('.')[0], name)}}, sep=' ')"
    code = "\n".join(["import sys", *(line for statement in statements for line in (statement, said))])
    return [set(line.removeprefix(SAID).split()) for line in printed(code).splitlines() if line.startswith(SAID)]


def test_every_room_can_be_imported_by_its_short_name_and_is_loaded_once():
    code = """
import facelora.core.photos
import facelora.photos.reading
from facelora.demo import BASE_FILE
from facelora.errors import FaceLoraError
spec = facelora.core.photos.__spec__.name
same = facelora.photos is facelora.core.photos and facelora.photos.reading is facelora.core.photos.reading
print(BASE_FILE.name, FaceLoraError.__module__, spec, same)
import importlib
importlib.reload(facelora)
try:
    import facelora.phots
except ModuleNotFoundError as error:
    print(error)
"""
    assert printed(code).splitlines() == [
        f"{core.demo.BASE_FILE.name} facelora.core.errors facelora.core.photos True",
        "No module named 'facelora.phots'",
    ]


def printed(code: str, *arguments: object, folder: Path = ROOT, **environment: str) -> str:
    """What code prints in a Python of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_core_loads_no_heavy_library_and_changes_no_variable():
    modules = modules_after("import os; before = dict(os.environ); import core; assert dict(os.environ) == before")
    assert "core" in modules
    assert not modules & {*LIBRARIES, *HEAVY, *COMFYUI}


def test_names_load_what_they_need_and_no_heavy_library():
    """In one process, which torch keeps busy for a while."""
    of_files, of_scripts = modules_after_each(
        "from core import lora; lora.convert_lora, lora.verify_lora, lora.edit_metadata, lora.write_sidecars",
        "import core; assert callable(core.train) and callable(core.lora.LoraFile.read)",
    )
    assert "core.lora.convert" in of_files and not [name for name in of_files if name.startswith("core.training")]
    assert {"torch", "core.training"} <= of_scripts and not of_scripts & {*HEAVY, *COMFYUI}


def test_the_header_of_a_lora_is_inspected_without_any_library(tmp_path):
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    sizes = {f"{module}.lora_down.weight": [1, 1280], f"{module}.lora_up.weight": [1280, 1], f"{module}.alpha": []}
    header, end = {}, 0
    for key, shape in sizes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    modules = modules_after(
        f"from core.cli import main\nfor path in {[str(tmp_path / 'a.safetensors'), str(tmp_path)]}:\n"
        "    assert main(['inspect', path, '--fast']) == 0"
    )
    assert not modules & {*LIBRARIES, *HEAVY, *COMFYUI, "tqdm"}


def test_help_and_wrong_usage_need_no_library():
    modules = modules_after(
        "from core.cli import main\n"
        f"for arguments in {[[], *([command] for command in COMMANDS)]}:\n"
        "    for option, code in (('--help', 0), ('--unknown', 2)):\n"
        "        try: main([*arguments, option])\n"
        "        except SystemExit as end: assert end.code == code\n"
        "        else: raise AssertionError(arguments)"
    )
    assert not modules & {*LIBRARIES, *HEAVY, *COMFYUI}


def test_the_arguments_offer_all_recipes_and_precisions():
    assert set(get_args(RecipeName)) == {*RECIPES}
    assert set(get_args(SavePrecision)) == {*PRECISIONS}


def test_the_version_is_the_one_of_the_project_file(capsys):
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'\nversion = "{core.__version__}"\n' in project
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"facelora {core.__version__}\n"


def test_the_installed_package_is_run_as_the_command_line():
    done = subprocess.run([sys.executable, "-m", "facelora", "--version"], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"facelora {core.__version__}\n", "")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_hands_out_each_name_that_editors_know_of_it(package):
    module = import_module(package)
    (for_editors,) = (
        node
        for node in ast.parse(Path(module.__file__ or "").read_text("utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    known = {}
    for node in for_editors.body:
        assert isinstance(node, ast.ImportFrom)
        known |= {alias.name: node.module for alias in node.names}
    assert sorted(known) == module.__all__
    assert {*module.__all__} <= {*dir(module)}
    for name, place in known.items():
        home = import_module(f".{place or name}", package)
        assert getattr(module, name) is (getattr(home, name) if place else home)
    submodules = {found.name for found in iter_modules(module.__path__)}
    assert not submodules & {name for name, place in known.items() if place}, "a submodule would hide the name"


def test_the_root_exports_cores_names_and_nodes_of_the_new_kind(tmp_path):
    (tmp_path / "facelora").symlink_to(ROOT)
    code = (
        "import sys, facelora\n"
        "assert not hasattr(facelora, 'NODE_CLASS_MAPPINGS') and callable(facelora.comfy_entrypoint)\n"
        "assert 'torch' not in sys.modules and {'train', 'lora', 'LoraFile'} <= {*dir(facelora)}\n"
        "assert facelora.train is facelora.core.train and facelora.lora.LoraFile is facelora.LoraFile\n"
    )
    printed(code, folder=tmp_path)


@pytest.mark.clock
def test_the_command_line_answers_for_help_at_once():
    before = os.times()
    subprocess.run([sys.executable, "-m", "core", "--help"], cwd=ROOT, capture_output=True, check=True)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.3


@pytest.mark.clock
def test_the_package_itself_is_loaded_at_once():
    code = "import time; t = time.process_time(); import core; core.lora, core.studio; print(time.process_time() - t)"
    assert float(printed(code)) < 0.15


@pytest.mark.clock
def test_what_trains_is_loaded_quickly_beside_torch():
    code = "import torch, PIL.Image, time; t = time.process_time(); import core; core.train; print(time.process_time() - t)"
    assert float(printed(code)) < 1.0  # CPU seconds, on any machine that runs tests


def test_the_wheel_has_each_package_of_the_library_and_the_folders_of_data():
    named = set(re.findall(r'^    "facelora\.([\w.]+)",$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE))
    packages = {str(file.parent.relative_to(ROOT)).replace(os.sep, ".") for file in ROOT.glob("core/**/__init__.py")}
    assert packages <= named
    assert all((ROOT / name.replace(".", os.sep)).is_dir() for name in named)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the last commit, built without the network where setuptools is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves build folders beside the source.
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder / "source")], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder)]
    alone = ["--no-build-isolation"] if find_spec("setuptools") else []
    done = subprocess.run([*command, *alone, str(folder / "source")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A Python whose site-packages have nothing but the wheel, and then what this Python has."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=os.name != "nt")
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site, ours = (
        Path(subprocess.run([one, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
        for one in (python, sys.executable)
    )
    zipfile.ZipFile(wheel).extractall(site)
    (site / "others.pth").write_text(f"{ours}\n", encoding="utf-8")
    return python


def pyright(python: Path, folder: Path, *arguments: str) -> dict:
    """What pyright says of code, with this Python's packages, in a folder without settings."""
    # It looks for the Python itself: --verifytypes takes no notice of --pythonpath.
    path = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "pyright", "--outputjson", *arguments]
    return json.loads(subprocess.run(command, cwd=folder, env=path, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_every_type_of_the_installed_library_is_known(installed, tmp_path):
    found = pyright(installed, tmp_path, "--verifytypes", "facelora", "--ignoreexternal")["typeCompleteness"]
    assert "facelora.core.studio.person" in {module["name"] for module in found["modules"]}
    unknown = [symbol["name"] for symbol in found["symbols"] if symbol["isExported"] and not symbol["isTypeKnown"]]
    assert unknown == [] and found["completenessScore"] == 1


@pytest.mark.slow
def test_the_scripts_of_the_pages_have_the_right_types(installed, tmp_path):
    for page, code in SCRIPTS.items():
        (tmp_path / f"{page.removesuffix('.md').replace('-', '_')}.py").write_text(code, encoding="utf-8")
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}', encoding="utf-8")
    found = pyright(installed, tmp_path)
    assert found["summary"]["filesAnalyzed"] == len(SCRIPTS)
    assert [(one["file"], one["range"]["start"]["line"], one["message"]) for one in found["generalDiagnostics"]] == []


@pytest.mark.slow
def test_the_wheel_has_one_top_level_name_and_everything_that_is_needed(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    # ComfyUI has a top-level module called nodes: ours must not stand in its way.
    assert top_level == {"facelora"}
    assert "facelora/core/models/clip_tokenizer/vocab.json" in names
    assert any(name.startswith("facelora/core/pictures/style_packs/") for name in names)
    assert {f"facelora/core/{page}.html" for page in ("photos/sheet", "pictures/gallery", "studio/report")} <= {*names}
    assert any(name.endswith("entry_points.txt") for name in names)
    assert "facelora/py.typed" in names and {"facelora/nodes/page/page.html", "facelora/web/zh.json"} <= {*names}
    assert not [name for name in names if name.startswith(("facelora/nodes/comfyui/", "facelora/nodes/invokeai/"))]
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = (
        "import facelora.core, sys; assert 'core' not in sys.modules and 'nodes' not in sys.modules\n"
        f"assert facelora.core.__version__ == {core.__version__!r}"
    )
    printed(code, folder=unpacked)


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs git and a clone")
def test_the_registrys_package_has_only_what_comfyui_serves():
    def listed(*options: str) -> set[str]:
        command = ["git", "ls-files", "--cached", *options]
        return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines())

    # comfy-cli reads the file as git reads a .gitignore.
    packed = listed() - listed("--ignored", f"--exclude-from={ROOT / '.comfyignore'}")
    folders = {name.partition("/")[0] for name in packed if "/" in name}
    assert folders == {"core", "locales", "nodes", "subgraphs", "web", "workflows"}
    assert "web/docs/FaceLoRATrain.md" in packed and "core/demo/base.safetensors" not in packed


def test_core_imports_diffusers_through_one_function():
    found = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "core").rglob("*.py")
        if re.search(r"^\s*(from diffusers|import diffusers)", path.read_text(), re.MULTILINE)
    ]
    assert found == []


def test_the_demos_base_is_there_for_scripts():
    assert "demo" in vars(core)["__all__"] and core.load_base("demo").name == core.demo.BASE_FILE.name


TRAINS = """
import sys, warnings
from core import TrainConfig, train

before = list(warnings.filters)
train(sys.argv[1], sys.argv[2], TrainConfig(steps=1, rank=2, resolution=32, check_photos=False))
assert warnings.filters == before, [one for one in warnings.filters if one not in before]

import kernels
assert 'bitsandbytes' in sys.modules and callable(kernels.get_kernel)
"""


def test_a_training_leaves_warning_filters_and_fetches_nothing(tmp_path, photo_folder, small_sd15):
    """The libraries that it imports have filters of their own. And bitsandbytes asks `kernels`, a package that loads code from
    a hub, when it is imported on some CPUs; so does this one.
    """
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__):\n    raise SystemExit('asked for a kernel')\n")
    asked = "import kernels; kernels.get_kernel('somewhere/else')"
    (tmp_path / "bitsandbytes.py").write_text(f"try:\n    {asked}\nexcept ImportError:\n    pass\n")
    printed(TRAINS, photo_folder, small_sd15, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
