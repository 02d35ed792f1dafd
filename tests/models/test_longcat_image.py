"""LongCat-Image against diffusers' pipeline: the same weights, the same captions; files that look like it or are others'."""

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids, split_quotation
from torch import Tensor

from core.errors import UnknownFamily
from core.lora.file import LoraFile
from core.lora.modules import LoraModule
from core.models import load_base, text
from core.models.families import FAMILIES, longcat_image
from core.tensor_names import NAME_TABLES
from tests.models.family_parts import (
    assert_diffusers_loads_whole,
    error_of,
    in_original_names,
    numbers_of,
    pipeline_with,
    write_folder,
)
from tests.tooling import SMALL_FLOWS, small_flow_base, whole_checkpoint

pytestmark = pytest.mark.ci

CPU = torch.device("cpu")
FAMILY = FAMILIES["longcat-image"]
WIDTH = 256
CAPTIONS = [
    "",
    "a photo of sks person",
    "sks person's shop, 'open' and \"24 hours\" on its door, dogs' toys, ‘晚安’ and “早安” "
    + 130 * "in the evening sun ",
]


@torch.no_grad()
def random_denoiser() -> Any:
    """diffusers' network, all of whose weights are random."""
    sizes = SMALL_FLOWS["longcat-image"].denoiser | {"joint_attention_dim": WIDTH}
    denoiser: Any = diffusers.LongCatImageTransformer2DModel.from_config(sizes)  # pyright: ignore
    generator = torch.Generator().manual_seed(1)
    for parameter in denoiser.parameters():
        parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim < 2))
    return denoiser


class Words:
    """A tokenizer with a number for each word and each sign, which puts a caption's spaces before the words."""

    def __call__(self, caption: str, add_special_tokens: bool = True, **_: Any) -> Any:
        return transformers.BatchEncoding({"input_ids": numbers_of(caption, pattern=r"<\|\w+\|>| ?\w+|\W")})

    def pad(self, encoded: Any, max_length: int, **_: Any) -> Any:
        rows = encoded["input_ids"]
        return SimpleNamespace(
            input_ids=torch.tensor([row + [text._PAD_QWEN] * (max_length - len(row)) for row in rows]),
            attention_mask=torch.tensor([[1] * len(row) + [0] * (max_length - len(row)) for row in rows]),
        )


@pytest.fixture
def language_model(monkeypatch) -> Any:
    """The network that a diffusers folder has as its text encoder, narrow, and of few words."""
    monkeypatch.setattr(text, "_PAD_QWEN", 63)
    sizes = {"vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
             "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": WIDTH}
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(text_config=sizes, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def pipeline(**parts: Any) -> Any:
    return pipeline_with(diffusers.LongCatImagePipeline, **parts)


def as_with_transformers_4(encoder: Any) -> Any:
    """The encoder with the positions that transformers 4.57, the authors' version, gave texts with padding."""

    def encode(input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        positions = (attention_mask.cumsum(1) - 1).masked_fill(attention_mask == 0, 1).expand(3, -1, -1)
        return encoder(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, **options)

    encode.dtype = torch.float32  # pyright: ignore
    return encode


@pytest.fixture
def folder(tmp_path, language_model):
    """A diffusers folder."""
    return write_folder(tmp_path, small_flow_base("longcat-image"), language_model, random_denoiser())


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_in_original_names_predicts_what_diffusers_predicts(prefix):
    theirs = random_denoiser()
    base = load_base(
        {prefix + name: tensor for name, tensor in in_original_names(theirs.state_dict(), FAMILY.name).items()}
    )
    assert base.family is FAMILY
    denoiser = base.load("denoiser", CPU, torch.float32)
    state = theirs.state_dict()
    assert denoiser.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in denoiser.state_dict().items())
    generator = torch.Generator().manual_seed(2)
    latents, times = torch.randn(2, 16, 8, 12, generator=generator), torch.tensor([200.0, 900.0])
    context = torch.randn(2, longcat_image.TEXT_TOKENS, WIDTH, generator=generator)
    expected = theirs(
        pipeline()._pack_latents(latents, 2, 16, 8, 12),
        encoder_hidden_states=context,
        timestep=times / 1000,
        txt_ids=prepare_pos_ids(0, "text", num_token=512),
        img_ids=prepare_pos_ids(1, "image", (512, 512), height=4, width=6),
    ).sample
    ours = FAMILY.predict(denoiser, latents, times, {"context": context})
    assert error_of(ours, pipeline()._unpack_latents(expected, 64, 96, 8)) < 1e-5


@pytest.mark.parametrize("source", ["folder", "file"])
def test_captions_have_the_states_of_diffusers_pipeline_as_its_authors_run_it(
    source, folder, language_model, monkeypatch
):
    monkeypatch.setattr(text, "load_tokenizer", lambda *_: Words())
    count = len(Words()(longcat_image.TEMPLATE).input_ids)
    monkeypatch.setattr(longcat_image, "TEMPLATE_TOKENS", count)
    if source == "folder":
        base = load_base(folder)
    else:
        denoiser = in_original_names(random_denoiser().state_dict(), FAMILY.name)
        base = load_base(whole_checkpoint(denoiser, "qwen25_7b", language_model.state_dict()))
    assert base.family is FAMILY
    theirs = pipeline(tokenizer=Words())
    theirs.text_encoder = as_with_transformers_4(language_model)
    with torch.no_grad():
        ours = FAMILY.encode_text(base.load_text_encoders(CPU, torch.float32), CAPTIONS, 1, 1)
        expected, positions = theirs.encode_prompt(CAPTIONS)
    assert ours.keys() == {"context"} and ours["context"].shape == expected.shape == (3, 512, WIDTH)
    assert len(positions) == 512
    for states, wanted in zip(ours["context"], expected, strict=True):
        assert error_of(states, wanted) < 1e-5


def test_the_template_and_its_tokens_are_those_of_the_pipeline():
    assert pipeline().prompt_template_encode_prefix == longcat_image.TEMPLATE
    assert pipeline().tokenizer_max_length == longcat_image.TEXT_TOKENS


@pytest.mark.parametrize("caption", [*CAPTIONS, "'one' 'two'", "don't say 'I don't'", "rock 'n' roll", "it's 6' tall"])
def test_what_is_quoted_is_tokenised_character_by_character_as_in_diffusers(caption):
    wanted = [piece for part, quoted in split_quotation(caption) for piece in (part if quoted else [part])]
    template, *found = longcat_image.pieces(caption)
    assert template == longcat_image.TEMPLATE
    assert [piece for piece in found if piece] == wanted


def test_two_words_with_an_apostrophe_stay_as_they_are():
    # diffusers puts the one in the place of the other: there the second becomes the first, twice.
    caption = "sks person's friend doesn't smile"
    assert "".join(longcat_image.pieces(caption)[1:]) == caption


def test_an_edit_folder_and_a_flux1_file_are_not_taken_for_it(folder):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LongCatImageEditPipeline"}))
    with pytest.raises(UnknownFamily, match="LongCatImageEditPipeline"):
        load_base(folder)
    flux1 = small_flow_base("flux1").load("denoiser", CPU, torch.float32)
    for name, denoiser in (("flux1", flux1), ("longcat-image", random_denoiser())):
        tensors = in_original_names(denoiser.state_dict(), name)
        assert [found for found, family in FAMILIES.items() if family.recognise(tensors)] == [name]


def lora_of_blocks(double: int, single: int) -> Mapping[str, Tensor]:
    """A LoRA file without metadata of so many of FLUX.1's blocks at their full width."""
    modules = {
        **{("denoiser", f"transformer_blocks.{i}.attn.{name}"): 3072 for i in range(double) for name in ("to_q", "to_out.0")},
        **{("denoiser", f"single_transformer_blocks.{i}.proj_mlp"): 12288 for i in range(single)},
    }  # fmt: skip
    loras = {module: LoraModule(torch.zeros(1, 3072), torch.zeros(rows, 1), 1.0) for module, rows in modules.items()}
    return LoraFile.from_modules("flux1", loras, {}, "diffusers").tensors


@pytest.mark.parametrize(
    ("double", "single", "family"),
    [
        *((double, single, "flux1") for double, single in ((19, 38), (19, 0), (0, 38), (3, 5))),
        *((double, single, "longcat-image") for double, single in ((10, 20), (10, 0))),
    ],
)
def test_a_lora_without_metadata_is_known_by_its_last_blocks(double, single, family):
    assert LoraFile.from_tensors(lora_of_blocks(double, single), {}).family == family


def test_a_lora_that_names_its_model_is_that_models_whatever_its_blocks():
    for family in ("flux1", "longcat-image"):
        said = {"ss_base_model_version": NAME_TABLES[family].base_versions[0]}
        assert LoraFile.from_tensors(lora_of_blocks(3, 5), said).family == family


@torch.no_grad()
def test_diffusers_own_denoiser_loads_a_lora_whole(tmp_path):
    base, theirs = small_flow_base("longcat-image"), random_denoiser()
    loader = SimpleNamespace(
        load_lora_weights=lambda path: theirs.load_lora_adapter(dict(LoraFile.read(path).tensors)),
        fuse_lora=theirs.fuse_lora, unload_lora_weights=theirs.unload_lora,
    )  # fmt: skip
    assert_diffusers_loads_whole(base, theirs, loader, tmp_path / "a.safetensors", "diffusers", modules=26)
