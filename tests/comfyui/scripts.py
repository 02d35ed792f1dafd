"""Scripts of this folder that run beside ComfyUI or InvokeAI, in the Python of that program."""

import os
import subprocess
from pathlib import Path

from .setup_comfyui import COMFYUI, PYTHON


def printed_by(script: str, *arguments: object, python: Path = PYTHON, **environment: str) -> str:
    """What the script prints, which has ComfyUI on its path."""
    done = subprocess.run(
        [str(python), str(Path(__file__).with_name(script)), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(COMFYUI), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
