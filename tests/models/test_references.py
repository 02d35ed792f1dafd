"""Families against diffusers: the same weights under published names, the same captions, the same LoRA."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from core.lora.file import LoraFile
from core.models import load_base, text
from core.models.families import FAMILIES
from tests.models.family_parts import (
    CPU,
    assert_diffusers_loads_whole,
    error_of,
    in_original_names,
    random_texts,
    write_folder,
)
from tests.models.references import REFERENCES
from tests.tooling import small_flow_base, whole_checkpoint

pytestmark = pytest.mark.ci
encoder_of = cache(lambda family: REFERENCES[family].encoder())
"""The small text encoder of a family."""


def rows(values: Mapping[str, Tensor], kept: slice, length: int) -> dict[str, Tensor]:
    """Some texts of a batch without their padding."""
    return {name: value[kept, :length] for name, value in values.items()}


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", REFERENCES)
def test_a_published_file_predicts_what_diffusers_predicts_with_texts_of_any_length(family, prefix):
    one, spec = REFERENCES[family], FAMILIES[family]
    theirs = one.denoiser(family)
    base = load_base({prefix + name: tensor for name, tensor in one.original(family, theirs).items()})
    assert base.family is spec and base.components["denoiser"].config.items() <= theirs.config.items()
    ours, generator = base.load("denoiser", CPU, torch.float32), torch.Generator().manual_seed(2)
    state = theirs.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    channels, width = base.latent_shape.channels, text.context_width(base.components["denoiser"].config)
    latents, times = torch.randn(3, channels, 4, 6, generator=generator), torch.tensor([0.2, 0.9, 0.5])
    texts = random_texts(one.lengths, width, generator)
    together = spec.predict(ours, latents, 1000 * times, texts)
    for row, length in enumerate(one.lengths):
        each, alone = slice(row, row + 1), rows(texts, slice(row, row + 1), length)
        with torch.set_grad_enabled(row == 0):
            expected = one.predict(theirs, latents[each], times[each], alone["context"])
            prediction = spec.predict(ours.requires_grad_(row == 0), latents[each], 1000 * times[each], alone)
            if row == 0:
                prediction.square().sum().backward()
                expected.square().sum().backward()
        assert max(error_of(made.detach(), expected.detach()) for made in (together[each], prediction)) < 1e-5
    same = rows(texts, slice(None, None, 2), one.lengths[0])
    assert error_of(spec.predict(ours, latents[::2], 1000 * times[::2], same), together[::2]) < 1e-5
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        wanted = gradients[name]
        assert parameter.grad is None if wanted is None else (parameter.grad - wanted).norm() <= 1e-4 * wanted.norm(), (
            name
        )


@pytest.mark.parametrize("family", REFERENCES)
def test_the_published_sizes_are_read_from_the_file(family):
    one = REFERENCES[family]
    with torch.device("meta"):
        theirs: Any = getattr(diffusers, one.network)(**one.published)
    base = load_base(
        {f"model.diffusion_model.{name}": t for name, t in in_original_names(theirs.state_dict(), family).items()}
    )
    read = base.components["denoiser"].config
    assert json.dumps(read) == json.dumps({name: theirs.config[name] for name in read})


@torch.no_grad()
@pytest.mark.parametrize("source", ["folder", "file"])
@pytest.mark.parametrize("family", REFERENCES)
def test_captions_have_the_states_of_diffusers_pipeline(family, source, tmp_path, monkeypatch):
    one, network = REFERENCES[family], encoder_of(family)
    monkeypatch.setattr(text, "load_tokenizer", lambda *_: one.words)
    monkeypatch.setattr(text, "_PAD_QWEN", 63)
    for name, number in one.constants.items():
        monkeypatch.setattr(
            f"core.models.families.{FAMILIES[family].encode_text.__module__.rpartition('.')[2]}.{name}", number
        )
    denoiser = one.denoiser(family, **one.takes)
    if source == "folder":
        write_folder(tmp_path, small_flow_base(family, **one.takes), network, denoiser)
        (tmp_path / "model_index.json").rename(tmp_path / one.index)
        base = load_base(tmp_path)
    else:
        tensors = one.language_model(network).state_dict()
        base = load_base(whole_checkpoint(one.original(family, denoiser), one.kind, tensors))
    assert base.family is FAMILIES[family]
    ours = base.family.encode_text(base.load_text_encoders(CPU, torch.float32), one.captions, 1, 1)
    expected = one.states(network, one.words, one.captions)
    masks = ours.get("context_mask", torch.ones(ours["context"].shape[:2]))
    for states, mask, wanted in zip(ours["context"], masks, expected, strict=True):
        assert mask.tolist() == [1] * len(wanted) + [0] * (len(mask) - len(wanted))
        assert error_of(states[: len(wanted)], wanted) < 1e-5 and not states[len(wanted) :].any()


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name, one in REFERENCES.items() if one.lora])
def test_a_lora_loads_whole_in_diffusers_and_is_read_back(family, tmp_path):
    theirs, path = REFERENCES[family].denoiser(family), tmp_path / "a.safetensors"
    loader, scheme, modules = REFERENCES[family].lora  # pyright: ignore
    assert_diffusers_loads_whole(small_flow_base(family), theirs, loader(theirs), path, scheme, modules)
    prefix = "diffusion_model." if scheme == "comfy" else "transformer."
    assert all(key.startswith(prefix) for key in LoraFile.read(path).tensors)


def test_a_file_of_a_text_encoder_is_known_by_its_width_or_by_its_half_that_sees_pictures():
    def kinds(width: int, tensors: Mapping[str, Tensor]) -> list[str]:
        table = torch.zeros(1).expand(131072, width)
        return [*text.encoders_of({"model.embed_tokens.weight": table, **tensors})]

    layer = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(1)}
    assert [*kinds(3072, layer), *kinds(5120, layer)] == ["ministral3_3b", "mistral3_24b"]
    tensors = {f"model.{name}": tensor for name, tensor in encoder_of("flux3").model.state_dict().items()}
    wide = tensors | {"model.language_model.norm.weight": torch.ones(4096)}
    assert [*text.encoders_of(wide), *text.encoders_of(tensors)] == ["qwen3vl_8b", "qwen3vl_4b"]


def test_krea2s_norms_stay_in_float32():
    denoiser = small_flow_base("krea2").load("denoiser", CPU, torch.bfloat16)
    kinds = {name.endswith(("norm1.weight", "norm_q.weight")): p.dtype for name, p in denoiser.named_parameters()
             if name.endswith(("norm1.weight", "norm_q.weight", "to_q.weight"))}  # fmt: skip
    assert kinds == {True: torch.float32, False: torch.bfloat16}
