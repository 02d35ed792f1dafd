"""Fetches InvokeAI from the package index for the tests that ask what it makes of LoRA files; 150 MB.

Its packages lie in a folder of their own, beside this project's: those that it shares with others in the versions that it
wants, and none of its server. Nothing of it is in this repository.
"""

import subprocess
import sys
from pathlib import Path

INVOKEAI = Path(__file__).parents[1] / ".downloads" / "invokeai"
PACKAGE = "invokeai==6.14.2"
"""Taken whatever Python it asks for."""
OTHERS = (
    "diffusers==0.40.0", "transformers>=5.5,<5.6", "tokenizers>=0.22,<=0.23.0",
    "huggingface-hub>=1.5,<2", "pydantic-settings", "python-dotenv", "gguf", "semver", "einops", "picklescan", "spandrel",
    "blake3", "torchvision", "deprecated", "wrapt", "opencv-python-headless", "compel", "pyparsing", "httpx", "httpcore",
    "h11", "anyio", "sniffio", "certifi", "idna",
)  # fmt: skip


def main() -> None:
    if (INVOKEAI / "invokeai").exists():
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(INVOKEAI)]
    subprocess.run([*pip, *OTHERS], check=True)  # the releases that this Python can read
    subprocess.run([*pip, "--ignore-requires-python", PACKAGE], check=True)


if __name__ == "__main__":
    main()
