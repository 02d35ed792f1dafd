"""Puts a real InvokeAI into `tests/.downloads/`, for the tests: `python tests/invokeai/setup_invokeai.py`; 900 MB.

It gets an environment of its own that sees the packages of the environment which runs this script (torch above all). It is
run here, and nothing of it is copied.
"""

import re
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

PACKAGE = "invokeai==6.14.2"
PYTHONS = ((3, 11), (3, 12))
"""The versions of Python that it runs in."""
NEVER_LOADED = ("bitsandbytes", "imageio", "mediapipe", "pypatchmatch", "torch")
"""Packages that bring along others which the server does not load, or that are installed apart."""
LOADED = ("absl-py", "attrs", "flatbuffers", "imageio", "matplotlib", "protobuf>=4.25.3,<5", "torchvision")
"""What the server loads of those that they bring along."""
PAGES = "starlette<1.4"
"""With later releases the compression of answers fails, and no page gets a connection."""

DOWNLOADS = Path(__file__).resolve().parents[1] / ".downloads"
ENVIRONMENT = DOWNLOADS / "invokeai-environment"
BIN = ENVIRONMENT / ("Scripts" if sys.platform == "win32" else "bin")
PYTHON = BIN / "python"
STAMP = DOWNLOADS / "invokeai.installed"


def main() -> None:
    if sys.version_info[:2] not in PYTHONS:
        print("InvokeAI runs in Python 3.11 and 3.12 alone: its tests are left out")
        return
    shared = sysconfig.get_path("purelib") + "\n"
    wanted = f"{PACKAGE} {PAGES} torch {version('torch')} {shared}"
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    DOWNLOADS.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
    (packages,) = ENVIRONMENT.glob("[Ll]ib/**/site-packages")
    (packages / "shared.pth").write_text(shared)
    constraints = DOWNLOADS / "invokeai-constraints.txt"
    constraints.write_text(f"torch=={version('torch')}\n")
    install("--no-deps", PACKAGE, "mediapipe==0.10.14", "pypatchmatch")
    asked = subprocess.check_output(
        [PYTHON, "-c", "from importlib.metadata import requires; print(*requires('invokeai'), sep='\\n')"], text=True
    )
    needed = [line.partition(";")[0] for line in asked.splitlines() if "extra ==" not in line]
    needed = [one for one in needed if re.split(r"[^\w-]", one)[0] not in NEVER_LOADED]
    install(*needed, *LOADED, PAGES, "--constraint", str(constraints))
    STAMP.write_text(wanted)


def install(*arguments: str) -> None:
    subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", *arguments], check=True)


if __name__ == "__main__":
    main()
