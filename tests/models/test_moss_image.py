"""MOSS-Image against OpenMOSS's own denoiser and transformers' text encoder; names that its files and LoRAs have."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from core.lora.convert import convert_for
from core.lora.file import LoraFile
from core.lora.inspect import verify_lora
from core.lora.readers import not_loaded_by, read_by
from core.models import load_base, text
from core.models.families import FAMILIES, family_without_class
from core.pictures.sampling import sample_latents
from tests.models.family_parts import CPU, Words, error_of, in_original_names, random_texts, write_folder
from tests.models.quantised_weights import quantised
from tests.tooling import SMALL_FLOWS, caption_states, small_flow_base, whole_checkpoint

FAMILY = FAMILIES["moss-image"]
LAYERS = 24
CAPTIONS = ("", " a photo of sks person\n", "sks person, outdoors, in the evening sun")


def random_denoiser(generator: torch.Generator) -> dict[str, Tensor]:
    """Weights under the authors' names, of a denoiser that has the layer which negative prompts leave out."""
    denoiser: Any = FAMILY.build("denoiser", SMALL_FLOWS[FAMILY.name].denoiser | {"num_layers": LAYERS})
    numbers = {n: torch.randn(p.shape, generator=generator) for n, p in sorted(denoiser.named_parameters())}
    return {name: 0.1 * values + (values.ndim < 2) for name, values in numbers.items()}


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("names", ["OpenMOSS", "ComfyUI"])
def test_a_file_predicts_what_the_authors_denoiser_predicts(names, prefix):
    """Their code as it is in SimpleTuner 4.10.1, with these weights: some of its numbers, with all layers and without one."""
    generator = torch.Generator().manual_seed(1)
    tensors = random_denoiser(generator)
    latents = torch.randn(1, 128, 4, 6, generator=generator)
    context = torch.randn(1, 9, SMALL_FLOWS[FAMILY.name].context, generator=generator)
    if names == "ComfyUI":
        tensors = in_original_names(tensors, FAMILY.name)
        assert "layers.0.proj.qkv.weight" in tensors
    base = load_base({prefix + name: value for name, value in (tensors | {"rope.bands": torch.ones(16)}).items()})
    both = {
        name: torch.cat([value, value])
        for name, value in {"context": context, "context_mask": torch.ones(1, 9)}.items()
    }
    times, is_negative = torch.tensor([300.0, 300.0]), torch.tensor([0.0, 1.0])
    denoiser = base.load("denoiser", CPU, torch.float32)
    found = FAMILY.predict(denoiser, torch.cat([latents, latents]), times, both | {"is_negative": is_negative})
    expected = [
        [-6.086971, -6.073233, -5.605526, -5.117177, -0.857259, 0.798149, -0.43921, -0.232331],
        [-5.879031, -5.86786, -5.944906, -5.392078, -0.867849, 0.61241, -0.037099, 0.296605],
    ]
    torch.testing.assert_close(found[:, ::32].flatten(1)[:, ::13], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    plain = FAMILY.predict(denoiser, latents, times[:1], {"context": context, "context_mask": torch.ones(1, 9)})
    assert error_of(plain, found[:1]) < 1e-5


@torch.no_grad()
def test_texts_of_different_lengths_in_a_batch_give_what_each_gives_alone():
    base, generator = small_flow_base(FAMILY.name), torch.Generator().manual_seed(2)
    texts, denoiser = random_texts((9, 4), 32, generator), base.load("denoiser", CPU, torch.float32)
    latents, times = torch.randn(2, 128, 4, 6, generator=generator), torch.tensor([200.0, 900.0])
    together = FAMILY.predict(denoiser, latents, times, texts)
    for row, length in enumerate((9, 4)):
        each = slice(row, row + 1)
        alone = {name: value[each, :length] for name, value in texts.items()}
        assert error_of(together[each], FAMILY.predict(denoiser, latents[each], times[each], alone)) < 1e-5


def test_only_the_negative_prompt_is_marked_where_pictures_are_drawn():
    base, marks = small_flow_base(FAMILY.name), []

    def seen(denoiser: Any, latents: Tensor, times: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        marks.append(conditioning.get("is_negative", torch.empty(0)).tolist())
        return FAMILY.predict(denoiser, latents, times, conditioning)

    base = replace(base, family=replace(FAMILY, predict=seen))
    texts = [random_texts((length,), 32, torch.Generator().manual_seed(length)) for length in (9, 4)]
    for guidance in (3.0, 1.0):
        sample_latents(
            base, base.load("denoiser", CPU, torch.float32), texts[:1], texts[1:], device=CPU, dtype=torch.float32,
            seeds=[1], size=(64, 32), steps=1, guidance=guidance,
        )  # fmt: skip
    assert marks == [[1.0, 0.0], []]


@pytest.mark.parametrize("form", ["scaled fp8", "int8", "convrot"])
def test_files_that_comfyui_quantises_are_read_with_q_k_and_v_fused(form):
    denoiser = in_original_names(small_flow_base(FAMILY.name).components["denoiser"].tensors, FAMILY.name)
    narrow = load_base({f"model.diffusion_model.{n}": t for n, t in quantised(denoiser, form, r"^layers\.").items()})
    assert narrow.family is FAMILY
    kept, wide = (narrow.load("denoiser", CPU, torch.float32, as_stored=stored) for stored in (True, False))
    texts, latents = random_texts((5,), 32, torch.Generator().manual_seed(3)), torch.randn(1, 128, 4, 4)
    with torch.no_grad():
        ours, expected = (FAMILY.predict(each, latents, torch.tensor([500.0]), texts) for each in (kept, wide))
    # Rotated weights stay rotated, and the states are rotated instead.
    assert error_of(ours, expected) < (1e-3 if form == "convrot" else 1e-5)
    assert sum(p.nbytes for p in kept.parameters()) < sum(p.nbytes for p in wide.parameters())


@pytest.fixture(scope="module")
def network() -> Any:
    """The network that the authors' folder has as its text encoder, narrow."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
             "num_key_value_heads": 1, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                                 "mrope_section": [11, 11, 10]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 32}
    torch.manual_seed(0)
    model = transformers.Qwen3_5Model(transformers.Qwen3_5Config(text_config=sizes, vision_config=vision)).eval()
    for parameter in model.language_model.parameters():
        if parameter.ndim < 2:
            parameter.data.uniform_(0.1, 0.9)
    return model


@torch.no_grad()
@pytest.mark.parametrize("source", ["folder", "file"])
def test_captions_have_the_last_states_of_a_chat_in_which_the_model_begins_to_think(
    source, network, tmp_path, monkeypatch
):
    words = Words(most=62, pattern=r"<\|\w+\|>|<\w+>|\w+|\W")
    monkeypatch.setattr(text, "load_tokenizer", lambda *_: words)
    if source == "folder":
        base = load_base(write_folder(tmp_path, small_flow_base(FAMILY.name), network))
    else:
        denoiser = small_flow_base(FAMILY.name).components["denoiser"].tensors
        base = load_base(
            whole_checkpoint(denoiser, "qwen35_9b", network.state_dict() | {"mtp.norm.weight": torch.ones(1)})
        )
    assert base.family is FAMILY
    for states, caption in zip(caption_states(base, CAPTIONS), CAPTIONS, strict=True):
        # The chat template of Qwen3.5 with enable_thinking, which strips what is around a text.
        chat = f"<|im_start|>user\n{caption.strip()}<|im_end|>\n<|im_start|>assistant\n<think>\n"
        expected = network(torch.tensor([words(chat).input_ids])).last_hidden_state[0]
        assert len(states) == len(expected) and error_of(states, expected) < 1e-5


def test_a_text_encoder_is_known_by_its_width_and_is_no_other_models():
    def tensors(width: int) -> dict[str, Tensor]:
        return {"model.language_model.layers.0.linear_attn.A_log": torch.zeros(32),
                "model.language_model.layers.0.input_layernorm.weight": torch.zeros(width)}  # fmt: skip

    assert list(text.encoders_of(tensors(4096))) == ["qwen35_9b"] and text.encoder_in(tensors(2560)) is None


def test_a_model_whose_class_in_comfyui_is_not_known_is_known_by_its_tensors():
    denoiser = small_flow_base(FAMILY.name).components["denoiser"].tensors
    assert family_without_class(in_original_names(denoiser, FAMILY.name)) is FAMILY
    assert family_without_class({"double_blocks.0.img_mod.lin.weight": torch.zeros(1)}) is None


NAMINGS = {
    "ai-toolkit": ("diffusion_model.layers.3.proj.{}", ("q", "k", "v", "ffn_up_gate"), ("lora_A", "lora_B")),
    "SimpleTuner": ("transformer.layers.3.proj.{}", ("q", "k", "v", "o"), ("lora_A", "lora_B")),
    "KohakuMossTrainer": ("lora_unet_layers_3_proj_{}", ("qkv", "ffn_down"), ("lora_down", "lora_up")),
    "few-step LoRAs": ("diffusion_model.layers.3.proj.{}", ("qkv", "o"), ("lora_down", "lora_up")),
}
SIZES = {"qkv": (9216, 3072), "ffn_up_gate": (16384, 3072), "ffn_down": (3072, 8192)}


@pytest.mark.parametrize("naming", NAMINGS)
def test_loras_of_other_trainers_are_known_and_said_to_load_in_comfyui_or_to_need_a_conversion(naming, tmp_path):
    name, parts, roles = NAMINGS[naming]
    tensors = {}
    for part in parts:
        outputs, inputs = SIZES.get(part, (3072, 3072))
        for role, shape in zip(roles, ((2, inputs), (outputs, 2)), strict=True):
            tensors[f"{name.format(part)}.{role}.weight"] = torch.randn(shape)
    lora = LoraFile.from_tensors(tensors, {})
    assert (lora.family, lora.unknown_keys, lora.identity.models) == (FAMILY.name, (), ("MOSS-Image",))
    lora.save(tmp_path / "a.safetensors")
    converted = convert_for(lora, ["ComfyUI"]).lora
    assert not not_loaded_by("ComfyUI", converted)
    faults = [fault.text for fault in verify_lora(tmp_path / "a.safetensors")]
    assert any("ComfyUI would not load" in fault and "convert it" in fault for fault in faults) == (
        naming == "SimpleTuner"
    )
    if naming == "SimpleTuner":
        assert read_by("ComfyUI", lora).verdict == "not at all"
        assert {key.rpartition(".lora")[0] for key in converted.tensors} == {
            f"diffusion_model.layers.3.proj.{part}" for part in parts
        }
