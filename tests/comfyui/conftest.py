"""One ComfyUI server for the whole session, with small random base models that ComfyUI recognises by itself."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tooling import FULL_SDXL, write_checkpoint, write_photos

from .demo_checkpoint import COMFY_SD15
from .server import ComfyServer, running_server

TEST_PACK = Path(__file__).parent / "pack_for_tests.py"

# Of SDXL only the width can shrink: 1.1 billion values.
COMFY_SDXL = replace(
    FULL_SDXL, unet={**FULL_SDXL.unet, "block_out_channels": (320, 320, 320), "attention_head_dim": (5, 5, 5)}
)


@pytest.fixture(scope="package")
def comfy_folder(tmp_path_factory) -> Path:
    """ComfyUI's base directory: a checkpoint and a folder of photos."""
    folder = tmp_path_factory.mktemp("comfyui")
    checkpoints = folder / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (folder / "models" / "loras").mkdir()
    write_checkpoint(checkpoints / "sd15.safetensors", COMFY_SD15)
    write_photos(folder / "input" / "anna", count=3)
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "pack_for_tests.py").symlink_to(TEST_PACK)
    return folder


@pytest.fixture(scope="package")
def server(comfy_folder) -> Iterator[ComfyServer]:
    with running_server(comfy_folder) as server:
        yield server


@pytest.fixture(scope="package")
def sdxl_checkpoint(comfy_folder) -> str:
    """The name of an SDXL checkpoint in the server's folder."""
    write_checkpoint(comfy_folder / "models" / "checkpoints" / "sdxl.safetensors", COMFY_SDXL)
    return "sdxl.safetensors"
