"""Safetensors files: a strict, lazy reader and an atomic, deterministic writer.

The reader reads only the header and refuses one that doesn't describe the file exactly. Each tensor is mapped into memory
on access.
"""

import hashlib
import json
import math
import mmap
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Protocol

import safetensors.torch
import torch
from torch import Tensor

from ..errors import BadFile
from ..progress import OnProgress, silent
from .files import map_file, write_file
from .header import TYPES, Header, parse_header
from .stored import LazyValues

CHUNK_BYTES = 1 << 20
SMALL_BYTES = 64
"""Tensors up to this size are read, not mapped: touching a mapped page makes the system read its neighbours too."""

# Older versions of torch lack some unsigned and small float types.
DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, (name, _) in TYPES.items() if hasattr(torch, name)
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
# The safetensors library stores tensors in the order of this list, then by name. The order makes equal tensors give equal
# files, and keeps large types aligned.
_STORAGE_ORDER = [
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
]  # fmt: skip


def sha256_of(chunks: Iterable[bytes | memoryview], on_chunk: Callable[[], None]) -> str:
    """Return the SHA-256 of a file's chunks, as 64 hex digits. `on_chunk` is called after each, and may raise to cancel."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        on_chunk()
    return digest.hexdigest()


@dataclass(eq=False, repr=False)
class SafetensorsFile(Header, Mapping[str, Tensor]):
    """A safetensors file with a checked header, as a mapping from names to tensors.

    A small file is read at once. Tensors of a large one are mapped on access, without a copy. They are private to this
    process: writing to one never changes the file. `SafetensorsFile.open(path)` opens a file.
    """

    def __post_init__(self) -> None:
        if unknown := next((name for name, code in self.codes.items() if code not in DTYPES), None):
            raise BadFile(
                f"{self.path}: tensor {unknown[:80]!r} has dtype {self.codes[unknown]!r}, which this version of torch lacks; "
                f"known: {', '.join(DTYPES)}"
            )
        self.dtypes: dict[str, torch.dtype] = {name: DTYPES[code] for name, code in self.codes.items()}
        self._memory: mmap.mmap | bytearray | None = None

    @property
    def layout(self) -> "Layout":
        """The dtype and shape of each tensor by name, as the header states them."""
        return {name: (self.dtypes[name], shape) for name, shape in self.shapes.items()}

    def tensor(self, name: str) -> Tensor:
        """Return the tensor called `name`, mapped from the file.

        Raises BadFile when the file was changed or removed after it was opened, KeyError for an unknown name.
        """
        shape, dtype, offset = self.shapes[name], self.dtypes[name], self._offsets[name]
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if count * dtype.itemsize <= SMALL_BYTES:
            with self._reopened() as file:
                file.seek(offset)
                raw = bytearray(file.read(count * dtype.itemsize))
            return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(shape)
        if self._memory is None:
            with self._reopened() as file:
                self._memory = map_file(file)
        if isinstance(self._memory, mmap.mmap) and self._memory.size() < self.size:  # Reading would end the process.
            raise BadFile(f"{self.path}: another program has truncated the file since it was opened")
        if offset % dtype.itemsize == 0:
            return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).reshape(shape)
        # Tensors of small types may leave the next one unaligned, and then only a copy can be read safely.
        raw = torch.frombuffer(self._memory, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
        return raw.clone().view(dtype).reshape(shape)

    __getitem__ = tensor

    def close(self) -> None:
        """Let go of the file until a tensor is read again. Tensors that have been read stay valid."""
        self._memory = None

    def sha256(self, *, with_header: bool = True, on_chunk: Callable[[], None] = silent) -> str:
        """Compute the SHA-256 of the whole file, or of everything after its header, as 64 hex digits.

        `on_chunk` is called after each MiB, and may raise to cancel. Raises BadFile when the file was changed or removed.
        """
        return sha256_of(self._chunks(with_header), on_chunk)

    def _chunks(self, with_header: bool) -> Iterator[bytes]:
        with self._reopened() as file:
            if not with_header:
                file.seek(8 + struct.unpack("<Q", file.read(8))[0])
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        return f"SafetensorsFile({str(self.path)!r}, {len(self)} tensors)"


Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""The dtype and shape of each tensor by name, as a file's header states them."""


class ComputedTensors(LazyValues[str, Tensor]):
    """Tensors that are computed on access, so that a large file can be written without holding it in memory.

    Each maker returns some tensors by name, the same ones in each call. All makers are called once to get the layout. Later,
    the result of the last call is kept, because the tensors of a module are read one after another.
    """

    def __init__(self, makers: Iterable[Callable[[], Mapping[str, Tensor]]]):
        self.layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._last: tuple[object, Mapping[str, Tensor]] = (None, {})
        readers: dict[str, Callable[[], Tensor]] = {}
        for make in makers:
            for name, tensor in make().items():
                self.layout[name] = (tensor.dtype, tuple(tensor.shape))
                # Single numbers, such as alphas, are kept: all of them are read before the file is written.
                readers[name] = partial(self._made, make, name) if tensor.ndim else tensor.clone
        super().__init__(readers)

    def _made(self, make: Callable[[], Mapping[str, Tensor]], name: str) -> Tensor:
        if self._last[0] is not make:
            self._last = (make, make())
        return self._last[1][name]


def read_safetensors(data: bytes, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata from the bytes of a safetensors file. Raises BadFile with `name`."""
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise BadFile(f"{name}: not a valid safetensors file ({error})") from None
    return tensors, json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]).get("__metadata__", {})


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Return the dtype and shape of each tensor by name, without reading tensors of files or recomputing others."""
    if isinstance(tensors, (SafetensorsFile, ComputedTensors)):
        return tensors.layout
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def layout_in(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Layout:
    """Return the layout of tensors when floating-point values are saved in `dtype`.

    Other types are kept, and a single number that `dtype` would round becomes float32.
    """

    def saved(name: str, own: torch.dtype, shape: tuple[int, ...]) -> torch.dtype:
        if not own.is_floating_point or own == dtype:
            return own
        # Rounding a single number, such as a LoRA's alpha, would change the scale of the whole module.
        if shape == () and tensors[name].to(dtype).float() != tensors[name].float():
            return torch.float32
        return dtype

    return {name: (saved(name, own, shape), shape) for name, (own, shape) in layout_of(tensors).items()}


def cast_tensor(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor to the dtype that it is saved in. Raises BadFile with `key` when its values do not fit."""
    if tensor.dtype == dtype:
        return tensor
    result = tensor.detach().to("cpu", dtype).contiguous()
    if not torch.isfinite(result.float()).all() and torch.isfinite(tensor.float()).all():
        raise BadFile(f"{key}: its values are too large for {dtype}; save as bfloat16 or float32")
    return result


def storage_order(layout: Layout) -> list[str]:
    """Return the names of the tensors in the order that they are written in, which is the safetensors library's."""
    return sorted(layout, key=lambda name: (_STORAGE_ORDER.index(_CODES[layout[name][0]]), name))


def header_bytes(layout: Layout, metadata: Mapping[str, str] | None) -> bytes:
    """Build the start of a safetensors file: the header's length and the header, padded to a multiple of 8 bytes."""
    entries, position = dict[str, object](), 0
    for name in storage_order(layout):
        dtype, shape = layout[name]
        end = position + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return _pack_header(entries, metadata)


def check_metadata(metadata: Mapping[Any, Any]) -> None:
    """Raise BadFile for metadata that are not texts by name: no program reads a file with others."""
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise BadFile(f"metadata: {name!r} = {text!r}: a safetensors file holds only texts by name; use str(value)")


def _pack_header(entries: Mapping[str, object], metadata: Mapping[str, str] | None) -> bytes:
    check_metadata(metadata or {})
    head = {"__metadata__": {key: metadata[key] for key in sorted(metadata)}} if metadata else {}
    # Metadata can hold file names, which need not be valid Unicode.
    text = json.dumps({**head, **entries}, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as they are stored in a file."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def save_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file atomically: a reader sees the old file or the whole new one.

    Equal input gives equal bytes. Raises BadFile when the folder is missing or not writable, the disk is full, or the
    format does not support a dtype.
    """
    write_safetensors(path, layout_of(tensors), tensors.__getitem__, metadata)


class Digest(Protocol):
    """A running hash with the interface of hashlib's objects."""

    def update(self, data: bytes | memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


def write_safetensors(
    path: str | os.PathLike[str] | BinaryIO,
    layout: Layout,
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    digests: Mapping[str, Digest] | None = None,
    on_progress: OnProgress = silent,
) -> None:
    """Write a safetensors file atomically, one tensor at a time. `read` returns a tensor by its name.

    `path` may also be a seekable stream, such as a BytesIO.
    Each tensor must have the dtype and shape that `layout` states. `digests` are hashes by their keys in the metadata: they
    are updated with the stored bytes of all tensors, and written into the metadata. `on_progress(done, total)` counts
    tensors. Raises BadFile when the file cannot be written or the format does not support a dtype.
    """
    for name, (dtype, _) in layout.items():
        if dtype not in _CODES:
            raise BadFile(f"{path}: cannot be written: tensor {name!r} has the unsupported dtype {dtype}")
    digests = digests or {}

    def header() -> bytes:
        found = {key: digest.hexdigest() for key, digest in digests.items()}
        return header_bytes(layout, {**(metadata or {}), **found})

    def write(file: BinaryIO) -> None:
        file.write(header())
        for done, name in enumerate(storage_order(layout), 1):
            tensor = read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == layout[name], name
            data = tensor_bytes(tensor)
            file.write(data)
            for digest in digests.values():
                digest.update(data)
            on_progress(done, len(layout))
        if digests:
            # The digests are known only now. They have the same length as before, so the tensors don't move.
            file.seek(0)
            file.write(header())

    if isinstance(path, str | os.PathLike):
        write_file(path, write)
    else:
        write(path)


def copy_with_metadata(file: SafetensorsFile, path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Copy `file` to `path` with new metadata. The tensors stay the same, byte for byte and in the same order.

    `path` may be the file itself. Raises BadFile when it cannot be written.
    """

    def write(output: BinaryIO) -> None:
        with file.path.open("rb") as source:
            size = struct.unpack("<Q", source.read(8))[0]
            entries, _ = parse_header(file.path, source.read(size))
            output.write(_pack_header({name: dict(entry) for name, entry in entries.items()}, metadata))
            shutil.copyfileobj(source, output, CHUNK_BYTES)

    write_file(path, write)
