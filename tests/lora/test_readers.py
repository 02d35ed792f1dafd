"""What other programs load, where no program is asked: by sd-scripts' lists of modules and by records of earlier tries.

tests/comfyui/test_lora_readers.py asks ComfyUI, diffusers, peft and InvokeAI.
"""

import itertools
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.cli import main
from core.errors import BadConfig, UnmatchedKeys
from core.lora import LoraFile
from core.lora.convert import convert_for, convert_lora, reading_limits
from core.lora.modules import LoraModule
from core.lora.readers import READERS, not_loaded_by, read_by
from tests.tensor_names.test_keys import KOHYA_LISTS, kohya_names
from tools import source_tables
from tools.model_tables import whole

from .test_file import kohya_tensors
from .test_identity import TABLES, lora_of

TITLES = {
    "sd3": "SD3.5 Medium",
    "flux1": "FLUX.1",
    "lumina2": "Lumina 2",
    "sdxl": "SDXL",
    "sd15": "SD 1.5",
    "sd2": "SD 2",
}


@pytest.mark.parametrize("family", KOHYA_LISTS)
def test_sd_scripts_loads_the_modules_of_its_own_list_only(family):
    listed = kohya_names(family)
    of_list = LoraFile.from_tensors(kohya_tensors(listed, rank=1), {})
    assert read_by("sd-scripts", of_list).verdict == "loads"
    names = "original" if family not in ("sd15", "sd2") else "diffusers"
    (model,) = (model for model in TABLES["models"] if model["title"] == TITLES[family])
    of_model = lora_of(
        {path: shape for path, shape in whole(model["denoiser"][names]).items() if len(shape) > 1}, "lora_unet_"
    )
    refused = not_loaded_by("sd-scripts", of_model)
    denoiser = {name for name in listed if name.startswith("lora_unet_")}
    loaded = {entry.name for entry in of_model.entries} - refused.keys()
    # The lists without convolutions are those of its default network.
    assert loaded >= denoiser & {entry.name for entry in of_model.entries}
    if "conv" in KOHYA_LISTS[family][-1] or family in ("flux1", "sd3", "lumina2"):
        assert loaded == denoiser


def zimage() -> LoraFile:
    module = LoraModule(torch.ones(1, 3840), torch.ones(3840, 1), 1.0)
    return LoraFile.from_modules("zimage", {("denoiser", "layers.0.attention.to_q"): module}, {}, "kohya")


def test_a_naming_is_chosen_that_all_programs_load():
    assert not_loaded_by("InvokeAI", zimage())
    converted, error = convert_for(zimage(), ["comfyui", "InvokeAI"])
    assert error == 0 and not any(not_loaded_by(reader, converted) for reader in ("ComfyUI", "InvokeAI"))
    with pytest.raises(
        UnmatchedKeys, match=r"no naming works completely in sd-scripts: comfy: sd-scripts does not support"
    ) as refused:
        convert_for(zimage(), ["sd-scripts"])
    assert str(refused.value).count(" comfy: ") == 1, "each reason is given once"
    with pytest.raises(BadConfig, match="unknown program 'krita'; known: comfyui, diffusers, peft"):
        convert_for(zimage(), ["krita"])


NO, OTHER, YES = "not at all", "loads as another change", "loads"


def test_diffusers_refuses_blocks_of_lumina2_that_lack_a_module():
    """As its converter does (KeyError), and convert writes names that it loads."""
    (model,) = (model for model in TABLES["models"] if model["title"] == "Lumina 2")
    shapes = whole(model["denoiser"]["original"])
    layers = {path: shape for path, shape in shapes.items() if path.startswith("layers.") and len(shape) == 2}

    def lora_of_paths(pattern: str) -> LoraFile:
        tensors = {}
        for path, (outputs, inputs) in layers.items():
            if re.search(pattern, path):
                tensors[f"diffusion_model.{path}.lora_A.weight"] = torch.ones(1, inputs)
                tensors[f"diffusion_model.{path}.lora_B.weight"] = torch.ones(outputs, 1)
        return LoraFile.from_tensors(tensors, {})

    whole_blocks, attention, late = map(lora_of_paths, (r"^layers\.[0-3]\.", r"attention", r"^layers\.[4-7]\."))
    assert read_by("diffusers", whole_blocks).verdict == "loads"
    assert {read_by("diffusers", lora).verdict for lora in (attention, late)} == {"not at all"}
    assert convert_for(attention, ["diffusers"])[0].scheme == "diffusers"


def test_sd2_files_with_flat_projections_do_not_load_in_diffusers():
    block = "lora_unet_down_blocks_0_attentions_0_"
    down, up = torch.ones(1, 320), torch.ones(320, 1)
    attention = {f"{block}transformer_blocks_0_attn1_to_q.lora_down.weight": down,
                 f"{block}transformer_blocks_0_attn1_to_q.lora_up.weight": up}  # fmt: skip
    projection = {f"{block}proj_in.lora_down.weight": down, f"{block}proj_in.lora_up.weight": up}
    convolution = {name: tensor[:, :, None, None] for name, tensor in projection.items()}
    for tensors, verdict in ((attention, YES), (attention | projection, YES), (attention | convolution, NO)):
        assert read_by("diffusers", LoraFile("sd2", {"ss_base_model_version": "sd_v2"}, tensors)).verdict == verdict


def test_only_diffusers_and_peft_read_an_alpha_in_the_metadata():
    path = "transformer.layers.0.attention.to_q"
    tensors = {f"{path}.lora_A.weight": torch.ones(4, 3840), f"{path}.lora_B.weight": torch.ones(3840, 4)}
    for alpha, verdict in ((4, YES), (8, OTHER)):
        config = json.dumps({"transformer.r": 4, "transformer.lora_alpha": alpha})
        lora = LoraFile.from_tensors(tensors, {"lora_adapter_metadata": config})
        assert {read_by(reader, lora).verdict for reader in ("diffusers", "peft")} == {YES}
        assert {read_by(reader, lora).verdict for reader in ("ComfyUI", "InvokeAI", "mflux")} == {verdict}
        assert read_by("ComfyUI", convert_for(lora, ["ComfyUI"]).lora).verdict == YES


def test_the_command_writes_for_the_programs_it_is_told(tmp_path, capsys):
    zimage().save(tmp_path / "a.safetensors")
    output = tmp_path / "b.safetensors"
    assert main(["convert", str(tmp_path / "a.safetensors"), "--output", str(output), "--for", "invokeai,comfyui"]) == 0
    assert LoraFile.read(output).scheme in capsys.readouterr().out
    assert main(["inspect", str(output), "--fast", "--json"]) == 0
    readers = json.loads(capsys.readouterr().out)["readers"]
    assert set(readers) == set(READERS) and readers["InvokeAI"]["verdict"] == "loads"


@pytest.mark.clock
def test_one_lora_is_inspected_in_a_fifth_of_a_second_and_a_thousand_in_ten(tmp_path):
    """Of usual kinds: the lists of sd-scripts' networks, whose files in the folder are links."""
    folder = tmp_path / "loras"
    folder.mkdir()
    kinds = {"sd15": False, "sdxl": True, "flux1": True, "sd2": False}
    for number, (family, large) in enumerate(kinds.items()):
        listed = json.loads((Path(__file__).parents[1] / "reference" / KOHYA_LISTS[family][0]).read_text())
        file = tmp_path / f"{family}.safetensors"
        LoraFile.from_tensors(kohya_tensors(listed, rank=1 + large), {}).save(file)
        for copy in range(250):
            os.symlink(file, folder / f"{copy}-{number}.safetensors")

    def seconds(*arguments: object) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "core", "inspect", *map(str, arguments), "--fast", "--json"]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL, check=True)
        assert done.returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds(tmp_path / "sd15.safetensors") for _ in range(5)) < 0.2
    assert min(seconds(folder) for _ in range(3)) < 10


# Of each family a norm's name in the original model and in diffusers.
NORMS = {
    "flux1": ("double_blocks.0.txt_attn.norm.query_norm", "transformer_blocks.0.attn.norm_added_q"),
    "chroma": ("single_blocks.0.norm.key_norm", "single_transformer_blocks.0.attn.norm_k"),
    "flux2": ("double_blocks.0.img_attn.norm.key_norm", "transformer_blocks.0.attn.norm_k"),
    "sd3": ("joint_blocks.0.x_block.attn2.ln_q", "transformer_blocks.0.attn2.norm_q"),
    "lumina2": ("layers.0.attention.q_norm", "layers.0.attn.norm_q"),
    "zimage": ("layers.0.attention.q_norm", "layers.0.attention.norm_q"),
    "qwen-image": ("transformer_blocks.0.attn.norm_added_k", "transformer_blocks.0.attn.norm_added_k"),
    "krea2": ("blocks.0.attn.qknorm.qnorm.scale", "transformer_blocks.0.attn.norm_q"),
    "ernie-image": ("layers.0.self_attention.norm_k", "layers.0.self_attention.norm_k"),
    "longcat-image": ("single_blocks.0.norm.query_norm", "single_transformer_blocks.0.attn.norm_q"),
    "ideogram4": ("layers.0.attention.norm_q", "layers.0.attention.norm_q"),
}
WIDTHS = {"sd3": 64, "lumina2": 96, "ideogram4": 256}


@pytest.mark.parametrize("family", NORMS)
def test_norms_of_transformers_are_known_by_both_names(family):
    original, diffusers = NORMS[family]
    names = (f"lora_unet_{original.replace('.', '_')}", f"diffusion_model.{original}", f"transformer.{diffusers}")
    for name, role in itertools.product(names, ("diff", "w_norm")):
        lora = LoraFile(family, {}, {f"{name}.{role}": torch.ones(WIDTHS.get(family, 128))})
        assert family in lora.identity.families, name
        for made in (lora, convert_lora(lora, "kohya").lora, convert_lora(lora, "comfy").lora):
            assert [entry.modules for entry in made.entries] == [(("denoiser", diffusers),)], name


# What the programs' own code loaded of whole LoRAs: in kohya, diffusers' and comfy names. Fused modules count as several.
TRIED = {
    ("sd15", "A1111"): (278, 0, 0),
    ("sd15", "stable-diffusion.cpp"): (278, 278, 278),
    ("sdxl", "Forge"): (788, 0, 0),
    ("sd3", "Forge"): (385, 0, 385),
    ("sd3", "stable-diffusion.cpp"): (0, 385, 385),
    ("flux1", "SD.Next"): (494, 0, 0),
    ("flux1", "mflux"): (0, 494, 0),
    ("zimage", "SD.Next"): (210, 210, 210),
    ("zimage", "mflux"): (90, 210, 210),
    ("zimage", "musubi-tuner"): (90, 210, 210),
    ("zimage", "OneTrainer"): (0, 210, 210),
    ("krea2", "ai-toolkit"): (0, 0, 224),
    ("ernie-image", "stable-diffusion.cpp"): (0, 252, 252),
}
# What the programs' own maps of names, in the files of PROGRAMS, have of whole LoRAs.
MAPPED = {
    ("chroma", "kohya", "sd-scripts"): "228 of 243",
    ("ideogram4", "comfy", "mflux"): "207 of 212",
    ("ideogram4", "kohya", "mflux"): "34 of 212",
    ("ideogram4", "kohya", "musubi-tuner"): "all",
    ("longcat-image", "comfy", "stable-diffusion.cpp"): "all",
    ("sd2", "kohya", "A1111"): "all",
    ("sd2", "text kohya", "SD.Next"): "all",
    ("sd2", "kohya", "musubi-tuner"): "",
}


def test_programs_are_said_to_load_what_their_maps_of_names_have():
    assert {
        (family, contents, program): source_tables.cell(program, source_tables.loras_of(family)[contents])
        for family, contents, program in MAPPED
    } == MAPPED


IN_BLOCKS = {
    "sd15": r"blocks?\.(\d+\.)?(attentions|resnets|downsamplers|upsamplers)",
    "sdxl": r"blocks?\.(\d+\.)?(attentions|resnets|downsamplers|upsamplers)",
    "krea2": r"^transformer_blocks\.",
    "zimage": r"^layers\.\d+\.(attention|feed)",
    "ernie-image": r"^layers\.",
}


@pytest.mark.parametrize(("family", "program"), TRIED)
def test_programs_are_said_to_load_what_they_have_loaded(family, program):
    of_family = [model for model in TABLES["models"] if model["family"] == family]
    model = next((model for model in of_family if model["title"] == TITLES.get(family)), of_family[0])
    pattern = IN_BLOCKS.get(family, r"^(single_)?transformer_blocks\.")
    shapes = {p: s for p, s in whole(model["denoiser"]["diffusers"]).items() if len(s) > 1 and re.search(pattern, p)}
    for scheme, loaded in zip(("kohya", "diffusers", "comfy"), TRIED[family, program], strict=True):
        modules = {("denoiser", path): source_tables.module(shape) for path, shape in shapes.items()}
        lora = LoraFile.from_modules(family, modules, {}, scheme)
        refused = not_loaded_by(program, lora)
        counted = sum(len(entry.modules) for entry in lora.entries if entry.name not in refused)
        assert counted == loaded, (scheme, len(modules), counted)


def test_other_kinds_load_where_they_were_tried():
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    pair = {f"{name}.lora_down.weight": torch.ones(2, 768), f"{name}.lora_up.weight": torch.ones(1280, 2)}
    dora = LoraFile.from_tensors(pair | {f"{name}.dora_scale": torch.ones(1, 768)}, {})
    oft = LoraFile.from_tensors({f"{name}.oft_blocks": torch.zeros(16, 80, 80)}, {"ss_base_model_version": "sd_v1"})
    verdicts = {kind: [read_by(program, lora).verdict for program in ("A1111", "Forge", "stable-diffusion.cpp", "mflux")]
                for kind, lora in (("dora", dora), ("oft", oft))}  # fmt: skip
    assert verdicts["dora"] == ["loads", "loads", "loads as another change", "not known"]
    assert verdicts["oft"] == ["loads", "not at all", "not at all", "not known"]


def test_a_fused_layer_is_said_to_be_cut_where_it_is():
    """ai-toolkit's rank is a setting, and three times ours only by chance."""
    name = "diffusion_model.double_blocks.0.img_attn"
    tensors = {f"{name}.qkv.lora_A.weight": torch.ones(2, 3072), f"{name}.qkv.lora_B.weight": torch.ones(9216, 2)}
    lora = LoraFile.from_tensors(tensors, {"ss_base_model_version": "chroma"})
    assert not_loaded_by("ai-toolkit", lora) == {
        f"{name}.qkv": "fused q, k and v above the rank that it is configured for"
    }


def test_one_module_outside_the_blocks_spoils_a_file_for_sd_next():
    name, outside = "lora_unet_single_blocks_0_linear1", "lora_unet_img_in"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 3072), f"{name}.lora_up.weight": torch.ones(21504, 2)}
    more = {f"{outside}.lora_down.weight": torch.ones(2, 64), f"{outside}.lora_up.weight": torch.ones(3072, 2)}
    assert read_by("SD.Next", LoraFile.from_tensors(tensors, {})).verdict == "loads"
    assert read_by("SD.Next", LoraFile.from_tensors(tensors | more, {})).verdict == "not at all"


@pytest.mark.parametrize(
    ("family", "limits"),
    [
        ("sdxl", []),
        ("sd3", ["InvokeAI does not load the LoRA of this training run, in any naming"]),
        (
            "flux1",
            [
                "diffusers loads only part of the LoRA of this training run, unless you convert it for diffusers",
                "InvokeAI does not load the LoRA of this training run, unless you convert it for InvokeAI",
            ],
        ),
    ],
)
def test_the_programs_that_cannot_load_a_lora_are_named(family, limits):
    loras = source_tables.loras_of(family)
    assert reading_limits(next(lora for lora in loras.values() if lora.scheme == lora.table.scheme)) == limits
