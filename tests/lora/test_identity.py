"""Which model a LoRA is for: the tables of published models, whole files and parts of them, under every naming scheme."""

import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core.cli import main
from core.errors import UnknownFamily
from core.lora import LoraFile, format_inspection, format_line, inspect_header
from core.storage.safetensors_file import save_safetensors
from core.tensor_names import NAME_TABLES, identify, models
from tests.tensor_names.test_keys import KOHYA_LISTS, kohya_names
from tools.model_tables import whole

from .test_file import kohya_tensors

Shapes = dict[str, tuple[int, ...]]
TABLES = json.loads(Path(models.__file__).with_name("model_tables.json").read_text())
CASES = [(model, names) for model in TABLES["models"] for names in model["denoiser"]]
assert len(CASES) > 50
PREFIXES = ["lora_unet_", "lycoris_", "lora_transformer_", "diffusion_model.", "transformer.", "base_model.model.", ""]


def subsets(shapes: Shapes) -> Iterator[Shapes]:
    """All modules, the matrices, those of attention, and some."""
    yield shapes
    yield {path: shape for path, shape in shapes.items() if len(shape) == 2}
    yield {path: shape for path, shape in shapes.items() if len(shape) == 2 and "att" in path}
    chosen = random.Random(0).sample(sorted(shapes), 12)
    yield {path: shapes[path] for path in chosen}


def lora_of(shapes: Shapes, prefix: str = "diffusion_model.") -> LoraFile:
    """A LoRA of rank 1 on the matrices and convolutions, without values."""
    return LoraFile.from_tensors(tensors_of(shapes, prefix), {}, "x")


def tensors_of(shapes: Shapes, prefix: str = "diffusion_model.") -> dict[str, torch.Tensor]:
    tensors = {}
    with torch.device("meta"):
        for path, shape in shapes.items():
            if len(shape) < 2:
                continue
            name = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
            tensors[f"{name}.lora_down.weight"] = torch.empty(1, *shape[1:])
            tensors[f"{name}.lora_up.weight"] = torch.empty(shape[0], 1, *(1 for _ in shape[2:]))
    return tensors


def test_every_published_model_is_known_by_all_of_its_modules_and_by_some():
    for model, names in CASES:
        shapes = whole(model["denoiser"][names])
        assert shapes
        for part in filter(None, subsets(shapes)):
            found = identify(("denoiser", *module) for module in part.items())
            assert model["title"] in found.models, (model["title"], names, found)
            assert model["family"] is None or model["family"] in found.families


@pytest.mark.parametrize("title", ["SD 1.5", "SD 2", "SDXL", "SD3.5 Medium", "ERNIE-Image"])
def test_convolutions_keep_their_kernel_and_get_it_back_from_flattened_files(title):
    (model,) = (model for model in TABLES["models"] if model["title"] == title)
    shapes = {path: shape for path, shape in whole(model["denoiser"]["diffusers"]).items() if len(shape) == 4}
    assert shapes
    prefix = NAME_TABLES[model["family"]].diffusers_prefix
    for path, shape in shapes.items():
        up = torch.zeros(shape[0], 1)
        for down in (torch.zeros(1, *shape[1:]), torch.zeros(1, math.prod(shape[1:]))):
            tensors = {
                f"{prefix}{path}.lora_A.weight": down,
                f"{prefix}{path}.lora_B.weight": up[(...,) + (None,) * (down.ndim - 2)],
            }
            (module,) = LoraFile(model["family"], {}, tensors).modules().values()
            assert module.down.shape == (1, *shape[1:]) and module.up.shape == (shape[0], 1, 1, 1), path


def test_only_models_that_hold_all_of_another_are_as_well_meant():
    """SSD-1B's and Vega's modules are modules of SDXL too, and so on: a file with all of them may be for either."""
    found = {(model["title"], identify(("denoiser", *module) for module in whole(model["denoiser"][names]).items()).models)
             for model, names in CASES}  # fmt: skip
    assert {titles for title, titles in found if titles != (title,)} == {
        ("SDXL", "SSD-1B"),
        ("SDXL", "SSD-1B", "Segmind Vega"),
        ("Cosmos-Predict2 2B", "Anima"),
        ("Sana 1.6B", "Sana 4.8B"),
        ("Bria", "Bria FIBO"),
        ("HunyuanVideo", "FramePack"),
    }


@pytest.mark.parametrize("family", KOHYA_LISTS)
def test_the_module_lists_of_sd_scripts_are_of_the_models_they_were_made_from(family):
    """Its lists, of the text encoders too, come from its own model classes (tests/reference)."""
    title = {"sd15": "SD 1.5", "sd2": "SD 2", "sdxl": "SDXL", "sd3": "SD3.5 Medium", "flux1": "FLUX.1"}.get(
        family, "Lumina 2"
    )
    lora = LoraFile.from_tensors(kohya_tensors(kohya_names(family), rank=1), {})
    assert (lora.scheme, lora.unknown_keys) == ("kohya", ())
    assert (lora.family, lora.identity.verdict, lora.identity.models) == (family, "certain", (title,))


def test_the_report_says_how_certain_it_is(tmp_path):
    sizes = {"attn": (3072, 3072), "narrow": (64, 64)}
    lines = {}
    for name, (outputs, inputs) in sizes.items():
        down, up = torch.ones(1, inputs), torch.ones(outputs, 1)
        module = "transformer.transformer_blocks.0.attn.to_out.0"
        tensors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        other = "transformer.single_transformer_blocks.0.proj_mlp"
        tensors |= {f"{other}.lora_A.weight": down, f"{other}.lora_B.weight": torch.ones(4 * outputs, 1)}
        path = tmp_path / f"{name}.safetensors"
        LoraFile("flux1", {}, tensors).save(path)
        report = inspect_header(path)
        lines[name] = report["identity"]["verdict"], format_inspection(report)
    verdict, text = lines["attn"]
    assert verdict == "ambiguous" and "its modules fit several models: FLUX.1, Chroma" in text
    verdict, text = lines["narrow"]
    assert verdict == "unknown" and "only by its names: no published model has modules of these sizes" in text


@pytest.mark.parametrize("rows, fits", [(1280, True), (1296, False)])
def test_a_rotation_fits_where_its_rows_are_the_outputs_of_the_weight(rows, fits):
    """OFT tells the outputs of the weight that it rotates, and not the inputs."""
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
    lora = LoraFile("sd15", {}, {f"{name}.oft_blocks": torch.zeros(16, rows // 16, rows // 16)})
    assert ("SD 1.5" in lora.identity.models) == fits


# What a model of this title is called in metadata, and some of its modules, which are also those of others.
CLAIMS = [
    ("Mage-Flow", "mageflow", r"^transformer_blocks\.[0-6]\."),
    ("Ovis-Image", "ovis_image", r"^transformer_blocks\.[0-2]\.attn"),
    ("Bria", "bria", r"^transformer_blocks\.\d\.attn"),
    ("FramePack", "framepack", r"^transformer_blocks\.\d\.attn"),
    ("HunyuanVideo 1.5", "hunyuan_video_1_5", r"^transformer_blocks\.\d\.attn"),
    ("Anima", "anima-preview", r"^blocks\.\d\.(self_attn|mlp)"),
]


@pytest.mark.parametrize(("title", "word", "pattern"), CLAIMS)
def test_a_model_that_the_metadata_name_and_the_modules_fit_is_the_one(title, word, pattern):
    (model,) = (model for model in TABLES["models"] if model["title"] == title)
    shapes = whole(next(iter(model["denoiser"].values())))
    lora = tensors_of({path: shape for path, shape in shapes.items() if re.search(pattern, path) and len(shape) > 1})
    assert lora
    for metadata in ({"ss_base_model_version": word}, {"modelspec.architecture": f"{word}/lora"}):
        with pytest.raises(UnknownFamily, match=f"x: is for {title}, which is not supported"):
            LoraFile.from_tensors(lora, metadata, "x")


@pytest.mark.parametrize(("metadata", "title"), [({"ss_base_model_version": "anima"}, "Anima"), ({}, ".* or Anima")])
def test_a_model_is_nearest_if_the_metadata_name_it(metadata, title):
    """Anima's LoRAs of sd-scripts change its Qwen3 too, which the tables lack."""
    attention = {f"blocks.{n}.self_attn.{x}_proj": (2048, 2048) for n in range(28) for x in "qkv"}
    tensors = tensors_of(attention, "lora_unet_")
    tensors |= tensors_of({f"layers.{n}.self_attn.q_proj": (2048, 1024) for n in range(28)}, "lora_te_")
    with pytest.raises(UnknownFamily, match=f"x: is for {title}, which is not supported"):
        LoraFile.from_tensors(tensors, metadata, "x")


def test_a_claim_that_does_not_fit_changes_nothing():
    shapes = blocks_of("Qwen-Image", "attn")
    for word in ("mageflow", "hunyuan_video", "wan_2.1"):
        assert LoraFile.from_tensors(tensors_of(shapes), {"ss_base_model_version": word}).family == "qwen-image"


def test_each_of_several_files_has_its_verdict(tmp_path, capsys):
    names = ["page", "pickle", "cut", "other model", "missing", "good"]
    paths = {name: tmp_path / f"{name}.safetensors" for name in names}
    paths["page"].write_text("<!DOCTYPE html><html>")
    paths["pickle"].write_bytes(b"PK\x03\x04" + bytes(100))
    LoraFile.from_tensors(kohya_tensors(dict(list(kohya_names("sd15").items())[:4]), rank=1), {}).save(paths["good"])
    paths["cut"].write_bytes(paths["good"].read_bytes()[:-10])
    wan = {
        "blocks.0.self_attn.q.lora_A.weight": torch.ones(1, 5120),
        "blocks.0.self_attn.q.lora_B.weight": torch.ones(5120, 1),
    }
    LoraFile("sd15", {}, {f"diffusion_model.{name}": tensor for name, tensor in wan.items()}).save(paths["other model"])
    command = ["inspect", *map(str, paths.values()), "--fast", "--json"]
    assert main(command) == 1
    out, err = capsys.readouterr()
    reports = dict(zip(names, map(json.loads, out.splitlines()), strict=True))
    assert [report["identity"]["verdict"] for report in reports.values()] == ["refused"] * 5 + ["ambiguous"]
    assert [report["file"] for report in reports.values()] == [str(path) for path in paths.values()]
    for name, reason in {
        "page": "web page",
        "pickle": "pickle",
        "cut": "truncated",
        "other model": "is for Wan",
    }.items():
        assert reason in reports[name]["error"]
    assert f"5 of 6 files were refused; the first: {paths['page']}: " in err
    assert main(["inspect", str(paths["good"]), str(paths["good"]), "--fast"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(paths["page"]), "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["identity"]["verdict"] == "refused" and "web page" in err


def blocks_of(title: str, part: str = "") -> Shapes:
    (model,) = (model for model in TABLES["models"] if model["title"] == title)
    shapes = whole(model["denoiser"]["original"])
    return {path: shape for path, shape in shapes.items() if "blocks" in path and part in path and len(shape) > 1}


def first(title: str, count: int) -> Shapes:
    shapes = blocks_of(title, "attn" if count > 24 else "")
    return {path: shape for path, shape in shapes.items() if int(path.split(".")[1]) < count}


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "lora_unet_"])
@pytest.mark.parametrize(("count", "models"), [(7, ["Mage-Flow"]), (12, ["Mage-Flow"]), (24, []), (60, None)])
def test_the_first_blocks_alone_may_be_those_of_a_smaller_model(prefix, count, models, tmp_path, capsys):
    """Mage-Flow's twelve blocks are the same as Qwen-Image's first twelve, of sixty."""
    path, tensors = tmp_path / "a.safetensors", tensors_of(first("Qwen-Image", count), prefix)
    save_safetensors(path, {key: torch.zeros(tensor.shape) for key, tensor in tensors.items()})
    assert main(["inspect", str(path), "--fast", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["family"] == "qwen-image" and report["identity"]["models"] == ["Qwen-Image", *(models or [])]
    assert report["identity"]["verdict"] == ("certain" if models is None else "ambiguous")
    others = {None: [], "Mage-Flow": ["Mage-Flow"], "": ["a smaller model with the same blocks"]}
    assert report["identity"]["others"] == others[models and models[0] if models != [] else ""]
    command = ["convert", str(path), "--output", str(tmp_path / "b.safetensors"), "--to", "diffusers", "--overwrite"]
    assert main(command) == 0
    warned = capsys.readouterr().err
    assert ("choose a family with convert --family" in warned) == (models is not None)
    assert all(other in warned for other in report["identity"]["others"])
    assert main([*command, "--family", "qwen-image"]) == 0 and capsys.readouterr().err == ""


def test_metadata_say_that_some_blocks_of_qwen_image_are_meant():
    lora = LoraFile.from_tensors(tensors_of(first("Qwen-Image", 12)), {"ss_base_model_version": "qwen_image"})
    assert lora.family == "qwen-image" and lora.other_models == ()


def test_names_that_several_families_have_name_none_of_them(tmp_path):
    """Short examples of Qwen-Image's LoKr, and of Anima's LoRA with its text encoder."""
    name = "transformer.transformer_blocks.0.attn.to_q"
    factors = {f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2": torch.ones(4, 4)}
    save_safetensors(tmp_path / "a.safetensors", factors)
    report = inspect_header(tmp_path / "a.safetensors")
    assert (report["family"], report["identity"]["verdict"]) == (None, "unknown")
    assert {"sd3", "flux1", "qwen-image"} <= set(report["identity"]["others"])
    assert "for           sd3 or" in format_inspection(report) and "named like sd3 or" in format_line(report)
    text = tensors_of({"layers.0.self_attn.q_proj": (2048, 1024)}, "lora_te_")
    with pytest.raises(UnknownFamily, match="no family matches its 2 keys"):
        LoraFile.from_tensors(text, {})


def test_a_file_of_which_most_modules_are_of_no_model_is_not_recognised():
    strange = {f"double_blocks.{number}.img_attn.mixer_{number}": (640, 640) for number in range(30)}
    few = {"double_blocks.0.img_attn.proj": (640, 640)}
    with pytest.raises(
        UnknownFamily, match=r"not recognised: its module names are most like those of flux1, which lacks 30 of 31"
    ):
        lora_of(strange | few)
    assert lora_of(few | {"double_blocks.1.img_attn.proj": (640, 640)}).family == "flux1"
