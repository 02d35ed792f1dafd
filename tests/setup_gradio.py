"""Installs the versions of gradio that A1111, SD.Next and Forge Neo have, each into a folder, for tests/page/test_tab.py."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / ".downloads"
NEWER = ("huggingface-hub<1", "numpy<2.4", "psutil", "filelock")
GRADIOS = {
    "3.41.2": ("fastapi==0.94.0", "pydantic<2", "httpx==0.24.1", "huggingface-hub<0.26"),
    "3.43.2": ("fastapi==0.124.4", "gradio-client==0.5.0", "httpx==0.28.1", *NEWER),
    "4.40.0": ("fastapi==0.127.1", "pydantic==2.10.6", "httpx==0.24.1", *NEWER),
}
"""What these programs have beside it, by gradio's version."""


def main() -> None:
    for version, others in GRADIOS.items():
        target = FOLDER / f"gradio-{version}"
        if not (target / "gradio").exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target)]
            subprocess.run([*pip, f"gradio=={version}", "matplotlib", *others], check=True)


if __name__ == "__main__":
    main()
