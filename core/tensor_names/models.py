"""Recognise the published model that a LoRA is for: the one that has all its modules, with weights of the same shapes.

Where the LoRA changes a bias, the model's module must have one.

tools/model_tables.py writes the tables, model_tables.json. They include models that this project cannot train.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .table import T5_PATHS, is_text_path

Shape = tuple[int, ...]
_OF_UNETS = ("down_blocks.", "mid_block.", "up_blocks.", "input_blocks.", "middle_block.", "output_blocks.")
# Matches a number that is a whole word of a path, between dots or "_"; in the tables it can be a range.
_NUMBER_WORD = re.compile(r"(?<![^._])(0|[1-9]\d{0,3})(?:-(\d{1,4}))?(?![^._])", re.ASCII)


class Row(NamedTuple):
    """The modules of a variant whose paths differ only in numbers."""

    variant: int
    path: str
    """The dotted path with "#" for each number. A text encoder's has no leading `text_model.`."""
    numbers: tuple[tuple[int, int], ...]
    """The range (first, last) of each number in the path."""
    shape: Shape
    has_bias: bool


@dataclass(frozen=True)
class Variant:
    """A published size or version of a model."""

    title: str
    family: str | None
    """Its family, a name in NAME_TABLES; None if this project cannot train it."""
    claims: frozenset[str]
    """Its names in metadata, for a model without a family."""


@dataclass(frozen=True)
class Identity:
    """The published models that a LoRA fits, or the nearest one."""

    models: tuple[str, ...]
    """The titles of the models that have all its modules in these shapes; empty for an unknown LoRA."""
    families: tuple[str, ...]
    """The families of these models, names in NAME_TABLES."""
    nearest: str | None = None
    """The model that has the most modules of an unknown LoRA; None if no model has any of them."""
    nearest_family: str | None = None
    """The family of the nearest model; None if this project cannot train it."""
    misfits: tuple[tuple[str, str], ...] = ()
    """The (part, path) of the modules that the nearest model lacks, or has in another shape."""
    is_near: bool = False
    """Whether the nearest model has more than half of the modules, so that only the others are wrong."""
    first_blocks: int | None = None
    """The number of blocks if a transformer's LoRA has only its first ones, which a smaller model may have too."""

    @property
    def verdict(self) -> str:
        """The result: "certain", "ambiguous" when several models fit or another could, or "unknown" when none does."""
        return "unknown" if not self.models else "ambiguous" if self.models[1:] or self.first_blocks else "certain"

    @property
    def unsupported_models(self) -> tuple[str, ...]:
        """The titles of the fitting models without a family."""
        return tuple(title for title in self.models if title in stranger_names())


def identify(
    modules: Iterable[tuple[str, str, Shape | None]],
    claims: Collection[str] = (),
    biased: Collection[tuple[str, str]] = (),
) -> Identity:
    """Find the models that have all the modules (part, path, shape of the weight, or None if the file doesn't show it).

    `biased` are the (part, path) of the modules whose bias is changed. A path may be in the original model's or in diffusers'
    naming, and for a model without a family also have "_" for its dots. If no model fits and several are equally near, one
    whose family or title is among the `claims` is preferred. A shape of (out, 0) means that the inputs are unknown.
    """
    variants = _tables().variants
    fitting: Counter[int] = Counter()
    having = [((part, path), _having(part, path, shape, (part, path) in biased)) for part, path, shape in modules]
    for found, count in Counter(found for _, found in having).items():
        fitting.update(dict.fromkeys(found, count))
    if whole := [variant for variant, count in fitting.items() if count == len(having)]:
        fits = [variants[number] for number in sorted(whole)]
        families = dict.fromkeys(variant.family for variant in fits if variant.family)
        titles = tuple(dict.fromkeys(variant.title for variant in fits))
        return Identity(titles, tuple(families), first_blocks=_first_blocks(whole[0], [place for place, _ in having]))
    if not fitting:
        return Identity((), ())
    # The models that this project can train come first in the tables, and so win a tie.
    order = sorted(fitting, key=lambda n: (-fitting[n], not {variants[n].family, variants[n].title} & {*claims}, n))
    nearest, title = order[0], variants[order[0]].title
    if variants[nearest].family is None and title not in claims:
        title = " or ".join(dict.fromkeys(variants[n].title for n in order if fitting[n] == fitting[nearest]))
    misfits = [place for place, found in having if nearest not in found]
    return Identity((), (), title, variants[nearest].family, tuple(misfits), 2 * len(misfits) < len(having))


def _first_blocks(variant: int, places: Collection[tuple[str, str]]) -> int | None:
    """Return the number of blocks if the places are only in a variant's first ones, without the last one of any stack.

    One block alone does not count, because LoRAs for tests and experiments have it. UNets have no such stacks.
    """
    stacks: dict[tuple[str, int], set[int]] = {}
    for part, path in places:
        row = next((row for row in _rows(part, path) if row.variant == variant), None)
        if part != "denoiser" or is_text_path(path) or path.startswith(_OF_UNETS) or row is None or not row.numbers:
            return None
        stacks.setdefault((row.path.partition("#")[0], row.numbers[0][1]), set()).add(_template(path)[1][0][0])
    counts = [
        len(blocks) for (_, last), blocks in stacks.items() if blocks == {*range(len(blocks))} and last not in blocks
    ]
    return max(counts, default=0) if len(counts) == len(stacks) and max(counts, default=0) > 1 else None


@cache
def stranger_names() -> dict[str, str]:
    """Return the title of each model without a family, by the title and by its other names in metadata."""
    return {name: v.title for v in _tables().variants if not v.family for name in (v.title, *v.claims)}


@lru_cache(1 << 16)
def is_published(family: str, part: str, path: str) -> bool:
    """Check that a published model of the family has a module with that path, in any shape."""
    variants = _tables().variants
    return any(variants[row.variant].family == family for row in _rows(part, path))


@lru_cache(1 << 16)
def is_widened(family: str, path: str, shape: Shape) -> bool:
    """Check that a weight of this shape has more inputs than in the family's model, for a control image."""
    variants = _tables().variants
    narrower = [row.shape for row in _rows("denoiser", path) if variants[row.variant].family == family]
    fits = any(same_weight(other, shape) for other in narrower)
    return fits and any(other[0] == shape[0] and other[1:] < shape[1:] for other in narrower)


@lru_cache(1 << 16)
def _having(part: str, path: str, shape: Shape | None, has_bias: bool) -> frozenset[int]:
    """Return the indices of the variants that have the module, with the shape if one is given, and with a bias if needed."""
    return frozenset(
        row.variant
        for row in _rows(part, path)
        if (shape is None or same_weight(row.shape, shape)) and row.has_bias >= has_bias
    )


@lru_cache(1 << 16)
def _rows(part: str, path: str) -> tuple[Row, ...]:
    if path.endswith(".linear1_qkv"):
        # XLabs and ComfyUI give this name to the rows of q, k and v in FLUX's linear1, each as wide as the inputs.
        rows = _rows(part, path.removesuffix("_qkv"))
        return tuple(row._replace(shape=(3 * row.shape[1], row.shape[1]), has_bias=False) for row in rows)
    if part == "denoiser" and is_text_path(path):
        part = "text_encoder"
    if part != "denoiser":
        path = path.removeprefix("text_model.")
        part = "" if path.startswith(T5_PATHS) else part
    dotted, numbers = _template(path)
    variants = _tables().variants
    return tuple(
        row
        for row in _tables().rows.get((part, dotted.replace(".", "_")), ())
        if all(low <= first == last <= high for (first, last), (low, high) in zip(numbers, row.numbers, strict=True))
        and (row.path == dotted or variants[row.variant].family is None)
    )


def same_weight(shape: Shape, other: Shape) -> bool:
    """Compare the sizes of two weights, since files may have 1x1 convolutions as Linear layers, and flattened kernels.

    Inputs of size 0 are unknown.
    """
    inputs, others = math.prod(shape[1:]), math.prod(other[1:])
    return shape[0] == other[0] and (inputs == others or 0 in (inputs, others))


@lru_cache(1 << 16)  # Many tables have the same paths.
def _template(path: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Replace the numbers and ranges in a path by "#", and return both: `b.0-3.q.1` gives b.#.q.# and ((0, 3), (1, 1)).

    Only the paths of the tables have ranges. A range that doesn't ascend is a name and is kept, such as Z-Image's
    `all_x_embedder.2-1`.
    """
    numbers: list[tuple[int, int]] = []

    def number(match: re.Match[str]) -> str:
        first, last = int(match[1]), int(match[2] or match[1])
        if match[2] and last <= first:
            return match[0]
        numbers.append((first, last))
        return "#"

    return _NUMBER_WORD.sub(number, path), tuple(numbers)


def compound_words() -> tuple[frozenset[str], int]:
    """Return the components of paths that contain "_" themselves, and the most words, separated by "_", in one of them.

    They are those of the models that have a family, and of the text encoders.
    """
    return _tables().words, _tables().longest


class _Tables(NamedTuple):
    variants: tuple[Variant, ...]
    rows: dict[tuple[str, str], list[Row]]
    """The rows by part and path, with "#" for numbers and "_" for dots."""
    words: frozenset[str]
    longest: int


@cache
def _tables() -> _Tables:
    data = json.loads(Path(__file__).with_name("model_tables.json").read_text(encoding="utf-8"))
    variants: list[Variant] = []
    rows: dict[tuple[str, str], list[Row]] = {}
    paths = {path for encoder in data["text_encoders"].values() for path in encoder}

    def add(table: dict[str, list[Any]], part: str) -> None:
        for path, (*shape, last) in table.items():
            name, numbers = _template(path.removeprefix("text_model.") if part != "denoiser" else path)
            of_part = "" if part != "denoiser" and path.startswith(T5_PATHS) else part
            rows.setdefault((of_part, name.replace(".", "_")), []).append(
                Row(len(variants), name, numbers, (*shape, *[last] * (last != "bias")), last == "bias")
            )

    for model in data["models"]:
        for table in model["denoiser"].values():
            add(table, "denoiser")
            paths |= table.keys() if model["family"] else set()
        for part, name in zip(("text_encoder", "text_encoder_2", "text_encoder_3"), model["text"], strict=False):
            add(data["text_encoders"].get(name, {}), part)
        add(model.get("control", {}), "denoiser")
        variants.append(Variant(model["title"], model["family"], frozenset(model["claims"])))
    words = frozenset(word for path in paths for word in path.split(".") if "_" in word)
    return _Tables(tuple(variants), rows, words, 1 + max(word.count("_") for word in words))
