"""Recognises the published model that a LoRA is for, which has all its modules with weights of the same shapes.

The tables are in model_tables.json, made by tools/model_tables.py, and include models that are not trained here.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

Shape = tuple[int, ...]
_RUN = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?", re.ASCII)


class Row(NamedTuple):
    """The modules of a variant whose paths differ only in numbers."""

    variant: int
    numbers: tuple[tuple[int, int], ...]
    """The first and the last of each number in the path."""
    shape: Shape


@dataclass(frozen=True)
class Variant:
    """A published size or kind of a model."""

    title: str
    family: str | None
    """The family that it belongs to, a name in NAME_TABLES; None when it is not trained here."""
    claims: frozenset[str]
    """The names that metadata have for it, for a model of no family."""


@dataclass(frozen=True)
class Identity:
    """The published models that a LoRA fits, or that it fits best."""

    models: tuple[str, ...]
    """The titles of the models that have all its modules in these shapes; empty for an unknown LoRA."""
    families: tuple[str, ...]
    """The families among them, names in NAME_TABLES."""
    nearest: str | None = None
    """The model that has most of the modules of an unknown LoRA; None when no model has any of them."""
    nearest_family: str | None = None
    """The family of the nearest model; None where it is not trained here."""
    misfits: tuple[str, ...] = ()
    """The paths of the modules that the nearest model lacks, or has in another shape."""

    @property
    def verdict(self) -> str:
        """The result in a word: "certain", "ambiguous" when several models fit, or "unknown" when none does."""
        return ("unknown", "certain", "ambiguous")[min(len(self.models), 2)]

    def of_claim(self, metadata_names: Iterable[str]) -> str | None:
        """The title of the fitting model that metadata call by one of these names; None when they name none."""
        named = {name.lower() for name in metadata_names}
        claimed = (variant.title for variant in _tables()[0] if variant.claims & named)
        return next((title for title in claimed if title in self.models), None)


def identify(modules: Iterable[tuple[str, str, Shape | None]]) -> Identity:
    """The models that have all the modules (part, path, shape of the weight or None when the file does not tell).

    A path may be the original model's or that of diffusers, with dots or with "_" in their place.
    """
    variants, _ = _tables()
    fitting: Counter[int] = Counter()
    having: list[tuple[str, frozenset[int]]] = []
    for part, path, shape in modules:
        found = _having(part, path, shape)
        fitting.update(found)
        having.append((path, found))
    whole = [variant for variant, count in fitting.items() if count == len(having)]
    if whole:
        fits = [variants[number] for number in sorted(whole)]
        families = dict.fromkeys(variant.family for variant in fits if variant.family)
        return Identity(tuple(dict.fromkeys(variant.title for variant in fits)), tuple(families))
    if not fitting:
        return Identity((), ())
    # Models that are trained here come first in the tables, and so win when two are equally near.
    nearest = max(sorted(fitting), key=lambda number: fitting[number])
    misfits = [path for path, found in having if nearest not in found]
    title, family = variants[nearest].title, variants[nearest].family
    return Identity((), (), title, family, tuple(misfits))


@lru_cache(1 << 16)
def is_published(family: str, part: str, path: str) -> bool:
    """Whether a published model of the family has a module with that path, in any shape."""
    variants, _ = _tables()
    return any(variants[row.variant].family == family for row in _rows(part, path))


@lru_cache(1 << 16)
def _having(part: str, path: str, shape: Shape | None) -> frozenset[int]:
    """The numbers of the variants that have the module, with a weight of the shape if one is given."""
    return frozenset(row.variant for row in _rows(part, path) if shape is None or _same_weight(row.shape, shape))


@lru_cache(1 << 16)
def _rows(part: str, path: str) -> tuple[Row, ...]:
    """The rows of the tables that include the path."""
    template, numbers = _template(path)
    is_text = part != "denoiser" or path.startswith(("text_model.", "encoder.block.", "encoder.layers."))
    if is_text:
        template = template.removeprefix("text_model_")
    rows = _tables()[1].get((is_text, template), ())
    return tuple(row for row in rows if all(map(_is_inside, numbers, row.numbers)))


def _is_inside(run: tuple[int, int], whole: tuple[int, int]) -> bool:
    return whole[0] <= run[0] and run[1] <= whole[1]


def _same_weight(shape: Shape, other: Shape) -> bool:
    # 1x1 convolutions may be written as Linear and kernels flattened, so only the sizes count.
    return shape[0] == other[0] and math.prod(shape[1:]) == math.prod(other[1:])


def _template(path: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The path with "_" for each dot and "#" for each number or range, and these numbers: `b.0-3.q` gives b_#_q and (0, 3).

    A falling range is a name and stays, such as Z-Image's `all_x_embedder.2-1`.
    """
    words, numbers = [], []
    for word in path.replace(".", "_").split("_"):
        run = _RUN.fullmatch(word) if word[:1].isdigit() else None
        first, last = (int(run[1]), int(run[2] or run[1])) if run else (1, 0)
        if first <= last:
            numbers.append((first, last))
            word = "#"
        words.append(word)
    return "_".join(words), tuple(numbers)


@cache
def _tables() -> tuple[tuple[Variant, ...], dict[tuple[bool, str], list[Row]]]:
    """The variants, and all rows by (whether they are of a text encoder, template of the path)."""
    data = json.loads(Path(__file__).with_name("model_tables.json").read_text(encoding="utf-8"))
    variants: list[Variant] = []
    rows: dict[tuple[bool, str], list[Row]] = {}

    def add(table: dict[str, list[int]], is_text: bool) -> None:
        for path, shape in table.items():
            template, numbers = _template(path)
            if is_text:
                template = template.removeprefix("text_model_")
            rows.setdefault((is_text, template), []).append(Row(len(variants), numbers, tuple(shape)))

    for model in data["models"]:
        for table in model["denoiser"].values():
            add(table, is_text=False)
        for name in filter(None, model["text"]):
            add(data["text_encoders"][name], is_text=True)
        variants.append(Variant(model["title"], model["family"], frozenset(model["claims"])))
    return tuple(variants), rows
