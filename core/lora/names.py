"""Interpret the names, shapes and metadata of a LoRA file, without reading tensors and without torch.

`LoraHeader` reads only these; `LoraFile` in file.py has the tensors too.
"""

import math
import os
import re
from collections import Counter
from dataclasses import InitVar, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ..errors import UnmatchedKeys
from ..storage.header import Header
from ..tensor_names import (
    NAME_TABLES,
    Identity,
    Listing,
    ModuleId,
    NameTable,
    Place,
    bundled_embedding,
    bundled_name,
    families_of,
    is_widened,
    plain_model_name,
    plain_name,
    shows_other_blocks,
)
from .content import Content, NamedModule, Types, content_of, recognise, shortened
from .kinds import BIAS_ROLES, rank_of, weight_shape
from .stated import PEFT_KEY, WORD_KEY, bases_in, claims_of, json_in, peft_metadata

_PLAIN = re.compile(r"[\w.]+")
"""A pattern in peft's configuration that is a name or the end of one."""
_BRIEF = re.compile(r"(?=.{1,200}$)(?!([^*(]*[*(]){4})([\w.^$|()]|\.\*|\\\.|\[\w+\])+")
"""Another pattern there: a regular expression with few ways to match, since one from a stranger's file may never end."""


@dataclass(frozen=True, eq=False)
class Entry(NamedModule):
    """One adapted module in a file. Other than in a NamedModule, `part` is the part of the family's model, e.g. "denoiser"."""

    kind: str
    """The kind of adapter, one of kinds.KINDS."""
    place: Place
    """The weight that the entry changes."""

    @cached_property
    def modules(self) -> tuple[ModuleId, ...]:
        """The modules whose weights the entry changes."""
        return self.place.modules

    @cached_property
    def rank(self) -> int | None:
        """The rank that alpha is divided by; None for a kind without a rank."""
        return rank_of(self.kind, self.shapes)

    @property
    def is_plain(self) -> bool:
        """Whether the entry is a plain LoRA, without a bias."""
        return self.kind in ("lora", "locon") and not self.changes_bias

    @property
    def changes_bias(self) -> bool:
        """Whether the entry changes the bias, with or without the weight."""
        return self.bias_size is not None

    @property
    def bias_size(self) -> int | None:
        """The size of the bias that the entry changes, None if it changes none."""
        return next((self.shapes[role][0] for role in BIAS_ROLES if role in self.shapes), None)

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        """The shape of the weight that the entry changes, None if the file doesn't show it."""
        return weight_shape(self.kind, self.shapes)


def has_pefts_magnitude(entry: Entry) -> bool:
    """Check that an entry is a DoRA whose magnitudes have peft's name, and so peft's meaning."""
    key = entry.keys.get("dora", "")
    return "lora_magnitude_vector" in key or key.endswith(".magnitude")


@lru_cache(maxsize=1 << 16)
def _entry(family: str, module: NamedModule) -> Entry:
    place = NAME_TABLES[family].locate(module.part, module.path)
    kind, keys, shapes = module.kind or "", module.keys, module.shapes
    return Entry(module.name, module.scheme, place.part, module.path, kind, keys, shapes, place)


class LoraNames:
    """A LoRA, described by its names, shapes and metadata."""

    family: str
    """The model family that the LoRA is for, a name in tensor_names.NAME_TABLES."""
    metadata: dict[str, str]
    name: str
    """The name of the LoRA in messages: the file's path, if it was read from a file."""
    _found: Content | None

    def __post_init__(self, found: Content | None) -> None:
        """Keep the content that `recognise` has `found`, so that the tensors are not grouped twice."""
        object.__setattr__(self, "_found", found)

    @cached_property
    def types(self) -> Types:
        """torch's name of the type, and the shape, of each tensor by name."""
        raise NotImplementedError

    @cached_property
    def content(self) -> Content:
        """The tensors, grouped by the meaning of their names."""
        return self._found or content_of(self.types, (self.family,))

    @property
    def identity(self) -> Identity:
        """The published models that have all modules of the LoRA, in the same shapes."""
        return self.content.identity

    @cached_property
    def table(self) -> NameTable:
        """The names of the model's modules in every scheme, for the model that the LoRA's modules suggest."""
        table = NAME_TABLES[self.family]
        if not table.is_unet or self.identity.models:
            return table
        paths = (module.path for module in self.content.modules if module.part == "denoiser")
        return table.for_other_blocks() if shows_other_blocks(paths) else table

    @cached_property
    def misfits(self) -> tuple[str, ...]:
        """The names of the modules that the nearest published model lacks, or has in another shape; empty if a model fits."""
        places = set(self.identity.misfits)
        return tuple(module.name for module in self.content.modules if (module.part, module.path) in places)

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The adapted modules, in the file's order."""
        return tuple(_entry(self.family, module) for module in self.content.modules if module.kind)

    @property
    def embedding_keys(self) -> tuple[str, ...]:
        """The names of the tensors that hold textual-inversion embeddings."""
        return self.content.embedding_keys

    @property
    def widened(self) -> tuple[Entry, ...]:
        """The modules with more inputs than in the family's model, for a control image beside the latents."""
        shapes = ((entry, entry.weight_shape) for entry in self.entries if entry.part == "denoiser")
        return tuple(entry for entry, shape in shapes if shape and is_widened(self.family, entry.path, shape))

    @cached_property
    def unknown_keys(self) -> tuple[str, ...]:
        """The names of tensors that are not recognised, or whose module lacks a tensor or has mismatched shapes."""
        broken = (key for module in self.content.modules if not module.kind for key in module.keys.values())
        return (*self.content.unrecognised_keys, *broken)

    @cached_property
    def base_metadata(self) -> dict[str, str]:
        """The metadata for the base model that the tensors fit, by key. The architecture is without the adapter's kind."""
        return NAME_TABLES[self.family].metadata_of(self.identity.models)

    @property
    def listings(self) -> list[Listing]:
        """What to state about the published models that the tensors fit, in the editions that the metadata name."""
        table = NAME_TABLES[self.family].listings
        names = [*bases_in(self.metadata).values(), self.metadata.get("ss_sd_model_name", "")]
        plain = [plain_model_name(name) for name in names]
        return [table[model].of(plain) for model in self.identity.models if model in table]

    @property
    def true_metadata(self) -> dict[str, str]:
        """The metadata, with the base model corrected if they name another family or another published model."""
        metadata, claims = dict(self.metadata), claims_of(self.metadata)
        of_models = {key for one in NAME_TABLES[self.family].listings.values() for key in one.metadata}
        for key in self.base_metadata.keys() & claims.keys():
            right = self.base_metadata[key]
            value, slash, kind = metadata[key].partition("/")
            is_told = key in of_models and self.identity.verdict == "certain"
            if claims[key] != self.family or (is_told and plain_name(value) != plain_name(right)):
                metadata[key] = right + slash + kind
        return metadata

    @property
    def scheme(self) -> str:
        """The naming scheme of most modules; "kohya" for a file without modules."""
        return Counter(entry.scheme for entry in self.entries).most_common(1)[0][0] if self.entries else "kohya"

    @property
    def kind(self) -> str:
        """The kind of adapter, one of kinds.KINDS or "mixed"; a LoRA with some convolutions is "locon"."""
        kinds = {entry.kind for entry in self.entries} or ({"embedding"} if self.embedding_keys else set())
        if kinds == {"lora", "locon"}:
            return "locon"
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def type_name(self) -> str:
        """torch's name of the type of most tensors, ignoring single numbers such as alphas."""
        return Counter([name for name, shape in self.types.values() if shape] or ["float32"]).most_common(1)[0][0]

    @cached_property
    def _peft_config(self) -> dict[str, Any]:
        return json_in(self.metadata, PEFT_KEY, dict)

    @cached_property
    def other_models(self) -> tuple[str, ...]:
        """The other families and models that the LoRA may be for, if the metadata do not decide between them.

        They are those that its modules fit too, or that have the same names if no model fits.
        """
        identity = self.identity
        fitting = (*identity.families, *identity.unsupported_models)
        if not self.is_known:
            fitting = tuple(families_of(self.content.outlines))
        elif identity.first_blocks and not identity.unsupported_models:
            fitting += ("a smaller model with the same blocks",)
        is_told = {*claims_of(self.metadata).values()} & {self.family, *fitting}
        return () if is_told else tuple(one for one in fitting if one != self.family)

    @property
    def is_known(self) -> bool:
        """Whether a published model has all modules of the LoRA, or most of them. Otherwise only their names are known."""
        return bool(self.identity.models or self.identity.is_near)

    def scale_in_config(self, entry: Entry) -> float | None:
        """Return the factor on a module's change from peft's configuration; None if it has none or the file has an alpha."""
        if "alpha" in entry.keys:
            return None
        config = self._peft_config
        # `save_lora_adapter` of diffusers' denoisers writes the names and this configuration without a prefix.
        prefix, dot, path = ("", "", entry.name) if entry.scheme == "bare" else entry.name.partition(".")
        path = path.removeprefix("model.") if prefix == "base_model" else path

        def number(name: str, patterns: str) -> float | None:
            by_path = config.get(prefix + dot + patterns)
            found = config.get(prefix + dot + name)
            if isinstance(by_path, dict):
                matching = (value for pattern, value in by_path.items() if self._matches(pattern, path))
                found = next(matching, found)
            return float(found) if isinstance(found, (int, float)) else None

        is_lora = entry.kind in ("lora", "locon", "dora")
        alpha = number("lora_alpha" if is_lora else "alpha", "alpha_pattern")
        rank = entry.rank or number("r", "rank_pattern")
        if alpha is None or not rank:
            return None
        # rsLoRA (arXiv:2312.03732) divides by the square root of the rank.
        return alpha / (math.sqrt(rank) if config.get(prefix + dot + "use_rslora") is True else rank)

    def _matches(self, pattern: str, path: str) -> bool:
        """Return whether a pattern in peft's configuration, a regular expression, matches the end of a path as in peft.

        Raises UnmatchedKeys for one that could take too long, or that is none.
        """
        if _PLAIN.fullmatch(pattern):
            return f".{path}".endswith(f".{pattern}")
        try:
            if _BRIEF.fullmatch(pattern):
                return re.match(rf"(.*\.)?({pattern})$", path) is not None
        except re.error:
            pass
        raise UnmatchedKeys(
            f"{self.name}: its alphas are given by the pattern {shortened(pattern)!r}, which is not understood"
        )


@dataclass(frozen=True, eq=False)
class LoraHeader(LoraNames):
    """A LoRA file without its tensors. Only the header and, on access, the alphas are read."""

    family: str
    metadata: dict[str, str]
    file: Header = field(repr=False)
    name: str
    found: InitVar[Content | None] = None
    """The meaning of the tensors' names, if it is known already."""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "LoraHeader":
        """Read the header of a LoRA file.

        Raises BadFile when it is damaged, UnknownFamily when it is not a LoRA or its family is unknown.
        """
        file = Header.open(path)
        metadata = peft_metadata(file.path) | file.metadata
        family, content = recognise(file.types, metadata, str(file.path))
        return cls(family, metadata, file, str(file.path), content)

    @cached_property
    def types(self) -> Types:
        """torch's name of the type, and the shape, of each tensor by name."""
        return self.file.types

    def alphas(self) -> list[float | None]:
        """Read the alpha of each entry that has a rank; None if neither the file nor peft's configuration has one."""
        ranked = [entry for entry in self.entries if entry.rank is not None]
        numbers = self.file.numbers(entry.keys["alpha"] for entry in ranked if "alpha" in entry.keys)
        found = []
        for entry in ranked:
            scale = self.scale_in_config(entry)
            alpha = numbers[entry.keys["alpha"]] if "alpha" in entry.keys else None
            found.append(alpha if scale is None else scale * (entry.rank or 0))
        return found


def word_of(lora: LoraNames, key: str) -> str:
    """Return the word of an embedding's tensor, one of the file's `embedding_keys`."""
    return bundled_embedding(bundled_name(key)) or lora.metadata.get(WORD_KEY) or Path(lora.name).stem
