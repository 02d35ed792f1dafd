"""The folder to upload: what the site needs is in it, and nothing personal."""

import hashlib
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from core import GenerateConfig, LoraFile, PictureJob, TrainConfig, generate, load_base, train
from core.cli import main
from core.errors import BadConfig, BadFile, BadPhoto
from core.lora import convert_lora, inspect_lora
from core.lora.modules import LoraModule
from core.pictures import Group, GroupMember, Picture, publish
from core.pictures.generate import parameters_text
from core.pictures.group import group_parameters
from core.pictures.parameters import Parameters
from core.storage.drawn import MARK_KEYS
from core.tensor_names import NAME_TABLES
from core.tensor_names.models import _tables

MODULE = ("denoiser", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
publish_agreed = partial(publish, agreed=True)
SETTINGS = {"Steps": "5", "Sampler": "Euler a", "CFG scale": "6", "Seed": "1", "Size": "64x64"}


@pytest.fixture
def nobody(monkeypatch):
    """A computer whose user has a name."""
    monkeypatch.setenv("LOGNAME", "janedoe77")


def write_lora(path: Path, width: int = 64, out: int = 32, **metadata: str) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    generator = torch.Generator().manual_seed(0)
    module = LoraModule(torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator), 1.0)
    known = {
        "ss_base_model_version": "sd_v1",
        "modelspec.title": "A sks person",
        "modelspec.trigger_phrase": "sks person",
    }
    texts = {key.replace("__", "."): value for key, value in metadata.items()}
    LoraFile.from_modules("sd15", {MODULE: module}, known | texts).save(path, torch.float32)
    return path


def write_picture(path: Path, prompt: str | None = "sks person", **settings: str) -> Path:
    info = PngInfo()
    if prompt is not None:
        info.add_text("parameters", str(Parameters(prompt, "", SETTINGS | settings)))
    info.add_text("workflow", '{"image": "/home/jane/IMG_2031.jpg"}')
    Image.new("RGB", (64, 64), "red").save(path, pnginfo=info)
    return path


def contents(folder: Path) -> bytes:
    return b"\n".join(path.name.encode() + path.read_bytes() for path in sorted(folder.iterdir()))


@pytest.mark.usefixtures("nobody")
def test_a_trained_lora_and_its_pictures_become_a_folder_to_upload(photo_folder, small_sd15, tmp_path, capsys):
    path, base = tmp_path / "jane_doe.safetensors", load_base(small_sd15)
    config = TrainConfig(steps=1, rank=2, resolution=64, check_photos=False)
    train(photo_folder, base, config, output=path)
    lora, job = LoraFile.read(path), PictureJob("studio headshot of sks person", 3, "blurry", (64, 64), 2, 4.5)
    drawn = next(iter(generate(base, [(lora, 0.9)], [job], GenerateConfig("euler_ancestral"))))
    drawn.save(tmp_path / "jane-1.png", {"face_pass": "{}"})
    pictures = ["--pictures", str(tmp_path / "jane-1.png")]
    assert main(["publish", str(path), "--output", str(tmp_path / "out"), *pictures, "--agreed"]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "page.txt", "sks_person-01.png", "sks_person.safetensors",
    ]  # fmt: skip

    before, after = inspect_lora(path), inspect_lora(tmp_path / "out/sks_person.safetensors")
    assert after["trigger_words"] == ["sks person"] and after["thumbnail"]
    assert after["training"] == before["training"] and after["norms"] == before["norms"]
    assert after["hashes"]["autov3"] == before["hashes"]["autov3"]
    page = (tmp_path / "out/page.txt").read_text()
    hashes = {name: after["hashes"][name.lower()].upper() for name in ("AutoV2", "AutoV3", "CRC32", "BLAKE3")}
    assert all(f"{name}: {number}\n" in page for name, number in hashes.items())
    for text in (
        "Title\n-----\nsks person\n", "The person shown has agreed", "Base model\n----------\nunknown\n",
        "Trigger words\n-------------\nsks person\n", "Strength\n--------\n0.9\n",
        f"Licence of the base model\n{25 * '-'}\nunknown\n",
        "Model: small, Sampler: Euler a, Steps: 2, CFG scale: 4.5, Size: 64x64\n",
    ):  # fmt: skip
        assert text in page, text

    with Image.open(tmp_path / "out/sks_person-01.png") as image:
        assert image.tobytes() == drawn.image.tobytes() and {*image.info} - MARK_KEYS == {"parameters"}
        prompt, negative, settings = image.info["parameters"].split("\n")
    assert prompt == "studio headshot of sks person <lora:sks_person:0.9>" and negative == "Negative prompt: blurry"
    assert settings.endswith(f'Lora hashes: "sks_person: {after["hashes"]["autov3"]}"')
    # The caption of a photo, the folders, the file's own name.
    for personal in (b"facing", b"jane", photo_folder.parent.name.encode(), tmp_path.name.encode()):
        assert personal not in contents(tmp_path / "out"), personal
    assert "metadata entries were left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x>JaneDoe", "x: ab, JaneDoe", "x<lora:JaneDoe>", "x\nJaneDoe:2"])
def test_no_part_of_a_loras_odd_file_name_gets_out_with_a_picture(small_sd15, tmp_path, name):
    path, base = write_lora(tmp_path / f"{name}.safetensors"), load_base(small_sd15)
    job = PictureJob("sks person", 1, "", (64, 64), 1)
    text = parameters_text(base, [(LoraFile.read(path), 0.9)], job, GenerateConfig())
    Picture(Image.new("RGB", (64, 64)), job, text).save(tmp_path / "ours.png")
    publish_agreed(path, tmp_path / "out", [tmp_path / "ours.png"])
    assert b"Jane" not in contents(tmp_path / "out") and b"<lora:A_sks_person:0.9>" in contents(tmp_path / "out")


def test_pictures_of_earlier_versions_have_no_name_of_a_file_either(tmp_path):
    path = write_lora(tmp_path / "x>JaneDoe.safetensors")
    number = LoraFile.read(path).model_hash[:12]
    pictures = [
        write_picture(tmp_path / f"{index}.png", f"sks person <lora:{name}:0.9>", **{"Lora hashes": hashes})
        for index, (name, hashes) in enumerate((
            ("x>JaneDoe", f"x>JaneDoe: {number}"), ("x: ab, JaneDoe", f"x: ab, JaneDoe: {number}"),
            ("x>JaneDoe", ""), ("y:JaneDoe", f"y: {number}"),
        ))
    ]  # fmt: skip
    publish_agreed(path, tmp_path / "out", pictures)
    assert b"Jane" not in contents(tmp_path / "out")
    with Image.open(tmp_path / "out/A_sks_person-01.png") as image:
        assert image.info["parameters"].startswith("sks person <lora:A_sks_person:0.9>\n")


@pytest.mark.usefixtures("nobody")
def test_nothing_of_another_programs_metadata_gets_out(tmp_path):
    path = write_lora(
        tmp_path / "jane/jane_doe.safetensors",
        ss_output_name="jane_doe", ss_dataset_dirs='{"10_jane": {}}', ss_tag_frequency='{"10_jane": {"jane at home": 3}}',
        ss_sd_model_name="/home/jane/model.safetensors", ss_training_comment="of jane", ss_optimizer="x(/home/jane/y=1)",
        ss_steps="40", modelspec__author="Jane", ot_config='{"path": "C:\\\\jane"}', modelspec__thumbnail="data:jane",
    )  # fmt: skip
    photo, exif = tmp_path / "jane/IMG_2031.jpg", Image.Exif()
    exif[0x010F], exif[0x9286] = "Jane's telephone", b"by jane"
    exif.get_ifd(0x8825)[1] = "N"
    Image.new("RGB", (64, 32), "red").save(photo, exif=exif, comment=b"jane")
    hash_ = LoraFile.read(path).model_hash[:10]
    png = write_picture(
        tmp_path / "jane/1.png", "sks person <lora:jane_doe:0.8><lora:bob:0.2> <lora:janes:1>",
        **{"Lora hashes": f"jane_doe: {hash_}, bob: 0123456789ab", "Model": "janes-folder", "Note": "jane", "VAE": "janes"},
    )  # fmt: skip
    told = []
    of_comfyui, of_a1111 = write_picture(tmp_path / "jane/3.png", None), tmp_path / "jane/4.jpg"
    exif = Image.Exif()
    settings = f'Steps: 7, Lora hashes: "jane_doe: {hash_}", Hashes: {{"vae": "735e", "lora:jane_doe": "{hash_}"}}'
    said = f'sks <lora:jane_doe:1>\n{settings}, Civitai resources: [{{"type": "lora", "modelName": "sks [fp8]"}}], Version: 1'
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + said.encode("utf-16-be")
    Image.new("RGB", (64, 32), "red").save(of_a1111, exif=exif)
    given = [photo, png, of_comfyui, of_a1111]
    made = publish_agreed(path, tmp_path / "out", given, on_warning=told.append)
    assert b"jane" not in contents(made.folder).lower() and b"bob" not in contents(made.folder)
    assert told == [
        "IMG_2031.jpg: left out: it may be a photo or show other people, since no prompt or graph is in it",
        "3.png: it has no A1111 parameters, so visitors cannot see how it was made",
    ]
    assert {"ss_output_name", "ss_optimizer", "modelspec.author", "ot_config"} <= set(made.left_out)
    assert inspect_lora(made.lora)["training"] == {"steps": "40"}
    first, second, third = map(Image.open, made.pictures)
    assert {*second.info} <= MARK_KEYS and not second.getexif() and second.size == (64, 64)
    assert third.info["parameters"].startswith("sks <lora:A_sks_person:1>") and not third.getexif()
    assert {*first.info} - MARK_KEYS == {"parameters"}
    assert first.info["parameters"] == (
        "sks person <lora:A_sks_person:0.8> <lora:0123456789ab:0.2>\nNegative prompt: \n"
        "Steps: 5, Sampler: Euler a, CFG scale: 6, Seed: 1, Size: 64x64, "
        f'Lora hashes: "A_sks_person: {hash_}, 0123456789ab: 0123456789ab"'
    )


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    ("description", "part"),
    [
        ("from /home/jane/photos", "the path '/home/jane/photos'"),
        ("from D:\\faces\\jane", r"the path 'D:\\faces\\jane'"),
        ("like ~/x", "the path '~/x'"),
        ("like Anna 2.HEIC", "the file name '2.HEIC'"),
        ("by JaneDoe77!", "the name of this computer's user, 'janedoe77'"),
    ],
)
def test_a_text_with_something_personal_is_refused_by_its_name(tmp_path, description, part):
    path = write_lora(tmp_path / "a.safetensors", modelspec__description=description)
    with pytest.raises(BadFile) as refused:
        publish_agreed(path, tmp_path / "out")
    assert str(refused.value) == (
        f"the LoRA's modelspec.description: found {part}, which should not be published; "
        "change the text or leave it out"
    )
    assert list(tmp_path.iterdir()) == [path]
    made = publish_agreed(
        path, tmp_path / "out", description="A person, 1/2 of a pair: https://example.org/a/b.png (50mm f/1.8)"
    )
    assert b"jane" not in contents(made.folder).lower()


@pytest.mark.usefixtures("nobody")
def test_a_prompt_with_something_personal_is_refused(tmp_path):
    path = write_lora(tmp_path / "a.safetensors", modelspec__trigger_phrase="janedoe77 person")
    publish_agreed(
        path, tmp_path / "out", [write_picture(tmp_path / "1.png", "janedoe77 person")], on_warning=lambda text: None
    )
    picture = write_picture(tmp_path / "2.png", "as on DSC_0001.jpg")
    with pytest.raises(BadFile, match=r"^2\.png, parameters: found the file name 'DSC_0001\.jpg'"):
        publish_agreed(path, tmp_path / "other", [picture], on_warning=lambda text: None)
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_published_is_refused_in_one_line(tmp_path, capsys):
    path, out = write_lora(tmp_path / "a.safetensors"), tmp_path / "out"
    untitled = write_lora(tmp_path / "untitled.safetensors", modelspec__title="")
    save_file({"emb_params": torch.zeros(2, 768)}, tmp_path / "word.safetensors")
    broken = write_lora(tmp_path / "broken.safetensors")
    tensors = {name: tensor * float("nan") for name, tensor in LoraFile.read(broken).tensors.items()}
    save_file(tensors, broken, {"ss_base_model_version": "sd_v1"})
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    for lora, output, pictures, error in (
        (path, tmp_path / "there", [], BadFile), (path, path, [], BadFile), (untitled, out, [], BadConfig),
        (tmp_path / "word.safetensors", out, [], BadFile), (broken, out, [], BadFile), (tmp_path / "no", out, [], BadFile),
        (path, out, [tmp_path / "no.png"], BadPhoto), (path, out, [tmp_path / "empty"], BadPhoto),
        (path, out, [path], BadPhoto),
    ):  # fmt: skip
        before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
        with pytest.raises(error):
            publish_agreed(lora, output, pictures)
        options = ["--pictures", *map(str, pictures)] if pictures else []
        assert main(["publish", str(lora), "--output", str(output), "--agreed", *options]) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert before == {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} and not out.exists()
        assert {file.name for file in tmp_path.iterdir() if file.is_dir()} == {"there", "empty"}
    with pytest.raises(BadConfig, match="the person shown must have agreed"):
        publish(path, out)
    half = {f"unet.{MODULE[1]}.lora_A.weight": torch.ones(2, 64)}
    save_file(half, tmp_path / "half.safetensors")
    for name, fault in (("word", "this file is an embedding"), ("half", "1 tensor is not recognised or incomplete")):
        with pytest.raises(BadFile, match=rf"{name}\.safetensors: {fault}"):
            publish_agreed(tmp_path / f"{name}.safetensors", out)
    for title, fault in ((None, "it has no title"), ("?!", r"its title '\?!' contains nothing usable")):
        with pytest.raises(BadConfig, match=rf"untitled\.safetensors: {fault}.*; set title$"):
            publish_agreed(untitled, out, title=title)
    device = publish_agreed(untitled, tmp_path / "con", title="Con")
    assert device.lora.name == "Con_.safetensors", "Con is a device on Windows"
    assert not out.exists()


def test_a_folder_of_pictures_is_taken_in_order_but_for_its_contact_sheet(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("b.png", "a.png", "contact_sheet.png"):
        write_picture(folder / name, name[0])
    (folder / "kept").mkdir()  # as it is beside headshots
    write_picture(folder / "kept/a.png")
    told = []
    path = write_lora(tmp_path / "a.safetensors", 768, 1280)
    made = publish_agreed(path, tmp_path / "out", [folder], on_warning=told.append)
    assert [Image.open(picture).info["parameters"][0] for picture in made.pictures] == ["a", "b"]
    assert told == [
        f"{name}.png: the hashes in its parameters show that it was drawn without this LoRA" for name in "ab"
    ]
    # These pictures say nothing of the LoRA's strength, so the page says what suits the family.
    page = made.page.read_text()
    assert "Strength\n--------\n1\n" in page and "Steps: 20, CFG scale: 6, Size: 512x512" in page
    assert "Base model\n----------\nSD 1.5\n" in page and "CreativeML Open RAIL-M" in page


def test_a_picture_of_several_people_is_no_example_of_ones_lora(small_sd15, tmp_path):
    path, folder, base = write_lora(tmp_path / "anna.safetensors"), tmp_path / "pictures", load_base(small_sd15)
    folder.mkdir()
    anna = GroupMember("anna", LoraFile.read(path), "sks person")
    groups = {
        "alone": Group((anna,)),
        "couple": Group((anna, replace(anna, name="ben", phrase="ohwx man; 1 2 3 4: x"))),
    }
    for name, group in groups.items():
        said = group_parameters(
            base, group, [], PictureJob(" and ".join(f"{{{one.name}}}" for one in group.people), 1), GenerateConfig()
        )
        Picture(Image.new("RGB", (64, 64)), PictureJob("", 1), said).save(folder / f"{name}.png")
    told = []
    made = publish_agreed(path, tmp_path / "out", [folder], on_warning=told.append)
    assert told == ["couple.png: left out: its parameters show several people, but the LoRA is of one person"]
    (picture,) = made.pictures
    assert Parameters.read(Image.open(picture).info["parameters"]).prompt.startswith("sks person <lora:")  # pyright: ignore
    assert "ohwx" not in made.page.read_text()


@pytest.mark.clock
@pytest.mark.parametrize(
    ("prompt", "hashes"),
    [(" " * 30_000, ""), ("<lora:" + ":1" * 15_000, ""), ("<lora:a:" + "1" * 30_000, "a: 12"), ("x", "a: " * 10_000)],
)
def test_hostile_parameters_do_not_make_publishing_slow(tmp_path, prompt, hashes):
    picture = write_picture(tmp_path / "a.png", f"x{prompt}x", **({"Lora hashes": hashes} if hashes else {}))
    path, began = write_lora(tmp_path / "a.safetensors", 768, 1280), time.process_time()
    publish_agreed(path, tmp_path / "out", [picture], on_warning=[].append)
    assert time.process_time() - began < 3  # 0.1 to 0.3 seconds, and 4 to 20 with unlimited names


def test_a_picture_with_very_long_parameters_is_left_out(tmp_path):
    path, told = write_lora(tmp_path / "a.safetensors", 768, 1280), []
    picture = write_picture(tmp_path / "a.png", "x" * 60_000)
    assert not publish_agreed(path, tmp_path / "out", [picture], on_warning=told.append).pictures
    assert told == ["a.png: left out: its parameters have 60,081 characters, more than 50,000"]


def test_alphas_in_pefts_configuration_stay_without_the_path_in_it(tmp_path):
    save_file({f"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_{letter}.weight": torch.ones(shape)
               for letter, shape in (("A", (2, 64)), ("B", (32, 2)))}, tmp_path / "a.safetensors", {
        "ss_base_model_version": "sd_v1", "lora_adapter_metadata": json.dumps(
            {"unet.r": 2, "unet.lora_alpha": 8, "unet.base_model_name_or_path": "/home/jane/model"})})  # fmt: skip
    made = publish_agreed(tmp_path / "a.safetensors", tmp_path / "out", title="A person")
    assert inspect_lora(made.lora)["alphas"] == {"8": 1} and b"jane" not in contents(made.folder)


def test_a_base_model_that_contradicts_the_tensors_is_not_published(tmp_path):
    path = write_lora(tmp_path / "a.safetensors", ss_base_model_version="flux1", modelspec__architecture="z-image/lora")
    metadata = LoraFile.read(publish_agreed(path, tmp_path / "out").lora).metadata
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_a_placeholder_for_the_hash_is_replaced(tmp_path):
    lora = LoraFile.read(write_lora(tmp_path / "a.safetensors"))
    tensors = {key: tensor.clone() for key, tensor in lora.tensors.items()}
    for number, digest in enumerate((hashlib.sha256().hexdigest(), "0" * 64)):
        save_file(tensors, path := tmp_path / f"{number}.safetensors", lora.metadata | {"sshs_model_hash": digest})
        if number:
            with pytest.raises(BadFile, match="sshs_model_hash is 000000000000"):
                publish_agreed(path, tmp_path / "refused")
        else:
            assert (
                LoraFile.read(publish_agreed(path, tmp_path / "out").lora).metadata["sshs_model_hash"]
                == lora.model_hash
            )


def test_a_lora_that_no_program_would_load_is_published_with_a_warning(tmp_path):
    name = "base_model.model." + MODULE[1]
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 768), f"{name}.lora_B.weight": torch.ones(1280, 2)}
    metadata = {"ss_base_model_version": "sd_v1", "modelspec.title": "A sks person"}
    save_file(tensors, path := tmp_path / "a.safetensors", metadata)
    told = []
    publish_agreed(path, tmp_path / "out", on_warning=told.append)
    (warning,) = told
    assert "no image program loads its peft names" in warning
    assert "facelora convert a.safetensors --to kohya" in warning
    convert_lora(LoraFile.read(path), "kohya")[0].save(path)
    publish_agreed(path, tmp_path / "loaded", on_warning=told.append)
    assert told == [warning]


def test_every_published_model_of_every_family_has_a_listing():
    titles = {name: {variant.title for variant in _tables()[0] if variant.family == name} for name in NAME_TABLES}
    assert {name: set(table.listings) for name, table in NAME_TABLES.items()} == titles


@pytest.mark.usefixtures("nobody")
def test_what_a_killed_process_left_of_the_folder_is_deleted(tmp_path):
    stale, other = tmp_path / ".out.0123abcd.tmp", tmp_path / ".other.0123abcd.tmp"
    for folder in (stale, other):
        folder.mkdir()
        (folder / "half.safetensors").touch()
    publish_agreed(write_lora(tmp_path / "a.safetensors", 768, 1280), tmp_path / "out")
    assert not stale.exists() and other.exists() and (tmp_path / "out").is_dir()
