"""What the tests share: a cache folder of their own, small random base models, photos, and one ComfyUI server."""

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from PIL import Image

from core.demo import BASE_FILE
from core.faces import FaceNetwork, OnnxFaces, YuNet, load_faces, networks
from core.models import Base, load_base
from tests.comfyui.flow_files import write_flow_models
from tests.comfyui.server import TEST_PACK, ComfyServer, running_server
from tests.tooling import (
    SMALL_SD15,
    SMALL_SDXL,
    collect_garbage_seldom,
    write_checkpoint,
    write_in_16_bits,
    write_photos,
)

# How long an example takes says more of what else the machine does than of the code.
settings.register_profile("random", deadline=None)
# The same examples in every run: what a change must pass says no more on one day than on another.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where tests run in several processes (`-n 2`): those of the server in one of them, and those of the fake GPU, the
    others file by file.

    A group of xdist's own would do, but those are without effect since pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class FileByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if needs_server(config.rootpath / file):
                return "server"
            return "gpu" if file.startswith("lab/emulated_gpu/") else file

    config.option.loadscopereorder = False
    return FileByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that need a program of others or simulate one, and start what takes longest first, so that processes end
    together: the server, the emulated GPU and the soak, then the files with the most tests.
    """
    tests = Counter(item.path for item in items)

    def is_below(item: pytest.Item, *names: str) -> bool:
        return not set(names).isdisjoint(item.path.relative_to(config.rootpath).parts)

    for item in items:
        if is_below(item, "browser", "comfyui", "invokeai", "lab"):
            item.add_marker("ci")
    long = ("browser", "comfyui", "emulated_gpu", "test_soak.py")
    items.sort(key=lambda item: (not is_below(item, *long), -tests[item.path], item.path))


def pytest_collection_finish() -> None:
    collect_garbage_seldom()


@cache
def needs_server(file: Path) -> bool:
    """Whether a test of that file may have the fixture `server`."""
    return file.parent.name in ("browser", "comfyui") and "(server" in file.read_text(encoding="utf-8")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing that a test encodes comes from, or goes to, the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACELORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def faces_looked_at_once():
    """What the face networks say of a picture is computed once, in however many tests it is shown to them.

    The networks that come with a package are loaded once.
    """
    detect, embed, known = YuNet._detect_at, OnnxFaces._run, {}
    read, start = networks._mended, networks._session
    models: dict[Path, Any] = {}
    sessions: dict[int, Any] = {}

    def read_once(path: Path, free_dimensions: dict[int, str]) -> Any:
        if not free_dimensions:  # a file that a test names
            return read(path, free_dimensions)
        return models.get(path) or models.setdefault(path, read(path, free_dimensions))

    def start_once(model: Any, providers: Sequence[str]) -> Any:
        if all(model is not one for one in models.values()):
            return start(model, providers)
        return sessions.get(id(model)) or sessions.setdefault(id(model), start(model, providers))

    def once(key: Any, compute: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = compute()
        return copy.deepcopy(known[key])

    def detect_once(self: YuNet, image: Image.Image, scale: float) -> Any:
        return once(("yunet", image.size, scale, digest(image)), lambda: detect(self, image, scale))

    def embed_once(self: OnnxFaces, crops: Sequence[Image.Image]) -> Any:
        if self.name != "sface":  # a file that a test has written
            return embed(self, crops)
        return once(("sface", *map(digest, crops)), lambda: embed(self, crops))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(YuNet, "_detect_at", detect_once)
        patch.setattr(OnnxFaces, "_run", embed_once)
        patch.setattr(networks, "_mended", read_once)
        patch.setattr(networks, "_session", start_once)
        yield


def digest(image: Image.Image) -> bytes:
    return hashlib.blake2b(image.tobytes()).digest()


@pytest.fixture(scope="session")
def small_sd15(tmp_path_factory) -> Path:
    """A checkpoint with SD1.5's structure and random weights: 2 levels, 1 residual block each, 2 pixels a latent."""
    return write_checkpoint(tmp_path_factory.mktemp("sd15") / "small.safetensors", SMALL_SD15, torch.float32)


@pytest.fixture(scope="session")
def small_sdxl(tmp_path_factory) -> Path:
    """The same with SDXL's structure: 3 levels, two text encoders."""
    return write_checkpoint(tmp_path_factory.mktemp("sdxl") / "small_xl.safetensors", SMALL_SDXL, torch.float32)


@pytest.fixture(scope="module")
def bases(small_sd15, small_sdxl) -> dict[str, Base]:
    """Both of them, opened."""
    return {"sd15": load_base(small_sd15), "sdxl": load_base(small_sdxl)}


@pytest.fixture(scope="module")
def base() -> Base:
    """The demo's base model, which draws faces."""
    return load_base(BASE_FILE)


@pytest.fixture(scope="module")
def network() -> FaceNetwork:
    """YuNet and SFace."""
    return load_faces()


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory) -> Path:
    """Four real photos of one person, 92x112 pixels."""
    return write_photos(tmp_path_factory.mktemp("photos") / "person")


@pytest.fixture(scope="session")
def comfy_folder(tmp_path_factory) -> Path:
    """ComfyUI's base directory: the demo's base model, which draws faces, a small random SDXL, a folder of photos.

    ComfyUI takes models so narrow with the help of pack_for_tests.py.
    """
    folder = tmp_path_factory.mktemp("comfyui")
    checkpoints = folder / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (folder / "models" / "loras").mkdir()
    write_in_16_bits(BASE_FILE, checkpoints / "sd15.safetensors")
    # ComfyUI takes the last layer but one of more than two.
    text = {part: config | {"num_hidden_layers": 3} for part, config in SMALL_SDXL.text.items()}
    write_checkpoint(checkpoints / "sdxl.safetensors", replace(SMALL_SDXL, text=text))
    write_photos(folder / "input" / "anna", count=3)
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / TEST_PACK.name).symlink_to(TEST_PACK)
    return folder


@pytest.fixture(scope="session")
def server(comfy_folder) -> Iterator[ComfyServer]:
    """The server of the comfyui and browser tests."""
    with running_server(comfy_folder) as server:
        yield server


@pytest.fixture(autouse=True)
def server_at_rest(request: pytest.FixtureRequest) -> Iterator[None]:
    """A training that never ends does not go on when the test that began it fails."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").rest()


@pytest.fixture(scope="session")
def flow_models(comfy_folder) -> None:
    """Small random diffusion transformers in the server's folder."""
    write_flow_models(comfy_folder / "models")
