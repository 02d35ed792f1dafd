"""What the encoders make of photos and captions: computed once, by content, and damaged or strange files do no harm."""

import math
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from core.config import TrainConfig
from core.errors import BadFile, BadPhoto, OutOfMemory
from core.models import Base, load_base
from core.photos import Photo, prepare, read_photos
from core.pictures.generate import Picture, PictureJob, generate
from core.storage.cache_folder import cache_folder, clear_cache, content_key, made_folder
from core.storage.files import write_text
from core.storage.safetensors_file import SafetensorsFile, save_safetensors
from core.training import Callbacks, LoraFolders, TrainingJob, find_or_train
from core.training.encode import encode, without_trigger
from core.training.samples import make_class_images
from tests.tooling import SMALL_SD15, write_checkpoint

CPU = torch.device("cpu")
CONFIG = TrainConfig(resolution=32)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FACELORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def dataset(photo_folder, base):
    return dataset_of(read_photos(photo_folder), base)


def dataset_of(photos, base, **options):
    return prepare(
        photos, resolution=32, size_multiple=base.size_multiple, trigger="sks", class_word="person", **options
    )


def loads(monkeypatch) -> list[str]:
    """The parts that are loaded from now on."""
    loaded, load = [], Base.load

    def counted(self, part, device, dtype):
        loaded.append(part)
        return load(self, part, device, dtype)

    monkeypatch.setattr("core.models.base.Base.load", counted)
    return loaded


def test_latents_are_the_vaes_mean_and_deviation_in_the_denoisers_scale(dataset, base):
    cache = encode(dataset, base, CONFIG, device=CPU)
    vae = base.load("vae", CPU, torch.float32)
    with torch.no_grad():
        latents = vae.encode(dataset.images[0].pixels()[None]).latent_dist  # pyright: ignore
    torch.testing.assert_close(cache.images[0].mean, 0.18215 * latents.mean[0])
    torch.testing.assert_close(cache.images[0].deviation, 0.18215 * latents.std[0])


@pytest.mark.parametrize(
    ("part", "tensor", "said"),
    [
        ("vae", "encoder.conv_in.bias", "its VAE turns .* into NaN or infinite values"),
        ("text_encoder", "text_model.final_layer_norm.bias", "its text encoder turns .* into NaN or infinite values"),
    ],
)
def test_an_encoder_with_damaged_weights_is_named_before_training(dataset, base, part, tensor, said):
    component = base.components[part]
    broken = {**component.tensors, tensor: torch.full_like(component.tensors[tensor], math.nan)}
    other = replace(base, components={**base.components, part: replace(component, tensors=broken)})
    with pytest.raises(BadFile, match=said):
        encode(dataset, other, CONFIG, device=CPU)


def test_names_in_the_cache_say_nothing(dataset, base, empty_cache):
    encode(dataset, base, CONFIG, device=CPU)
    names = [path.name for path in empty_cache.rglob("*") if path.is_file()]
    assert names and all(re.fullmatch(r"[0-9a-f]{64}\.safetensors", name) for name in names)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    path.write_bytes(data)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = SafetensorsFile.open(path)
    save_safetensors(path, change({name: tensor.clone() for name, tensor in file.items()}), file.metadata)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a bit flipped": flip_a_bit,
    "other names": lambda path: rewrite(path, lambda found: {f"{name}s": tensor for name, tensor in found.items()}),
    "other shapes": lambda path: rewrite(path, lambda found: {name: t.mT.contiguous() for name, t in found.items()}),
    "another type": lambda path: rewrite(path, lambda found: {name: t.half() for name, t in found.items()}),
    "not finite": lambda path: rewrite(path, lambda found: {name: t / 0 for name, t in found.items()}),
    "another photo's": lambda path: shutil.copy(min(path.parent.iterdir()), path),
    "no checksum": lambda path: save_safetensors(path, dict(SafetensorsFile.open(path))),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_what_was_kept_is_computed_again(dataset, base, damage, monkeypatch):
    first = encode(dataset, base, CONFIG, device=CPU)
    for kind in ("latents", "text"):
        damage(max((cache_folder() / kind).iterdir()))
    loaded = loads(monkeypatch)
    second = encode(dataset, base, CONFIG, device=CPU)
    assert loaded == ["vae", "text_encoder"] and first.digest == second.digest
    assert all(torch.equal(a.mean, b.mean) for a, b in zip(first.images, second.images, strict=True))
    assert all(torch.equal(first.text[c]["context"], second.text[c]["context"]) for c in first.text)
    loaded.clear()
    encode(dataset, base, CONFIG, device=CPU)
    assert loaded == []


def test_nothing_is_kept_of_a_photo_that_has_changed_since_it_was_read(photo_folder, base, tmp_path):
    shutil.copytree(photo_folder, tmp_path / "photos")
    photos = read_photos(tmp_path / "photos")
    shutil.copy(tmp_path / "photos" / photos[0].name, tmp_path / "photos" / photos[1].name)
    with pytest.raises(BadPhoto, match=f"{photos[1].name}: the file has changed since it was first read"):
        encode(dataset_of(photos, base), base, CONFIG, device=CPU)
    assert len(list((cache_folder() / "latents").iterdir())) == 1


def test_a_damaged_class_image_is_drawn_again(base, monkeypatch):
    drawn: list[int] = []

    def draw(base, loras, jobs, **_):
        for job in jobs:
            drawn.append(job.seed)
            yield Picture(Image.linear_gradient("L").resize(job.size), job, "")

    monkeypatch.setattr("core.training.samples.generate", draw)
    make_class_images(base, "person", 3, resolution=32, device=CPU)
    (damaged,) = (cache_folder() / "class").rglob("00001.png")
    whole = Image.open(damaged).tobytes()
    damaged.write_bytes(damaged.read_bytes()[:-40])
    make_class_images(base, "person", 3, resolution=32, device=CPU)
    assert drawn == [0, 1, 2, 1] and Image.open(damaged).tobytes() == whole


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_what_is_kept_is_its_owners_alone(dataset, base, empty_cache, monkeypatch):
    encode(dataset, base, CONFIG, device=CPU)
    run = made_folder("runs", content_key("a run"))
    run.chmod(0o755)  # as an earlier version has left it
    write_text(made_folder("runs", content_key("a run")) / "history.json", "[]")
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in (empty_cache, *empty_cache.rglob("*"))}
    assert modes == {(True, 0o700), (False, 0o600)}
    # The usual folder is ours, whatever is in it; one that the user has chosen may hold the folders of others.
    empty_cache.chmod(0o755)
    made_folder("text")
    assert empty_cache.stat().st_mode & 0o777 == 0o755
    monkeypatch.delenv("FACELORA_CACHE")
    monkeypatch.setattr("core.storage.cache_folder.cache_folder", lambda: empty_cache)
    made_folder("text")
    assert empty_cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_readable_folders_with_nothing_of_others_are_closed(empty_cache):
    ours, theirs = made_folder("latents"), made_folder("runs")
    (ours / f"{content_key('a photo')}.safetensors").touch()
    (theirs / "a notebook").mkdir()
    for folder in (ours, theirs):
        folder.chmod(0o755)
        made_folder(folder.name)
    assert ours.stat().st_mode & 0o777 == 0o700
    assert theirs.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("change", ["photo", "caption", "flip", "text encoder"])
def test_the_digest_changes_with_everything_that_is_trained_on(photo_folder, base, change, tmp_path):
    photos = read_photos(photo_folder)
    before = encode(dataset_of(photos, base), base, CONFIG, device=CPU).digest
    options = {}
    if change == "photo":
        photos[1] = Photo.from_image(photos[1].image().transpose(Image.Transpose.FLIP_TOP_BOTTOM), photos[1].name)
    elif change == "caption":
        photos[1] = replace(photos[1], caption="sks person at the sea")
    elif change == "flip":
        options["flip"] = True
    else:
        base = load_base(write_checkpoint(tmp_path / "other.safetensors", SMALL_SD15, torch.float32, seed=2))
    assert encode(dataset_of(photos, base, **options), base, CONFIG, device=CPU).digest != before


def test_when_the_text_encoder_trains_no_caption_is_cached(dataset, base, monkeypatch):
    loaded = loads(monkeypatch)
    cache = encode(dataset, base, replace(CONFIG, text_encoder_lr=1e-5), device=CPU)
    assert cache.text == {}
    assert loaded == ["vae"]


def test_the_class_captions_are_encoded_only_for_prior_prediction(dataset, base):
    assert set(encode(dataset, base, CONFIG, device=CPU).text) == {image.caption for image in dataset.images} | {""}
    cache = encode(dataset, base, replace(CONFIG, prior_prediction=0.5), device=CPU)
    assert {image.class_caption for image in cache.images} <= set(cache.text)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo of sks person, outdoors", "a photo of person, outdoors"),
        ("Sks person wearing masks", "person wearing masks"),
        ("a man at the sea", "a photo of person"),  # names no trigger: nothing to hold against it
        ("sks", "a photo of person"),
    ],
)
def test_the_caption_of_the_class_is_the_caption_without_the_trigger(caption, expected):
    assert without_trigger(caption, CONFIG) == expected


def test_all_captions_are_padded_to_the_longest(photo_folder, base):
    photos = read_photos(photo_folder)
    photos[0] = replace(photos[0], caption="sks person " + "word " * 100)
    cache = encode(dataset_of(photos, base), base, CONFIG, device=CPU)
    assert cache.chunks == 2
    assert {text["context"].shape for text in cache.text.values()} == {(1, 2 * 77, 64)}


def test_what_is_trained_does_not_depend_on_the_prompts_of_samples(dataset, base):
    prompts = ["short", "word " * 100]
    plain, shown = (encode(dataset, base, CONFIG, device=CPU, extra_prompts=extra) for extra in ([], prompts))
    assert (plain.chunks, plain.digest) == (shown.chunks, shown.digest)
    assert plain.text.keys() == shown.text.keys()
    assert all(torch.equal(plain.text[c]["context"], shown.text[c]["context"]) for c in plain.text)
    # Nor does one sample's text depend on another's length.
    lengths = [[text["context"].shape[1] for text in shown.prompts[prompt]] for prompt in prompts]
    assert lengths == [[77, 77], [2 * 77, 2 * 77]]


def test_class_images_are_drawn_as_suits_the_family(base):
    base = replace(base, family=replace(base.family, steps=2))
    first, again, other = (
        make_class_images(one, "person", 1, resolution=32, device=CPU)[0]
        for one in (base, base, replace(base, prediction_type="v_prediction"))
    )
    assert first.digest == again.digest != other.digest
    family = base.family
    job = PictureJob("a photo of person", 0, size=(32, 32), steps=family.steps, guidance=family.guidance)
    (picture,) = generate(base, [], [job], device=CPU)
    assert first.image().tobytes() == picture.image.tobytes()


def test_a_cache_folder_that_cannot_be_written_is_named(dataset, base, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FACELORA_CACHE", str(tmp_path / "file"))
    for use in (partial(encode, dataset, base, CONFIG), partial(make_class_images, base, "person", 1)):
        with pytest.raises(BadFile, match="cannot be written: File exists; set FACELORA_CACHE to a folder"):
            use(device=CPU)


def test_a_lack_of_memory_is_explained_where_photos_are_encoded_and_pictures_drawn(dataset, base):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    for change, use in (
        ({"encode_image": full}, partial(encode, dataset, config=CONFIG, device=CPU)),
        ({"predict": full}, lambda base: list(generate(base, [], [PictureJob("a photo", 1, size=(64, 64))]))),
    ):
        with pytest.raises(OutOfMemory, match=r"enough memory \(CUDA .* or the device cpu"):
            use(base=replace(base, family=replace(base.family, **change)))


def test_latents_that_were_made_in_tiles_are_not_kept(dataset, base, monkeypatch):
    load = Base.load

    def load_tiled(self, part, device, dtype):
        network: Any = load(self, part, device, dtype)
        if part == "vae":
            network.enable_tiling()
        return network

    monkeypatch.setattr("core.models.base.Base.load", load_tiled)
    encode(dataset, base, CONFIG, device=CPU)
    assert clear_cache() == 3  # captions


def test_clearing_the_cache_deletes_all_of_it(dataset, base):
    encode(dataset, base, CONFIG, device=CPU)
    assert clear_cache() == len(dataset.images) + 3  # and the captions: two different ones and the empty one
    assert not cache_folder().exists()


def test_clearing_the_cache_leaves_what_is_not_of_this_project(dataset, base, tmp_path, monkeypatch):
    """The cache folder can be set to any folder: a disk, a home."""
    others = [
        tmp_path / name for name in ("thesis.odt", "runs/2026/log.txt", "latents/holiday.safetensors", "class/a/b.png")
    ]
    for file in others:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / f"{'a' * 64}.safetensors").write_text("mine")
    (tmp_path / "text").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    monkeypatch.setenv("FACELORA_CACHE", str(tmp_path))
    made_folder("runs", content_key("a run")).joinpath("history.json").write_text("[]")
    (made_folder("latents") / f".{content_key('cut')}.safetensors.0123abcd.tmp").write_text("half")
    assert clear_cache() == 2
    assert all(file.read_text() == "mine" for file in others)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["2026"]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("unlink", r"history.json: cannot be deleted: Permission denied \(1 file was deleted, 1 "),
        ("iterdir", "latents: cannot be read: Permission denied"),
    ],
)
def test_what_cannot_be_read_or_deleted_is_named_and_the_rest_is_gone(tmp_path, monkeypatch, method, said):
    monkeypatch.setenv("FACELORA_CACHE", str(tmp_path))
    first, second = (made_folder("runs", content_key(name)) for name in ("one", "two"))
    for folder in (first, second):
        (folder / "history.json").write_text("[]")
    closed, plain = made_folder("latents") if method == "iterdir" else first, getattr(Path, method)

    def refuse(path, *arguments, **options):
        if closed in (path, path.parent):
            raise PermissionError(13, "Permission denied")
        return plain(path, *arguments, **options)

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(BadFile, match=said):
        clear_cache()
    assert closed.exists() and not second.exists()


def test_what_a_run_uses_is_kept_while_the_cache_is_cleared(dataset, base, tmp_path):
    """Otherwise it trained to its end, could not write its history, and kept nothing."""
    refused: list[str] = []

    def clear(report: object) -> None:
        with ThreadPoolExecutor(1) as another, pytest.raises(BadFile) as error:
            another.submit(clear_cache).result()
        refused.append(str(error.value))

    config = replace(CONFIG, steps=2, rank=2, check_photos=False)
    job = TrainingJob.of([one.photo for one in dataset.images], base, config)
    assert find_or_train(job, LoraFolders("a", [tmp_path]), callbacks=Callbacks(on_step=clear)).path.exists()
    assert len(refused) == 2 and all("is in use, repeat this later" in said for said in refused)
    clear_cache()
    assert not cache_folder().exists()


def test_a_killed_runs_lock_keeps_nothing_in_the_cache():
    folder = made_folder("runs", content_key("one"))
    for name in ("history.json", ".lora.safetensors.lock"):
        (folder / name).touch()
    assert clear_cache() == 1 and not cache_folder().exists()


def test_no_lock_beyond_a_link_is_touched_when_the_cache_is_cleared(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("photo.png", ".photo.png.lock"):
        (tmp_path / "mine" / name).touch()
    (made_folder("runs") / content_key("one")).symlink_to(tmp_path / "mine")
    clear_cache()
    assert sorted(os.listdir(tmp_path / "mine")) == [".photo.png.lock", "photo.png"] and not cache_folder().exists()


def test_clearing_the_cache_while_it_is_written_stops_no_run(dataset, base, monkeypatch):
    def clear_and_save(*arguments: Any) -> None:
        if not cleared:
            cleared.append(shutil.rmtree(cache_folder()))
        save_safetensors(*arguments)

    cleared: list[None] = []
    monkeypatch.setattr("core.training.encode.save_safetensors", clear_and_save)
    assert encode(dataset, base, CONFIG, device=CPU).images and cleared
