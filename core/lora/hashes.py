"""The hashes by which the community's tools tell LoRA files apart."""

import hashlib
from collections.abc import Mapping

from torch import Tensor

from ..storage.safetensors_file import Layout, header_bytes, layout_of, storage_order, tensor_bytes


def model_hash(tensors: Mapping[str, Tensor]) -> str:
    """`sshs_model_hash`: sha256 of everything after the header, so it does not change with the metadata."""
    digest = hashlib.sha256()
    for name in storage_order(layout_of(tensors)):
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


class LegacyHash:
    """`sshs_legacy_hash`: of the file with `ss_*` metadata only, 8 hex digits of sha256 over 0x100000 to 0x110000."""

    _BEGIN, _END = 0x100000, 0x110000

    def __init__(self, layout: Layout, metadata: Mapping[str, str]):
        self._digest = hashlib.sha256()
        self._position = 0
        self.update(header_bytes(layout, {key: value for key, value in metadata.items() if key.startswith("ss_")}))

    def update(self, data: bytes | memoryview) -> None:
        """Takes the bytes of the tensors, in the order in which they are stored."""
        self._digest.update(data[max(self._BEGIN - self._position, 0) : max(self._END - self._position, 0)])
        self._position += len(data)

    @property
    def is_complete(self) -> bool:
        """Whether further bytes change nothing."""
        return self._position >= self._END

    def hexdigest(self) -> str:
        return self._digest.hexdigest()[:8]


def legacy_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The `LegacyHash` of tensors that are at hand."""
    layout = layout_of(tensors)
    digest = LegacyHash(layout, metadata)
    for name in storage_order(layout):
        if digest.is_complete:
            break
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()
