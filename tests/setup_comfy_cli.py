"""Fetches comfy-cli, ComfyUI's program for its registry, from the package index for tests/test_registry.py.

It lies in a folder of its own, beside this project's packages, without most of what it asks for: checking and packing need
none of uv, ffmpeg and the ways to tell its makers of its use.
"""

import subprocess
import sys
from pathlib import Path

COMFY_CLI = Path(__file__).parent / ".downloads" / "comfy-cli"
PACKAGE = "comfy-cli==1.23.0"
OTHERS = ("typer>=0.24", "pydantic", "pathspec", "tomlkit<0.16", "semver~=3.0.2", "pyyaml", "rich")


def main() -> None:
    if (COMFY_CLI / "comfy_cli").exists():
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(COMFY_CLI)]
    subprocess.run([*pip, *OTHERS], check=True)
    subprocess.run([*pip, "--no-deps", PACKAGE], check=True)


if __name__ == "__main__":
    main()
