"""What is said of other programs without asking them: sd-scripts by the lists of its modules, and what is written for whom."""

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
from core.lora.readers import OTHERS, READERS, not_loaded_by, read_by
from core.tensor_names import NAME_TABLES
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
def test_sd_scripts_is_said_to_load_the_modules_of_its_own_list_and_no_others(family):
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
# What diffusers 0.42 and InvokeAI 6.14 do with names that end in other ways, and with an alpha.
# tests/comfyui/test_lora_readers.py asks them.
OTHER_ENDS = {
    ("sdxl", "kohya", "lora_A.weight", ""): (NO, NO),
    ("sdxl", "kohya", "lora_down.weight", "alpha"): (YES, YES),
    ("sdxl", "diffusers", "lora_A.weight", "alpha"): (OTHER, NO),
    ("sdxl", "diffusers", "lora_down.weight", ""): (NO, NO),
    ("sdxl", "diffusers", "lora.down.weight", ""): (YES, NO),
    ("sdxl", "diffusers", "lora_linear_layer.down.weight", ""): (NO, NO),
    ("sdxl", "diffusers", "lora_A", ""): (NO, NO),
    ("flux1", "diffusers", "lora_A.weight", "alpha"): (YES, NO),
    ("flux1", "diffusers", "lora_A.default.weight", ""): (NO, YES),
    ("flux1", "diffusers", "lora_down.weight", "alpha"): (OTHER, NO),
    ("flux2", "comfy", "lora_A.weight", "alpha"): (NO, NO),
    ("flux2", "comfy", "lora_down.weight", ""): (NO, NO),
    ("ernie-image", "comfy", "lora_down.weight", "alpha"): (NO, NO),
    ("zimage", "comfy", "lora_A.default.weight", "alpha"): (YES, OTHER),
    ("zimage", "comfy", "lora_down.weight", "alpha"): (YES, YES),
    ("zimage", "diffusers", "lora_A.weight", "alpha"): (NO, OTHER),
    ("qwen-image", "comfy", "lora_down.weight", "alpha"): (YES, NO),
    ("qwen-image", "kohya", "lora_A.weight", ""): (YES, NO),
    ("qwen-image", "diffusers", "lora.down.weight", ""): (YES, NO),
    ("krea2", "diffusers", "lora_A.weight", "alpha"): (OTHER, YES),
    ("krea2", "kohya", "lora_A.weight", ""): (NO, YES),
}
ATTENTIONS = {
    "sdxl": ("down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k", 2048, 1280),
    "flux1": ("transformer_blocks.0.attn.to_out.0", 3072, 3072),
    "flux2": ("transformer_blocks.0.attn.to_out.0", 6144, 6144),
    "krea2": ("text_fusion.refiner_blocks.0.attn.to_q", 2560, 2560),
    "ernie-image": ("layers.0.self_attention.to_q", 4096, 4096),
    "zimage": ("layers.0.attention.to_q", 3840, 3840),
    "qwen-image": ("transformer_blocks.0.attn.to_q", 3072, 3072),
}


@pytest.mark.parametrize("case", OTHER_ENDS)
def test_names_that_a_program_does_not_read_to_the_end_are_not_said_to_load(case):
    family, scheme, end, alpha = case
    path, inputs, outputs = ATTENTIONS[family]
    module = LoraModule(torch.ones(1, inputs), torch.ones(outputs, 1), 1.0)
    plain = LoraFile.from_modules(family, {("denoiser", path): module}, {}, scheme).tensors
    name = next(iter(plain)).partition(".lora_")[0]
    up = end.replace("lora_A", "lora_B").replace("down", "up")
    tensors = {f"{name}.{end}": module.down, f"{name}.{up}": module.up} | {
        f"{name}.{a}": torch.tensor(0.5) for a in alpha.split()
    }
    lora = LoraFile(family, {}, tensors)
    assert (read_by("diffusers", lora).verdict, read_by("InvokeAI", lora).verdict) == OTHER_ENDS[case]
    assert read_by("sd-scripts", lora).verdict == (YES if (scheme, end) == ("kohya", "lora_down.weight") else NO)
    in_peft = {("lora_A.weight", ""): "loads", ("lora_A.weight", "alpha"): "loads as another change"}
    assert read_by("peft", lora).verdict == (
        in_peft.get((end, alpha), "not at all") if scheme == "diffusers" else "not at all"
    )


def test_diffusers_is_said_to_take_shift_for_scale_in_the_last_layer_of_flux2():
    module = LoraModule(torch.ones(1, 6144), torch.ones(2 * 6144, 1), 1.0)
    verdicts = {
        scheme: read_by(
            "diffusers", LoraFile.from_modules("flux2", {("denoiser", "norm_out.linear"): module}, {}, scheme)
        ).verdict
        for scheme in ("comfy", "diffusers")
    }
    assert verdicts == {"comfy": "loads as another change", "diffusers": "loads"}


def test_diffusers_is_said_to_refuse_blocks_of_lumina2_that_lack_a_module():
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


def test_early_names_of_text_encoders_load_in_diffusers_and_those_of_denoisers_do_not():
    down, up = torch.ones(1, 768), torch.ones(768, 1)
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.k_proj"
    for form, verdict in (("lora_linear_layer", YES), ("lora", NO)):
        lora = LoraFile("sd15", {}, {f"{layer}.{form}.down.weight": down, f"{layer}.{form}.up.weight": up})
        assert read_by("diffusers", lora).verdict == verdict


# What diffusers 0.42 does with names whose prefix belongs to one model's paths and whose rest to the other's.
OTHER_PATHS = {
    ("flux1", "lora_unet_transformer_blocks_0_attn_to_out_0", 3072): NO,
    ("flux1", "diffusion_model.transformer_blocks.0.attn.to_out.0", 3072): NO,
    ("flux1", "transformer.double_blocks.0.img_attn.proj", 3072): NO,
    ("flux1", "diffusion_model.double_blocks.0.img_attn.proj", 3072): YES,
    ("flux2", "lora_unet_transformer_blocks_0_attn_to_out_0", 6144): NO,
    ("krea2", "diffusion_model.transformer_blocks.0.attn.to_out.0", 6144): NO,
    ("sd15", "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", 320): NO,
    ("sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 640): YES,
    ("qwen-image", "lora_unet_transformer_blocks_0_attn_to_q", 3072): YES,
}


@pytest.mark.parametrize("case", OTHER_PATHS)
def test_diffusers_is_not_said_to_load_the_other_model_s_paths(case):
    family, name, width = case
    ends = ("lora_A", "lora_B") if family == "krea2" or name.startswith("transformer.") else ("lora_down", "lora_up")
    tensors = dict(
        zip((f"{name}.{end}.weight" for end in ends), (torch.ones(1, width), torch.ones(width, 1)), strict=True)
    )
    lora = LoraFile(family, {}, tensors)
    assert read_by("diffusers", lora).verdict == OTHER_PATHS[case]
    assert read_by("peft", lora).verdict == NO


def test_sd2_files_of_sd_scripts_load_in_diffusers_unless_they_change_projections():
    block = "lora_unet_down_blocks_0_attentions_0_"
    down, up = torch.ones(1, 320), torch.ones(320, 1)
    attention = {f"{block}transformer_blocks_0_attn1_to_q.lora_down.weight": down,
                 f"{block}transformer_blocks_0_attn1_to_q.lora_up.weight": up}  # fmt: skip
    projection = {f"{block}proj_in.lora_down.weight": down, f"{block}proj_in.lora_up.weight": up}
    convolution = {name: tensor[:, :, None, None] for name, tensor in projection.items()}
    for tensors, verdict in ((attention, YES), (attention | projection, YES), (attention | convolution, NO)):
        assert read_by("diffusers", LoraFile("sd2", {"ss_base_model_version": "sd_v2"}, tensors)).verdict == verdict


def test_an_alpha_in_the_metadata_is_said_to_be_ignored_by_all_programs_but_diffusers_and_peft():
    path, inputs, outputs = ATTENTIONS["zimage"]
    tensors = {
        f"transformer.{path}.lora_A.weight": torch.ones(4, inputs),
        f"transformer.{path}.lora_B.weight": torch.ones(outputs, 4),
    }
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


# Of each family a norm's name in the original model and in diffusers, and the namings in which ComfyUI knows it.
NORMS = {
    "flux1": ("double_blocks.0.txt_attn.norm.query_norm", "transformer_blocks.0.attn.norm_added_q", "kohya comfy diffusers"),
    "chroma": ("single_blocks.0.norm.key_norm", "single_transformer_blocks.0.attn.norm_k", "kohya comfy diffusers"),
    "flux2": ("double_blocks.0.img_attn.norm.key_norm", "transformer_blocks.0.attn.norm_k", "kohya comfy diffusers"),
    "sd3": ("joint_blocks.0.x_block.attn2.ln_q", "transformer_blocks.0.attn2.norm_q", "kohya comfy diffusers"),
    "lumina2": ("layers.0.attention.q_norm", "layers.0.attn.norm_q", "kohya comfy"),
    "zimage": ("layers.0.attention.q_norm", "layers.0.attention.norm_q", "kohya comfy diffusers"),
    "qwen-image": ("transformer_blocks.0.attn.norm_added_k", "transformer_blocks.0.attn.norm_added_k", "kohya comfy diffusers"),
    "krea2": ("blocks.0.attn.qknorm.qnorm.scale", "transformer_blocks.0.attn.norm_q", "comfy"),
    "ernie-image": ("layers.0.self_attention.norm_k", "layers.0.self_attention.norm_k", "kohya comfy diffusers"),
    "longcat-image": ("single_blocks.0.norm.query_norm", "single_transformer_blocks.0.attn.norm_q", "kohya comfy diffusers"),
    "ideogram4": ("layers.0.attention.norm_q", "layers.0.attention.norm_q", "kohya comfy"),
}  # fmt: skip
WIDTHS = {"sd3": 64, "lumina2": 96, "ideogram4": 256}


@pytest.mark.parametrize("role", ["diff", "w_norm"])
@pytest.mark.parametrize("family", NORMS)
def test_norms_of_transformers_are_known_by_both_names_and_load_in_comfyui_where_its_map_has_them(family, role):
    original, diffusers, known = NORMS[family]
    names = {
        "kohya": f"lora_unet_{original.replace('.', '_')}",
        "comfy": f"diffusion_model.{original}",
        "diffusers": f"transformer.{diffusers}",
    }
    for scheme, name in names.items():
        lora = LoraFile(family, {}, {f"{name}.{role}": torch.ones(WIDTHS.get(family, 128))})
        assert [entry.modules for entry in lora.entries] == [(("denoiser", diffusers),)]
        assert family in lora.identity.families, scheme
        assert (read_by("ComfyUI", lora).verdict == "loads") == (scheme in known.split()), scheme
        for other in ("kohya", "comfy"):
            converted = convert_lora(lora, other).lora
            assert [entry.modules for entry in converted.entries] == [(("denoiser", diffusers),)]
            assert (read_by("ComfyUI", converted).verdict == "loads") == (other in known.split()), (scheme, other)
    if original == diffusers:
        return
    # Names of diffusers behind the prefixes of original ones load nowhere.
    for name in (f"lora_unet_{diffusers.replace('.', '_')}", f"diffusion_model.{diffusers}"):
        lora = LoraFile(family, {}, {f"{name}.{role}": torch.ones(WIDTHS.get(family, 128))})
        loads = read_by("ComfyUI", lora).verdict == "loads"
        assert loads == (family == "zimage" and name.startswith("diffusion_model.")), name


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


@pytest.mark.parametrize(("family", "contents", "program"), MAPPED)
def test_a_cell_is_what_the_program_has_in_its_map_of_names(family, contents, program):
    assert source_tables.cell(program, source_tables.loras_of(family)[contents]) == MAPPED[family, contents, program]


def test_each_cell_has_the_version_and_the_file_that_it_was_read_from():
    assert tuple(source_tables.PROGRAMS) == READERS
    for family, table in NAME_TABLES.items():
        files = {reader: source_tables.file_of(reader, family) for reader in READERS}
        known = {reader for reader, file in files.items() if file and re.fullmatch(r"[\w/.-]+\.(py|cpp)", file)}
        assert known == {*READERS} - OTHERS.keys() | table.loaded.others.keys()
    programs = source_tables.PROGRAMS
    assert all(re.fullmatch(r"[\d.]+|\d{4}-\d\d-\d\d \([0-9a-f]{7}\)", one.version) for one in programs.values())
    named = {word for one in programs.values() for families in one.files.values() for word in families.split()}
    assert named <= {source_tables.ALL, *NAME_TABLES}


IN_BLOCKS = {
    "sd15": r"blocks?\.(\d+\.)?(attentions|resnets|downsamplers|upsamplers)",
    "sdxl": r"blocks?\.(\d+\.)?(attentions|resnets|downsamplers|upsamplers)",
    "krea2": r"^transformer_blocks\.",
    "zimage": r"^layers\.\d+\.(attention|feed)",
    "ernie-image": r"^layers\.",
}


@pytest.mark.parametrize(("family", "program"), TRIED)
def test_eight_more_programs_are_said_to_load_what_they_have_loaded(family, program):
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


def test_one_module_outside_the_blocks_spoils_a_file_of_flux1_for_sd_next():
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
def test_the_programs_that_cannot_load_a_lora_are_named_and_whether_a_conversion_helps(family, limits):
    loras = source_tables.loras_of(family)
    assert reading_limits(next(lora for lora in loras.values() if lora.scheme == lora.table.scheme)) == limits
