"""Krea 2 against diffusers' pipeline: the same weights under the original names, the same captions."""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers

from core.models import load_base, text
from core.models.families import FAMILIES
from tests.models.family_parts import (
    error_of,
    in_original_names,
    numbers_of,
    pipeline_with,
    rough_weights,
    small_qwen3vl,
    write_folder,
)
from tests.tooling import SMALL_FLOWS, small_flow_base

pytestmark = pytest.mark.ci

CPU = torch.device("cpu")
FAMILY = FAMILIES["krea2"]
LAYERS, WIDTH = 36, 64


def original_weights(denoiser: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the names of the published file, as diffusers' own converter reads them."""
    state = denoiser.state_dict()
    renamed = in_original_names(state, FAMILY.name)
    converted = convert_krea2_transformer_checkpoint_to_diffusers(dict(renamed))
    assert {name: tensor.shape for name, tensor in converted.items()} == {n: t.shape for n, t in state.items()}
    return renamed


@torch.no_grad()
def test_a_published_file_predicts_what_diffusers_pipeline_does():
    theirs, generator = small_flow_base("krea2").load("denoiser", CPU, torch.float32), torch.Generator().manual_seed(2)
    rough_weights(theirs)
    base = load_base(original_weights(theirs))
    assert base.family is FAMILY
    layers, width = SMALL_FLOWS["krea2"].denoiser["num_text_layers"], SMALL_FLOWS["krea2"].denoiser["text_hidden_dim"]
    latents = torch.randn(2, 16, 8, 12, generator=generator)
    states = torch.randn(2, 9, layers, width, generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    times = torch.tensor([0.2, 0.9])
    pipe = pipeline_with(diffusers.Krea2Pipeline, transformer=theirs)
    expected = theirs(
        pipe._pack_latents(latents, 2, 16, 8, 12), states, times, pipe.prepare_position_ids(9, 4, 6, CPU), mask
    ).sample
    expected = pipe._unpack_latents(expected, 64, 96).squeeze(2)
    conditioning = {"context": states.flatten(2), "context_mask": mask.float()}
    ours = base.family.predict(base.load("denoiser", CPU, torch.float32), latents, 1000 * times, conditioning)
    assert error_of(ours, expected) < 1e-4


def test_the_norms_weights_stay_in_float32():
    denoiser = small_flow_base("krea2").load("denoiser", CPU, torch.bfloat16)
    kinds = {name.endswith(("norm1.weight", "norm_q.weight")): p.dtype for name, p in denoiser.named_parameters()
             if name.endswith(("norm1.weight", "norm_q.weight", "to_q.weight"))}  # fmt: skip
    assert kinds == {True: torch.float32, False: torch.bfloat16}


class Words:
    """A tokenizer with a number for each word, each sign and each special token."""

    def __call__(self, texts: Any, max_length: int | None = None, **options: Any) -> Any:
        if isinstance(texts, str):
            return SimpleNamespace(input_ids=numbers_of(texts))
        rows = [self(each).input_ids[:max_length] for each in texts]
        length = max_length or max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        given = SimpleNamespace(input_ids=ids, attention_mask=mask)
        given.to = lambda _: given
        return given


def test_captions_have_the_states_of_diffusers_pipeline_even_where_they_are_cut(tmp_path, monkeypatch):
    words = Words()
    monkeypatch.setattr(text, "load_tokenizer", lambda *_: words)
    network = small_qwen3vl(transformers.Qwen3VLModel, WIDTH, LAYERS)
    base = load_base(write_folder(tmp_path, small_flow_base("krea2"), network))
    captions = ["", "a photo of sks person", "long " * 300]
    with torch.no_grad():
        ours = FAMILY.encode_text(base.load_text_encoders(CPU, torch.float32), captions, 1, 1)
        pipe = pipeline_with(diffusers.Krea2Pipeline, text_encoder=network, tokenizer=words)
        states, mask = pipe.get_text_hidden_states(captions, device=CPU)
    lengths = ours["context_mask"].sum(1).int().tolist()
    assert lengths == mask.sum(1).tolist() and lengths[-1] == 512
    for length, mine, theirs, real in zip(lengths, ours["context"], states, mask, strict=True):
        assert error_of(mine[:length], theirs[real].flatten(1)) < 1e-4
