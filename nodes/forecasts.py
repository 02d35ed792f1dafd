"""How long each recipe takes on this machine, before there are photos. Pages of every interface show it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..core import studio  # Its modules are loaded when they are used.
from ..core.models.base import Base
from ..core.models.recipe import Recipe
from ..core.storage.cache_folder import content_key
from ..core.training.recipes import ENOUGH, RECIPES
from .settings import NodeSettings

_forecasts: "dict[str, studio.Forecast]" = {}
"""The last forecast, by a hash of the base model's file and the settings: a GPU's memory plan takes a second."""


def forget_forecasts() -> None:
    """Forget the last forecast, since a training run has told how fast this machine is."""
    _forecasts.clear()


def forecast_for(
    base: Base, settings: NodeSettings, recipes: Mapping[str, Recipe], device: torch.device
) -> "studio.Forecast":
    """Return the forecast of training runs with these settings, whichever recipe they have."""
    # What only decides how long a run is changes no pass.
    balanced, path = replace(settings, recipe="balanced", training_seed=1).config(recipes), Path(base.files[0].path)
    passes = replace(balanced, steps=1, sample_every=1, warmup_steps=0)
    key = content_key(path, path.stat().st_mtime_ns, passes)
    forecast = _forecasts.get(key) or studio.Forecast.on(base, passes, device)
    _forecasts.clear()
    _forecasts[key] = forecast
    return forecast


def spans_of(
    forecast: "studio.Forecast", settings: NodeSettings, recipes: Mapping[str, Recipe], photos: int, pictures: int
) -> "dict[str, studio.Span]":
    """Return the least and the most seconds that each recipe takes for a number of photos (0: enough) and of pictures."""
    photos = photos or ENOUGH
    configs = {recipe: replace(settings, recipe=recipe).config(recipes, photos) for recipe in RECIPES}
    return {recipe: forecast.span(config, photos, pictures) for recipe, config in configs.items()}
