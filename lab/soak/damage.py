"""Random damage: to bytes, to the header and the tensors of safetensors files, to values of JSON. All of it is drawn by
the `random.Random` that is given, so a seed gives the same again."""

import copy
import json
import math
import struct
from collections.abc import Sequence
from random import Random
from typing import Any

ODD: Sequence[Any] = (
    None, True, -1, 0, 1.5, 1e308, -1e-308, math.nan, math.inf, 2**31, 2**63, 2**70, "", "0", "\0", "\x1b[31m\n", "\ud800",
    "x" * 5000, "../../x", "NaN", [], {}, [[]], [None], {"": {}}, [1, [2, [3]]],
)  # fmt: skip
"""Values that nobody expects."""
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "C64": 8}


def damaged_bytes(data: bytes, draw: Random) -> bytes:
    """The data with some bytes flipped, zeroed, cut off, put in or moved."""
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(result) + 1)
        # Most of what is decided by bytes is decided at the beginning.
        at = min(at, draw.choice((16, 256, 4096, len(result))))
        length = draw.choice((1, 1, 4, 64, 1000))
        match draw.choice(("flip", "zero", "cut", "insert", "copy", "remove")):
            case "flip":
                for place in range(at, min(at + draw.choice((1, 1, 8)), len(result))):
                    result[place] ^= 1 << draw.randrange(8)
            case "zero":
                result[at : at + length] = bytes(len(result[at : at + length]))
            case "cut":
                del result[at:]
            case "insert":
                result[at:at] = draw.randbytes(length)
            case "copy":
                start = draw.randrange(len(result) + 1)
                result[at : at + length] = result[start : start + length]
            case _:
                del result[at : at + length]
    return bytes(result)


def damaged_value(value: Any, draw: Random) -> Any:
    """A JSON value with a value in it exchanged for an odd one, left out, renamed, or there twice."""
    result = copy.deepcopy(value)
    owner: Any = None
    key: Any = None
    inner = result
    while isinstance(inner, (dict, list)) and inner and (owner is None or draw.random() < 0.8):
        owner, key = inner, draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner = owner[key]
    if owner is None:
        return draw.choice(ODD)
    match draw.choice(("odd", "odd", "odd", "remove", "rename", "twice", "deep")):
        case "remove":
            del owner[key]
        case "rename" if isinstance(owner, dict):
            new = draw.choice((f"{key}_", key[1:], draw.choice(list(owner)), "\ud800", "__metadata__"))
            owner[new] = owner.pop(key)
        case "twice" if isinstance(owner, list):
            owner.append(copy.deepcopy(inner))
        case "deep":
            for _ in range(draw.choice((1, 50, 2000))):
                owner[key] = [owner[key]]
        case _:
            owner[key] = draw.choice(ODD)
    return result


def json_bytes(value: Any) -> bytes:
    """The value as JSON, or bytes that are none where it is nested too deeply for Python to write it."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 5000


def damaged_json(data: bytes, draw: Random) -> bytes:
    """A JSON file with other values, or with other bytes."""
    return json_bytes(damaged_value(json.loads(data), draw)) if draw.random() < 0.7 else damaged_bytes(data, draw)


def damaged_safetensors(data: bytes, draw: Random) -> bytes:
    """A safetensors file with other bytes, with another header, or with other tensors under a header that is right."""
    kind = draw.choice(("bytes", "header", "tensors", "tensors"))
    if kind == "bytes":
        return damaged_bytes(data, draw)
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if kind == "header":
        return _packed(damaged_value(header, draw), body)
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: [entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])]] for name, entry in header.items()
    }
    for _ in range(draw.choice((1, 1, 3))):
        _damage_a_tensor(tensors, draw)
    if draw.random() < 0.2:
        metadata = {draw.choice(list(metadata) or ["a"]): str(draw.choice(ODD)).replace("\ud800", "?")} | metadata
    entries, position = {}, 0
    for name, (dtype, shape, values) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(values)]}
        position += len(values)
    return _packed({"__metadata__": metadata, **entries}, b"".join(values for *_, values in tensors.values()))


def _packed(header: Any, body: bytes) -> bytes:
    text = json_bytes(header)
    return struct.pack("<Q", len(text)) + text + body


def _damage_a_tensor(tensors: dict[str, list[Any]], draw: Random) -> None:
    name = draw.choice(list(tensors) or [""])
    dtype, shape, values = tensors.get(name, ["F32", [0], b""])
    count = math.prod(shape)
    match draw.choice(("fill", "fill", "remove", "rename", "reshape", "dtype", "copy", "resize")):
        case "fill":
            formats = {"F64": "<d", "F32": "<f", "F16": "<e"}
            number = struct.pack(formats.get(dtype, "<f"), draw.choice((math.nan, math.inf, 0.0, -1.0, 6e4)))
            if name in tensors:
                tensors[name][2] = (number * count)[: len(values)]
        case "remove":
            tensors.pop(name, None)
        case "rename":
            other = draw.choice(list(tensors) or [""])
            new = draw.choice(
                (other, name.rpartition(".")[0] + "." + other.rpartition(".")[2], name + ".x", "\0", "a" * 3000)
            )
            tensors[new] = tensors.pop(name, ["F32", [0], b""])
        case "reshape":
            sizes = [
                [count],
                [1, count],
                [count, 1],
                [*shape, 1],
                [*reversed(shape)],
                [1, 1, *shape],
                [1] * 15 + [count],
            ]
            tensors[name] = [dtype, draw.choice(sizes), values]
        case "dtype":
            new = draw.choice([code for code, size in _SIZES.items() if len(values) % size == 0])
            tensors[name] = [new, [len(values) // _SIZES[new]] if new not in _same(dtype) else shape, values]
        case "copy":
            tensors[name + draw.choice((".alpha", "_2", ".lora_mid.weight", ".dora_scale"))] = [dtype, shape, values]
        case _:
            new = [draw.choice((0, 1, 2, side, side + 1, 3 * side)) for side in shape]
            wanted = math.prod(new) * (len(values) // max(count, 1))
            tensors[name] = [dtype, new, (values * (wanted // max(len(values), 1) + 1))[:wanted]]
            if len(tensors[name][2]) != wanted:
                tensors[name] = [dtype, shape, values]


def _same(dtype: str) -> list[str]:
    return [code for code, size in _SIZES.items() if size == _SIZES.get(dtype)]
