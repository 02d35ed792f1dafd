"""Text encoders in GGUF: llama.cpp's names are those of the package gguf, and the encoders those of the same weights."""

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor, nn

from core.errors import UnknownFamily
from core.models import load_base, text
from core.models.quantised_layers import QuantisedLinear
from core.models.spec import materialise
from core.models.text_gguf import NAMES
from core.storage.gguf_file import open_gguf
from tests.tooling import RandomTensors, write_gguf

CPU = torch.device("cpu")
Q = gguf.GGMLQuantizationType
ARCHITECTURES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 64, "d_ff": 64, "num_layers": 2, "num_heads": 2,
      "feed_forward_proj": "gated-gelu"}  # fmt: skip
DECODER = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
           "num_key_value_heads": 1}  # fmt: skip
MISTRAL = {**DECODER, "model_type": "mistral", "vocab_size": 131072}
ENCODERS = {
    "t5": ("t5xxl", T5), "t5encoder": ("t5xxl", T5), "qwen2vl": ("qwen25_7b", DECODER), "qwen3": ("qwen3_4b", DECODER),
    "qwen3vl": ("qwen3vl_4b", DECODER), "llama": ("mistral3_24b", MISTRAL), "mistral3": ("mistral3_24b", MISTRAL),
}  # fmt: skip


def llama_cpps(architecture: str) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(ARCHITECTURES[architecture], 2)


@pytest.mark.parametrize("architecture", NAMES)
def test_the_names_are_those_of_llama_cpp_and_no_tensor_is_left_out(architecture):
    names, known = NAMES[architecture], llama_cpps(architecture)
    tensors = gguf.MODEL_TENSORS[ARCHITECTURES[architecture]]
    its_own = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "{}") for tensor in tensors}
    for theirs, ours in names.items():
        if theirs in its_own:
            assert known.get_name(ours.replace("{}", "1")) == theirs.replace("{}", "1")
    # What writes words, and experts and rotations in numbers of their own, which no text encoder here has.
    others = r"dec\.|output$|rope_freqs$|blk\.\{\}\.(attn_rot_embd|ffn_gate_inp|ffn_\w+_exps)$"
    assert not [name for name in its_own - set(names) if not re.match(others, name)]
    assert set(names) - its_own <= {"blk.{}.attn_q_norm", "blk.{}.attn_k_norm"}


def network_of(kind: str, config: dict[str, Any], tensors: Any, **how: Any) -> Any:
    with torch.device("meta"):
        network = text.build(kind, config)
    return materialise(network, tensors, kind, CPU, torch.float32, **how)


def written(path: Path, architecture: str) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Writes an encoder of the architecture as llama.cpp's converter does. Its kind, its config, and what gguf dequantises."""
    kind, config = ENCODERS[architecture]
    with torch.device("meta"):
        state = text.build(kind, config).state_dict()
    state.pop("encoder.embed_tokens.weight", None)
    draw = RandomTensors({name: tuple(tensor.shape) for name, tensor in state.items()}, torch.float32, seed=3)
    names, file, expected = llama_cpps(architecture), {}, {}
    for name in state:
        weight = draw(name)
        q4 = name.endswith(("q.weight", "q_proj.weight", "wo.weight"))
        form = Q.F32 if weight.ndim == 1 or "relative" in name else Q.Q4_0 if q4 else Q.Q8_0
        expected[name] = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), form), form))
        if architecture in ("llama", "mistral3") and re.search(r"[qk]_proj", name):
            # The halves of a head become pairs.
            weight = weight.unflatten(0, (-1, 2, 64)).transpose(1, 2).flatten(0, 2)
        theirs = names.get_name(name if kind == "t5xxl" else f"model.{name}", (".weight", ".bias"))
        assert theirs
        file[theirs] = (weight, form)
    extra = {"output.weight": (torch.ones(4, 32), Q.F32), "rope_freqs.weight": (torch.ones(64), Q.F32)}
    if kind == "t5xxl":
        extra["dec.blk.0.attn_q.weight"] = (torch.ones(4, 32), Q.F32)
    if kind.startswith("mistral"):
        extra["output_norm.weight"] = (torch.ones(32), Q.F32)
    write_gguf(path, file | extra, architecture)
    return kind, config, expected


@pytest.mark.parametrize("architecture", ENCODERS)
def test_an_encoder_in_gguf_is_that_of_its_dequantised_weights(architecture, tmp_path):
    kind, config, weights = written(tmp_path / "encoder.gguf", architecture)
    ((found, stored),) = text.encoders_of(open_gguf(tmp_path / "encoder.gguf")).items()
    component = text._component(found, stored)
    assert found == kind and component.config.items() >= config.items() - {("feed_forward_proj", "gated-gelu")}
    if "shared.weight" in weights:
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    # In bf16, as all that is quantised.
    plain = re.compile(r"norm\.weight|bias|relative")
    weights = {name: weight if plain.search(name) else weight.bfloat16() for name, weight in weights.items()}
    expected = network_of(kind, config, weights)
    tokens = torch.tensor([[5, 17, 3, 60, 2]])
    with torch.no_grad():
        states = expected(tokens).last_hidden_state
        for how in ({}, {"as_stored": True}):
            ours = network_of(kind, component.config, component.tensors, **how)
            assert any(isinstance(layer, QuantisedLinear) for layer in ours.modules()) == bool(how)
            for name, layer in expected.named_modules():
                if isinstance(layer, nn.Linear | nn.Embedding):
                    assert torch.equal(ours.get_submodule(name).weight, layer.weight), name
            assert torch.equal(ours(tokens).last_hidden_state, states)


def test_an_encoder_of_another_architecture_is_refused_with_those_that_are_known(tmp_path):
    path = write_gguf(tmp_path / "gemma.gguf", {"token_embd.weight": (torch.ones(8, 32), Q.Q8_0)}, "gemma3")
    with pytest.raises(
        UnknownFamily, match=r"gemma\.gguf: .* unknown architecture 'gemma3'\. Supported: t5, .*qwen3vl"
    ):
        load_base({"x": torch.ones(1)}, text_encoders=[path])
    llama = {"token_embd.weight": (torch.ones(8, 32), Q.Q8_0), "blk.0.attn_q.weight": (torch.ones(96, 32), Q.Q8_0)}
    path = write_gguf(tmp_path / "odd.gguf", llama, "llama")
    with pytest.raises(UnknownFamily, match=r"odd\.gguf: blk\.0\.attn_q\.weight has 96 rows, .* a multiple of .* 128"):
        load_base({"x": torch.ones(1)}, text_encoders=[path])
