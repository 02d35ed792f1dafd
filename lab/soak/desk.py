"""What the trials work on: small good files of each kind, made once, and commands that are run on damaged copies."""

import contextlib
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from core.cli import main
from core.config import TrainConfig
from core.demo import BASE_FILE
from core.demo.people import person_photos
from core.lora.convert import convert_lora
from core.lora.file import LoraFile
from core.lora.modules import LoraModule
from core.models import Base, load_base
from core.photos import Photo, read_photos
from core.pictures.style_pack import PACKAGE_FOLDER
from core.storage.safetensors_file import SafetensorsFile
from core.training.job import TrainingJob
from core.training.store import LoraFolders, find_or_train
from tests.tooling import SMALL_SD15, write_checkpoint, write_photos

_BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
_NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
PHOTO_FORMATS = ("jpg", "png", "webp", "gif", "bmp", "tif", "avif")
TRAINING = (
    "--resolution", "32", "--rank", "2", "--steps", "3", "--batch-size", "1", "--state-interval", "0", "--no-check-photos",
    "--device", "cpu", "--json",
)  # fmt: skip

_QUICK = b"rank = 2\nsteps = 3\nbatch_size = 1\nwarmup_steps = 0\nprior_prediction = 0.0\nstate_interval = 0.0\n"
_QUICK_PACK = json.dumps({
    "id": "quick", "title": "Quick", "version": "1", "licence": "none",
    "styles": [{
        "name": "Plain", "category": "Quick", "framing": "close-up", "aspect": "4:5",
        "prompts": {"tags": {"prompt": "{framing} photo of {subject}", "steps": 1, "guidance": 1}},
    }],
}).encode()  # fmt: skip
"""Settings and styles with which a person is made in a second."""


class Desk:
    """The good files; `room` is a folder for one trial, empty at its beginning."""

    def __init__(self, folder: Path):
        self.folder, self.room = folder, folder / "room"
        self.counts: Counter[str] = Counter()
        """What the campaign tells beside the trials: kills, commands."""
        os.environ["FACELORA_CACHE"] = str(folder / "cache")
        good = folder / "good"
        good.mkdir(parents=True)
        self.photos = write_photos(good / "person", count=2)
        self.base = write_checkpoint(good / "base.safetensors", SMALL_SD15)
        self.tuned = write_checkpoint(good / "tuned.safetensors", SMALL_SD15, seed=2)
        self.loras = [_saved(good / f"{name}.safetensors", tensors) for name, tensors in _loras().items()]
        self.packs = [path.read_bytes() for path in PACKAGE_FOLDER.glob("*.json") if "schema" not in path.name]
        self.pictures = dict(pictures())
        self.entries: dict[Path, bytes] = {}
        """The entries of the cache, by their path in it, of what is encoded for a training."""
        self.encoded: list[torch.Tensor] = []
        """What they hold."""
        self._trained: dict[str, torch.Tensor] = {}

    def fresh_room(self) -> None:
        shutil.rmtree(self.room, ignore_errors=True)
        self.room.mkdir()

    def put(self, name: str, content: bytes | Path) -> Path:
        """A file of that name in the room."""
        path = self.room / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        return path

    def training(self, output: Path, *options: str) -> list[str]:
        """The arguments of a short training."""
        return ["train", str(self.photos), "--base", str(self.base), "--output", str(output), *TRAINING, *options]

    def studio(self, people: Path, output: Path) -> list[object]:
        """The arguments of a command that makes each of the people in a second."""
        packs, settings = self.put("packs/quick.json", _QUICK_PACK).parent, self.put("settings.toml", _QUICK)
        return [
            "studio", people, "--base", BASE_FILE, "--output", output, "--style-pack", "quick", "--style-folder", packs,
            "--count", "1", "--config", settings, "--no-check-photos", "--device", "cpu",
        ]  # fmt: skip

    @cached_property
    def materials(self) -> tuple[list[Photo], Base, TrainConfig]:
        """What `training` trains on, as values."""
        config = TrainConfig(resolution=32, rank=2, steps=3, state_interval=0.0, check_photos=False)
        return read_photos(self.photos), load_base(self.base), config

    @cached_property
    def kept_lora(self) -> Path:
        """What the store makes of that."""
        photos, base, config = self.materials
        job, place = TrainingJob.of(photos, base, config), LoraFolders("kept", [self.folder])
        return find_or_train(job, place, device="cpu").path

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """What such a training comes to when nothing disturbs it."""
        if not self._trained:
            output = self.folder / "trained.safetensors"
            code, errors = run(*self.training(output))
            assert code == 0, errors
            self._trained = tensors_of(output)
        return self._trained


def run(*arguments: object) -> tuple[int, str]:
    """The exit code of a command and what it says on stderr, which is one clear line if it has failed."""
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        code = main([str(argument) for argument in arguments])
    text = errors.getvalue()
    told = re.findall(r"^facelora: .+$", text, re.MULTILINE)
    assert code in (0, 1), f"exit code {code}"
    assert "Traceback" not in text, text
    answers = arguments[0] in ("check", "verify", "studio") and said.getvalue()  # 1 is an answer of theirs, on stdout
    assert len(told) == code or (code == 1 and answers), f"{code}: {text!r}"
    return code, text


@contextlib.contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """A context in which the cache folder is that one."""
    before = os.environ["FACELORA_CACHE"]
    os.environ["FACELORA_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ["FACELORA_CACHE"] = before


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in SafetensorsFile.open(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether the tensors are the same; a single number may be a list of one, as it is for those who read it."""

    def alike(name: str) -> bool:
        pair = one[name], other[name]
        return torch.equal(*(tensor.flatten() if tensor.numel() == 1 else tensor for tensor in pair))

    return one.keys() == other.keys() and all(map(alike, one))


def check_written(path: Path) -> None:
    """A file that a command has written can be read, and holds no NaN."""
    for name, tensor in SafetensorsFile.open(path).items():
        assert not tensor.is_floating_point() or tensor.float().isfinite().all(), f"{name} of the output is not finite"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def _saved(path: Path, lora: LoraFile) -> Path:
    lora.save(path, torch.float32)
    return path


def _loras() -> dict[str, LoraFile]:
    """LoRAs for the small base, of each kind and naming."""
    make = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=make)

    metadata = {
        "ss_base_model_version": "sd_v1", "ss_network_dim": "2", "modelspec.trigger_phrase": "sks person",
        "ss_datasets": '[{"subsets": [{"class_tokens": "sks person"}]}]', "ss_tag_frequency": '{"1_sks": {"sks": 3}}',
    }  # fmt: skip
    modules = {
        ("denoiser", f"{_BLOCK}attn1.to_q"): LoraModule(numbers(2, 32), numbers(32, 2), 1.0),
        ("denoiser", f"{_BLOCK}attn2.to_k"): LoraModule(numbers(4, 64), numbers(32, 4), 4.0),
        ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"): LoraModule(
            numbers(2, 64), numbers(64, 2), 2.0
        ),
    }
    plain = LoraFile.from_modules("sd15", modules, metadata)
    kinds = {
        "loha": {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)},
        "lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
        "oft": {"oft_blocks": (4, 8, 8)},
        "full": {"diff": (32, 32)},
        "dora": {"lora_down.weight": (2, 32), "lora_up.weight": (32, 2), "dora_scale": (32, 1)},
    }
    others = {}
    for kind, roles in kinds.items():
        tensors = {f"{_NAME}attn1_to_q.{role}": numbers(*shape) for role, shape in roles.items()}
        others[kind] = LoraFile.from_tensors({**plain.tensors, **tensors}, metadata)
        if kind != "dora":
            kept = {key: tensor for key, tensor in plain.tensors.items() if "attn1_to_q.lora" not in key}
            others[kind] = LoraFile.from_tensors({**kept, **tensors}, metadata)
    words = LoraFile.from_tensors({**plain.tensors, "bundle_emb.sks.string_to_param.*": numbers(2, 64)}, metadata)
    named = {scheme: convert_lora(plain, scheme)[0] for scheme in ("diffusers", "comfy")}
    return {"plain": plain, **others, "words": words, **named}


def pictures() -> Iterator[tuple[str, bytes]]:
    """Good pictures, by the ending of their name, in every format that this Pillow writes."""
    Image.init()
    photo = person_photos(35)[0].convert("RGB")
    for ending in PHOTO_FORMATS:
        stream = io.BytesIO()
        kind = {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper())
        if kind in Image.SAVE:
            photo.save(stream, kind, **({"exif": _exif()} if kind in ("JPEG", "PNG", "WEBP") else {}))
            yield ending, stream.getvalue()
    stream = io.BytesIO()
    photo.convert("RGBA").save(stream, "PNG")
    yield "rgba.png", stream.getvalue()


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a person"
    return exif.tobytes()
