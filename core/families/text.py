"""Text encoders of the diffusion transformers, from files in the naming of transformers, which all of them have.

Their tokenizers are too large to travel with the package (CLIP's does): a folder that has one must be given.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadFile, UnknownFamily, UnmatchedKeys
from . import clip
from .ldm import count_children
from .spec import Component, Conditioning, LazyTensors, stack_conditioning

PREFIX = "text_encoders.{}.transformer."
"""Of the tensors of a text encoder in a checkpoint, by kind: ComfyUI's."""
KINDS = {
    "clip_l": "CLIP ViT-L/14",
    "clip_g": "OpenCLIP ViT-bigG/14",
    "t5xxl": "T5 v1.1 XXL",
    "qwen3_4b": "Qwen3-4B",
    "qwen3_8b": "Qwen3-8B",
    "qwen25_7b": "Qwen2.5-VL-7B",
}
"""Kind, as ComfyUI calls it -> name that a person knows."""
_HEAD_WIDTH_T5, _HEAD_WIDTH_QWEN = 64, 128
_QWEN_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_key_value_heads")  # fmt: skip
_PAD_QWEN = 151643
_VOCABULARIES = {
    "t5": (32128, {"<pad>": 0, "</s>": 1}),
    "qwen": (151936, {"<|endoftext|>": _PAD_QWEN, "<|im_start|>": 151644}),
}
"""Rows of the models' tables of tokens, and numbers of tokens by which their tokenizers are known."""


def kind_of(tensors: Mapping[str, Tensor]) -> str:
    """The kind of a text encoder in a file of its own. UnknownFamily names those that are known."""
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in tensors:
        return "t5xxl"
    for name in ("text_model.final_layer_norm.weight", "final_layer_norm.weight"):
        if name in tensors:
            return "clip_g" if tensors[name].shape[0] == 1280 else "clip_l"
    qwen = {_qwen_name(name): name for name in tensors}
    if "layers.0.self_attn.q_norm.weight" in qwen:
        return "qwen3_8b" if tensors[qwen["norm.weight"]].shape[0] == 4096 else "qwen3_4b"
    if "layers.0.self_attn.q_proj.bias" in qwen:
        return "qwen25_7b"
    raise UnknownFamily(
        f"no text encoder that is known, e.g. {next(iter(tensors), 'no tensor')!r}; known: {', '.join(KINDS.values())}"
    )


def has(tensors: Mapping[str, Tensor], kind: str) -> bool:
    """Whether a checkpoint holds a text encoder of that kind."""
    prefix = PREFIX.format(kind)
    return any(name.startswith(prefix) for name in tensors)


def component(tensors: Mapping[str, Tensor], kind: str) -> Component:
    """A text encoder of a checkpoint, its config read off the shapes of its tensors."""
    prefix = PREFIX.format(kind)
    if kind == "clip_l":
        return clip.text_component(tensors, prefix, activation="quick_gelu")
    if kind == "clip_g":
        return clip.text_component(tensors, prefix, activation="gelu", projection=True)
    names = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    readers = library_tensors({short: partial(tensors.__getitem__, full) for short, full in names.items()})
    return Component((_t5_config if kind == "t5xxl" else _qwen_config)(readers), LazyTensors(readers))


def library_tensors(readers: Mapping[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """The tensors of a text encoder under the names of its network here, whichever version of transformers wrote them."""
    named = {
        f"text_model.{name}" if re.match(r"encoder\.layers\.|embeddings\.|final_layer_norm\.", name) else name: read
        for name, read in readers.items()
    }
    # Neither what a language model writes words with nor what it sees pictures with.
    named = {_qwen_name(name): read for name, read in named.items() if not re.search(r"\b(lm_head|visual)\.", name)}
    # T5's embedding has two names, of which files have one.
    tied = ("shared.weight", "encoder.embed_tokens.weight")
    embedding = next((named[name] for name in tied if name in named), None)
    return named if embedding is None else named | dict.fromkeys(tied, embedding)


def _qwen_name(name: str) -> str:
    """The name in the language model alone: files are of the model that also writes or sees."""
    return re.sub(r"^(model\.)?(language_model\.)?(model\.)?", "", name)


def _shape(readers: Mapping[str, Callable[[], Tensor]], name: str) -> tuple[int, ...]:
    if name not in readers:
        raise UnmatchedKeys(f"the text encoder lacks {name}")
    return tuple(readers[name]().shape)


def _t5_config(readers: Mapping[str, Callable[[], Tensor]]) -> dict[str, Any]:
    shape = partial(_shape, readers)
    first = "encoder.block.0.layer"
    vocabulary, width = shape("shared.weight")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": _HEAD_WIDTH_T5,
        "d_ff": shape(f"{first}.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": count_children(readers, "encoder.block"),
        "num_heads": shape(f"{first}.0.SelfAttention.q.weight")[0] // _HEAD_WIDTH_T5,
        "relative_attention_num_buckets": shape(f"{first}.0.SelfAttention.relative_attention_bias.weight")[0],
        "feed_forward_proj": "gated-gelu",
    }


def _qwen_config(readers: Mapping[str, Callable[[], Tensor]]) -> dict[str, Any]:
    def rows(name: str) -> int:
        return _shape(readers, f"layers.0.{name}.weight")[0]

    vocabulary, width = _shape(readers, "embed_tokens.weight")
    heads, shared_heads = (rows(f"self_attn.{part}_proj") // _HEAD_WIDTH_QWEN for part in "qk")
    sizes = (vocabulary, width, rows("mlp.gate_proj"), count_children(readers, "layers"), heads, shared_heads)
    return dict(zip(_QWEN_SIZES, sizes, strict=True))


def build(kind: str, config: dict[str, Any]) -> nn.Module:
    """The text encoder without weights. It knows where its tokenizer is: `config["tokenizer"]`."""
    if kind.startswith("clip"):
        with_projection = kind == "clip_g" or "CLIPTextModelWithProjection" in config.get("architectures", ())
        return clip.build_text_encoder(config, with_projection)
    if kind.startswith("qwen"):
        return _build_qwen(kind, config)
    from transformers import T5Config, T5EncoderModel

    keep = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets",
            "feed_forward_proj")  # fmt: skip
    encoder = T5EncoderModel(T5Config(**{name: config[name] for name in keep if name in config}))
    encoder.tokenizer_folder = config.get("tokenizer")  # pyright: ignore
    return encoder


def _build_qwen(kind: str, config: dict[str, Any]) -> nn.Module:
    from transformers import Qwen2Model, Qwen3Model

    # For text alone, Qwen2.5-VL is Qwen2: its three kinds of positions are one.
    network: Any = Qwen3Model if kind.startswith("qwen3") else Qwen2Model
    given = config.get("text_config", config)
    # The angle and epsilon are the same in all of them, but written in two ways in folders of transformers 4 and 5.
    settings = {name: given[name] for name in _QWEN_SIZES} | {"rope_theta": 1e6, "rms_norm_eps": 1e-6}
    encoder = network(network.config_class(**settings, head_dim=_HEAD_WIDTH_QWEN))
    with torch.device("cpu"):
        # Its frequencies are in no file, so they must not stay on the meta device.
        encoder.rotary_emb = type(encoder.rotary_emb)(encoder.config)
    encoder.tokenizer_folder = config.get("tokenizer")  # pyright: ignore
    return encoder


@lru_cache(maxsize=4)
def load_tokenizer(folder: str | None, kind: str) -> Any:
    """transformers' tokenizer of that folder. BadFile when there is none, or another model's."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if folder is None:
        raise BadFile(
            f"captions need the tokenizer of {KINDS[kind]}, which does not travel with this program: give its folder "
            "(`tokenizer`), from a diffusers folder or from ComfyUI's comfy/text_encoders"
        )
    file = Path(folder) / "tokenizer.json"
    try:
        if file.exists():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises many kinds, for files that are missing or damaged
        raise BadFile(f"{folder}: no tokenizer of {KINDS[kind]} in it: {str(error).splitlines()[0]}") from None
    rows, special = _VOCABULARIES["t5" if kind == "t5xxl" else "qwen"]
    numbers = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
    if numbers != special or len(tokenizer) > rows:
        raise BadFile(
            f"{folder}: this is the tokenizer of another model than {KINDS[kind]}: in its {len(tokenizer)} tokens "
            f"{_listed(numbers)}, expected at most {rows} in which {_listed(special)}"
        )
    return tokenizer


def _listed(numbers: Mapping[str, Any]) -> str:
    return ", ".join(f"{token} is {number}" for token, number in numbers.items())


def encode_t5(encoder: nn.Module, captions: Sequence[str], length: int) -> Tensor:
    """T5's states (B, length, D). Padding is seen like text, as the models were trained."""
    tokenizer = load_tokenizer(encoder.tokenizer_folder, "t5xxl")  # pyright: ignore
    rows = [tokenizer(caption, add_special_tokens=True).input_ids[:length] for caption in captions]
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return encoder(tokens.to(next(encoder.parameters()).device)).last_hidden_state


def encode_qwen(
    encoder: nn.Module, kind: str, texts: Sequence[str], limit: int, *, layers: Sequence[int] = (), filled: bool = False
) -> Conditioning:
    """`context` (B, L, D), a Qwen model's states, and `context_mask` (B, L), 1 where there is text.

    States are normed, after the last layer, or those after each of `layers` (1 is the first; -2 the last but one), side by
    side. Texts have `limit` tokens at most, and as many when `filled`: then padding, which text does not see, has states too.
    """
    tokenizer = load_tokenizer(encoder.tokenizer_folder, kind)  # pyright: ignore
    device = next(encoder.parameters()).device
    parts = []
    for text in texts:
        row = tokenizer(text, add_special_tokens=False).input_ids[:limit]
        padding = limit - len(row) if filled else 0
        tokens = torch.tensor([row + [_PAD_QWEN] * padding], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * padding], device=device)
        output = encoder(tokens, attention_mask=mask, output_hidden_states=bool(layers), use_cache=False)
        states = (
            torch.cat([output.hidden_states[layer] for layer in layers], -1) if layers else output.last_hidden_state
        )
        parts.append({"context": states, "context_mask": mask})
    return stack_conditioning(parts)


def pooled_clip(encoder: nn.Module, captions: Sequence[str]) -> Tensor:
    """CLIP's pooled state of the first 75 tokens of each caption, (B, D)."""
    tokens = clip.token_chunks(captions, 1, padding=clip.END)
    _, output = clip.encode_chunks(encoder, tokens, layer=1, final_norm=True)
    return output.pooler_output
