"""The settings of a family for a quick, normal or thorough training run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..config import GROUPS, config_from, known_settings
from ..errors import BadConfig
from ..storage.plain_values import parse_json, read_as

RECIPES = ("fast", "balanced", "best")
"""The recipes that every family has, from the shortest to the longest."""
RECIPES_KEY = "facelora.recipes"
"""The key of a base model's own recipes in its metadata: JSON with the fields of a Recipe by the recipe's name."""
_ITS_GROUPS = ("method", "photos", "optimizer", "loss", "prior preservation")
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
    views: int = 0
    """How often each photo is seen. The whole run then sees between `photos` and `most` photos. 0: `photos`, however many."""
    most: int = 0
    warmup: float = 0.0
    """The share of the steps in which the rate rises, 0 to 0.5."""
    reason: str = ""
    """Why it moves weights less than half or more than twice as far as other trainers do. Empty if it doesn't."""

    def seen(self, photos: int) -> int:
        """Return the number of photos seen in a run on so many photos of a person."""
        return min(max(self.photos, self.views * photos), self.most) if self.views else self.photos


def usual(rate: float, rank: int, least: int = 500, most: int = 1000, views: int = 50, **settings: Any) -> Recipe:
    """Return a recipe `balanced`. Guides for faces ask for 50 to 120 views of each photo."""
    warmup = 0.05 if rate > 1e-4 else 0.0
    return Recipe(least, rate, rank, settings=settings, views=views, most=most, warmup=warmup)


short = partial(usual, least=350, most=600, views=25)
"""Returns a recipe `fast`: each photo is seen 25 times, about as often as in Astria's trainer and Fizgig's presets."""

STARTING_POINTS: Mapping[str, Recipe] = {
    "fast": replace(short(2e-4, 16, resolution=512), reason="Half the length of balanced, for a first look."),
    "balanced": usual(2e-4, 16, resolution=512),
    "best": Recipe(2400, 1e-4, 32),
}
"""The recipes of large transformers.

2e-4 at alpha = rank is the rate of diffusers' example for Qwen-Image and of a workshop on faces for FLUX.2 klein. It stays the
same, as in nearly all trainers. `best` has ai-toolkit's rate and length. docs/training.md lists what others ship.
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
    allowed = {name for title in _ITS_GROUPS for name in GROUPS[title].__annotations__} - {*_DERIVED}
    if wrong := settings.keys() - allowed - {"sample_guidance", "sample_steps"}:
        raise BadConfig(f"recipe {name!r}: {', '.join(sorted(wrong))}: not allowed in a recipe")
    if recipe.views < 0 or (recipe.views and recipe.most < recipe.photos) or not 0 <= recipe.warmup <= 0.5:
        raise BadConfig(f"recipe {name!r}: views must not be negative, most at least photos, and warmup from 0 to 0.5")
    # TrainConfig checks ranges. The numbers of photos are checked like the steps.
    of_the_run = {
        "steps": max(recipe.photos, recipe.most),
        "learning_rate": recipe.rate,
        "batch_size": recipe.batch_size,
    }
    config_from({**settings, **of_the_run, "rank": recipe.rank})
    return replace(recipe, settings=settings)
