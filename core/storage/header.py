"""Read and check the header of a safetensors file, without reading its tensors and without torch.

A header that does not describe the file exactly is refused. No memory is allocated for the sizes that it claims.
"""

import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..errors import BadFile
from .plain_values import is_text, unique

MAX_HEADER_BYTES = 2**24
"""The largest header, in bytes. Real files have a few million at most, and each byte can take ten in memory."""
MAX_HEADER_VALUES, MAX_HEADER_QUOTES = 1_000_000, 300_000
"""The most commas and brackets, and quotes, in a header. A tensor has ten quotes, and a text can take hundreds of bytes."""
MAX_NAME = 1000
"""The most characters in a tensor's name. Names in real models have at most 200."""
MAX_DIMENSIONS = 16
TYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "C64": ("complex64", 8),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""torch's name and the size in bytes of each type, by its code in headers."""
_FORMATS = {
    "F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b",
    "U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B", "BOOL": "<?",
}  # fmt: skip
_File = TypeVar("_File", bound="Header")


@dataclass(eq=False, repr=False)
class Header:
    """The checked header of a safetensors file. `Header.open(path)` reads one."""

    path: Path
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    """The shape of each tensor by name."""
    codes: dict[str, str]
    """The type code of each tensor by name, a key of TYPES."""
    _offsets: dict[str, int]
    size: int

    @classmethod
    def open(cls: type[_File], path: str | os.PathLike[str]) -> _File:
        """Open the file at `path`. Raises BadFile when it is missing, a pickle, truncated, or doesn't match its header."""
        path = Path(path)
        try:
            if stat.S_ISFIFO(path.stat().st_mode):  # Opening a pipe would wait for a writer.
                raise BadFile(f"{path}: is not a regular file")
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = file.read(8)
                header_size = _header_size(path, start, size)
                entries, metadata = parse_header(path, file.read(header_size))
        except OSError as error:
            raise BadFile(f"{path}: cannot be read: {error.strerror or error}") from None
        return cls(path, metadata, *_checked(path, entries, first_byte=8 + header_size, file_size=size), size)

    @cached_property
    def types(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """torch's name of the type, and the shape, of each tensor by name."""
        return {name: (TYPES[self.codes[name]][0], shape) for name, shape in self.shapes.items()}

    def numbers(self, names: Iterable[str]) -> dict[str, float]:
        """Read the values of tensors that hold one real number each, by name. Nothing else in the file is read.

        Raises BadFile when the file was changed or removed after it was opened, KeyError for an unknown name.
        """
        found = {}
        with self._reopened() as file:
            for name in names:
                code = self.codes[name]
                file.seek(self._offsets[name])
                found[name] = _real_number(code, file.read(TYPES[code][1]))
        return found

    @contextmanager
    def _reopened(self) -> Iterator[BinaryIO]:
        try:
            with self.path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != self.size:
                    raise BadFile(f"{self.path}: the file has changed since it was opened")
                yield file
        except OSError as error:
            raise BadFile(f"{self.path}: cannot be read: {error.strerror or error}") from None


def _real_number(code: str, data: bytes) -> float:
    """Return the value of a tensor with one real element. Raises ValueError for a complex one."""
    # These two types are the upper bytes of wider ones, so zeros complete them.
    if code == "BF16":
        code, data = "F32", b"\0\0" + data
    elif code == "F8_E5M2":
        code, data = "F16", b"\0" + data
    if code in _FORMATS:
        return float(struct.unpack(_FORMATS[code], data)[0])
    if code == "F8_E8M0":
        return math.ldexp(1.0, data[0] - 127) if data[0] < 255 else math.nan
    if code != "F8_E4M3":
        raise ValueError(f"tensors of type {code} do not hold real numbers")
    sign, exponent, fraction = -1.0 if data[0] >> 7 else 1.0, data[0] >> 3 & 15, data[0] & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return sign * (math.ldexp(8 + fraction, exponent - 10) if exponent else math.ldexp(fraction, -9))


def _header_size(path: Path, start: bytes, file_size: int) -> int:
    if file_size == 0:
        raise BadFile(f"{path}: the file is empty")
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else None
    if size is not None and size <= MAX_HEADER_BYTES and 8 + size <= file_size:
        return size
    if start[:4] == b"GGUF":
        raise BadFile(f"{path}: this is a GGUF file (quantised weights); give a safetensors file instead")
    # This check must come after the length check: a valid header length can have the same bytes as the start of a pickle.
    if start[:2] == b"PK" or start[:1] == b"\x80":
        raise BadFile(
            f"{path}: this is a Python pickle (.pt, .ckpt, .bin), not a safetensors file, whatever its name says. "
            "Opening a pickle can run any program: convert it to .safetensors first, with a tool that you trust"
        )
    if size is None:
        raise BadFile(
            f"{path}: truncated: the file has {file_size} bytes, but the header length alone takes 8; download it again"
        )
    if start == b"version ":
        raise BadFile(f"{path}: this is a Git LFS pointer, not the file itself; download the file with: git lfs pull")
    text = start.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if text.isprintable() and "\ufffd" not in text:
        kind = "a web page" if text.startswith("<") else "text"
        raise BadFile(
            f"{path}: this is {kind}, not a safetensors file. The site may have sent an error or a login page instead of "
            "the file: log in and download it again"
        )
    if size > MAX_HEADER_BYTES:
        raise BadFile(f"{path}: not a safetensors file: it claims a header of {size} bytes (limit {MAX_HEADER_BYTES})")
    raise BadFile(
        f"{path}: truncated: the header needs {8 + size} bytes, but the file has {file_size}; download it again"
    )


def parse_header(path: Path, header: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the entries of the tensors by name, each as a tuple of pairs, and the metadata. Raises BadFile for other JSON."""
    if header[:1] != b"{":
        raise BadFile(f"{path}: not a safetensors file: its header does not start with '{{'")
    # A text that is JSON itself has escaped quotes.
    values, quotes = sum(map(header.count, b",[{")), header.count(b'"') - header.count(b'\\"')
    if values > MAX_HEADER_VALUES or quotes > MAX_HEADER_QUOTES:
        raise BadFile(f"{path}: its header has too many values: {values} commas and brackets, and {quotes} quotes")
    may_be_wrong = b"\\u" in header  # UTF-8 has no surrogates; only escapes can be unpaired ones.
    try:
        entries = unique(json.loads(header.decode("utf-8"), object_pairs_hook=tuple), "name")
        found = entries.pop("__metadata__", None)
        metadata = unique(found or (), "name") if found is None or isinstance(found, tuple) else None
    except UnicodeDecodeError:
        raise BadFile(f"{path}: damaged header: not UTF-8") from None
    except RecursionError:
        raise BadFile(f"{path}: damaged header: nested too deeply") from None
    except ValueError as error:
        raise BadFile(f"{path}: damaged header: {error}") from None
    if metadata is None or not all(isinstance(value, str) for value in metadata.values()):
        raise BadFile(f"{path}: damaged header: __metadata__ must map strings to strings")
    texts = (*entries, *metadata, *metadata.values()) if may_be_wrong else ()
    if wrong := next((text for text in texts if not is_text(text)), None):
        raise BadFile(f"{path}: damaged header: {wrong[:80]!r} is not valid Unicode")
    return entries, metadata


def _where(path: Path, name: str) -> str:
    return f"{path}: damaged header: tensor {name[:80]!r}"


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return the dtype and shape in a tensor's entry, and where its data begin and end. Raises BadFile for a malformed one."""
    pairs: Any = entry if type(entry) is tuple and len(entry) == 3 else ((None, None),) * 3
    (first, code), (second, shape), (third, span) = pairs
    if first != "dtype" or second != "shape" or third != "data_offsets":  # Common tools use this order.
        fields = dict(pairs)
        if fields.keys() != {"dtype", "shape", "data_offsets"}:
            raise BadFile(f"{_where(path, name)} must have exactly dtype, shape and data_offsets")
        code, shape, span = fields["dtype"], fields["shape"], fields["data_offsets"]
    is_shape = type(shape) is list and len(shape) <= MAX_DIMENSIONS
    for side in shape if is_shape else ():
        if type(side) is not int or side < 0:
            is_shape = False
    if not is_shape:
        raise BadFile(f"{_where(path, name)} has a shape that is not a list of at most {MAX_DIMENSIONS} sizes")
    begin, end = span if type(span) is list and len(span) == 2 else (None, None)
    if type(begin) is not int or type(end) is not int or begin < 0:
        raise BadFile(f"{_where(path, name)} has data_offsets that are not two byte positions")
    if len(name) > MAX_NAME:
        raise BadFile(f"{_where(path, name)} has a name of {len(name):,} characters (limit {MAX_NAME:,})")
    if type(code) is not str or code not in TYPES:
        raise BadFile(f"{path}: tensor {name[:80]!r} has dtype {str(code)[:20]!r}; known: {', '.join(TYPES)}")
    return code, tuple(shape), begin, end


def _checked(
    path: Path, entries: dict[str, Any], first_byte: int, file_size: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, str], dict[str, int]]:
    """Return the shapes, types and byte offsets that a header states.

    Raises BadFile unless the tensors fill the file without gaps or overlaps.
    """
    shapes, codes, begins, ends = {}, {}, {}, {}
    for name, entry in entries.items():
        code, shape, begin, end = _entry(path, name, entry)
        if begin > end or first_byte + end > file_size:
            raise BadFile(
                f"{path}: truncated or damaged: tensor {name[:80]!r} is at bytes {begin} to {end}, "
                f"but the file has only {file_size - first_byte} bytes of tensors; download it again"
            )
        taken = math.prod(shape) * TYPES[code][1]
        if taken != end - begin or (not taken and max(shape) > file_size):  # torch can't count sides of absurd sizes.
            where = _where(path, name)
            raise BadFile(f"{where} of shape {list(shape)} and dtype {code} does not take {end - begin} bytes")
        shapes[name], codes[name], begins[name], ends[name] = shape, code, begin, end
    # Common tools write the entries in the order of the data, so that each tensor begins where the last one ended.
    if [*begins.values(), file_size - first_byte] != [0, *ends.values()]:
        position = 0
        for begin, end, name in sorted((begin, ends[name], name) for name, begin in begins.items()):
            if begin != position:
                fault = "overlaps another" if begin < position else "leaves a gap before it"
                raise BadFile(f"{_where(path, name)} {fault}")
            position = end
        if first_byte + position != file_size:
            raise BadFile(f"{path}: damaged: {file_size - first_byte - position} bytes after the last tensor")
    return shapes, codes, {name: first_byte + begin for name, begin in begins.items()}
