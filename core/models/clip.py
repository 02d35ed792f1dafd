"""CLIP's tokenizer and text encoders, in the naming of OpenAI (SD1.x, and the first of SDXL) or of OpenCLIP.

The vocabulary and the merges in `clip_tokenizer/` are those that OpenAI published with CLIP (MIT licence, see NOTICE).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import BadConfig, LoraMisfit
from ..storage.stored import LazyTensors, Stored
from .ldm import count_children, shapes_in
from .spec import Component

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TOKENIZER_FOLDER = Path(__file__).parent / "clip_tokenizer"
START, END = 49406, 49407
CHUNK_TOKENS = 75
"""The tokens of a caption that fit into one pass of the encoder, not counting a start and an end token."""
HEAD_WIDTH = 64
"""The width of an attention head in every CLIP text encoder of Stable Diffusion."""

OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
"""transformers' names of a layer's modules, by their names in OpenCLIP, where q, k and v are one module."""
OPENCLIP_OUTSIDE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
"""The same for the tensors outside layers, except for the projection, which OpenCLIP transposes."""

TEXT_TARGETS = r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"


@lru_cache(maxsize=1)
def load_tokenizer() -> "CLIPTokenizer":
    """Load transformers' CLIPTokenizer with CLIP's 49,408 tokens."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TOKENIZER_FOLDER)


Words = Mapping[str, Sequence[int]]
"""The token numbers of each new word, as added by textual inversion."""


def caption_tokens(caption: str, words: Words | None = None) -> list[int]:
    """Return the tokens of a caption of any length, without start and end tokens.

    Each of `words`, alone or as `embedding:word`, is replaced by its own tokens.
    """
    if words:
        names = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))  # the longest first
        pieces = re.split(rf"(?<!\w)(?:embedding:)?({names})(?!\w)", caption, flags=re.IGNORECASE)
        by_name = {word.lower(): tokens for word, tokens in words.items()}
        # re.split puts the words at odd indices, and the text between them at even ones.
        tokens = [by_name[piece.lower()] if index % 2 else caption_tokens(piece) for index, piece in enumerate(pieces)]
        return [token for part in tokens for token in part]
    return load_tokenizer()(caption, add_special_tokens=False, truncation=False, verbose=False).input_ids


def chunk_count(captions: Sequence[str], words: Words | None = None) -> int:
    """Return the number of 75-token chunks that the longest caption needs, at least 1."""
    longest = max((len(caption_tokens(caption, words)) for caption in captions), default=0)
    return max(1, -(-longest // CHUNK_TOKENS))


def token_chunks(captions: Sequence[str], chunks: int, padding: int, words: Words | None = None) -> Tensor:
    """Return the token numbers (captions, chunks, 77), each chunk with a start and an end, filled up with `padding`.

    There are more than `chunks` chunks if the tokens of `words` need them.
    """
    if words:
        chunks = max(chunks, chunk_count(captions, words))
    result = torch.full((len(captions), chunks, CHUNK_TOKENS + 2), padding)
    for row, caption in enumerate(captions):
        tokens = caption_tokens(caption, words)
        for chunk in range(chunks):
            part = tokens[chunk * CHUNK_TOKENS : (chunk + 1) * CHUNK_TOKENS]
            result[row, chunk, : len(part) + 2] = torch.tensor([START, *part, END])
    return result


_TOKEN_EMBEDDING = "text_model.embeddings.token_embedding"


class WordEmbedding(nn.Module):
    """CLIP's table of token vectors, followed by the vectors of new words."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.table = table
        self.words: list[str] = []
        self.vectors: nn.ParameterList = nn.ParameterList()
        """The vectors of each word, (count, width)."""
        self.enabled = True

    def tokens(self) -> Words:
        """Return the token numbers of each word, which continue those of the table. Empty while not `enabled`."""
        found, first = {}, len(self.table.weight)
        for word, vectors in zip(self.words, self.vectors, strict=True) if self.enabled else ():
            found[word] = range(first, first + len(vectors))
            first += len(vectors)
        return found

    def forward(self, tokens: Tensor) -> Tensor:
        known = len(self.table.weight)
        looked_up = self.table(tokens.clamp(max=known - 1))
        if not self.words:
            return looked_up
        new = torch.cat(list(self.vectors)).to(looked_up.dtype)
        return torch.where((tokens >= known)[..., None], new[(tokens - known).clamp(min=0)], looked_up)


def token_table(encoder: nn.Module) -> nn.Module:
    """Return the module that embeds tokens in an encoder: an nn.Embedding, or the WordEmbedding that replaces it."""
    return encoder.get_submodule(_TOKEN_EMBEDDING)


def words_of(encoder: nn.Module) -> Words:
    """Return the new words of an encoder of any kind, with their tokens."""
    return next((module.tokens() for module in encoder.modules() if isinstance(module, WordEmbedding)), {})


def add_word(encoder: nn.Module, word: str, vectors: Tensor) -> nn.Parameter:
    """Add a word with vectors (count, width) to the encoder, and return the float32 parameter that holds them.

    Raises LoraMisfit when the encoder's vectors have a different width.
    """
    table = token_table(encoder)
    if not isinstance(table, WordEmbedding):
        assert isinstance(table, nn.Embedding)
        table = WordEmbedding(table)
        encoder.set_submodule(_TOKEN_EMBEDDING, table)
    width = table.table.embedding_dim
    if vectors.shape[1] != width:
        raise LoraMisfit(
            f"the vectors of {word!r} have {vectors.shape[1]} numbers each, but the text encoder's words have {width}"
        )
    parameter = nn.Parameter(vectors.detach().float().to(table.table.weight.device, copy=True), requires_grad=False)
    table.words.append(word)
    table.vectors.append(parameter)
    return parameter


def remove_words(encoder: nn.Module) -> None:
    """Remove all words that `add_word` added to the encoder."""
    table = token_table(encoder)
    if isinstance(table, WordEmbedding):
        encoder.set_submodule(_TOKEN_EMBEDDING, table.table)


def encode_chunks(encoder: nn.Module, tokens: Tensor, layer: int, final_norm: bool) -> tuple[Tensor, Any]:
    """Return the hidden states (B, chunks * 77, D) of a layer counted from the end (1 is the last), and the whole output.

    `final_norm` applies the final layer norm to them. Raises BadConfig when the encoder has fewer layers.
    """
    count, chunks, length = tokens.shape
    device = next(encoder.parameters()).device
    output = encoder(tokens.reshape(-1, length).to(device), output_hidden_states=True)
    if final_norm and layer == 1:
        # Versions of transformers differ in whether hidden_states[-1] is normed.
        states = output.last_hidden_state
    else:
        if layer >= len(output.hidden_states):
            raise BadConfig(f"clip_skip = {layer}: the text encoder has {len(output.hidden_states) - 1} layers")
        states = output.hidden_states[-layer]
        states = encoder.text_model.final_layer_norm(states) if final_norm else states  # pyright: ignore
    return states.reshape(count, chunks * length, -1), output


def pooled(output: Any) -> Tensor:
    """Return the pooled state (B, D) of each text in an encoder's output, projected if the encoder has a projection."""
    return output.text_embeds if "text_embeds" in output else output.pooler_output


def text_component(stored: Mapping[str, Stored], what: str, activation: str, projection: bool) -> Component:
    """Build a text encoder from tensors in OpenAI's naming (`text_model.…`) or OpenCLIP's (`transformer.resblocks.…`).

    Its config follows from their shapes. Raises UnmatchedKeys, with `what` in the message, when a tensor is missing or is not
    a matrix.
    """
    is_openclip = any(name.startswith("transformer.resblocks.") for name in stored)
    readers = _openclip_readers(stored) if is_openclip else library_readers(stored)
    if not projection:
        readers.pop("text_projection.weight", None)
    tensors = LazyTensors(readers)
    shape = shapes_in(tensors, f"the text encoder {what}")
    vocabulary, width = shape("text_model.embeddings.token_embedding.weight")
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape("text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": count_children(readers, "text_model.encoder.layers"),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": shape("text_model.embeddings.position_embedding.weight")[0],
        "hidden_act": activation,
        "projection_dim": shape("text_projection.weight")[0] if "text_projection.weight" in readers else width,
    }
    return Component(config, tensors)


def library_readers(readers: Mapping[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """Rename the tensors of a text encoder in OpenAI's naming to the names of its network here.

    Files written by some versions of transformers lack the leading `text_model.`, which is added. Tensors of CLIP's vision
    part, which some files and merging tools keep, are left out.
    """
    left_out = r"vision_model\.|visual_projection\.|(.+\.)?(position_ids|logit_scale)$"
    return {
        f"text_model.{name}" if re.match(r"(encoder\.layers|embeddings|final_layer_norm)\.", name) else name: read
        for name, read in readers.items()
        if not re.match(left_out, name)
    }


def _openclip_readers(stored: Mapping[str, Stored]) -> dict[str, Callable[[], Tensor]]:
    readers: dict[str, Callable[[], Tensor]] = {}
    outside = OPENCLIP_OUTSIDE | {"text_projection.weight": "text_projection.weight"}

    for short, whole in stored.items():
        if short in outside:
            readers[outside[short]] = whole
        elif short == "text_projection":
            readers["text_projection.weight"] = lambda whole=whole: whole().T.contiguous()
        elif match := re.match(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$", short):
            for index, letter in enumerate("qkv"):
                name = f"text_model.encoder.layers.{match[1]}.self_attn.{letter}_proj.{match[2]}"
                readers[name] = lambda whole=whole, index=index: whole().chunk(3)[index]
        elif match := re.match(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)$", short):
            name = f"text_model.encoder.layers.{match[1]}.{OPENCLIP_LAYER.get(match[2], match[2])}.{match[3]}"
            readers[name] = whole
    return readers


class _WithPrefix(nn.Module):
    """A text encoder under the name `text_model`, which transformers 5 dropped. It keeps module names the same."""

    def __init__(self, text_model: nn.Module):
        super().__init__()
        self.text_model = text_model

    def forward(self, tokens: Tensor, output_hidden_states: bool) -> Any:
        return self.text_model(tokens, output_hidden_states=output_hidden_states)


def without_prefix(encoder: nn.Module) -> nn.Module:
    """Return the text encoder as its library creates it. Its modules may have other names."""
    return encoder.text_model if isinstance(encoder, _WithPrefix) else encoder


def build_text_encoder(config: dict[str, Any], projection: bool) -> nn.Module:
    """Build transformers' CLIPTextModel or CLIPTextModelWithProjection, with module names that begin with `text_model.`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "hidden_act", "projection_dim")  # fmt: skip
    # With 2, as in published configs, transformers pools at the largest token number, which could be an added word.
    text_config = CLIPTextConfig(**{name: config[name] for name in keep if name in config}, eos_token_id=END)
    encoder = (CLIPTextModelWithProjection if projection else CLIPTextModel)(text_config)
    for module in encoder.modules():
        if "position_ids" in module._buffers:
            # Checkpoints don't contain it, so it must not stay on the meta device.
            module.register_buffer(
                "position_ids", torch.arange(text_config.max_position_embeddings, device="cpu")[None], persistent=False
            )
    return encoder if hasattr(encoder, "text_model") else _WithPrefix(encoder)
