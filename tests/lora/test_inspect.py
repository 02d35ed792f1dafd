import base64
import hashlib
import json
import os
import random
import re
import struct
import time
import tracemalloc
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import EpsImagePlugin, Image
from PIL.PngImagePlugin import PngInfo

from core.errors import BadFile, FaceLoraError, UnmatchedKeys
from core.lora.convert import convert_lora
from core.lora.file import LoraFile
from core.lora.hashes import file_hashes
from core.lora.inspect import block_norms, inspect_lora, verify_lora
from core.lora.merge import merge_loras
from core.lora.metadata import edit_metadata
from core.lora.modules import SCHEMES, LoraModule
from core.lora.report import format_inspection, inspect_header
from core.lora.resize import resize_lora
from core.lora.stated import trigger_words
from core.storage.safetensors_file import SafetensorsFile, save_safetensors

from .test_file import kohya_tensors, some

KOHYA_METADATA = json.loads((Path(__file__).parents[1] / "reference" / "kohya_metadata_sd15.json").read_text())
TRIGGER = {"modelspec.trigger_phrase": "sks person"}


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "face.safetensors"
    metadata = {**KOHYA_METADATA, "ss_network_dim": "2", **TRIGGER}
    LoraFile.from_tensors(kohya_tensors(some("sd15"), rank=2), metadata).save(path)
    return path


def broken(path: Path, change) -> None:
    tensors = {key: tensor.clone() for key, tensor in SafetensorsFile.open(path).items()}
    change(tensors)
    LoraFile.from_tensors(tensors, SafetensorsFile.open(path).metadata).save(path)


def texts(path: Path) -> list[str]:
    return [finding.text for finding in verify_lora(path)]


def test_an_inspection_says_what_the_file_is(saved):
    report = inspect_lora(saved)
    assert (report["family"], report["scheme"], report["kind"]) == ("sd15", "kohya", "locon")
    assert report["parts"] == {"text_encoder": 4, "denoiser": 12}
    assert report["ranks"] == {"2": 16} and report["alphas"] == {"1": 16}
    assert report["trigger_words"][0] == "sks person"
    assert report["training"]["steps"] == "8" and report["base_model"]["version"] == "sd_v1"
    assert json.loads(json.dumps(report)) == report


def test_the_text_of_an_inspection_has_the_facts_for_a_person(saved):
    text = format_inspection(inspect_lora(saved))
    for fact in ("face.safetensors", "sd15", "rank          2", "sks person", "learning rate: 0.0001", "mid_block"):
        assert fact in text


@pytest.mark.parametrize(
    "look", [inspect_lora, verify_lora, lambda path, **more: edit_metadata(path, title="a", **more)]
)
def test_progress_is_told_to_the_end(saved, look):
    told = []
    look(saved, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(done, len(told)) for done in range(1, len(told) + 1)]


def test_of_a_file_of_words_the_word_is_named(tmp_path):
    path = tmp_path / "sks.safetensors"
    save_safetensors(path, {"emb_params": torch.randn(2, 768)})
    report = inspect_lora(path)
    text = format_inspection(report)
    assert report["embeddings"] == ["sks"] and "embeddings    sks" in text and "rank" not in text
    for tool in (lambda lora: convert_lora(lora, "diffusers"), lambda lora: resize_lora(lora, rank=1)):
        with pytest.raises(UnmatchedKeys, match=r"sks\.safetensors: has .*no module"):
            tool(LoraFile.read(path))


def test_an_inspection_of_the_header_alone_has_no_hashes_and_norms(saved):
    report = inspect_header(saved)
    assert "hashes" not in report and "norms" not in report and "hashes" not in format_inspection(report)


def test_the_hashes_are_those_of_the_bytes(saved):
    data = saved.read_bytes()
    header = int.from_bytes(data[:8], "little")
    hashes = file_hashes(saved)
    assert hashes["autov2"] == hashlib.sha256(data).hexdigest()[:10]
    assert hashes["sshs_model_hash"] == hashlib.sha256(data[8 + header :]).hexdigest()
    assert hashes["autov3"] == hashes["sshs_model_hash"][:12]
    assert hashes["crc32"] == f"{zlib.crc32(data):08x}"
    assert hashes["autov1"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert ("blake3" in hashes) == (find_spec("blake3") is not None)
    assert hashes["sshs_legacy_hash"] == SafetensorsFile.open(saved).metadata["sshs_legacy_hash"]


def test_the_norm_of_a_block_is_that_of_its_weight_changes(saved):
    lora = LoraFile.read(saved)
    changes = [c for (part, path), c in lora.changes() if part == "denoiser" and path.startswith("up_blocks.3.")]
    expected = sum(change.square().sum() for change in changes) ** 0.5
    assert block_norms(lora)["up_blocks.3"] == pytest.approx(float(expected), rel=1e-4)


def test_trigger_words_are_found_in_each_of_their_three_places():
    assert trigger_words({"modelspec.trigger_phrase": "sks person, smiling"}) == ["sks person", "smiling"]
    datasets = json.dumps([{"subsets": [{"class_tokens": "ohwx man"}]}])
    assert trigger_words({"ss_datasets": datasets}) == ["ohwx man"]
    frequency = json.dumps({"10_x": {"outdoors": 2, "sks": 12}})
    assert trigger_words({"ss_tag_frequency": frequency}) == ["sks", "outdoors"]


@pytest.mark.parametrize("value", ["[" * 100_000, "{", "[1]", '{"a": 1}', '[{"subsets": 5}]', '[{"subsets": [7]}]', ""])
def test_damaged_nested_metadata_are_ignored(value):
    assert trigger_words({"ss_datasets": value, "ss_tag_frequency": value}) == []


def test_a_good_file_has_no_findings(saved):
    assert texts(saved) == []


def first_up(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors[next(name for name in tensors if "lora_up" in name)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: first_up(tensors).fill_(float("nan")), "1 tensor contains NaN"),
        (lambda tensors: first_up(tensors).zero_(), "1 module changes nothing"),
        (lambda tensors: first_up(tensors).mul_(1000), "changes far more than the others"),
    ],
    ids=["NaN", "without effect", "a suspicious norm"],
)
def test_a_strange_tensor_is_found(saved, change, said):
    broken(saved, change)
    assert any(said in text for text in texts(saved))


def test_a_lora_without_any_effect_is_an_error(saved):
    broken(saved, lambda tensors: [t.zero_() for k, t in tensors.items() if "lora_up" in k])
    findings = [finding for finding in verify_lora(saved) if finding.is_error]
    assert [finding.text for finding in findings] == ["no module changes anything"]


def test_a_wrong_hash_is_found(saved):
    file = SafetensorsFile.open(saved)
    save_safetensors(saved, dict(file), {**file.metadata, "sshs_model_hash": "0" * 64})
    assert texts(saved)[0].startswith("sshs_model_hash is 000000000000 in the metadata")


def test_a_wrong_hash_of_modelspec_is_found(saved):
    right = edit_metadata(saved, title="A face")["sshs_model_hash"]
    lora = LoraFile.read(saved)
    tensors = {key: tensor.clone() for key, tensor in lora.tensors.items()}
    for value, wrong in ((f"0x{right}", False), ("0x12", True)):
        save_safetensors(saved, tensors, {**lora.metadata, "modelspec.hash_sha256": value})
        assert any(text.startswith("modelspec.hash_sha256 is 12 in the metadata") for text in texts(saved)) == wrong


def test_metadata_of_another_family_are_found(saved):
    file = SafetensorsFile.open(saved)
    save_safetensors(saved, dict(file), {**file.metadata, "ss_base_model_version": "sdxl_base_v1-0"})
    assert any(
        "its metadata say 'sdxl_base_v1-0' (ss_base_model_version), but its tensors are for sd_v1 (sd15)" in text
        for text in texts(saved)
    )


def test_names_that_comfyui_would_skip_are_found(saved):
    lora = LoraFile.read(saved)
    LoraFile.from_modules("sd15", lora.modules(), lora.metadata, "diffusers").save(saved)
    reading = inspect_lora(saved)["readers"]["ComfyUI"]
    refused = reading["names"]
    assert reading["verdict"] == "loads in part" and sum(reading["reasons"].values()) == len(refused)
    # Of diffusers' UNet names it is the attention's that ComfyUI does not know.
    assert set(refused) == {e.name for e in LoraFile.read(saved).entries if e.part == "denoiser" and ".to_" in e.name}
    assert any(f"ComfyUI would not load {len(refused)} module" in text for text in texts(saved))


def test_tags_in_one_text_are_not_taken_apart_into_letters(saved):
    assert edit_metadata(saved, tags="portrait, photo")["modelspec.tags"] == "portrait, photo"


def test_an_edit_changes_nothing_else(saved):
    file = SafetensorsFile.open(saved)
    save_safetensors(saved, dict(file), before := {**file.metadata, "ss_training_comment": ""})
    assert edit_metadata(saved, title="A face") == before | {
        "modelspec.title": "A face", "modelspec.sai_model_spec": "1.0.1",
    }  # fmt: skip


def test_an_edited_lora_of_peft_keeps_its_strength_without_a_path(tmp_path):
    path, name = tmp_path / "adapter_model.safetensors", "base_model.model.mid_block.attentions.0.proj_in"
    save_safetensors(path, {f"{name}.lora_A.weight": torch.ones(8, 320), f"{name}.lora_B.weight": torch.ones(320, 8)})
    config = {"r": 8, "lora_alpha": 16, "base_model_name_or_path": "/home/someone/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    metadata = edit_metadata(path, tmp_path / "new.safetensors", title="Me")
    (module,) = LoraFile.read(tmp_path / "new.safetensors").modules().values()
    assert module.scale == 2.0 and "someone" not in json.dumps(metadata)


def test_a_thumbnail_is_small_and_carries_neither_exif_nor_a_comment(saved, tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "camera of a private person"
    Image.new("RGB", (1000, 500)).save(tmp_path / "picture.jpg", exif=exif, comment="a private remark")
    assert (tmp_path / "picture.jpg").read_bytes().count(b"private") == 2
    url = edit_metadata(saved, tmp_path / "new.safetensors", thumbnail=tmp_path / "picture.jpg")["modelspec.thumbnail"]
    start, _, data = url.partition(",")
    assert start == "data:image/jpeg;base64" and len(url) < 10_000 and b"private" not in base64.b64decode(data)
    assert "modelspec.thumbnail" not in SafetensorsFile.open(saved).metadata


def test_a_thumbnail_that_is_no_picture_is_refused(saved, tmp_path):
    with pytest.raises(BadFile, match=f"^{re.escape(str(saved))}: this picture cannot be read$"):
        edit_metadata(saved, thumbnail=saved)
    text = PngInfo()
    text.add_text("comment", "a" * 2**21, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(BadFile, match=r"/a\.png: the file is damaged or incomplete"):
        edit_metadata(saved, thumbnail=tmp_path / "a.png")


def test_a_thumbnail_is_read_like_a_photo(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript is run"))
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    os.mkfifo(tmp_path / "b.jpg")
    for name, why in (("a.jpg", "this picture cannot be read"), ("b.jpg", "is not a regular file")):
        with pytest.raises(BadFile, match=f"/{name}: {why}$"):
            edit_metadata(saved, thumbnail=tmp_path / name)


# --- damaged and absurd files

BLOCK = "lora_unet_mid_block_attentions_0_transformer_blocks_0_"
EVERY_KIND = {
    f"{BLOCK}attn1_to_q": {"lora_down.weight": (2, 12), "lora_up.weight": (12, 2), "alpha": (), "dora_scale": (12, 1)},
    f"{BLOCK}attn2_to_k": {"lora_down.weight": (2, 768), "lora_up.weight": (12, 2), "alpha": ()},
    "lora_unet_mid_block_resnets_0_conv1": {
        "lora_down.weight": (2, 12, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (12, 2, 1, 1),
    },
    f"{BLOCK}attn1_to_k": {"hada_w1_a": (12, 2), "hada_w1_b": (2, 12), "hada_w2_a": (12, 3), "hada_w2_b": (3, 12)},
    f"{BLOCK}attn1_to_v": {"lokr_w1": (2, 2), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 6), "alpha": ()},
    f"{BLOCK}attn1_to_out_0": {"diff": (12, 12), "diff_b": (12,)},
    f"{BLOCK}ff_net_2": {"oft_blocks": (3, 4, 4), "alpha": ()},
    f"{BLOCK}norm1": {"w_norm": (12,), "b_norm": (12,)},
}  # fmt: skip


_RARE_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.complex64)


def damaged_lora(chance: random.Random) -> dict[str, torch.Tensor]:
    """Some kinds of adapters, with some tensors gone, of another shape or type, under another role, or not finite."""
    kinds = chance.sample(list(EVERY_KIND), chance.randint(2, len(EVERY_KIND)))
    shapes = {f"{name}.{role}": shape for name in kinds for role, shape in EVERY_KIND[name].items()}
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    for _ in range(chance.randint(1, 2)):
        key = chance.choice(list(tensors))
        action = chance.randrange(5)
        if action == 0:
            del tensors[key]
        elif action == 1:
            tensors[key] = torch.randn([chance.choice([0, 1, 2, 3, 12]) for _ in range(chance.randrange(6))])
        elif action == 2:
            tensors[key] = tensors[key].to(chance.choice([torch.int64, torch.bool, *_RARE_TYPES]))
        elif action == 3:
            tensors[chance.choice(list(tensors))] = tensors[key]
        else:
            tensors[key] = torch.full(tensors[key].shape, chance.choice([float("nan"), float("inf"), 0.0]))
    return tensors


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_adapters_are_explained_or_refused_by_name(count, tmp_path):
    chance = random.Random(count)
    torch.manual_seed(count)
    path, inspected, written = tmp_path / "a.safetensors", 0, 0
    tools = (
        lambda lora: convert_lora(lora, chance.choice(SCHEMES), chance.choice([None, 2])),
        lambda lora: resize_lora(lora, rank=1),
        lambda lora: merge_loras([(lora, 0.5), (lora, 2.0)], scheme=chance.choice(SCHEMES)),
    )
    for _ in range(count):
        save_safetensors(path, damaged_lora(chance))
        try:
            report = inspect_lora(path)
            verify_lora(path)
            inspected += len(format_inspection(report)) > 0
        except FaceLoraError as error:
            assert "\n" not in str(error)
        for tool in tools:
            try:
                tool(LoraFile.read(path))[0].save(tmp_path / "b.safetensors")
                written += 1
            except FaceLoraError as error:
                assert "\n" not in str(error)
    assert written > 0.09 * count  # most are damaged in a way that is refused
    assert inspected > 0.9 * count


def test_a_small_file_that_claims_a_huge_weight_allocates_none(tmp_path):
    path = tmp_path / "a.safetensors"
    absurd = {"lokr_w1": torch.ones(1000, 100), "lokr_w2": torch.ones(100, 1000)}
    more = {"lora_down.weight": torch.ones(1, 100_000), "lora_up.weight": torch.ones(100_000, 1)}
    tensors = {f"{BLOCK}attn1_to_q.{role}": tensor for role, tensor in absurd.items()}
    tensors |= {f"{BLOCK}attn1_to_k.{role}": tensor for role, tensor in more.items()}
    good = LoraModule(torch.ones(1, 768), torch.ones(12, 1), 1.0)
    path_of_good = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors |= LoraFile.from_modules("sd15", {("denoiser", path_of_good): good}, {}).tensors
    save_safetensors(path, tensors)
    report = inspect_lora(path)
    assert len(report["unknown_keys"]) == 2 + 2 and list(report["norms"]) == ["mid_block"]
    assert any("4 tensors are not recognised" in text for text in texts(path))


@pytest.mark.clock
def test_two_gigabytes_are_inspected_in_under_a_second_without_reading_them(tmp_path):
    path = tmp_path / "a.safetensors"
    names = [n.removesuffix(".alpha") for n in kohya_tensors(some("sdxl", 1), rank=1) if n.endswith(".alpha")]
    entries, position = {}, 0
    for name in names:
        for suffix, shape in (("alpha", []), ("lora_down.weight", [400, 1280]), ("lora_up.weight", [1280, 400])):
            size = 2 * (1 if not shape else shape[0] * shape[1])
            entries[f"{name}.{suffix}"] = {"dtype": "F16", "shape": shape, "data_offsets": [position, position + size]}
            position += size
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + position)  # sparse: takes no room on the disk
    assert path.stat().st_size > 2e9
    tracemalloc.start()
    inspect_header(path)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    started = time.process_time()
    inspect_header(path)
    assert time.process_time() - started < 1
