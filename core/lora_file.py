"""LoRA files: what the community trains, shares and loads, read into values and written in Kohya's format.

Facts about the format are in docs/formats.md.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import BadFile, UnknownFamily, UnmatchedKeys
from .lora_keys import FAMILIES, ModuleId, parse_key
from .safetensors_file import SafetensorsFile, header_bytes, save_safetensors, storage_order, tensor_bytes


@dataclass(frozen=True, eq=False)
class LoraModule:
    """A low-rank change of one weight: `delta = alpha / rank * up @ down`.

    Of a Linear, down is (rank, in) and up (out, rank); of a convolution, (rank, in, kh, kw) and (out, rank, 1, 1).
    With a Tucker core (LyCORIS), down is (rank, in, 1, 1), mid (rank, rank, kh, kw) and up (out, rank, 1, 1).
    """

    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The change of the weight, float32, in the weight's shape."""
        down, up = self.down.float(), self.up.float()
        if self.mid is not None:
            return self.scale * torch.einsum("or,rskl,si->oikl", up.flatten(1), self.mid.float(), down.flatten(1))
        return self.scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA as it stands in a file: its tensors under the names of the file, and what they mean."""

    family: str
    scheme: str
    """kohya, diffusers or comfy."""
    metadata: dict[str, str]
    tensors: Mapping[str, Tensor] = field(repr=False)
    name: str = "LoRA"
    """What messages call it: the file's path."""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "LoraFile":
        """The file, with its tensors still on disk. BadFile when it is damaged, UnknownFamily when it is no LoRA."""
        return cls.from_tensors(file := SafetensorsFile.open(path), file.metadata, name=str(file.path))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str = "LoRA") -> "LoraFile":
        """A LoRA from tensors under file names; detects family and scheme."""
        names = {key: named for key in tensors if (named := parse_key(key))}
        if not names:
            example = next(iter(tensors), "none")
            raise UnknownFamily(f"{name}: no LoRA tensors among its {len(tensors)} keys, e.g. {example!r}")
        family = _detect_family(name, tensors, metadata)
        return cls(family, next(iter(names.values())).scheme, dict(metadata), tensors, name)

    @classmethod
    def from_modules(
        cls, family: str, modules: Mapping[ModuleId, LoraModule], metadata: Mapping[str, str]
    ) -> "LoraFile":
        """A LoRA in Kohya's scheme."""
        keys = FAMILIES[family]
        tensors: dict[str, Tensor] = {}
        for (part, path), module in modules.items():
            module_name = keys.kohya_name(part, path)
            tensors[f"{module_name}.lora_down.weight"] = module.down
            tensors[f"{module_name}.lora_up.weight"] = module.up
            tensors[f"{module_name}.alpha"] = torch.tensor(module.alpha)
            if module.mid is not None:
                tensors[f"{module_name}.lora_mid.weight"] = module.mid
        return cls(family, "kohya", dict(metadata), tensors)

    def modules(self) -> dict[ModuleId, LoraModule]:
        """The low-rank change of every module. UnmatchedKeys when tensors are left over or missing."""
        roles: dict[ModuleId, dict[str, Tensor]] = {}
        unknown = []
        keys = FAMILIES[self.family]
        for key in self.tensors:
            named = parse_key(key)
            if named is None:
                unknown.append(key)
                continue
            fusion, _ = keys.locate(named.part, named.path)
            roles.setdefault((named.part, fusion.parts[0]), {})[named.role] = self.tensors[key]
        if unknown:
            raise UnmatchedKeys(f"{self.name}: {len(unknown)} tensors are not understood, e.g. {unknown[0]!r}")
        modules = {}
        for module_id, found in roles.items():
            if "down" not in found or "up" not in found:
                missing = "lora_down" if "down" not in found else "lora_up"
                raise UnmatchedKeys(f"{self.name}: {module_id[1]} of the {module_id[0]} has no {missing}")
            # No alpha: Kohya then means alpha = rank.
            alpha = found["alpha"].item() if "alpha" in found else found["down"].shape[0]
            modules[module_id] = LoraModule(found["down"], found["up"], float(alpha), found.get("mid"))
        return modules

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
        """Writes the file, whole or not at all, with its hashes in the metadata. BadFile when that is not possible."""
        tensors = {key: _cast(key, self.tensors[key], dtype) for key in self.tensors}
        hashes = {
            "sshs_model_hash": model_hash(tensors),
            "sshs_legacy_hash": legacy_hash(tensors, self.metadata),
        }
        save_safetensors(path, tensors, {**self.metadata, **hashes})

    def with_metadata(self, metadata: Mapping[str, str]) -> "LoraFile":
        """The same tensors with other metadata."""
        return replace(self, metadata=dict(metadata))


def model_hash(tensors: Mapping[str, Tensor]) -> str:
    """`sshs_model_hash`: sha256 of everything after the header, so it does not change with the metadata."""
    digest = hashlib.sha256()
    for name in storage_order(tensors):
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def legacy_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """`sshs_legacy_hash`: 8 hex digits of sha256 over bytes 0x100000 to 0x110000 of the file with `ss_*` metadata only."""
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    begin, end, position = 0x100000, 0x110000, 0
    digest = hashlib.sha256()

    def update(data: bytes | memoryview) -> None:
        nonlocal position
        digest.update(data[max(begin - position, 0) : max(end - position, 0)])
        position += len(data)

    update(header_bytes(tensors, training))
    for name in storage_order(tensors):
        if position >= end:
            break
        update(tensor_bytes(tensors[name]))
    return digest.hexdigest()[:8]


def _cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    result = tensor.detach().to("cpu", dtype).contiguous()
    # Alpha is one number: where the dtype would round it, the scale of the whole module would be off.
    if tensor.ndim == 0 and result.float() != tensor.float():
        return tensor.detach().cpu().float()
    if not torch.isfinite(result).all() and torch.isfinite(tensor).all():
        raise BadFile(f"{key}: its values do not fit {dtype}; save as bfloat16 or float32")
    return result


_CONTEXT_WIDTHS = {768: "sd15", 1024: "sd2", 2048: "sdxl"}
_BASE_VERSIONS = {"sd_v1": "sd15", "sd_v2": "sd2", "sd_v2_v": "sd2", "sdxl_base_v1-0": "sdxl"}


def _detect_family(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    for key in tensors:
        if key.startswith("lora_te2_"):
            return "sdxl"
        if "attn2_to_k.lora_down" in key and (family := _CONTEXT_WIDTHS.get(tensors[key].shape[1])):
            return family
    if family := _BASE_VERSIONS.get(metadata.get("ss_base_model_version", "")):
        return family
    raise UnknownFamily(
        f"{name}: no family matches its keys, e.g. {next(iter(tensors))!r}; known: {', '.join(FAMILIES)}"
    )
