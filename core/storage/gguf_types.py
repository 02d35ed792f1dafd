"""Dequantise the most common GGUF types with torch, on any device.

Rows consist of ggml's blocks. Their layouts are defined in the package gguf (quants.py), which dequantises them on the CPU
only. The results are the same, bit for bit.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .narrow import NarrowTensor


def is_narrow(kind: str) -> bool:
    """Check whether this module can widen the quantisation with that GGUF name."""
    return kind in _BLOCKS


def narrow_gguf(data: Tensor, kind: str, shape: tuple[int, ...]) -> NarrowTensor | None:
    """Return a quantised weight that torch can widen. `kind` is GGUF's name of the quantisation.

    `data` are bytes, (rows, bytes per row). The result is None for other quantisations, and for a `shape` whose rows are not
    those of `data`.
    """
    if not is_narrow(kind) or data.ndim != 2 or len(shape) != 2 or len(data) != shape[0]:
        return None
    return NarrowTensor((data,), partial(_widen, kind=kind), shape)


def _widen(parts: Sequence[Tensor], dtype: torch.dtype, kind: str) -> Tensor:
    size, numbers_of = _BLOCKS[kind]
    return numbers_of(parts[0].unflatten(1, (-1, size))).flatten(1).bfloat16().to(dtype)


def _half(blocks: Tensor, place: int) -> Tensor:
    """Return the fp16 number at byte `place` of each block as float32, (..., 1)."""
    return blocks[..., place : place + 2].contiguous().view(torch.float16).float()


def _nibbles(blocks: Tensor) -> Tensor:
    """Return the lower halves of bytes (..., n), followed by the upper halves: (..., 2, n)."""
    return torch.stack([blocks & 15, blocks >> 4], dim=-2)


def _bits(blocks: Tensor, width: int = 1) -> Tensor:
    """Unpack numbers of `width` bits from bytes (..., n), the lowest bits of all bytes first: (..., 8 / width, n)."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=blocks.device)
    return blocks[..., None, :] >> shifts[:, None] & 2**width - 1


def _fifth_bits(blocks: Tensor) -> Tensor:
    """Unpack 4 bytes into the fifth bits of 32 numbers."""
    return _bits(blocks).transpose(-1, -2).flatten(-2) << 4


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[..., 2:].view(torch.int8).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[..., 2:]).flatten(-2).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[..., 4:]).flatten(-2).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[..., 6:]).flatten(-2) | _fifth_bits(blocks[..., 2:6])
    return _half(blocks, 0) * (numbers.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[..., 8:]).flatten(-2) | _fifth_bits(blocks[..., 4:8])
    return _half(blocks, 0) * numbers.float() + _half(blocks, 2)


def _of_eight(blocks: Tensor, numbers: Tensor) -> Tensor:
    """Scale the numbers (..., 8, 32) of a block's eight parts.

    The block begins with two factors, followed by the scale and the minimum of each part.
    """
    first, second, third = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=-1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=-1)
    scale, minimum = _half(blocks, 0) * scales.float(), _half(blocks, 2) * minima.float()
    return (scale[..., None] * numbers.float() - minimum[..., None]).flatten(-2)


def _q4_k(blocks: Tensor) -> Tensor:
    return _of_eight(blocks, _nibbles(blocks[..., 16:].unflatten(-1, (4, 32))).flatten(-3, -2))


def _q5_k(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[..., 48:].unflatten(-1, (4, 32))).flatten(-3, -2)
    return _of_eight(blocks, numbers | _bits(blocks[..., 16:48]) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64))).flatten(-2).unflatten(-1, (4, 32))
    numbers = low | _bits(blocks[..., 128:192].unflatten(-1, (2, 32)), 2) << 4
    scales = _half(blocks, 208) * blocks[..., 192:208].view(torch.int8).float()
    return (scales[..., None] * (numbers.float() - 32).flatten(-3).unflatten(-1, (16, 16))).flatten(-2)


_BLOCKS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "Q8_0": (34, _q8_0), "Q4_0": (18, _q4_0), "Q4_1": (20, _q4_1), "Q5_0": (22, _q5_0), "Q5_1": (24, _q5_1),
    "Q4_K": (144, _q4_k), "Q5_K": (176, _q5_k), "Q6_K": (210, _q6_k),
}  # fmt: skip
"""The size of a block in bytes, and the function that dequantises blocks (..., bytes)."""
