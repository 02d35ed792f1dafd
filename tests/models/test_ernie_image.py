"""ERNIE-Image against diffusers' pipeline: the same weights, the same captions; a run that goes on where it was stopped."""

import re
import zlib
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor

from core.models import Base, load_base, text
from core.models.families import FAMILIES
from tests.models.family_parts import error_of, pipeline_with, rough_weights, write_folder
from tests.tooling import SMALL_FLOWS, caption_states, small_flow_base, whole_checkpoint

pytestmark = pytest.mark.ci

CPU = torch.device("cpu")
FAMILY = FAMILIES["ernie-image"]
WIDTH = SMALL_FLOWS["ernie-image"].context
CAPTIONS = ["", "a photo of sks person", "sks person, outdoors, in the evening sun"]


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_published_file_predicts_what_diffusers_predicts_with_texts_filled_up(prefix):
    theirs = rough_weights(small_flow_base("ernie-image").load("denoiser", CPU, torch.float32))
    base = load_base({prefix + name: tensor for name, tensor in theirs.state_dict().items()})
    assert base.family is FAMILY
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 128, 8, 12, generator=generator)
    states = [torch.randn(length, WIDTH, generator=generator) for length in (9, 4)]
    times = torch.tensor([200.0, 900.0])
    filled, lengths = pipeline_with(diffusers.ErnieImagePipeline, transformer=theirs)._pad_text(
        states, CPU, torch.float32, WIDTH
    )
    expected = theirs(latents, times, filled, lengths).sample
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    denoiser = base.load("denoiser", CPU, torch.float32)
    ours = base.family.predict(denoiser, latents, times, {"context": filled, "context_mask": mask.float()})
    assert error_of(ours, expected) < 1e-4
    alone = {"context": states[1][None], "context_mask": torch.ones(1, 4)}
    ours = base.family.predict(denoiser, latents[1:], times[1:], alone)
    assert error_of(ours, expected[1:]) < 1e-4


class Words:
    """A tokenizer with a number for each word, each sign and each special token."""

    def __call__(self, caption: str, add_special_tokens: bool = True, **_: Any) -> Any:
        words = re.findall(r"<s>|\w+|\W", ("<s>" if add_special_tokens else "") + caption)
        numbers = [1 if word == "<s>" else 2 + zlib.crc32(word.encode()) % 60 for word in words]
        return SimpleNamespace(input_ids=numbers) if not add_special_tokens else {"input_ids": numbers}


@pytest.fixture(scope="module")
def vision_model() -> Any:
    """The network that a diffusers folder has as its text encoder, narrow."""
    sizes = {"model_type": "ministral3", "vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 48,
             "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}  # fmt: skip
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 1, "head_dim": 16}  # fmt: skip
    torch.manual_seed(0)
    return transformers.Mistral3Model(transformers.Mistral3Config(text_config=sizes, vision_config=vision)).eval()


def of_a_file(encoder: dict[str, Tensor]) -> Base:
    denoiser = small_flow_base("ernie-image").load("denoiser", CPU, torch.float32).state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in encoder.items()}
    return load_base(whole_checkpoint(denoiser, "ministral3_3b", tensors))


@torch.no_grad()
@pytest.mark.parametrize("source", ["folder", "file"])
def test_captions_have_the_states_of_diffusers_pipeline(source, tmp_path, vision_model, monkeypatch):
    monkeypatch.setattr(text, "load_tokenizer", lambda *_: Words())
    if source == "folder":
        base = load_base(write_folder(tmp_path, small_flow_base("ernie-image"), vision_model))
    else:
        base = of_a_file(vision_model.language_model.state_dict())
    pipe = pipeline_with(diffusers.ErnieImagePipeline, text_encoder=vision_model, tokenizer=Words())
    theirs = pipe.encode_prompt(CAPTIONS, CPU)
    for states, expected in zip(caption_states(base, CAPTIONS), theirs, strict=True):
        assert len(states) == len(expected) and error_of(states, expected) < 1e-5


def test_a_file_of_the_text_encoder_is_known_by_its_width():
    layer = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(1)}
    kinds = {
        width: list(text.encoders_of({"model.embed_tokens.weight": torch.zeros(1).expand(131072, width)} | layer))
        for width in (3072, 5120)
    }
    assert kinds == {3072: ["ministral3_3b"], 5120: ["mistral3_24b"]}
