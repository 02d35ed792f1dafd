"""The files beside a LoRA: what other programs read of them, with their own code where it is here."""

import base64
import importlib.util
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.ExifTags import Base

from core.cli import main
from core.errors import BadFile, NoLora
from core.lora import LoraFile, edit_metadata, write_sidecars
from core.lora.hashes import file_hashes
from core.storage.safetensors_file import SafetensorsFile, save_safetensors
from core.tensor_names import NAME_TABLES
from tests.tooling import write_photos, write_quick_pack
from tools.model_tables import whole

from .test_file import kohya_tensors, some
from .test_identity import TABLES

DOWNLOADS = Path(__file__).parents[1] / ".downloads"
METADATA = {
    "ss_base_model_version": "sd_v1",
    "modelspec.title": "A face",
    "modelspec.description": "Made of twelve photos.",
    "modelspec.trigger_phrase": "sks person",
    "modelspec.tags": "person, photo",
    "modelspec.usage_hint": "Best at 0.9.",
}
SUFFIXES = ("json", "metadata.json", "cm-info.json")
TEXTS = {f"face.{suffix}" for suffix in SUFFIXES}


@pytest.fixture
def lora(tmp_path) -> Path:
    path = tmp_path / "face.safetensors"
    LoraFile.from_tensors(kohya_tensors(some("sd15"), rank=1), METADATA).save(path)
    return path


@pytest.fixture
def picture(tmp_path) -> Path:
    image, path = Image.new("RGB", (1600, 800), "red"), tmp_path / "IMG_1.jpg"
    exif = image.getexif()
    exif[Base.Orientation], exif[Base.Artist] = 6, "Jane"
    image.save(path, exif=exif)
    return path


def test_each_program_finds_the_words_under_the_names_it_knows(lora):
    assert {path.name for path in write_sidecars(lora)} == TEXTS
    a1111, manager, matrix = (json.loads((lora.parent / f"face.{name}.json").read_text()) if name else
                              json.loads((lora.parent / "face.json").read_text())
                              for name in ("", "metadata", "cm-info"))  # fmt: skip
    assert (a1111["activation text"], a1111["sd version"]) == ("sks person", "SD1")
    assert a1111["modelVersions"] == [{"trainedWords": ["sks person"]}] and a1111["tags"] == ["person", "photo"]
    hashes = file_hashes(lora)
    # The fields without a default in ComfyUI-Lora-Manager's class.
    needed = "file_name model_name file_path size modified sha256 base_model preview_url"
    assert manager.keys() >= set(needed.split())
    assert (manager["sha256"], manager["base_model"], manager["from_civitai"]) == (hashes["sha256"], "SD 1.5", False)
    assert manager["civitai"] == {"trainedWords": ["sks person"]} and manager["size"] == lora.stat().st_size
    assert (matrix["ModelName"], matrix["BaseModel"], matrix["ModelType"]) == ("A face", "SD 1.5", "LORA")
    assert matrix["TrainedWords"] == ["sks person"] and matrix["Hashes"]["SHA256"] == hashes["sha256"]
    assert not any(str(lora.parent) in path.read_text() for path in lora.parent.glob("*.json"))


# The published model, a name of its base in metadata, and how Civitai's list and Lora-Manager call that.
BASES = [
    ("Z-Image", "ss_base_model_version", "zimage:turbo", "ZImageTurbo"),
    ("FLUX.1", "ss_base_model_version", "flux.1_kontext", "Flux.1 Kontext"),
    ("FLUX.1", "ss_sd_model_name", "flux1-dev.safetensors", "Flux.1 D"),
    ("SDXL", "ss_sd_model_name", "ponyDiffusionV6XL.safetensors", "Pony"),
    ("SDXL", "ss_sd_model_name", "sd_xl_base_1.0.safetensors", "SDXL 1.0"),
    ("FLUX.2 klein 4B", "ss_sd_model_name", "flux-2-klein-base-4b.safetensors", "Flux.2 Klein 4B-base"),
    ("Ideogram 4", "ss_base_model_version", "ideogram4", "Ideogram 4.0"),
    ("Qwen-Image 2.1", "ss_base_model_version", "qwen_image_2.1", "Other"),
]


@pytest.mark.parametrize(("title", "key", "name", "civitai"), BASES)
def test_the_base_model_is_the_one_that_the_metadata_name(title, key, name, civitai, tmp_path):
    (model,) = (model for model in TABLES["models"] if model["title"] == title)
    shapes = whole(model["denoiser"]["diffusers"])
    ends = {path: shape for path, shape in shapes.items() if len(shape) == 2}
    prefix = NAME_TABLES[model["family"]].diffusers_prefix
    tensors = {
        f"{prefix}{path}.lora_{letter}.weight": torch.zeros(size)
        for path, shape in ends.items()
        for letter, size in (("A", (1, shape[1])), ("B", (shape[0], 1)))
    }
    path = tmp_path / "face.safetensors"
    save_safetensors(path, tensors, {key: name})
    write_sidecars(path)
    assert json.loads(path.with_suffix(".metadata.json").read_text())["base_model"] == civitai
    assert json.loads(path.with_suffix(".cm-info.json").read_text())["BaseModel"] == civitai


def test_a_file_for_no_published_model_has_no_version_and_no_file_is_from_civitai(tmp_path):
    """Stability Matrix takes a missing Source for Civitai, 0. 3 is "Other"."""
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 16), f"{name}.lora_up.weight": torch.ones(16, 1)}
    save_safetensors(tmp_path / "demo.safetensors", tensors, {"ss_base_model_version": "sd_v1"})
    write_sidecars(tmp_path / "demo.safetensors")
    a1111, manager, matrix = (
        json.loads((tmp_path / f"demo{end}.json").read_text()) for end in ("", ".metadata", ".cm-info")
    )
    assert (a1111["sd version"], manager["base_model"]) == ("Unknown", "Other")
    assert (matrix["BaseModel"], matrix["Source"]) == ("Other", 3)


def test_a_picture_is_written_only_if_it_is_given(lora, picture):
    write_sidecars(lora)
    assert not list(lora.parent.glob("*.png"))
    assert {path.name for path in write_sidecars(lora, picture)} == {"face.png", "face.preview.png"}
    for path in lora.parent.glob("*.png"):
        with Image.open(path) as image:
            assert image.size == (384, 768) and not image.getexif() and set(image.info) == set()


def test_a_file_that_is_there_is_never_replaced(lora, picture, capsys):
    for name in ("face.json", "face.preview.png"):
        (lora.parent / name).write_text("mine")
    assert main(["sidecars", str(lora), "--picture", str(picture)]) == 0
    printed = {Path(line).name for line in capsys.readouterr().out.splitlines()}
    assert printed == {"face.metadata.json", "face.cm-info.json", "face.png"}
    assert {(lora.parent / name).read_text() for name in ("face.json", "face.preview.png")} == {"mine"}
    assert main(["sidecars", str(lora), "--picture", str(picture)]) == 0
    assert "all files already exist beside" in capsys.readouterr().out


def test_only_a_lora_in_a_safetensors_file_gets_some(tmp_path, lora):
    save_safetensors(tmp_path / "model.safetensors", {"a.weight": torch.ones(2, 2)})
    with pytest.raises(NoLora):
        write_sidecars(tmp_path / "model.safetensors")
    lora.rename(tmp_path / "face.bin")
    with pytest.raises(BadFile, match=r"face\.bin: .* must end in \.safetensors"):
        write_sidecars(tmp_path / "face.bin")


def test_the_picture_in_the_file_is_where_all_programs_look_and_goes_as_a_whole(lora, picture):
    metadata = edit_metadata(lora, thumbnail=picture)
    (cover,) = json.loads(metadata["ssmd_cover_images"])
    assert metadata["modelspec.thumbnail"] == f"data:image/jpeg;base64,{cover}"
    assert Image.open(io.BytesIO(base64.b64decode(cover))).size == (128, 256)
    edit_metadata(lora, remove=["modelspec.thumbnail"])
    assert not {"modelspec.thumbnail", "ssmd_cover_images"} & SafetensorsFile.open(lora).metadata.keys()


def module_of(file: Path, stubs: Mapping[str, Any], monkeypatch) -> ModuleType:
    """A module of another program by itself; what it imports of the rest, and does not need here, is stubbed."""
    if not file.exists():
        pytest.skip(f"needs {file.name}, which make test-all downloads")
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, name, stub)
    spec = importlib.util.spec_from_file_location("other_program", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_invokeais_own_code_takes_words_and_picture(lora, picture, tmp_path, monkeypatch):
    write_sidecars(lora, picture)
    stubs = {
        "invokeai.app.util.path_safety": SimpleNamespace(is_plain_filename=lambda name: True),
        "invokeai.app.util.thumbnails": SimpleNamespace(make_thumbnail=lambda image, side: image.resize((side, side))),
        "invokeai.backend.model_manager.configs.factory": SimpleNamespace(AnyModelConfig=object),
        "invokeai.backend.model_manager.taxonomy": SimpleNamespace(ModelType=object),
    }
    file = DOWNLOADS / "invokeai/invokeai/backend/model_manager/util/lora_metadata_extractor.py"
    found = module_of(file, stubs, monkeypatch).extract_lora_metadata(lora, "key", tmp_path)
    assert found == ("Made of twelve photos. | Best at 0.9.", {"sks person"})
    assert Image.open(tmp_path / "key.webp").size == (256, 256)


def test_comfyuis_own_code_finds_the_pictures(lora, picture, monkeypatch):
    write_sidecars(lora, picture)
    edit_metadata(lora, thumbnail=picture)

    def header(path: str, max_size: int) -> bytes:
        data = Path(path).read_bytes()
        return data[8 : 8 + int.from_bytes(data[:8], "little")]

    utils = SimpleNamespace(safetensors_header=header)
    stubs = {
        "comfy": SimpleNamespace(utils=utils),
        "comfy.utils": utils,
        "folder_paths": SimpleNamespace(
            map_legacy=None,
            filter_files_extensions=None,
            filter_files_content_types=lambda files, kinds: [file for file in files if file.endswith("png")],
        ),
        "aiohttp": SimpleNamespace(web=SimpleNamespace()),
    }
    module = module_of(DOWNLOADS / "ComfyUI/app/model_manager.py", stubs, monkeypatch)
    found = module.ModelFileManager.get_model_previews(SimpleNamespace(), str(lora))
    assert {Path(each).name for each in found[:2]} == {"face.png", "face.preview.png"}
    assert Image.open(found[2]).size == (128, 256)


def test_a_training_writes_them_when_asked_without_a_picture(photo_folder, small_sd15, tmp_path):
    output = tmp_path / "me.safetensors"
    command = ["train", str(photo_folder), "--base", str(small_sd15), "--output", str(output), "--recipe", "none"]
    settings = ["--steps", "1", "--rank", "2", "--resolution", "64", "--no-check-photos", "--trigger", "sks"]
    assert main([*command, *settings, "--sidecars"]) == 0
    assert {path.name for path in tmp_path.glob("me.*")} == {f"me.{end}" for end in ("safetensors", *SUFFIXES)}
    assert json.loads((tmp_path / "me.json").read_text())["activation text"] == "sks person"


def test_headshots_and_a_studio_write_them_and_forget_deletes_them(tmp_path):
    anna, packs = write_photos(tmp_path / "people" / "anna", 5), write_quick_pack(tmp_path / "packs")
    (anna / "person.toml").write_text("agreed = true")
    order = ["--base", "demo", "--style-pack", "quick", "--style-folder", str(packs), "--count", "1", "--steps", "1"]
    studio, headshots = ["studio", str(anna.parent)], ["headshots", str(anna), "--yes"]
    for command, place, name in ((studio, "studio", "anna"), (headshots, "shots", "sks")):
        assert main([*command, *order, "--sidecars", "--output", str(tmp_path / place)]) in (0, 1)
        (lora,) = (tmp_path / place).rglob(f"{name}.safetensors")
        assert all(lora.with_suffix(f".{suffix}").exists() for suffix in SUFFIXES)
    assert main(["forget", "anna", "--output", str(tmp_path / "studio")]) == 0
    assert not list((tmp_path / "studio").rglob("anna*"))


def test_after_another_training_the_words_are_new_but_what_somebody_edited_stays(lora):
    write_sidecars(lora)
    edited = lora.with_suffix(".json")
    edited.write_text(edited.read_text().replace("Best at 0.9.", "Best at 0.7."))
    before = edited.read_bytes()
    edit_metadata(lora, trigger_phrase="ohwx person")
    assert {path.name for path in write_sidecars(lora)} == {"face.metadata.json", "face.cm-info.json"}
    manager = json.loads(lora.with_suffix(".metadata.json").read_text())
    assert manager["civitai"]["trainedWords"] == ["ohwx person"] and manager["sha256"] == file_hashes(lora)["sha256"]
    assert edited.read_bytes() == before
    assert write_sidecars(lora) == []
