"""The settings of a family for a quick, normal or thorough training run."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import (
    LossSettings,
    MethodSettings,
    OptimizerSettings,
    PhotoSettings,
    PriorSettings,
    config_from,
    known_settings,
)
from ..errors import BadConfig
from ..storage.plain_values import parse_json, read_as

RECIPES = ("fast", "balanced", "best")
"""The recipes that every family has, from the shortest to the longest."""
RECIPES_KEY = "facelora.recipes"
"""The key of a base model's own recipes in its metadata: JSON with the fields of a Recipe by the recipe's name."""
_ITS_GROUPS = (MethodSettings, PhotoSettings, OptimizerSettings, LossSettings, PriorSettings)
"""The groups of settings allowed in such a recipe. Those of the person, the base, the machine and the output are not."""
_DERIVED = ("steps", "learning_rate", "rank", "batch_size", "accumulation", "method", "optimizer")
"""Settings of these groups that follow from a Recipe's other fields, or that these depend on."""


@dataclass(frozen=True)
class Recipe:
    """The length and the settings of a training run for one photo per step. A batch size turns them into steps and a rate."""

    photos: int
    """The number of photos seen in the whole run. Divided by the photos per step, it gives the steps."""
    rate: float
    """The learning rate for one photo per step. It grows with the square root of these (arXiv:2205.10287, for Adam)."""
    rank: int
    batch_size: int = 1
    """The photos in a forward pass, unless the user sets another number."""
    settings: Mapping[str, Any] | None = None
    """Other settings that differ from the defaults of TrainConfig and from `training.recipes.COMMON`."""


STARTING_POINTS: Mapping[str, Recipe] = {
    "fast": Recipe(300, 2e-4, 16, settings={"resolution": 512}),
    "balanced": Recipe(450, 2e-4, 16, settings={"resolution": 512}),
    "best": Recipe(2400, 1e-4, 32),
}
"""The recipes of large transformers.

For Z-Image, Krea 2 and Qwen-Image, OneTrainer's presets take 512 px, rank 16, and 3e-4 for two photos per step. Fizgig's take
20 to 30 epochs, which are 300 to 450 of 15 photos, and 512 px for Z-Image and Krea 2. `best` has ai-toolkit's rate and length.
"""


def read_recipes(text: str) -> dict[str, Recipe]:
    """Read the recipes in the value of RECIPES_KEY, by name: some or all of RECIPES.

    Raises BadConfig when it is not JSON of that form, has a setting that recipes don't allow, or has a value out of range.
    """
    try:
        recipes = parse_json(text)
    except ValueError as error:
        raise BadConfig(f"is not JSON: {error}") from None
    if not isinstance(recipes, dict) or not recipes.keys() <= {*RECIPES}:
        raise BadConfig(f"expected a table of some of {', '.join(RECIPES)}, each a table")
    return {name: _read_recipe(name, values) for name, values in recipes.items()}


def _read_recipe(name: str, values: Any) -> Recipe:
    recipe = read_as(Recipe, values, f"recipe {name!r}")
    settings = known_settings(recipe.settings or {})
    allowed = {item.name for group in _ITS_GROUPS for item in dataclasses.fields(group)} - {*_DERIVED}
    if wrong := settings.keys() - allowed - {"sample_guidance", "sample_steps"}:
        raise BadConfig(f"recipe {name!r}: {', '.join(sorted(wrong))}: not allowed in a recipe")
    # TrainConfig checks ranges. The number of photos is checked like the steps.
    of_the_run = {"steps": recipe.photos, "learning_rate": recipe.rate, "batch_size": recipe.batch_size}
    config_from({**settings, **of_the_run, "rank": recipe.rank})
    return dataclasses.replace(recipe, settings=settings)
