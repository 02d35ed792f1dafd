"""The settings that a recipe stands for.

Recipes are starting points from other projects, not measurements of this one. Each family has its own, in its file in
core/models/families/.
"""

import math
from collections.abc import Mapping
from typing import Any

from ..config import TrainConfig
from ..errors import BadConfig
from ..models.families import FAMILIES
from ..models.recipe import RECIPES
from .methods import METHODS

MEASUREMENTS = 8
"""The number of likeness measurements when photos are held out and `sample_every` is not given."""


def recipe_settings(name: str, family: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings of a family's recipe, overridden by those `given`.

    Steps and learning rate are adapted to the batch size, and the learning rate to the method. Raises BadConfig for a name
    that is no recipe, or a given setting that is out of range.
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
        # Rounded to two digits. Prodigy finds the rate by itself.
        "learning_rate": None if given.get("optimizer") == "prodigy" else float(f"{rate:.1e}"),
        **(recipe.settings or {}),
        **given,
    }
    if settings.get("hold_out"):
        settings.setdefault("sample_every", max(1, math.ceil(settings["steps"] / MEASUREMENTS)))
    return settings
