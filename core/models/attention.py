"""Attention with rotary embeddings for diffusers' transformers, with fewer operations, since a GPU waits for each one.

Queries and keys are rotated together and in real numbers, by tables that are computed once for all blocks. The tables of
cosines and sines are (S, D) or (B, S, D) float32. A sine is negative where the rotation subtracts.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Tables = tuple[Tensor, Tensor]
"""A table of cosines and one of sines."""


def tables_of_pairs(cosines: Tensor, sines: Tensor) -> Tables:
    """Build the tables from the cosine and the sine (..., D / 2) of each pair of neighbours (arXiv:2104.09864)."""
    return torch.stack([cosines, cosines], -1).flatten(-2), torch.stack([-sines, sines], -1).flatten(-2)


def tables_of_flux(_: nn.Module, __: object, tables: Tables) -> Tables:
    """Convert the rotary tables of diffusers' FLUX.1 and similar models, which list each pair's numbers twice (a hook)."""
    cosines, sines = tables
    return tables_of_pairs(cosines[..., ::2], sines[..., ::2])


def tables_of_halves(angles: Tensor) -> Tables:
    """Build the tables from the angle (..., D) of each number, where a number's partner is in the other half."""
    first, second = angles.sin().chunk(2, -1)
    return angles.cos(), torch.cat([-first, second], -1)


def rotated(x: Tensor, tables: Tables, halves: bool = False) -> Tensor:
    """Multiply each number of x (B, S, H, D) or (B, N, S, H, D) by its cosine, and add its partner times its sine.

    It is computed in float32 and rounded once, as in diffusers.
    """
    cosines, sines = (table.unsqueeze(-2).unsqueeze(-4) if x.ndim == 5 else table.unsqueeze(-2) for table in tables)
    return _Rotation.apply(x, cosines, sines, halves)  # pyright: ignore


class _Rotation(torch.autograd.Function):
    """`rotated` for tables that fit x. It saves nothing but the tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor, halves: bool) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        ctx.halves = halves
        return torch.addcmul(x * cosines, _partners(x, halves), sines, out=torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cosines, sines = ctx.saved_tensors
        swapped = _partners(gradient * sines, ctx.halves)
        return torch.addcmul(swapped, gradient, cosines, out=torch.empty_like(gradient)), None, None, None


def _partners(x: Tensor, halves: bool) -> Tensor:
    """Put each number of x in its partner's place."""
    return x.roll(x.shape[-1] // 2, -1) if halves else x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def attend(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    tables: Tables,
    mask: Tensor | None = None,
    halves: bool = False,
) -> Tensor:
    """Rotate queries and keys, and return the attention output (B, S, H D) of the parts (B, S_i, H, D) of a sequence."""
    both = torch.cat([*queries, *keys], 1).unflatten(1, (2, -1))
    query, key = rotated(both, tables, halves).unbind(1)
    return mixed(query, key, values[0] if len(values) == 1 else torch.cat([*values], 1), mask)


def mixed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Return the attention output (B, S, H D) of inputs (B, S, H, D)."""
    parts = (part.transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(*parts, attn_mask=mask, is_causal=causal).transpose(1, 2).flatten(2)


def heads(x: Tensor, count: int, *layers: Any) -> list[Tensor]:
    """Apply linear layers to the same input and cut their outputs into heads (B, S, H, D)."""
    return [layer(x).unflatten(-1, (count, -1)) for layer in layers]


class JointAttention:
    """Attention of a picture's and a text's stream together, text first, or of one stream with both in it.

    It replaces diffusers' processor in FLUX.1, Chroma, FLUX.2 and Qwen-Image, and has the same arguments.
    """

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert image_rotary_emb is not None
        layers = attention.to_q, attention.to_k, attention.to_v
        query, key, value = heads(hidden_states, attention.heads, *layers)
        query, key = attention.norm_q(query), attention.norm_k(key)
        if encoder_hidden_states is None:
            return attend([query], [key], [value], image_rotary_emb, attention_mask)
        layers = attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
        texts = heads(encoder_hidden_states, attention.heads, *layers)
        queries, keys = [attention.norm_added_q(texts[0]), query], [attention.norm_added_k(texts[1]), key]
        length, count = texts[0].shape[1], query.shape[1]
        if encoder_hidden_states_mask is not None:
            attention_mask = F.pad(encoder_hidden_states_mask, (0, count), value=1)[:, None, None]
        both = attend(queries, keys, [texts[2], value], image_rotary_emb, attention_mask)
        text, picture = both.split([length, count], 1)
        return attention.to_out[1](attention.to_out[0](picture)), attention.to_add_out(text)


class StreamAttention:
    """Attention of one stream with picture and text in it. It replaces diffusers' in Z-Image and ERNIE-Image."""

    def __init__(self, halves: bool = False):
        self.halves = halves

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
    ) -> Tensor:
        """Take both tables as one tensor (B, S, 2, D)."""
        assert freqs_cis is not None and encoder_hidden_states is None
        layers = attention.to_q, attention.to_k, attention.to_v
        query, key, value = heads(hidden_states, attention.heads, *layers)
        if len(hidden_states) == 1:
            attention_mask = None  # a single text has no padding, and a GPU has faster kernels without a mask
        elif attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None]
        cosines, sines = freqs_cis.unbind(-2)
        query, key = attention.norm_q(query), attention.norm_k(key)
        return attention.to_out[0](attend([query], [key], [value], (cosines, sines), attention_mask, self.halves))


def use_attention(denoiser: Any, processor: Any) -> None:
    """Make all attention layers of a diffusers network use `processor`."""
    for module in denoiser.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(processor)
