"""LongCat-Image: pieces of captions as in diffusers' pipeline; files that look like it or are others'."""

import json
from collections.abc import Mapping

import diffusers
import pytest
import torch
from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation
from torch import Tensor

from core.errors import UnknownFamily
from core.lora.file import LoraFile
from core.lora.modules import LoraModule
from core.models import load_base
from core.models.families import FAMILIES, longcat_image
from core.tensor_names import NAME_TABLES
from tests.models.family_parts import CPU, in_original_names, pipeline_with, write_folder
from tests.models.references import REFERENCES
from tests.tooling import small_flow_base

pytestmark = pytest.mark.ci

REFERENCE = REFERENCES["longcat-image"]


def test_the_template_and_its_tokens_are_those_of_the_pipeline():
    pipeline = pipeline_with(diffusers.LongCatImagePipeline)
    assert pipeline.prompt_template_encode_prefix == longcat_image.TEMPLATE
    assert pipeline.tokenizer_max_length == longcat_image.TEXT_TOKENS


@pytest.mark.parametrize(
    "caption", [*REFERENCE.captions, "'one' 'two'", "don't say 'I don't'", "rock 'n' roll", "it's 6' tall"]
)
def test_what_is_quoted_is_tokenised_character_by_character_as_in_diffusers(caption):
    wanted = [piece for part, quoted in split_quotation(caption) for piece in (part if quoted else [part])]
    template, *found = longcat_image.pieces(caption)
    assert template == longcat_image.TEMPLATE
    assert [piece for piece in found if piece] == wanted


def test_two_words_with_an_apostrophe_stay_as_they_are():
    # diffusers puts the one in the place of the other: there the second becomes the first, twice.
    caption = "sks person's friend doesn't smile"
    assert "".join(longcat_image.pieces(caption)[1:]) == caption


def test_an_edit_folder_and_a_flux1_file_are_not_taken_for_it(tmp_path):
    takes = REFERENCE.takes
    folder = write_folder(tmp_path, small_flow_base("longcat-image", **takes), REFERENCE.encoder())
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LongCatImageEditPipeline"}))
    with pytest.raises(UnknownFamily, match="LongCatImageEditPipeline"):
        load_base(folder)
    flux1 = small_flow_base("flux1").load("denoiser", CPU, torch.float32)
    for name, denoiser in (("flux1", flux1), ("longcat-image", REFERENCE.denoiser("longcat-image"))):
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
