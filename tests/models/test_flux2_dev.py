"""FLUX.2 dev's text encoder, a Mistral: its states as transformers gives them, and where dev's denoiser sees a text."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from core.errors import BadFile
from core.models import Base, load_base, text
from core.models.families.flux2 import FLUX2, texts_at_the_end
from tests.models.family_parts import Words, error_of, random_texts, write_folder
from tests.models.test_base_files import FLUX2_SHAPES
from tests.tooling import caption_states, small_flow_base

pytestmark = pytest.mark.ci

WIDTH, LAYERS, WORDS = 32, 32, 131072
TOKENIZER = Words(WORDS - 1, r"</?\w+>|\[/?\w+\]|\w+|\W")
CAPTIONS = ["a photo of sks person", "sks person, outdoors, in the evening sun"]


@pytest.fixture(scope="module")
def network() -> Any:
    """The network that dev's diffusers folder has as its text encoder, narrow, and with two layers too many."""
    sizes = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "rms_norm_eps": 1e-5,
             "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e9}}  # fmt: skip
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 16,
    }
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **sizes}, vision_config={"model_type": "pixtral", **vision}
    )
    torch.manual_seed(0)
    return transformers.Mistral3ForConditionalGeneration(config).eval()


def dev_base() -> Base:
    return small_flow_base("flux2", guidance_embeds=True, joint_attention_dim=3 * WIDTH)


def expected_states(network: Any, caption: str) -> Tensor:
    """The states of a caption in the form that Black Forest Labs gave it, by transformers."""
    system = (
        "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
        "relationships, object\nattribution and actions without speculation."
    )
    chat = f"<s>[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT][INST]{caption}[/INST]"
    tokens = torch.tensor([TOKENIZER(chat).input_ids])
    with torch.no_grad():
        states = network.model.language_model(tokens, output_hidden_states=True).hidden_states
    return torch.cat([states[layer] for layer in (10, 20, 30)], -1)[0]


def check_captions(base: Base, network: Any) -> None:
    for caption, states in zip(CAPTIONS, caption_states(base, CAPTIONS), strict=True):
        expected = expected_states(network, caption)
        assert len(states) == len(expected) and error_of(states, expected) < 1e-5


def test_a_diffusers_folder_encodes_captions_as_transformers_does(network, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "load_tokenizer", lambda *_: TOKENIZER)
    base = load_base(write_folder(tmp_path, dev_base(), network, _class_name="Flux2Pipeline"))
    assert base.family is FLUX2 and base.embeds_guidance
    check_captions(base, network)


@pytest.mark.parametrize("pruned", [False, True])
def test_a_file_of_the_text_encoder_without_its_last_layers(pruned, network, monkeypatch):
    monkeypatch.setattr(text, "load_tokenizer", lambda *_: TOKENIZER)
    tensors = {f"model.{name}": tensor for name, tensor in network.model.language_model.state_dict().items()}
    if pruned:
        tensors = {name: t for name, t in tensors.items() if not re.match(r"model\.(norm|layers\.3[01])\.", name)}
        tensors["tekken_model"] = torch.zeros(4, dtype=torch.uint8)
    (kind, stored), *others = text.encoders_of(tensors).items()
    assert kind == "mistral3_24b" and not others
    component = text._component(kind, stored)
    assert component.config["num_hidden_layers"] == 30
    base = dev_base()
    base = replace(base, components={**base.components, "text_encoder": component}, caption_encoder=None)
    check_captions(base, network)


def test_texts_end_at_the_last_of_512_tokens_with_zeros_before_them():
    both = random_texts((3, 5), 6, torch.Generator())
    moved = texts_at_the_end(both)
    assert moved.shape == (2, 512, 6)
    for row, states, length in zip(moved, both["context"], (3, 5), strict=True):
        assert torch.equal(row[-length:], states[:length]) and not row[:-length].any()
    whole = {"context": torch.randn(1, 512, 6), "context_mask": torch.ones(1, 512)}
    assert texts_at_the_end(whole) is whole["context"]


def write_tokenizer(folder: Path, vocabulary: dict[str, int]) -> Path:
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    return folder


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    said = r"not the tokenizer of Mistral Small 3.2 \(24B\)\. It has 3 tokens, and <s> is 2"
    with pytest.raises(BadFile, match=said):
        text.load_tokenizer(str(write_tokenizer(tmp_path, {"<s>": 2, "<pad>": 11, "a": 0})), "mistral3_24b")


def test_the_tokenizer_in_the_text_encoders_file_is_taken(network, tmp_path):
    """It was once refused, since it isn't that of the family's smaller models."""
    with torch.device("meta"):
        denoiser = {name: torch.empty(shape) for name, shape in FLUX2_SHAPES.items()}
        denoiser["txt_in.weight"] = torch.empty(3072, 3 * WIDTH)
    encoder = {f"model.{name}": tensor for name, tensor in network.model.language_model.state_dict().items()}
    base = load_base(
        denoiser, text_encoders=[encoder], tokenizer=write_tokenizer(tmp_path, {"a": 0, "<s>": 1, "<pad>": 11})
    )
    assert base.components["text_encoder"].config["tokenizer"] == str(tmp_path)
