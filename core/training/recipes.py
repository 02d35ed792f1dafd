"""The settings of each recipe for a base model and a number of photos.

The length and the learning rate are starting points from other projects, not measurements of this one. Each family has its
own, in its file in core/models/families/. The settings shared by all recipes were measured on the demo's base model: see
docs/likeness.md.
"""

import math
from collections.abc import Mapping
from typing import Any

from ..config import RecipeName, TrainConfig, config_from, known_settings
from ..errors import BadConfig
from ..faces import why_no_faces
from ..models.base import Base
from ..models.recipe import RECIPES, Recipe, read_recipes
from ..photos import Thresholds, usual_hold_out
from ..progress import OnWarning, silent
from .methods import METHODS, peak_rate
from .optimizer import learning_rate_factor

COMMON = {"prior_prediction": 0.5}
"""The settings of every recipe: prior prediction keeps the class from turning into the person."""
MEASURED: dict[str, Any] = {"stop_early": True}
"""The settings of every recipe, besides `hold_out`, when photos can be held out.

The best intermediate LoRA is kept, and training stops early when more steps don't help or the class is lost.
"""
FEWER_PICTURES: dict[str, Any] = {"likeness_pictures": 4}
"""The settings of the recipes `fast` and `balanced` when likeness is measured. docs/likeness.md lists what they cost."""
ENOUGH = Thresholds.photos_measured
"""With this many usable photos or more, some are held out."""
MEASUREMENTS = 4
"""The number of likeness measurements when photos are held out and `sample_every` is not given."""


def recipe_config(
    name: RecipeName,
    base: Base,
    photos: int,
    given: Mapping[str, Any] | None = None,
    on_warning: OnWarning = silent,
) -> TrainConfig:
    """Build the TrainConfig of a recipe for a number of photos, overridden by the settings `given`.

    The base model's own recipe, if its file has one, replaces its family's. `on_warning` is called when that recipe cannot be
    used, and when the face networks are not installed. Raises BadConfig for an unknown recipe, or a given setting that is
    unknown or out of range, and for a base model that is not loaded.
    """
    if not isinstance(base, Base):
        raise BadConfig(f"base = {base!r}: expected a Base, as returned by load_base(path)")
    return config_from(recipe_settings(name, recipes_of(base, on_warning), given, photos, on_warning))


def recipes_of(base: Base, on_warning: OnWarning) -> Mapping[str, Recipe]:
    """Return the recipes by name: the base model's own, or its family's where it has none or its own cannot be used."""
    try:
        return {**base.family.recipes, **read_recipes(base.own_recipes)}
    except BadConfig as error:
        on_warning(f"{base.name}: the recipes in its metadata cannot be used ({error}). Using its family's instead")
        return base.family.recipes


def recipe_settings(
    name: str,
    recipes: Mapping[str, Recipe],
    given: Mapping[str, Any] | None = None,
    photos: int = ENOUGH,
    on_warning: OnWarning = silent,
) -> dict[str, Any]:
    """Return the settings of one of `recipes` for a number of photos, overridden by those `given`.

    Steps and learning rate are adapted to the batch size, the learning rate to the method, and alpha to the rank. Raises
    BadConfig for an unknown recipe or setting. Of the values, only those used here are checked.
    """
    if name not in RECIPES:
        raise BadConfig(f"recipe {name!r}: unknown. Choose one of {', '.join(RECIPES)}")
    recipe, given = recipes[name], known_settings(given or {})
    used: dict[str, Any] = {"batch_size": recipe.batch_size, "rank": recipe.rank, "steps": 1}
    used |= {name: given[name] for name in (*used, "accumulation", "method", "optimizer") if name in given}
    checked = TrainConfig(**used)
    method, seen = METHODS[checked.method], checked.batch_size * checked.accumulation
    measured = {"hold_out": usual_hold_out(photos)} | MEASURED | ({} if name == "best" else FEWER_PICTURES)
    settings = {
        # Textual inversion changes no network, so no other prompt can turn into the person.
        **(COMMON if method.makes != "embedding" else {}),
        **(measured if given.get("hold_out", _can_hold_out(photos, given, on_warning)) else {}),
        "steps": math.ceil(recipe.seen(photos) / seen),
        "batch_size": checked.batch_size,
        "rank": recipe.rank,
        "learning_rate": (None if checked.finds_rate else float(f"{recipe.rate * seen**0.5 * method.rate_factor:.1e}")),
        **({} if checked.finds_rate else method.recipe),
        **(recipe.settings or {}),
        **given,
    }
    if recipe.warmup and not checked.finds_rate:
        settings.setdefault("warmup_steps", math.floor(recipe.warmup * settings["steps"]))
    if settings.get("alpha") and "alpha" not in given:
        settings["alpha"] *= checked.rank / recipe.rank
    if settings.get("hold_out"):
        settings.setdefault("sample_every", steps_between(settings["steps"]))
    return settings


def steps_between(steps: int, samples: int = MEASUREMENTS) -> int:
    """Return the `sample_every` with which samples are drawn so many times in a training run."""
    return max(1, math.ceil(steps / samples))


def travel(config: TrainConfig) -> float:
    """Return how far weights can move: alpha / rank times the sum of all steps' learning rates, as AdamW takes them.

    It compares settings of equal methods, and says nothing about likeness. With a small alpha / rank s, the weights move up to
    1 / sqrt(s) times as far.
    """
    scale = config.alpha_for(config.rank) / (config.rank**0.5 if config.rslora else config.rank)
    some = range(0, config.steps, math.ceil(config.steps / 1000))
    return (
        scale * peak_rate(config) * config.steps * sum(learning_rate_factor(step, config) for step in some) / len(some)
    )


def _can_hold_out(photos: int, given: Mapping[str, Any], on_warning: OnWarning) -> bool:
    """Return whether a recipe holds out photos: there must be enough. If the face networks are missing, warn about it."""
    if photos < ENOUGH or "hold_out" in given or given.get("sample_every") == 0:
        return False
    if missing := why_no_faces():
        on_warning(f"likeness is not measured while training: {missing}")
    return not missing
