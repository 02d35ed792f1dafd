"""Parse the strengths of a LoRA's blocks, given by name or as a list for the LoRA Block Weight extension."""

import math
import re
from collections.abc import Iterator

from ..errors import BadConfig
from ..tensor_names import NAME_TABLES
from .file import LoraFile
from .names import Entry


def _labels(text: str) -> tuple[str, ...]:
    """Expand the ranges in a list of labels: `M00 OUT03-05` means M00, OUT03, OUT04 and OUT05."""
    found = []
    for word in text.split():
        name, first, last = re.fullmatch(r"([A-Z]+)(\d*)(?:-(\d+))?", word).groups()  # pyright: ignore
        found += [f"{name}{i:02}" for i in range(int(first), int(last or first) + 1)] if first else [name]
    return tuple(found)


BLOCK_LISTS: dict[tuple[int, str], tuple[str, ...]] = {
    (len(labels), family.name): labels for family in NAME_TABLES.values() for labels in map(_labels, family.block_lists)
}
"""The labels of the blocks in a list of numbers, by (length of the list, family)."""


def block_strengths(lora: LoraFile, text: str) -> dict[str, float]:
    """Return the strength factor of each entry of the LoRA, by the entry's name; 1 if the text does not mention it.

    The text is either a list of numbers for BLOCK_LISTS, or `BLOCK=NUMBER` items separated by commas or line breaks. BLOCK
    is the beginning of a module's dotted path (`up_blocks`, `up_blocks.1.attentions.0`), a part (`text_encoder`), or a label
    of the lists (`BASE`, `IN04`, `M00`, `OUT05`). The longest match is used. A part of the model that this LoRA doesn't change
    may be named too. Raises BadConfig for anything else.
    """
    items = [item.strip() for item in re.split(r"[,\n]", text) if item.strip()]
    named = dict.fromkeys(name for entry in lora.entries for name in _blocks_of(entry))
    if items and not any("=" in item for item in items):
        given = _listed(lora, items)
    else:
        given = {}
        for item in items:
            name, _, number = (part.strip() for part in item.partition("="))
            if name not in named and name not in ("BASE", *NAME_TABLES[lora.family].kohya_prefixes):
                shown = ", ".join(name for name in named if name.count(".") < 2)
                raise BadConfig(f"block_weights: {lora.name} has no block {name!r}; choose from {shown}")
            given[name] = _factor(number, item)
    return {
        entry.name: next((given[name] for name in reversed(list(_blocks_of(entry))) if name in given), 1.0)
        for entry in lora.entries
    }


def _listed(lora: LoraFile, items: list[str]) -> dict[str, float]:
    labels = BLOCK_LISTS.get((len(items), lora.family))
    if labels is None:
        counts = " or ".join(str(count) for count, family in BLOCK_LISTS if family == lora.family)
        known = f"a list for {lora.family} has {counts}" if counts else f"{lora.family} does not support lists"
        raise BadConfig(f"block_weights: {len(items)} numbers; {known}, or give BLOCK=NUMBER")
    return {label: _factor(item, item) for label, item in zip(labels, items, strict=True)}


def _factor(text: str, item: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadConfig(f"block_weights: {item!r} is not BLOCK=NUMBER, e.g. up_blocks.1=0.5") from None
    return number


def _blocks_of(entry: Entry) -> Iterator[str]:
    """Yield the names of the blocks that an entry is in, the largest block first."""
    if entry.part != "denoiser":
        yield from ("BASE", entry.part)
        if layer := re.search(r"layers\.\d+", entry.modules[0][1]):
            yield f"{entry.part}.{layer[0]}"
        return
    words = entry.modules[0][1].split(".")
    yield from (".".join(words[: count + 1]) for count in range(len(words)))
    if match := re.match(r"(input|middle|output)_blocks?\.(\d+)", entry.place.fusion.original):
        side = {"input": "IN", "middle": "M", "output": "OUT"}[match[1]]
        yield "M00" if side == "M" else f"{side}{int(match[2]):02}"
