"""Names and forms of other trainers, each read, and converted without a difference."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.cli import main
from core.errors import UnknownFamily
from core.lora import LoraFile, convert_lora, verify_lora
from core.lora.convert import convert_for
from core.lora.embeddings import embeddings_of
from core.lora.modules import LoraModule
from core.lora.readers import READERS, not_loaded_by, read_by
from core.storage.safetensors_file import save_safetensors

KLEIN = 4096


def factors(outputs: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, inputs, generator=generator), torch.randn(outputs, 2, generator=generator)


# Dialect: its names of down, up and perhaps more, and the same module's name in ComfyUI's scheme, with its size.
DIALECTS = {
    "musubi's half flattened names of klein": (
        "diffusion_model.double_blocks.0.img_attn_proj.lora_A.weight",
        "diffusion_model.double_blocks.0.img_attn_proj.lora_B.weight",
        "diffusion_model.double_blocks.0.img_attn.proj",
        (KLEIN, KLEIN),
    ),
    "an adapter's name of peft": (
        "transformer.transformer_blocks.0.attn.to_out.0.lora_A.default_0.weight",
        "transformer.transformer_blocks.0.attn.to_out.0.lora_B.default_0.weight",
        "diffusion_model.double_blocks.0.img_attn.proj",
        (KLEIN, KLEIN),
    ),
    "two prefixes, of SimpleTuner in 2024": (
        "transformer.base_model.model.transformer_blocks.0.attn.to_out.0.lora.down.weight",
        "transformer.base_model.model.transformer_blocks.0.attn.to_out.0.lora.up.weight",
        "diffusion_model.double_blocks.0.img_attn.proj",
        (KLEIN, KLEIN),
    ),
    "two underlines, of InvokeAI and newer Kohya names": (
        "lora_unet__layers_3_attention_to_k.lora_down.weight",
        "lora_unet__layers_3_attention_to_k.lora_up.weight",
        "diffusion_model.layers.3.attention.to_k",
        (3840, 3840),
    ),
    "XLabs' processors of double blocks": (
        "double_blocks.0.processor.qkv_lora2.down.weight",
        "double_blocks.0.processor.qkv_lora2.up.weight",
        "diffusion_model.double_blocks.0.txt_attn.qkv",
        (9216, 3072),
    ),
    "USO's processors of single blocks": (
        "single_blocks.0.processor.proj_lora.down.weight",
        "single_blocks.0.processor.proj_lora.up.weight",
        "diffusion_model.single_blocks.0.linear2",
        (3072, 15360),
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_is_read_and_converted_without_a_difference(dialect):
    down_key, up_key, module, size = DIALECTS[dialect]
    down, up = factors(*size)
    lora = LoraFile.from_tensors({down_key: down, up_key: up}, {})
    assert lora.identity.verdict != "unknown" and lora.unknown_keys == ()
    assert not_loaded_by("ComfyUI", lora)
    converted, error = convert_lora(lora, "comfy")
    assert error == 0 and read_by("ComfyUI", converted).verdict == "loads"
    assert set(converted.tensors) == {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
    assert torch.equal(converted.tensors[f"{module}.lora_A.weight"], down)
    assert torch.equal(converted.tensors[f"{module}.lora_B.weight"], up)


def test_no_program_is_said_to_load_pefts_names_after_another_prefix():
    down, up = factors(KLEIN, KLEIN)
    name = "transformer.base_model.model.transformer_blocks.0.attn.to_out.0.lora"
    lora = LoraFile.from_tensors({f"{name}.down.weight": down, f"{name}.up.weight": up}, {})
    assert {read_by(reader, lora).verdict for reader in READERS} == {"not at all", "not known"}


def test_the_part_of_a_fused_layer_that_xlabs_changes_finds_its_rows():
    down, up = factors(9216, 3072)
    prefix = "single_blocks.0.processor.qkv_lora"
    lora = LoraFile.from_tensors({f"{prefix}.down.weight": down, f"{prefix}.up.weight": up}, {})
    converted, _ = convert_lora(lora, "comfy")
    name = "diffusion_model.single_blocks.0.linear1"
    assert torch.equal(converted.tensors[f"{name}.lora_A.weight"], down)
    rows = converted.tensors[f"{name}.lora_B.weight"]
    assert torch.equal(rows[:9216], up) and rows.shape == (21504, 2) and not rows[9216:].any()


def usos_file(*others: str) -> LoraFile:
    """A file with all modules of USO's LoRAs, and other ones."""
    sizes = {f"double_blocks.{n}.processor.{p}_lora{s}": (3072 * (3 if p == "qkv" else 1), 3072)
             for n in range(19) for s in (1, 2) for p in ("qkv", "proj")}  # fmt: skip
    sizes |= {f"single_blocks.{n}.processor.qkv_lora": (9216, 3072) for n in range(38)}
    sizes |= {f"single_blocks.{n}.processor.proj_lora": (3072, 15360) for n in range(38)}
    names = {f"{name}.down.weight": f"{name}.up.weight" for name in sizes}
    tensors = {down: torch.zeros(1, sizes[down[: -len(".down.weight")]][1]) for down in names}
    tensors |= {up: torch.zeros(sizes[up[: -len(".up.weight")]][0], 1) for up in names.values()}
    for name in others:
        tensors |= {f"{name}.lora_down.weight": torch.zeros(1, 3072), f"{name}.lora_up.weight": torch.zeros(3072, 1)}
    return LoraFile.from_tensors(tensors, {})


def test_comfyui_loads_usos_files_that_are_whole_and_nothing_else_in_them():
    whole = usos_file()
    assert read_by("ComfyUI", whole).verdict == "loads"
    other = "lora_unet_double_blocks_0_img_attn_proj"
    assert set(not_loaded_by("ComfyUI", usos_file(other))) == {other}
    part = {key: tensor for key, tensor in whole.tensors.items() if not key.startswith("single_blocks.37.")}
    assert read_by("ComfyUI", LoraFile.from_tensors(part, {})).verdict == "not at all"


def test_a_magnitude_by_its_short_name_is_pefts(tmp_path):
    down, up = factors(KLEIN, KLEIN)
    module = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    magnitude = torch.rand(KLEIN) + 1
    lora = LoraFile.from_tensors(tensors | {f"{module}.magnitude": magnitude}, {})
    assert lora.kind == "dora" and read_by("ComfyUI", lora).verdict == "loads as another change"
    base = torch.randn(KLEIN, KLEIN, generator=torch.Generator().manual_seed(1)) / 64
    same = LoraFile.from_tensors(tensors | {f"{module}.lora_magnitude_vector": magnitude}, {})
    changes = [next(file.changes(lambda _: base))[1] for file in (lora, same, convert_lora(lora, "comfy")[0])]
    assert torch.equal(changes[0], changes[1]) and torch.equal(changes[0], changes[2])


WHOLE = {"lokr_w1": (4, 4), "lokr_w2": (KLEIN // 4, KLEIN // 4)}
LOKR = [
    WHOLE,
    WHOLE | {"alpha": ()},
    {"lokr_w1": (4, 4), "lokr_w2_a": (KLEIN // 4, 2), "lokr_w2_b": (2, KLEIN // 4), "alpha": ()},
    {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2": (KLEIN // 4, KLEIN // 4), "alpha": ()},
]


@pytest.mark.parametrize(
    ("roles", "scheme", "reader"),
    [*((roles, "comfy", "ComfyUI") for roles in LOKR), (WHOLE, "kohya", "ComfyUI"), (WHOLE, "diffusers", "diffusers")],
)
def test_a_lokr_stays_one_where_the_program_reads_it(roles, scheme, reader):
    generator = torch.Generator().manual_seed(0)
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = {f"{name}.{role}": torch.randn(shape, generator=generator) for role, shape in roles.items()}
    lora = LoraFile.from_tensors(tensors, {})
    converted, error = convert_lora(lora, scheme)
    assert converted.kind == "lokr" and error == 0 and read_by(reader, converted).verdict == "loads"
    ((_, before),), ((_, after),) = lora.changes(), converted.changes()
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-5)


def test_diffusers_does_not_load_a_lokr_whose_first_factor_is_a_product():
    name = "transformer.transformer_blocks.0.attn.to_out.0"
    tensors = {f"{name}.{role}": torch.ones(shape) for role, shape in LOKR[3].items() if role != "alpha"}
    assert read_by("diffusers", LoraFile.from_tensors(tensors, {})).verdict == "not at all"


def test_t5_of_flux1_gets_the_name_that_invokeai_looks_for():
    t5 = "encoder.block.0.layer.0.SelfAttention.q"
    modules = {}
    for place, size in {("denoiser", "transformer_blocks.0.attn.to_out.0"): 3072, ("text_encoder_2", t5): 4096}.items():
        modules[place] = LoraModule(*factors(size, size), 2.0)
    lora = LoraFile.from_modules("flux1", modules, {"ss_base_model_version": "flux1"})
    reasons = set(not_loaded_by("InvokeAI", lora).values())
    assert reasons == {"a file with text encoder names that begin with lora_te3_"}
    converted, error = convert_for(lora, ["invokeai", "comfyui"])
    assert error == 0 and "lora_te2_encoder_block_0_layer_0_SelfAttention_q.alpha" in converted.tensors
    assert read_by("InvokeAI", converted).verdict == read_by("ComfyUI", converted).verdict == "loads"
    assert LoraFile.from_tensors(converted.tensors, converted.metadata).modules().keys() == modules.keys()


@pytest.mark.parametrize(
    ("tensors", "family", "parts"),
    [
        ({"emb_params": 768}, "sd15", {"text_encoder"}),
        ({"<sks>": 768}, "sd15", {"text_encoder"}),
        ({"<sks>": 1024}, "sd2", {"text_encoder"}),
        ({"text_encoders_0": 768, "text_encoders_1": 1280}, "sdxl", {"text_encoder", "text_encoder_2"}),
    ],
)
def test_embeddings_of_all_programs_are_read_alike(tensors, family, parts):
    vectors = {name: torch.ones(2, width) for name, width in tensors.items()}
    lora = LoraFile.from_tensors(vectors, {}, "sks.safetensors")
    assert (lora.family, lora.kind, lora.unknown_keys) == (family, "embedding", ())
    ((word, taken),) = embeddings_of(lora).items()
    assert word.strip("<>") == "sks" and set(taken) == parts


@pytest.mark.parametrize("names", [["clip_l_out", "clip_g_out"], ["clip_l", "clip_g", "clip_l_out", "clip_g_out"]])
def test_onetrainer_s_vectors_of_a_text_encoder_s_output_are_understood(names):
    vectors = {name: torch.ones(2, 768 if "_l" in name else 1280) for name in names}
    lora = LoraFile.from_tensors(vectors, {}, "sks.safetensors")
    assert (lora.family, lora.kind, lora.unknown_keys) == ("sdxl", "embedding", ())
    taken = embeddings_of(lora).get("sks", {})
    assert set(taken) == ({"text_encoder", "text_encoder_2"} if "clip_l" in names else set())


@pytest.mark.parametrize(
    ("more", "scale"), [({}, 4.0), ({"use_rslora": True}, 8.0), ({"alpha_pattern": {"to_q": 2}}, 0.5)]
)
def test_the_strength_in_what_a_denoiser_of_diffusers_saves_is_kept(more, scale):
    """`save_lora_adapter` writes names and a configuration of peft that have no prefix."""
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    down, up = torch.randn(4, 320), torch.randn(320, 4)
    tensors = {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    metadata = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 16} | more)}
    lora = LoraFile.from_tensors(tensors, metadata)
    assert lora.modules()["denoiser", path].scale == scale
    converted, _ = convert_lora(lora, "kohya")
    torch.testing.assert_close(converted.modules()["denoiser", path].delta(), scale * up @ down)


def write_text_adapter(folder: Path, base: str, width: int = 768) -> Path:
    """Writes a LoRA of a CLIP, usually CLIP-L, as peft does, with the base model that its configuration names."""
    name = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    down, up = factors(width, width)
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "base_model_name_or_path": base}))
    save_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("base", "family", "prefix"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", "lora_te1_"),
        ("runwayml/stable-diffusion-v1-5", "sd15", "lora_te_"),
        ("black-forest-labs/FLUX.1-dev", "flux1", "lora_te1_"),
        (r"D:\models\stable-diffusion-xl-base-1.0\text_encoder", "sdxl", "lora_te1_"),
        (
            f"/cache/models--stabilityai--stable-diffusion-xl-base-1.0/snapshots/{'0f' * 20}/text_encoder",
            "sdxl",
            "lora_te1_",
        ),
    ],
)
def test_a_text_encoder_is_of_the_model_that_pefts_configuration_names(base, family, prefix, tmp_path):
    lora = LoraFile.read(write_text_adapter(tmp_path, base))
    assert lora.family == family and lora.other_models == ()
    assert all(key.startswith(prefix) for key in convert_lora(lora, "kohya").lora.tensors)


def test_a_clip_g_is_the_second_text_encoder(tmp_path):
    lora = LoraFile.read(write_text_adapter(tmp_path, "stable-diffusion-xl-base-1.0/text_encoder_2", 1280))
    assert lora.family == "sdxl" and list(lora.modules()) == [
        ("text_encoder_2", "text_model.encoder.layers.0.self_attn.q_proj")
    ]
    assert all(key.startswith("lora_te2_") for key in convert_lora(lora, "kohya").lora.tensors)


def test_a_text_encoder_of_an_unknown_model_is_ambiguous_until_its_family_is_given(tmp_path, capsys):
    source, output = write_text_adapter(tmp_path, "somebody/a-model"), tmp_path / "a.safetensors"
    assert LoraFile.read(source).other_models == ("sdxl", "sd3", "flux1")
    assert any("fit sdxl and sd3 and flux1 as well as sd15" in fault.text for fault in verify_lora(source))
    command = ["convert", str(source), "--output", str(output), "--overwrite", "--to", "kohya"]
    assert main(command) == 0
    assert "treated as sd15, but its modules also fit sdxl and sd3 and flux1" in capsys.readouterr().err
    assert main([*command, "--family", "sdxl"]) == 0
    lora = LoraFile.read(output)
    assert (lora.family, lora.metadata["ss_base_model_version"]) == ("sdxl", "sdxl_base_v1-0")
    assert capsys.readouterr().err == ""
    with pytest.raises(UnknownFamily, match="is for sd15, not for zimage"):
        LoraFile.read(source, "zimage")


def factors_of(*names: str) -> dict[str, torch.Tensor]:
    down, up = factors(640, 640)
    return {f"{name}.lora_{letter}.weight": matrix for name in names for letter, matrix in (("A", down), ("B", up))}


STRANGE = {
    "nothing": ({}, r"^LoRA: not a LoRA: it has no tensors$"),
    "a LoRA of a ViT": ({"w_a_000": torch.zeros(4, 768), "w_b_000": torch.zeros(768, 4)}, "no adapter found in its 2"),
    "a cached text": ({"prompt_embeds": torch.zeros(77, 4096)}, "not a LoRA: no adapter found in its 1 tensor"),
    "numbers": (
        {"unet:0:up": torch.zeros(320, 4), "unet:0:down": torch.zeros(4, 320)},
        r"are numbered .*cloneofsimo/lora",
    ),
    "words for T5": (
        {"<s1>": torch.zeros(2, 4096)},
        "its vectors of words are 4096 wide, which no supported text encoder",
    ),
    "an underline in place of a dot": (
        {"lora_unet_mid_block_attentions_0_proj_in_lora_down.weight": torch.zeros(2, 1280)},
        r"_lora_down.weight' does not end like a LoRA's tensor, such as \.lora_down\.weight",
    ),
    "OFT of OneTrainer": (
        {"lora_unet_mid_block_attentions_0_proj_in.oft_R.weight": torch.zeros(40, 496)},
        r"not supported: its tensors are those of OFT v2 \(peft, OneTrainer\), e\.g\. 'lora_unet_mid.*oft_R\.weight'",
    ),
    "IA3 of LyCORIS": (
        {
            "lora_unet_mid_block_attentions_0_proj_in.on_input": torch.zeros(()),
            "lora_unet_mid_block_attentions_0_proj_in.weight": torch.zeros(1, 1280),
        },
        r"not supported: its tensors are those of IA3 \(LyCORIS\)",
    ),
    "a language model": (factors_of("base_model.model.model.layers.0.self_attn.q_proj"), "is for a language model"),
    "SAM": (factors_of("base_model.model.vision_encoder.layers.0.attn.qkv"), "is for a vision model like SAM or ViT"),
    "an encoder": (factors_of("encoder.layer.0.intermediate.dense"), "is for a language or vision model"),
    **{
        kind: (
            {f"base_model.model.roberta.encoder.layer.0.{end}": torch.ones(4, 4)},
            rf"those of {kind} \(peft\), e\.g",
        )
        for kind, end in {
            "IA3": "attention.self.key.ia3_l",
            "VeRA": "attention.self.key.vera_lambda_b",
            "BOFT": "attention.self.key.boft_R",
        }.items()
    },
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_file_of_something_else_is_named_as_what_it_is(what):
    tensors, message = STRANGE[what]
    with pytest.raises(UnknownFamily, match=message):
        LoraFile.from_tensors(tensors, {})


def test_what_a_denoiser_of_diffusers_saves_is_said_to_load_there():
    lora = LoraFile.from_tensors(factors_of("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"), {})
    (reason,) = set(not_loaded_by("diffusers", lora).values())
    assert reason == "bare names of sd15 (pipe.unet.load_lora_adapter(file, prefix=None) does)"


def test_nothing_but_results_and_warnings_is_printed_where_no_terminal_is(tmp_path):
    """A bar would appear after a second."""
    command = "import time; from core.cli.common import progress_bar; b = progress_bar('x'); time.sleep(1.2); b(1, 2); b(2, 2)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
