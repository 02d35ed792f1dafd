"""Interpret the names, shapes and metadata of a LoRA file, without reading tensors and without torch.

`LoraHeader` reads only these; `LoraFile` in file.py has the tensors too.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BadFile, NoLora, UnknownFamily, UnmatchedKeys, counted
from ..storage.files import read_json
from ..storage.header import Header
from ..storage.plain_values import parse_json
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
    families_of_embedding,
    identify,
    is_published,
    is_text_path,
    is_widened,
    model_named,
    other_model,
    parse_key,
    plain_model_name,
    plain_name,
    shows_other_blocks,
    vectors_in,
)
from .kinds import BIAS_DIFFERENCES, BIAS_ROLES, KINDS, kind_of, rank_of, weight_shape

Types = Mapping[str, tuple[str, tuple[int, ...]]]
"""torch's name of the type, and the shape, of each tensor by name."""
MOST_TENSORS = 20_000
"""The most tensors in a LoRA. The largest real ones have half as many, and more small tensors would take minutes."""
PHRASE_KEY = "modelspec.trigger_phrase"
"""The metadata key of a LoRA's trigger words."""
WORD_KEY = "facelora.word"
"""The metadata key of an embedding's word in prompts."""
SUBJECT_KEY, AGREED = "facelora.subject", "real person, agreed"
"""The metadata key and value which state that a LoRA is of a real person who has agreed, as the user has confirmed."""
UNTIL_KEY = "facelora.agreed_until"
"""The metadata key of the last day of the agreement, such as 2036-11-30."""
PEFT_KEY = "lora_adapter_metadata"
"""The metadata key of peft's configuration."""
_PLAIN = re.compile(r"[\w.]+")
"""A pattern in peft's configuration that is a name or the end of one."""
_BRIEF = re.compile(r"(?=.{1,200}$)(?!([^*(]*[*(]){4})([\w.^$|()]|\.\*|\\\.|\[\w+\])+")
"""Another pattern there: a regular expression with few ways to match, since one from a stranger's file may never end."""
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class NamedModule:
    """The tensors of a file that belong to one module, independent of the family."""

    name: str
    """The module's name in the file, without the suffixes of its tensors."""
    scheme: str
    """The naming scheme of that name."""
    part: str
    """The part of the model, e.g. "denoiser", that the name's prefix states."""
    path: str
    """The dotted path in the name, in the original or diffusers' naming."""
    kind: str | None
    """The kind of adapter, one of kinds.KINDS; None if the tensors don't form one."""
    keys: Mapping[str, str]
    """The name of each tensor in the file, by its role."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shape of each tensor, by its role."""

    @cached_property
    def known_shape(self) -> tuple[int, ...] | None:
        """The shape of the changed weight, (out, 0) if the file only shows the outputs, None for a broken module."""
        if self.kind in ("oft", "boft"):
            return (self.shapes["oft_blocks"][-3] * self.shapes["oft_blocks"][-1], 0)
        if self.kind == "bias":
            return (next(self.shapes[role][0] for role in BIAS_ROLES if role in self.shapes), 0)
        return weight_shape(self.kind, self.shapes) if self.kind else None


@dataclass(frozen=True)
class Content:
    """The tensors of a file, grouped by the meaning of their names."""

    claims: tuple[str, ...]
    """The families and models that the metadata name (`claims_of`), which decide between models that are equally near."""
    modules: tuple[NamedModule, ...]
    """The modules in the file's order."""
    embedding_keys: tuple[str, ...]
    """The names of the tensors that hold textual-inversion embeddings."""
    unrecognised_keys: tuple[str, ...]
    """The names of tensors that belong to neither."""

    @property
    def places(self) -> list[tuple[str, str, tuple[int, ...] | None]]:
        """The (part, path, known shape of the weight) of each module, to look up in the tables of models."""
        return [(module.part, module.path, module.known_shape) for module in self.modules]

    @cached_property
    def identity(self) -> Identity:
        """The published models that have all unbroken modules, in the same shapes."""
        biased = {(module.part, module.path) for module in self.modules if module.keys.keys() & BIAS_DIFFERENCES}
        return identify((place for place in self.places if place[2] is not None), self.claims, biased)


_EMBEDDING = "<"
"""The owner of a textual inversion's tensors. No module can have this name: every name that starts so is an embedding's."""


@lru_cache(maxsize=1 << 17)
def _owner(key: str) -> str | None:
    """Return the name of the module that a tensor belongs to, or else _EMBEDDING or None."""
    if vectors_in(key):
        return _EMBEDDING
    parsed = parse_key(key)
    return parsed.module_name if parsed else None


def content_of(types: Types, claims: tuple[str, ...]) -> Content:
    """Group the tensors of a file by the meaning of their names. `claims` are those of `Content`."""
    found: dict[str | None, list[tuple[str, tuple[str, tuple[int, ...]]]]] = {}
    for item in types.items():
        found.setdefault(_owner(item[0]), []).append(item)
    strange = [key for key, _ in found.pop(None, ())]
    embeddings = [key for key, _ in found.pop(_EMBEDDING, ())]
    modules = tuple(_named_module(tuple(tensors)) for tensors in found.values())
    if all(module.shapes.keys() == {"set_weight"} for module in modules):  # Of a checkpoint.
        strange, modules = [*strange, *(key for tensors in found.values() for key, _ in tensors)], ()
    return Content(claims, modules, tuple(embeddings), tuple(strange))


# Most files in a folder have modules with the same names and sizes.
@lru_cache(maxsize=1 << 16)
def _named_module(tensors: tuple[tuple[str, tuple[str, tuple[int, ...]]], ...]) -> NamedModule:
    parsed = [(parse_key(key), key, shape) for key, (_, shape) in tensors]
    keys = {named.role: key for named, key, _ in parsed if named}
    shapes = {named.role: shape for named, _, shape in parsed if named}
    is_complex = any(type_name.startswith("complex") for _, (type_name, _) in tensors)
    named = parsed[0][0]
    assert named is not None
    kind, part = None if is_complex else kind_of(shapes), named.part
    # peft has one prefix for all parts. Only CLIP-G, the second text encoder of all its models, is 1280 wide.
    if part == "denoiser" and is_text_path(named.path) and 1280 in (weight_shape(kind or "", shapes) or ())[:2]:
        part = "text_encoder_2"
    return NamedModule(named.module_name, named.scheme, part, named.path, kind, keys, shapes)


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
        names = [*_bases_in(self.metadata).values(), self.metadata.get("ss_sd_model_name", "")]
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
        return most_common(entry.scheme for entry in self.entries) if self.entries else "kohya"

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
        return most_common([name for name, shape in self.types.values() if shape] or ["float32"])

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
            fitting = tuple(families_of(self.content.places))
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


def recognise(types: Types, metadata: Mapping[str, str], name: str) -> tuple[str, Content]:
    """Return the family of a LoRA with tensors of these names and shapes, and their content.

    `name` is the LoRA's name in messages. Raises UnknownFamily when it is not a LoRA, or its family is unknown. Raises BadFile
    when it has more than MOST_TENSORS tensors.
    """
    if len(types) > MOST_TENSORS:
        raise BadFile(f"{name}: has {len(types):,} tensors, but a LoRA can have at most {MOST_TENSORS:,}")
    content = content_of(types, tuple(claims_of(metadata).values()))
    for key in content.unrecognised_keys:
        if kind := next((kind for end, kind in _UNREAD.items() if re.search(f"{end}$", key)), None):
            what = f"its tensors are those of {kind}, e.g. {shortened(key)!r}"
            raise UnknownFamily(f"{name}: not supported: {what}; known kinds: {', '.join(KINDS)}")
    return _detect_family(content, types, name), content


def _detect_family(content: Content, types: Types, name: str) -> str:
    """Return the family of a published model that has all the modules, or else the family whose names fit best.

    The metadata only break ties, since many tools write them wrong. Raises UnknownFamily when no family has the names of half
    of the modules, or when an unsupported model fits better.
    """
    modules, identity = content.places, content.identity
    fitting = (*identity.families, *identity.unsupported_models)
    claimed = next((claim for claim in content.claims if claim in fitting), next(iter(content.claims), None))
    if other := _unsupported_model(content, claimed):
        raise UnknownFamily(f"{name}: is for {other}, which is not supported; known: {', '.join(NAME_TABLES)}")
    candidates = list(identity.families)
    if identity.is_near and identity.nearest_family:
        candidates = [identity.nearest_family]
    if len(candidates) != 1:
        candidates = families_of(modules, candidates or None) or candidates
    if not candidates and types and len(content.embedding_keys) == len(types):
        candidates = families_of_embedding({vectors_in(key) or "": shape for key, (_, shape) in types.items()})
    if not candidates:
        example = shortened(next(iter(types), ""))
        if not modules:
            what = _what_else(types) or f"no adapter found in its {counted(len(types), 'tensor')}, e.g. {example!r}"
            raise NoLora(f"{name}: not a LoRA: {what}")
        raise UnknownFamily(
            f"{name}: no family matches its {len(types)} keys, e.g. {example!r}; known: {', '.join(NAME_TABLES)}"
        )
    by_names = not identity.models and not identity.is_near

    def strange_in(family: str) -> list[str]:
        return [path for part, path, _ in modules if by_names and not is_published(family, part, path)]

    most = max(len(modules) / 2, 10)  # Small custom models may have ten modules with unpublished names.
    family = next((one for one in candidates if len(strange_in(one)) <= most), candidates[0])
    if claimed and claimed in (identity.families or candidates):
        family = claimed
    strange = strange_in(family)
    if len(strange) > most:
        raise UnknownFamily(
            f"{name}: not recognised: its module names are most like those of {family}, which lacks {len(strange)} of "
            f"{len(modules)}, e.g. {shortened(strange[0])!r}; known: {', '.join(NAME_TABLES)}"
        )
    return family


def _unsupported_model(content: Content, claimed: str | None) -> str | None:
    """Return the name of the unsupported model that a file is for; None for another file."""
    identity = content.identity
    if claimed in identity.unsupported_models:
        return claimed
    if identity.models:
        return None if identity.families else " or ".join(identity.models)
    if identity.is_near:
        return None if identity.nearest_family else identity.nearest
    return other_model(content.places)


_UNREAD = {
    r"\.oft_R\.weight": "OFT v2 (peft, OneTrainer)",
    r"\.on_input": "IA3 (LyCORIS)",
    r"\.a1\.weight": "GLoRA (LyCORIS)",
    r"\.ia3_l(\.\w+)?": "IA3 (peft)",
    r"\.p?vera_(lambda_[bd]|[AB])(\.\w+)?": "VeRA (peft)",
    r"\.boft_[Rs](\.\w+)?": "BOFT (peft)",
    r"\.fourierft_spectrum(\.\w+)?": "FourierFT (peft)",
    r"\.hra_u(\.\w+)?": "HRA (peft)",
    r"\.lora_monteclora_sampler\..+": "MonteCLoRA (peft)",
}
"""Kinds of adapters that are not read, by patterns of the ends of names that only these have."""


def _what_else(types: Types) -> str | None:
    """Describe what a file without an adapter's tensors contains instead; None if its names don't show it."""
    if not types:
        return "it has no tensors"
    if any(re.fullmatch(r"(unet|text_encoder):\d+:(up|down)", key) for key in types):
        return "its modules are numbered instead of named (cloneofsimo/lora, 2022), which is not read any more"
    if words := [shape[-1] for key, (_, shape) in types.items() if shape and vectors_in(key)]:
        return f"its vectors of words are {words[0]} wide, which no supported text encoder has"
    if key := next((key for key in types if "lora" in key.lower()), None):
        return f"{shortened(key)!r} does not end like a LoRA's tensor, such as .lora_down.weight or .lora_A.weight"
    return None


def claims_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the family that each metadata value names, by key, the best evidence first. Unknown names are left out.

    For a model without a family, it is the model's title.
    """
    return {key: family for key, name in _bases_in(metadata).items() if (family := model_named(name))}


def _bases_in(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the name of the base model in each metadata value that has one, by key."""
    bases = (base for key, base in json_in(metadata, PEFT_KEY, dict).items() if key.endswith("base_model_name_or_path"))
    return {
        "ss_base_model_version": metadata.get("ss_base_model_version", ""),
        "modelspec.architecture": metadata.get("modelspec.architecture", "").partition("/")[0],
        PEFT_KEY: str(next(bases, "")),
    }


def json_in(metadata: Mapping[str, str], key: str, kind: type) -> Any:
    """Return the JSON value of type `kind` in a metadata value; an empty one if it is missing, damaged or of another type."""
    try:
        value = parse_json(metadata.get(key, ""))
    except ValueError:
        return kind()
    return value if isinstance(value, kind) else kind()


def word_of(lora: LoraNames, key: str) -> str:
    """Return the word of an embedding's tensor, one of the file's `embedding_keys`."""
    return bundled_embedding(bundled_name(key)) or lora.metadata.get(WORD_KEY) or Path(lora.name).stem


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """Return the trigger words in the metadata, best first: from modelspec and the subsets, then frequent tags."""
    words = trigger_phrases(metadata)
    for dataset in json_in(metadata, "ss_datasets", list):
        subsets = dataset.get("subsets") if isinstance(dataset, dict) else None
        for subset in subsets if isinstance(subsets, list) else []:
            if isinstance(subset, dict):
                words.append(str(subset.get("class_tokens") or ""))
    for tags in json_in(metadata, "ss_tag_frequency", dict).values():
        if isinstance(tags, dict):
            counts = [(tag, count) for tag, count in tags.items() if isinstance(count, int)]
            words += [tag.strip() for tag, _ in sorted(counts, key=lambda pair: -pair[1])[:5]]
    return [word for word in dict.fromkeys(words) if word and word != "None"]


def trigger_phrases(metadata: Mapping[str, str]) -> list[str]:
    """Return the trigger phrases in modelspec's metadata. A merged LoRA has several."""
    return [phrase for word in metadata.get(PHRASE_KEY, "").split(",") if (phrase := word.strip())]


def peft_metadata(path: Path) -> dict[str, str]:
    """Read the configuration that peft writes beside its file, in diffusers' metadata format; empty for other files."""
    beside = path.with_name("adapter_config.json")
    if path.name != "adapter_model.safetensors" or not beside.exists():
        return {}
    try:
        config = read_json(beside)
    except BadFile as error:
        raise BadFile(f"{error}; it contains the alpha of {path.name}") from None
    named = {f"base_model.{key}": value for key, value in config.items()} if isinstance(config, dict) else {}
    return {PEFT_KEY: json.dumps(named)}


def most_common(values: Iterable[_T]) -> _T:
    """Return the most common value, the first one of a tie. `values` must not be empty."""
    return Counter(values).most_common(1)[0][0]


def shortened(name: str) -> str:
    """Shorten the name of a tensor or module for a message. Only damaged files have names that are too long."""
    return name if len(name) <= 120 else f"{name[:117]}..."
