"""What other trainers ship for a face, beside our recipes: `python -m lab.anchors` writes the tables of docs/training.md.

anchors.json has a row for each: the families, the trainer with its date, where it is, rank and alpha (null: they are equal),
learning rate, schedule, steps, photos a step, pixels, and the photos that it is for (null: not known).
"""

import json
from pathlib import Path
from typing import Any

from core.config import TrainConfig, config_from
from core.models.families import FAMILIES
from core.training.recipes import RECIPES, recipe_settings, travel
from tools.tables import table, write_tables

DATA = Path(__file__).with_suffix(".json")
DOCUMENT = Path(__file__).parent.parent / "docs" / "training.md"
PHOTOS = 15
"""The photos of the set that our recipes are shown for."""
COMPARABLE = 0.25
"""The least alpha / rank of a trainer to compare with. Below it, travel says too little."""


def anchors() -> list[dict[str, Any]]:
    """Each row of the data as a table of its columns, with what it travels."""
    data = json.loads(DATA.read_text("utf-8"))
    rows = [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]
    names = {"rank": "rank", "alpha": "alpha", "rate": "learning_rate", "schedule": "schedule", "steps": "steps"}
    settings = [{name: row[column] for column, name in names.items() if row[column]} for row in rows]
    return [row | {"travel": travel(TrainConfig(**known))} for row, known in zip(rows, settings, strict=True)]


def travel_of_others(family: str) -> tuple[float, float]:
    """The least and the most travel of the trainers of a family whose alpha / rank can be compared with ours."""
    values = [
        row["travel"]
        for row in anchors()
        if family in row["families"] and (row["alpha"] or 1) >= COMPARABLE * (row["rank"] or 1)
    ]
    return min(values), max(values)


def _rate(rate: float) -> str:
    return f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-")


def others() -> str:
    """The table of the other trainers."""
    rows = [
        (
            ", ".join(FAMILIES[name].title for name in row["families"][:3]) + (" and others" if row["families"][3:] else ""),
            f"{row['trainer']} ({row['source']})", f"{row['rank']}, {row['alpha']:g}" if row["rank"] else "equal",
            _rate(row["rate"]) + ("" if row["schedule"] == "constant" else f", {row['schedule']}"),
            f"{row['steps']:,} × {row['batch']}", row["pixels"] or "–", f"{row['travel']:.3f}",
            f"{row['steps'] * row['batch'] / row['photos']:.0f}" if row["photos"] else "–",
        )
        for row in anchors()
    ]  # fmt: skip
    return table(["base model", "trainer", "rank, alpha", "rate", "steps × batch", "pixels", "travel", "views"], rows)


def ours() -> str:
    """The table of our recipes for PHOTOS photos. Families with equal recipes and anchors share a row."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, family in FAMILIES.items():
        for recipe in RECIPES:
            config = config_from(recipe_settings(recipe, family.recipes, photos=PHOTOS))
            (least, most), reason = travel_of_others(name), family.recipes[recipe].reason
            note = f". {reason}" if reason else ""
            cells = (
                recipe, f"{config.rank}, {config.alpha_for(config.rank):g}",
                _rate(config.learning_rate or 0.0) + ("" if config.schedule == "constant" else f", {config.schedule}"),
                f"{config.steps:,} × {config.batch_size}", str(config.resolution or family.resolution),
                f"{travel(config):.3f}", f"{config.steps * config.batch_size / PHOTOS:.0f}", f"{least:.2f}–{most:.2f}{note}",
            )  # fmt: skip
            groups.setdefault(cells, []).append(family.title)
    header = [
        "base model",
        "recipe",
        "rank, alpha",
        "rate",
        "steps × batch",
        "pixels",
        "travel",
        "views",
        "others' travel",
    ]
    return table(header, [(", ".join(titles), *cells) for cells, titles in groups.items()])


if __name__ == "__main__":
    write_tables(DOCUMENT, {"recipes of others": others(), "our recipes": ours()})
