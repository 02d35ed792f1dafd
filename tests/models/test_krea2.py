"""Krea 2 against diffusers' pipeline: the same weights under the original names, the same captions."""

import json
import re
import zlib
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers

from core.config import TrainConfig
from core.errors import BadConfig
from core.models import load_base, text
from core.models.families import FAMILIES
from core.training.job import check_base_options
from tests.tooling import SMALL_FLOWS, small_flow_base

CPU = torch.device("cpu")
FAMILY = FAMILIES["krea2"]
LAYERS, WIDTH = 36, 64


def pipeline(**parts: Any) -> Any:
    """diffusers' pipeline with some of its parts."""
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    return diffusers.Krea2Pipeline(**dict.fromkeys(names, None) | parts)  # pyright: ignore


def original_weights(denoiser: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the names of the published file, as diffusers' own converter reads them."""
    state = denoiser.state_dict()
    words = {
        "transformer_blocks.": "blocks.", "text_fusion.": "txtfusion.", "img_in.": "first.", "time_mod_proj.": "tproj.1.",
        "time_embed.linear_1.": "tmlp.0.", "time_embed.linear_2.": "tmlp.2.", "txt_in.norm.weight": "txtmlp.0.scale",
        "txt_in.linear_1.": "txtmlp.1.", "txt_in.linear_2.": "txtmlp.3.", "final_layer.norm.weight": "last.norm.scale",
        "final_layer.linear.": "last.linear.", "final_layer.scale_shift_table": "last.modulation.lin",
        ".attn.to_q.": ".attn.wq.", ".attn.to_k.": ".attn.wk.", ".attn.to_v.": ".attn.wv.", ".attn.to_out.0.": ".attn.wo.",
        ".attn.to_gate.": ".attn.gate.", ".attn.norm_q.weight": ".attn.qknorm.qnorm.scale",
        ".attn.norm_k.weight": ".attn.qknorm.knorm.scale", ".ff.": ".mlp.", ".norm1.weight": ".prenorm.scale",
        ".norm2.weight": ".postnorm.scale", ".scale_shift_table": ".mod.lin",
    }  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        new = name
        for theirs, original in words.items():
            new = new.replace(theirs, original)
        renamed[new] = tensor.flatten() if new.endswith(".mod.lin") else tensor
    converted = convert_krea2_transformer_checkpoint_to_diffusers(dict(renamed))
    assert {name: tensor.shape for name, tensor in converted.items()} == {n: t.shape for n, t in state.items()}
    return renamed


def test_a_weight_without_its_first_side_of_1_is_read_as_some_gguf_files_have_it():
    whole = original_weights(small_flow_base("krea2").load("denoiser", CPU, torch.float32))
    name = "txtfusion.projector.weight"
    base = load_base({**whole, name: whole[name][0]})
    assert torch.equal(base.load("denoiser", CPU, torch.float32).text_fusion.projector.weight, whole[name])  # pyright: ignore


@torch.no_grad()
def test_a_published_file_predicts_what_diffusers_pipeline_predicts_with_texts_filled_up():
    theirs: Any = small_flow_base("krea2").load("denoiser", CPU, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    base = load_base(original_weights(theirs))
    assert base.family is FAMILY
    layers, width = SMALL_FLOWS["krea2"].denoiser["num_text_layers"], SMALL_FLOWS["krea2"].denoiser["text_hidden_dim"]
    latents = torch.randn(2, 16, 8, 12, generator=generator)
    states = torch.randn(2, 9, layers, width, generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    times = torch.tensor([0.2, 0.9])
    pipe = pipeline(transformer=theirs)
    expected = theirs(
        pipe._pack_latents(latents, 2, 16, 8, 12), states, times, pipe.prepare_position_ids(9, 4, 6, CPU), mask
    ).sample
    expected = pipe._unpack_latents(expected, 64, 96).squeeze(2)
    conditioning = {"context": states.flatten(2), "context_mask": mask.float()}
    ours = base.family.predict(base.load("denoiser", CPU, torch.float32), latents, 1000 * times, conditioning)
    assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_the_norms_weights_stay_in_float32():
    denoiser = small_flow_base("krea2").load("denoiser", CPU, torch.bfloat16)
    kinds = {name.endswith(("norm1.weight", "norm_q.weight")): p.dtype for name, p in denoiser.named_parameters()
             if name.endswith(("norm1.weight", "norm_q.weight", "to_q.weight"))}  # fmt: skip
    assert kinds == {True: torch.float32, False: torch.bfloat16}


class Words:
    """A tokenizer with a number for each word, each sign and each special token."""

    def __call__(self, texts: Any, max_length: int | None = None, **options: Any) -> Any:
        if isinstance(texts, str):
            words = re.findall(r"<\|\w+\|>|\w+|\W", texts)
            return SimpleNamespace(input_ids=[1 + zlib.crc32(word.encode()) % 63 for word in words])
        rows = [self(each).input_ids[:max_length] for each in texts]
        length = max_length or max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        given = SimpleNamespace(input_ids=ids, attention_mask=mask)
        given.to = lambda _: given
        return given


def vision_model() -> Any:
    """The network that a diffusers folder has as its text encoder, narrow."""
    sizes = {"vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": LAYERS,
             "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 128, "rms_norm_eps": 1e-6,
             "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": WIDTH,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen3VLModel(transformers.Qwen3VLConfig(text_config=sizes, vision_config=vision)).eval()


@pytest.fixture
def turbo_folder(tmp_path):
    """A diffusers folder, which says that it was distilled."""
    base = small_flow_base("krea2")
    for part, folder in (("denoiser", "transformer"), ("vae", "vae")):
        base.load(part, CPU, torch.float32).save_pretrained(tmp_path / folder)  # pyright: ignore
    vision_model().save_pretrained(tmp_path / "text_encoder")
    index = {"_class_name": FAMILY.pipeline_class, "is_distilled": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def test_captions_have_the_states_of_diffusers_pipeline_even_where_they_are_cut(turbo_folder, monkeypatch):
    words = Words()
    monkeypatch.setattr(text, "load_tokenizer", lambda *_: words)
    base = load_base(turbo_folder)
    captions = ["", "a photo of sks person", "long " * 300]
    with torch.no_grad():
        ours = FAMILY.encode_text(base.load_text_encoders(CPU, torch.float32), captions, 1, 1)
        states, mask = pipeline(text_encoder=vision_model(), tokenizer=words).get_text_hidden_states(
            captions, device=CPU
        )
    lengths = ours["context_mask"].sum(1).int().tolist()
    assert lengths == mask.sum(1).tolist() and lengths[-1] == 512
    for length, mine, theirs, real in zip(lengths, ours["context"], states, mask, strict=True):
        expected = theirs[real].flatten(1)
        assert (mine[:length] - expected).norm() < 1e-4 * expected.norm()


def test_turbo_is_refused_for_training_unless_told_otherwise(turbo_folder):
    base = load_base(turbo_folder)
    with pytest.raises(BadConfig, match=r"distilled to a few steps, .* set allow_distilled"):
        check_base_options(base, TrainConfig())
    check_base_options(base, TrainConfig(allow_distilled=True))
