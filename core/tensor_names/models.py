"""Which published model a LoRA is for: every one of its modules must be in the model, with a weight of the same shape.

The tables are those of model_tables.json, made by tools/model_tables.py, also of the models that are not trained here.
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


class Row(NamedTuple):
    """Modules of one variant of a model whose paths differ in numbers alone."""

    variant: int
    numbers: tuple[tuple[int, int], ...]
    """The first and the last of each number in the path."""
    shape: Shape


@dataclass(frozen=True)
class Variant:
    """One published size or kind of a model."""

    title: str
    family: str | None
    """The family that it belongs to, a name in NAME_TABLES; None where it is not trained here."""
    claims: frozenset[str]
    """What metadata call a model that is of no family."""


@dataclass(frozen=True)
class Identity:
    """The published models that a LoRA fits, or that it fits best."""

    models: tuple[str, ...]
    """The titles of the models that have all its modules in these shapes; none: it is unknown."""
    families: tuple[str, ...]
    """The families among them, names in NAME_TABLES."""
    nearest: str | None = None
    """Of an unknown LoRA: the model that has most of its modules; None where no model has one of them."""
    nearest_family: str | None = None
    """The family of the nearest model; None where it is not trained here."""
    misfits: tuple[str, ...] = ()
    """The paths of the modules that the nearest model has not, or has in another shape."""

    @property
    def verdict(self) -> str:
        """ "certain", "ambiguous" where several models fit, or "unknown" where none does."""
        return ("unknown", "certain", "ambiguous")[min(len(self.models), 2)]

    def of_claim(self, metadata_names: Iterable[str]) -> str | None:
        """The title among the models that metadata name by one of these, None where they name none of them."""
        named = {name.lower() for name in metadata_names}
        claimed = (variant.title for variant in _tables()[0] if variant.claims & named)
        return next((title for title in claimed if title in self.models), None)


def identify(modules: Iterable[tuple[str, str, Shape | None]]) -> Identity:
    """The models that have all the modules: (part, path, shape of the weight, None where the file does not tell).

    A path may be the original model's or diffusers', with dots or with "_" in their place.
    """
    variants, _ = _tables()
    fitting: Counter[int] = Counter()
    having: list[tuple[str, set[int]]] = []
    for part, path, shape in modules:
        found = {row.variant for row in _rows(part, path) if shape is None or _same_weight(row.shape, shape)}
        fitting.update(found)
        having.append((path, found))
    whole = [variant for variant, count in fitting.items() if count == len(having)]
    if whole:
        fits = [variants[number] for number in sorted(whole)]
        families = dict.fromkeys(variant.family for variant in fits if variant.family)
        return Identity(tuple(dict.fromkeys(variant.title for variant in fits)), tuple(families))
    if not fitting:
        return Identity((), ())
    # Of two that are equally near, the family of this project comes first in the tables.
    nearest = max(sorted(fitting), key=lambda number: fitting[number])
    misfits = [path for path, found in having if nearest not in found]
    title, family = variants[nearest].title, variants[nearest].family
    return Identity((), (), title, family, tuple(misfits))


def is_published(family: str, part: str, path: str) -> bool:
    """Whether a published model of the family has a module of that path, in whatever shape."""
    variants, _ = _tables()
    return any(variants[row.variant].family == family for row in _rows(part, path))


@lru_cache(1 << 16)
def _rows(part: str, path: str) -> tuple[Row, ...]:
    """The rows of the tables that the path is in."""
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
    """The path with "_" for each dot and "#" for each number or run of numbers, and these: `b.0-3.q` is b_#_q, (0, 3).

    A word of numbers that do not rise is a name: Z-Image has an `all_x_embedder.2-1`.
    """
    words, numbers = [], []
    for word in path.replace(".", "_").split("_"):
        run = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", word, re.ASCII)
        first, last = (int(run[1]), int(run[2] or run[1])) if run else (1, 0)
        if first <= last:
            numbers.append((first, last))
            word = "#"
        words.append(word)
    return "_".join(words), tuple(numbers)


@cache
def _tables() -> tuple[tuple[Variant, ...], dict[tuple[bool, str], list[Row]]]:
    """The variants, and the rows of all by whether they are of a text encoder and by the template of their paths."""
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
