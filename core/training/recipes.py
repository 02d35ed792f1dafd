"""The settings that a family's recipe comes to, with what else is asked for. Recipes are starting points, not measurements
of this project: each family has its own in its file of core/models/families/."""

import math
from collections.abc import Mapping
from typing import Any

from ..config import TrainConfig
from ..errors import BadConfig
from ..models.families import FAMILIES
from ..models.recipe import RECIPES
from .methods import METHODS

MEASUREMENTS = 8
"""Times that likeness is measured where photos are held out and no samples are asked for."""


def recipe_settings(name: str, family: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings of a recipe with those `given` in their place: steps and learning rate follow a given batch size, the
    rate a given method too.

    BadConfig for a name that is no recipe.
    """
    if name not in RECIPES:
        raise BadConfig(f"recipe {name!r}: choose one of {', '.join(RECIPES)}")
    recipe, given = FAMILIES[family].recipes[name], given or {}
    defaults = {"batch_size": recipe.batch_size, "accumulation": 1, "steps": 1, "method": "lora"}
    checked = TrainConfig(**{name: given.get(name, value) for name, value in defaults.items()})
    photos = checked.batch_size * checked.accumulation
    rate = recipe.rate * photos**0.5 * METHODS[checked.method].rate_factor
    settings = {
        "steps": math.ceil(recipe.photos / photos),
        "batch_size": checked.batch_size,
        "rank": recipe.rank,
        # Two digits are enough. Prodigy finds the rate by itself.
        "learning_rate": None if given.get("optimizer") == "prodigy" else float(f"{rate:.1e}"),
        **(recipe.settings or {}),
        **given,
    }
    if settings.get("hold_out"):
        settings.setdefault("sample_every", max(1, math.ceil(settings["steps"] / MEASUREMENTS)))
    return settings
