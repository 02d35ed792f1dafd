"""One InvokeAI server for the tests of this folder, with the pack installed as its page does it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tooling import write_photos

from .server import REPOSITORY, InvokeServer, running_server
from .setup_invokeai import STAMP
from .wide_base import write_wide_base

BASE = "Small faces"
"""The name of the server's base model."""


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    """The last commit, under the name that users clone."""
    folder = tmp_path_factory.mktemp("clone") / "ComfyUI-FaceLoRA"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def invoke(tmp_path_factory, clone) -> Iterator[InvokeServer]:
    if not STAMP.exists():
        pytest.skip("needs InvokeAI: python tests/invokeai/setup_invokeai.py")
    folder = tmp_path_factory.mktemp("invokeai")
    with running_server(folder / "root") as server:
        assert server.install_pack(clone)["success"]
        assert server.add_model(write_wide_base(folder / "base"), BASE)["base"] == "sd-1"
        yield server


@pytest.fixture(scope="session")
def photos(invoke, tmp_path_factory) -> list[dict[str, str]]:
    """Six uploaded photos of one person."""
    folder = write_photos(tmp_path_factory.mktemp("photos") / "person", count=6, scale=3)
    return invoke.upload(sorted(folder.glob("*.png")))
