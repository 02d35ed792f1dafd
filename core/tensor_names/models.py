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
    stranger: str | None = None
    """The model without a family that the LoRA is for.

    Either no model of a family fits, or it is the only one whose changed blocks the LoRA covers completely.
    """

    @property
    def verdict(self) -> str:
        """The result: "certain", "ambiguous" when several models fit, or "unknown" when none does."""
        return ("unknown", "certain", "ambiguous")[min(len(self.models), 2)]

    def of_claim(self, metadata_names: Iterable[str]) -> str | None:
        """Return the title of the fitting model that has one of these names in metadata; None if no name matches."""
        named = {name.lower() for name in metadata_names}
        claimed = (variant.title for variant in _tables().variants if variant.claims & named)
        return next((title for title in claimed if title in self.models), None)


def identify(
    modules: Iterable[tuple[str, str, Shape | None]],
    claimed: str | None = None,
    biased: Collection[tuple[str, str]] = (),
) -> Identity:
    """Find the models that have all the modules (part, path, shape of the weight, or None if the file doesn't show it).

    `biased` are the (part, path) of the modules whose bias is changed. A path may be in the original model's or in diffusers'
    naming, and for a model without a family also have "_" for its dots. If no model fits and several are equally near, one
    of the family `claimed` is preferred. A shape of (out, 0) means that the inputs are unknown.
    """
    variants = _tables().variants
    fitting: Counter[int] = Counter()
    having: list[tuple[tuple[str, str], frozenset[int]]] = []
    for part, path, shape in modules:
        found = _having(part, path, shape, (part, path) in biased)
        fitting.update(found)
        having.append(((part, path), found))
    whole = [variant for variant, count in fitting.items() if count == len(having)]
    if whole:
        fits = [variants[number] for number in sorted(whole)]
        families = dict.fromkeys(variant.family for variant in fits if variant.family)
        titles = tuple(dict.fromkeys(variant.title for variant in fits))
        stranger = None if families else " or ".join(titles)
        # All programs treat a smaller UNet, such as SSD-1B, like its family (SDXL).
        if families and not any(place[1].startswith(_OF_UNETS) for place, _ in having):
            places = {place for place, _ in having}
            exact = [variants[number] for number in whole if _has_no_more(number, places)]
            if exact and not any(variant.family for variant in exact):
                stranger = " or ".join(dict.fromkeys(variant.title for variant in exact))
        return Identity(titles, tuple(families), stranger=stranger)
    if not fitting:
        return Identity((), ())
    # The models that this project can train come first in the tables, and so win a tie.
    nearest = max(sorted(fitting), key=lambda n: (fitting[n], claimed is not None and variants[n].family == claimed))
    misfits = [place for place, found in having if nearest not in found]
    title, family = variants[nearest].title, variants[nearest].family
    return Identity((), (), title, family, tuple(misfits), 2 * len(misfits) < len(having))


def _has_no_more(variant: int, places: Collection[tuple[str, str]]) -> bool:
    """Check that the places include every block of a variant that has their modules, and that there are several blocks."""
    seen = Counter(row for place in places for row in _rows(*place) if row.variant == variant)
    return all(count == math.prod(last - first + 1 for first, last in row.numbers) > 1 for row, count in seen.items())


@lru_cache(1 << 16)
def is_published(family: str, part: str, path: str) -> bool:
    """Check that a published model of the family has a module with that path, in any shape."""
    variants = _tables().variants
    return any(variants[row.variant].family == family for row in _rows(part, path))


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
    """Return the rows of the tables that include the path."""
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
        variants.append(Variant(model["title"], model["family"], frozenset(model["claims"])))
    words = frozenset(word for path in paths for word in path.split(".") if "_" in word)
    return _Tables(tuple(variants), rows, words, 1 + max(word.count("_") for word in words))
