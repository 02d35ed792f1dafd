"""Group the tensors of a LoRA file by the meaning of their names, and recognise the family that they fit."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ..errors import BadFile, NoLora, UnknownFamily, counted
from ..tensor_names import (
    NAME_TABLES,
    Identity,
    families_of,
    families_of_embedding,
    identify,
    is_published,
    is_text_path,
    other_model,
    parse_key,
    vectors_in,
)
from .kinds import BIAS_DIFFERENCES, BIAS_ROLES, KINDS, kind_of, weight_shape
from .stated import claims_of

Types = Mapping[str, tuple[str, tuple[int, ...]]]
"""torch's name of the type, and the shape, of each tensor by name."""
MOST_TENSORS = 20_000
"""The most tensors in a LoRA. The largest real ones have half as many, and more small tensors would take minutes."""


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
    def outlines(self) -> list[tuple[str, str, tuple[int, ...] | None]]:
        """The (part, path, known shape of the weight) of each module, to look up in the tables of models."""
        return [(module.part, module.path, module.known_shape) for module in self.modules]

    @cached_property
    def identity(self) -> Identity:
        """The published models that have all unbroken modules, in the same shapes."""
        biased = {(module.part, module.path) for module in self.modules if module.keys.keys() & BIAS_DIFFERENCES}
        return identify((outline for outline in self.outlines if outline[2] is not None), self.claims, biased)


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
    modules, identity = content.outlines, content.identity
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
    return other_model(content.outlines)


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


def shortened(name: str) -> str:
    """Shorten the name of a tensor or module for a message. Only damaged files have names that are too long."""
    return name if len(name) <= 120 else f"{name[:117]}..."
