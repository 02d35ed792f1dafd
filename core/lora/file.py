"""Read the LoRA files that the community trains and shares, and write them in any of their naming schemes.

docs/formats.md describes the format.
"""

import hashlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

from ..device import is_out_of_memory
from ..errors import LoraMisfit, UnknownFamily, UnmatchedKeys, counted
from ..progress import OnProgress, silent
from ..storage.safetensors_file import (
    Layout,
    SafetensorsFile,
    cast_tensor,
    layout_in,
    layout_of,
    read_safetensors,
    write_safetensors,
)
from ..tensor_names import NAME_TABLES, ModuleId, NameTable, bundled_name
from ..tensor_names.models import same_weight
from .changes import LARGEST_VALUE, bias_change, largest_change, weight_change
from .content import Content, Types, recognise, shortened
from .hashes import LegacyHash, model_hash
from .kinds import needs_base
from .modules import LoraModule, name_modules
from .names import Entry, LoraNames, has_pefts_magnitude
from .stated import peft_metadata

KEY = "facelora.key"
"""The metadata key with the hash of everything that the LoRA was trained from. Changed copies of the LoRA don't have it."""
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class LoraFile(LoraNames):
    """A LoRA as in its file: its tensors under the file's names, and their meaning."""

    family: str
    metadata: dict[str, str] = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)
    name: str = "LoRA"
    found: InitVar[Content | None] = None
    """The meaning of the tensors' names, if it is known already."""

    @classmethod
    def read(cls, path: str | os.PathLike[str], family: str | None = None) -> "LoraFile":
        """Read a LoRA from a file, without loading its tensors yet.

        If its modules fit several families, `family` decides, whatever the metadata say. For peft's
        `adapter_model.safetensors`, the `adapter_config.json` beside it is read too, because it holds the alpha. Raises BadFile
        when a file is damaged. Raises UnknownFamily when it is not a LoRA, or its family is unknown or not `family`.
        """
        file = SafetensorsFile.open(path)
        metadata = peft_metadata(file.path) | file.metadata
        if family is not None:
            _check_family(family)
            metadata["ss_base_model_version"] = NAME_TABLES[family].base_versions[0]
        lora = cls.from_tensors(file, metadata, name=str(file.path))
        if family not in (None, lora.family):
            raise UnknownFamily(f"{lora.name}: is for {lora.family}, not for {family}")
        return lora

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "LoRA") -> "LoraFile":
        """Read a LoRA from the bytes of a file, such as an upload. Its family is detected.

        Raises BadFile when they are not a valid safetensors file, and the errors of `from_tensors`.
        """
        return cls.from_tensors(*read_safetensors(data, name), name)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str = "LoRA") -> "LoraFile":
        """Make a LoRA from tensors with a file's names. Raises UnknownFamily unless they show a LoRA and its family."""
        family, content = recognise(types_of(tensors), metadata, name)
        return cls(family, dict(metadata), tensors, name, content)

    @classmethod
    def from_modules(
        cls,
        family: str,
        modules: Mapping[ModuleId, LoraModule],
        metadata: Mapping[str, str],
        scheme: str | None = None,
        names: NameTable | None = None,
    ) -> "LoraFile":
        """Make a LoRA from the low-rank changes of modules. `scheme` is one of modules.SCHEMES; None means the family's own.

        `names` are the names of the base model's modules, if they differ from the published models' (`Base.names`). Raises
        UnknownFamily for an unknown family, UnmatchedKeys for an unknown scheme.
        """
        _check_family(family)
        names = names or NAME_TABLES[family]
        return cls(family, dict(metadata), dict(name_modules(names, modules, scheme or names.scheme)))

    @cached_property
    def layout(self) -> Layout:
        """The dtype and shape of every tensor, by its name."""
        return layout_of(self.tensors)

    @cached_property
    def types(self) -> Types:
        """torch's name of the type, and the shape, of each tensor by name."""
        return types_of(self.tensors)

    @cached_property
    def model_hash(self) -> str:
        """The actual `sshs_model_hash` of the tensors, not the one in the metadata: SHA-256 as 64 hex digits."""
        if isinstance(self.tensors, SafetensorsFile):
            return self.tensors.sha256(with_header=False)  # The file's order of tensors may differ from ours.
        return model_hash(self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most tensors, ignoring single numbers such as alphas."""
        return getattr(torch, self.type_name)

    def tensors_of(self, entry: Entry) -> dict[str, Tensor]:
        """Return the tensors of an entry by role. If the file has no alpha, they are scaled by peft's metadata."""
        tensors = {role: self.tensors[key] for role, key in entry.keys.items()}
        if has_pefts_magnitude(entry):
            # For a convolution it is (1, out, 1, 1), which LyCORIS' layout would take for one magnitude per input.
            tensors["dora"] = tensors["dora"].flatten()
        scale = self.scale_in_config(entry)
        if scale is not None and entry.rank is not None:
            tensors["alpha"] = torch.tensor(scale * entry.rank)
        elif scale is not None and entry.kind == "lokr":
            # Both factors are whole. Only peft scales such a product.
            tensors["lokr_w1"] = scale * tensors["lokr_w1"].float()
        return tensors

    def sound_tensors_of(self, entry: Entry, strength: float = 1.0) -> dict[str, Tensor]:
        """Return the result of `tensors_of`, after a check that a weight can hold the change times `strength`.

        Raises UnmatchedKeys for NaN, infinity and values that 16 bits cannot hold: such a LoRA draws only black pictures.
        """
        tensors = self.tensors_of(entry)
        largest = abs(strength) * largest_change(entry.kind, tensors)
        if not largest <= LARGEST_VALUE:
            too_large = f"values up to {largest:.1g}, too large for a weight"
            what = too_large if math.isfinite(largest) else "NaN or infinity"
            raise UnmatchedKeys(f"{self.name}: {entry.name}: its change contains {what}")
        return tensors

    def sound_vectors(self, key: str) -> Tensor:
        """Return the vectors of a word by key, one of `embedding_keys`. Raises UnmatchedKeys for NaN and infinity."""
        if not self.tensors[key].float().isfinite().all():
            raise UnmatchedKeys(f"{self.name}: {key} contains NaN or infinity")
        return self.tensors[key]

    def bundled_words(self) -> dict[str, Tensor]:
        """Return the vectors of all words by their bundled names. Raises UnmatchedKeys as `sound_vectors` does."""
        return {bundled_name(key): self.sound_vectors(key) for key in self.embedding_keys}

    def modules(self, strength: float = 1.0) -> dict[ModuleId, LoraModule]:
        """Return the low-rank change of every diffusers module, times `strength`.

        Raises UnmatchedKeys when tensors are left over, when a module appears twice or is not finite, and for other kinds of
        adapters (`convert.to_plain` converts them).
        """
        self.check()
        modules: dict[ModuleId, LoraModule] = {}
        for entry in self.entries:
            if not entry.is_plain:
                what = "a LoRA with a bias" if entry.kind in ("lora", "locon") else f"of kind {entry.kind}"
                raise UnmatchedKeys(f"{self.name}: {entry.name} is {what}; convert it to a plain LoRA first")
            modules |= self.low_rank_of(entry, strength)
        return modules

    def low_rank_of(self, entry: Entry, strength: float = 1.0) -> Iterator[tuple[ModuleId, LoraModule]]:
        """Yield the low-rank change of each module of an entry. For a DoRA, this is the change without the magnitude.

        The entry must be of a low-rank kind. Raises UnmatchedKeys when its shapes do not fit the family, or when it is not
        finite.
        """
        tensors = self.sound_tensors_of(entry, strength)
        down, up, mid = tensors["down"], tensors["up"], tensors.get("mid")
        alpha = float(tensors["alpha"].item()) if "alpha" in tensors else float(down.shape[0])
        kernel = NAME_TABLES[self.family].kernel(entry.modules[0][1]) if entry.part == "denoiser" else None
        try:
            down, up = _in_weight_form(down, up, kernel)
            parts = entry.place.split(up, inputs=down.shape[1])
        except ValueError as error:
            raise UnmatchedKeys(f"{self.name}: {entry.name} does not fit {self.family}: {error}") from None
        whole = LoraModule(down, up, strength * alpha, mid)
        used = [part.flatten(1).float().any(0) for _, part in parts] if len(parts) > 1 and mid is None else []
        is_diagonal = bool(used) and int(torch.stack(used).sum(0).max()) == 1
        for number, (module_id, part) in enumerate(parts):
            # Modules that were fused from separate ones have ranks of their own. The others are zero in their rows.
            own = used[number] if is_diagonal and used[number].any() else slice(None)
            rows = down[own]
            yield module_id, replace(whole, down=rows, up=part[:, own], alpha=whole.scale * rows.shape[0])

    def changes(self, base_weight: Callable[[ModuleId], Tensor] | None = None) -> Iterator[tuple[ModuleId, Tensor]]:
        """Yield the change of each weight, float32. `bias_changes_of` returns those of biases.

        `base_weight` returns the weight of a module, for kinds whose change depends on it (DoRA, OFT). Raises UnmatchedKeys
        when it is missing, when tensors are left over, or when a change cannot be computed.
        """
        self.check()
        for entry in self.entries:
            yield from self.changes_of(entry, base_weight)

    def of_parts(self, parts: Collection[str]) -> "LoraFile":
        """Return a copy of the LoRA with only the modules in these parts. Embeddings and unknown tensors are kept."""
        return self._without(entry for entry in self.entries if entry.part not in parts)

    def of_loaded(self, modules: Collection[ModuleId], unused: str) -> "LoraFile":
        """Return the LoRA without changes of modules that are not loaded because nothing uses them.

        `unused` matches their paths (`FamilySpec.unused`). A LoRA that only changes such modules is returned unchanged, and
        fits no base model.
        """
        missing = [entry for entry in self.entries if not any(module in modules for module in entry.modules)]
        left_out = [entry for entry in missing if all(re.search(unused, path) for _, path in entry.modules)]
        return self._without(left_out) if 0 < len(left_out) < len(self.entries) else self

    def _without(self, entries: Iterable[Entry]) -> "LoraFile":
        left_out = {key for entry in entries for key in entry.keys.values()}
        return replace(self, tensors={key: tensor for key, tensor in self.tensors.items() if key not in left_out})

    def changes_of(
        self,
        entry: Entry,
        base_weight: Callable[[ModuleId], Tensor] | None = None,
        device: torch.device | None = None,
    ) -> list[tuple[ModuleId, Tensor]]:
        """Compute the change of each weight that an entry changes, float32. A fused weight is split into its modules.

        `base_weight` returns the weight of a module, for kinds whose change depends on it (DoRA, OFT). Changes are computed on
        `device`, by default where the tensors are, and weights must be there too. Raises UnmatchedKeys when a weight is
        missing, or when a change cannot be computed or is not finite.
        """
        if entry.kind == "bias":
            return []
        weight = None
        if needs_base(entry.kind, entry.keys):
            if base_weight is None:
                raise UnmatchedKeys(
                    f"{self.name}: {entry.name} is of kind {entry.kind}, whose change depends on the base weights; "
                    "give the base model"
                )
            weight = entry.place.join([base_weight(module).float() for module in entry.modules])
        tensors = self.sound_tensors_of(entry)
        try:
            # Alpha is read as a number.
            there = {role: tensor if role == "alpha" else tensor.to(device=device) for role, tensor in tensors.items()}
            return entry.place.split(weight_change(entry.kind, there, weight))
        except (RuntimeError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            raise UnmatchedKeys(f"{self.name}: {entry.name} cannot be computed: {error}") from None

    def bias_changes_of(self, entry: Entry, inputs: int) -> list[tuple[ModuleId, Tensor]]:
        """Compute the change of each bias that an entry changes, float32. A fused bias is split into its modules.

        `inputs` is the weight's number of input features. Raises UnmatchedKeys when the bias does not fit the family, or is
        not finite.
        """
        change = bias_change(entry.kind, self.sound_tensors_of(entry)) if entry.changes_bias else None
        try:
            return [] if change is None else entry.place.split(change, inputs)
        except ValueError as error:
            raise UnmatchedKeys(f"{self.name}: the bias of {entry.name} does not fit {self.family}: {error}") from None

    def check(self) -> None:
        """Raise UnmatchedKeys if any tensor is not recognised, or a module appears twice."""
        if self.unknown_keys:
            count, example = len(self.unknown_keys), self.unknown_keys[0]
            raise UnmatchedKeys(
                f"{self.name}: {counted(count, 'tensor is', 'tensors are')} not recognised, or not part of a complete module "
                f"with matching shapes, e.g. {shortened(example)!r} of shape {list(self.layout[example][1])}"
            )
        seen: set[ModuleId] = set()
        for entry in self.entries:
            for module_id in entry.modules:
                if module_id in seen:
                    raise UnmatchedKeys(
                        f"{self.name}: the file changes {module_id[1]} twice, the second time as {entry.name}"
                    )
                seen.add(module_id)

    def save(
        self,
        path: str | os.PathLike[str] | BinaryIO,
        dtype: torch.dtype = torch.float16,
        on_progress: OnProgress = silent,
    ) -> None:
        """Write the file atomically, with its hashes in the metadata. `path` may also be a stream, such as a BytesIO.

        Tensors are read or computed, and written, one by one, so they are never all in memory. `dtype` is for floating-point
        tensors; `on_progress(done, total)` counts tensors. Raises BadFile when the file cannot be written or a value does not
        fit `dtype`.
        """
        layout = layout_in(self.tensors, dtype)
        digests = {"sshs_model_hash": hashlib.sha256(), "sshs_legacy_hash": LegacyHash(layout, self.metadata)}
        # modelspec's hash is of the tensors that were read, which may have had another dtype.
        metadata = {key: value for key, value in self.metadata.items() if key != "modelspec.hash_sha256"}

        def read(key: str) -> Tensor:
            return cast_tensor(key, self.tensors[key], layout[key][0])

        write_safetensors(path, layout, read, metadata, digests, on_progress)

    def with_metadata(self, metadata: Mapping[str, str]) -> "LoraFile":
        """Return a copy of the LoRA with other metadata."""
        return replace(self, metadata=dict(metadata))


def _check_family(name: str) -> None:
    if name not in NAME_TABLES:
        raise UnknownFamily(f"unknown family {name!r}; known: {', '.join(NAME_TABLES)}")


def types_of(tensors: Mapping[str, Tensor]) -> Types:
    """Return torch's name of the type, and the shape, of each tensor by name."""
    if isinstance(tensors, SafetensorsFile):
        return tensors.types
    return {name: (str(dtype).removeprefix("torch."), shape) for name, (dtype, shape) in layout_of(tensors).items()}


def _in_weight_form(down: Tensor, up: Tensor, kernel: int | None) -> tuple[Tensor, Tensor]:
    """Reshape the down and up matrices like diffusers' weight: two axes for a Linear, four for a convolution.

    `kernel` is the side of a convolution's kernel, None for a Linear. sd-scripts writes SD2's Linear projections as 1x1
    convolutions, and ComfyUI's trainer flattens every convolution. Raises ValueError when the sizes don't fit the kernel.
    """
    if kernel is None:
        return (down, up) if down.ndim == 2 or math.prod(down.shape[2:]) != 1 else (down.flatten(1), up.flatten(1))
    if down.ndim == 2:
        if down.shape[1] % kernel**2:
            raise ValueError(f"{down.shape[1]} inputs do not fit a kernel of {kernel} x {kernel}")
        down = down.reshape(down.shape[0], -1, kernel, kernel)
    return down, up if up.ndim == 4 else up[:, :, None, None]


@dataclass(frozen=True)
class Fit:
    """The result of `fit`: which parts of a LoRA fit a base model, and which don't."""

    family: str
    base_family: str
    matched: tuple[ModuleId, ...]
    left_over: Mapping[str, str]
    """The reason, by name in the file, why a module does not fit the base model."""

    @property
    def fits(self) -> bool:
        """Whether everything in the file fits the base model."""
        return not self.left_over

    def check(self, name: str = "LoRA") -> None:
        """Raise LoraMisfit, with the families and some keys, unless everything in the file fits."""
        if self.fits:
            return
        first: dict[str, str] = {}  # Many keys may have the same reason.
        for key, why in self.left_over.items():
            first.setdefault(why, key)
        examples = "; ".join(f"{shortened(key)}: {why}" for why, key in list(first.items())[:3])
        differ = self.family != self.base_family
        families = f"it is for {self.family}, but the base model is {self.base_family}; " if differ else ""
        count = len(self.left_over)
        raise LoraMisfit(f"{name}: does not fit the base model: {families}{count} keys are left over, e.g. {examples}")


def fit(
    lora: LoraFile,
    family: str,
    shapes: Mapping[ModuleId, tuple[int, ...]],
    biased: Collection[ModuleId] | None = None,
    widens: bool = False,
) -> Fit:
    """Find the modules of a base model that the LoRA changes, and the names in the file that do not fit it.

    `family` is the base model's family. `shapes` are the weight shapes of all its modules; without those of its text encoders,
    their part of the LoRA is left over. `biased` are the modules that have a bias; None skips this check. `widens` says that
    inputs for a control image can be added to the base model. No tensor is read.
    """
    matched: list[ModuleId] = []
    left_over: dict[str, str] = {key: "is not recognised" for key in lora.unknown_keys}
    if lora.family != family:
        why = f"changes a {lora.family} model"
        names = [*(entry.name for entry in lora.entries), *lora.embedding_keys]
        return Fit(lora.family, family, (), left_over | dict.fromkeys(names, why))
    widened = lora.widened
    for entry in lora.entries:
        missing = [module for module in entry.modules if module not in shapes]
        if missing:
            left_over[entry.name] = f"the base model has no {missing[0][1]} in its {missing[0][0]}"
            continue
        expected = [tuple(shapes[module]) for module in entry.modules]
        shape, outputs = entry.weight_shape, sum(rows for rows, *_ in expected)
        if shape is not None and not same_weight(shape, (outputs, *expected[0][1:])):
            if entry not in widened:
                left_over[entry.name] = f"shape {list(shape)} does not fit {[list(e) for e in expected]}"
                continue
            if not widens:
                left_over[entry.name] = (
                    "it adds inputs for a control image, which this base model does not have. ComfyUI's Load LoRA and "
                    "diffusers' FluxControlPipeline add them"
                )
                continue
        if entry.bias_size is not None and entry.bias_size != outputs:
            left_over[entry.name] = f"a bias of {entry.bias_size} does not fit {outputs} outputs"
            continue
        if biased is not None and entry.changes_bias and (bare := [m for m in entry.modules if m not in biased]):
            left_over[entry.name] = f"changes a bias, but {bare[0][1]} has none"
            continue
        matched.extend(entry.modules)
    return Fit(lora.family, family, tuple(matched), left_over)
