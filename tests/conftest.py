"""What the tests share: a cache folder of their own, small random base models, photos."""

from pathlib import Path

import pytest
import torch

from tests.tooling import SMALL_SD15, SMALL_SDXL, write_checkpoint, write_photos


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing that a test encodes comes from, or goes to, the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACELORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def small_sd15(tmp_path_factory) -> Path:
    """A checkpoint with SD1.5's structure and random weights: 2 levels, 1 residual block each, 2 pixels a latent."""
    return write_checkpoint(tmp_path_factory.mktemp("sd15") / "small.safetensors", SMALL_SD15, torch.float32)


@pytest.fixture(scope="session")
def small_sdxl(tmp_path_factory) -> Path:
    """The same with SDXL's structure: 3 levels, two text encoders."""
    return write_checkpoint(tmp_path_factory.mktemp("sdxl") / "small_xl.safetensors", SMALL_SDXL, torch.float32)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory) -> Path:
    """Four real photos of one person, 92x112 pixels."""
    return write_photos(tmp_path_factory.mktemp("photos") / "person")
