"""Compute the hashes that the community's tools identify LoRA files by."""

import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from ..storage.safetensors_file import (
    CHUNK_BYTES,
    Digest,
    Layout,
    SafetensorsFile,
    header_bytes,
    layout_of,
    storage_order,
    tensor_bytes,
)


def model_hash(tensors: Mapping[str, Tensor]) -> str:
    """Compute the `sshs_model_hash`: SHA-256 of everything after the header, so that it is independent of the metadata."""
    digest = hashlib.sha256()
    for name in storage_order(layout_of(tensors)):
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


class _WindowHash:
    """A running SHA-256 of bytes 0x100000 to 0x110000 of a file: its first 8 hex digits."""

    _BEGIN, _END = 0x100000, 0x110000

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._position = 0

    def update(self, data: bytes | memoryview) -> None:
        self._digest.update(data[max(self._BEGIN - self._position, 0) : max(self._END - self._position, 0)])
        self._position += len(data)

    @property
    def is_complete(self) -> bool:
        """Whether the hash is known, so that further bytes do not change it."""
        return self._position >= self._END

    def hexdigest(self) -> str:
        return self._digest.hexdigest()[:8]


class LegacyHash(_WindowHash):
    """A running `sshs_legacy_hash`: of the header with `ss_*` metadata alone, then of the tensors added in the file's order."""

    def __init__(self, layout: Layout, metadata: Mapping[str, str]):
        super().__init__()
        self.update(header_bytes(layout, {key: value for key, value in metadata.items() if key.startswith("ss_")}))


def legacy_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Compute the `sshs_legacy_hash` of tensors and metadata: 8 hex digits."""
    layout = layout_of(tensors)
    digest = LegacyHash(layout, metadata)
    for name in storage_order(layout):
        if digest.is_complete:
            break
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def chunks(path: str | os.PathLike[str]) -> int:
    """Return the number of steps for hashing a file."""
    return 1 + Path(path).stat().st_size // CHUNK_BYTES


def file_hashes(path: str | os.PathLike[str], step: Callable[[], None] = lambda: None) -> dict[str, str]:
    """Compute the hashes of a file that the community uses, from its bytes. `step` is called `chunks` times.

    `autov1` is the first 8 digits of the SHA-256 of bytes 0x100000 to 0x110000, and `autov2` the first 10 of `sha256`.
    `autov3` and A1111's short hash are the first 12 of `sshs_model_hash`. `blake3` requires the package of that name.
    """
    file = SafetensorsFile.open(path)
    of_file: dict[str, Digest] = {"autov1": _WindowHash(), "sha256": hashlib.sha256()}
    with suppress(ImportError):
        from blake3 import blake3  # pyright: ignore[reportMissingImports]

        of_file["blake3"] = blake3()
    model = hashlib.sha256()
    with file.path.open("rb") as stream:
        start = stream.read(8)
        start += stream.read(struct.unpack("<Q", start)[0])
        for digest in of_file.values():
            digest.update(start)
        crc32 = zlib.crc32(start)
        for _ in range(chunks(path)):
            chunk = stream.read(CHUNK_BYTES)
            for digest in (*of_file.values(), model):
                digest.update(chunk)
            crc32 = zlib.crc32(chunk, crc32)
            step()
    hashes = {name: digest.hexdigest() for name, digest in of_file.items()}
    return {
        "crc32": f"{crc32:08x}",
        **hashes,
        "autov2": hashes["sha256"][:10],
        "sshs_model_hash": model.hexdigest(),
        "autov3": model.hexdigest()[:12],
        "sshs_legacy_hash": legacy_hash(file, file.metadata),
    }
