"""Convert text encoders in GGUF, with llama.cpp's tensor names, to the naming of transformers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import UnknownFamily
from ..storage.gguf_file import GgufTensors
from ..storage.stored import LazyTensors, QuantisedTensor, Stored, shape_of

_T5 = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "enc.blk.{}.attn_norm": "encoder.block.{}.layer.0.layer_norm",
    "enc.blk.{}.attn_q": "encoder.block.{}.layer.0.SelfAttention.q",
    "enc.blk.{}.attn_k": "encoder.block.{}.layer.0.SelfAttention.k",
    "enc.blk.{}.attn_v": "encoder.block.{}.layer.0.SelfAttention.v",
    "enc.blk.{}.attn_o": "encoder.block.{}.layer.0.SelfAttention.o",
    "enc.blk.{}.attn_rel_b": "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
    "enc.blk.{}.ffn_norm": "encoder.block.{}.layer.1.layer_norm",
    "enc.blk.{}.ffn_gate": "encoder.block.{}.layer.1.DenseReluDense.wi_0",
    "enc.blk.{}.ffn_up": "encoder.block.{}.layer.1.DenseReluDense.wi_1",
    "enc.blk.{}.ffn_down": "encoder.block.{}.layer.1.DenseReluDense.wo",
}
_DECODER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
"""Module names without layer numbers, llama.cpp's and transformers'."""
NAMES: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(("t5", "t5encoder"), _T5),
    **dict.fromkeys(("qwen2vl", "qwen3", "qwen3vl", "llama", "mistral3"), _DECODER),
}
"""The module names of each supported architecture, by its name in GGUF."""
_HEAD_WIDTH = 128


def in_transformers_names(tensors: GgufTensors) -> LazyTensors:
    """Return a text encoder's tensors under transformers' names, on demand. Names that aren't llama.cpp's are kept.

    Raises UnknownFamily for an unknown architecture.
    """
    if "token_embd.weight" not in tensors:
        return tensors
    names = NAMES.get(tensors.architecture)
    if names is None:
        raise UnknownFamily(
            f"a text encoder in GGUF of the unknown architecture {tensors.architecture[:40]!r}. "
            f"Supported: {', '.join(NAMES)}"
        )
    left_out = ("dec.", "output.", "rope_freqs.")  # the parts that write words, and numbers that are computed here
    renamed = {_renamed(name, names): Stored(tensors, name) for name in tensors if not name.startswith(left_out)}
    # In these, the two numbers that rotary embeddings rotate together are next to each other in queries and keys.
    if tensors.architecture in ("llama", "mistral3"):
        for own in [name for name in renamed if re.search(r"self_attn\.[qk]_proj\.weight$", name)]:
            name = renamed[own].name
            if shape_of(tensors, name)[0] % _HEAD_WIDTH:
                raise UnknownFamily(
                    f"{name} has {shape_of(tensors, name)[0]} rows, which is not a multiple of the head width {_HEAD_WIDTH}"
                )
            renamed[own] = _InHalves(tensors, name)
    return LazyTensors(renamed)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    path, _, kind = name.rpartition(".")
    layer = re.search(r"\.(\d+)\.", path)
    if layer is None:
        return f"{names.get(path, path)}.{kind}"
    before, after = path[: layer.start()], path[layer.end() :]
    return f"{names.get(f'{before}.{{}}.{after}', path).replace('{}', layer[1])}.{kind}"


@dataclass(frozen=True, eq=False)
class _InHalves(Stored):
    """The weight of queries or keys, with a head's rows in transformers' order: all first numbers, then all second ones."""

    def __call__(self) -> Tensor:
        return _in_halves(super().__call__())

    def quantised(self, read: bool = True) -> QuantisedTensor | None:
        quantised = super().quantised(read)
        return quantised and quantised.cut(_in_halves)


def _in_halves(rows: Tensor) -> Tensor:
    return rows.unflatten(0, (-1, _HEAD_WIDTH // 2, 2)).transpose(1, 2).flatten(0, 2)
