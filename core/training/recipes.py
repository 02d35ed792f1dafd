"""Recipes: settings for little, usual and much time, for each family. Starting points, not measurements of this project."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import TrainConfig
from ..errors import BadConfig
from .methods import METHODS

MEASUREMENTS = 8
"""Times that likeness is measured where photos are held out and no samples are asked for."""


@dataclass(frozen=True)
class Recipe:
    """How much is trained and how, whatever the batch size: steps and learning rate follow from it."""

    photos: int
    """Photos seen, all passes and repeats together; steps are these divided by the photos of a step."""
    rate: float
    """Learning rate where a step sees one photo. It grows with the square root of the photos of a step, as the noise of
    their mean falls by it (arXiv:2205.10287, for Adam)."""
    rank: int
    batch_size: int = 1
    """Photos in a forward pass, unless others are asked for."""
    settings: Mapping[str, Any] | None = None
    """Whatever else differs from TrainConfig's defaults."""


_HELD_OUT = {"hold_out": 2}

# SD1.5: rank 32, alpha 16, 1e-4 at batch 4, 400 to 600 steps. SDXL: rank 32, 1e-4 at batch 4, 600 to 1,000 steps;
# cog-sdxl trains at 768 px. Those are the usual settings of sd-scripts and of cog-sdxl. SD3.5: sd-scripts, rank 32 to 64.
# FLUX.1: 500 to 1,000 steps of one photo at 2e-4 to 4e-4, 512 to 768 px (Chroma: the same); FLUX.2, Z-Image, Qwen-Image:
# ai-toolkit and diffusers. "fast" takes the upper rate and the lower size of each, "best" more photos and the checkpoint
# most alike.
RECIPES: dict[str, dict[str, Recipe]] = {
    "fast": {
        "sd15": Recipe(800, 1e-4, 16, batch_size=4),
        "sdxl": Recipe(800, 5e-5, 16, batch_size=4, settings={"resolution": 768}),
        "sd3": Recipe(600, 1e-4, 16, settings={"resolution": 768}),
        "flux1": Recipe(500, 4e-4, 16, settings={"resolution": 512}),
        "chroma": Recipe(500, 4e-4, 16, settings={"resolution": 512}),
        "flux2": Recipe(600, 1e-4, 16, settings={"resolution": 512}),
        "zimage": Recipe(600, 1e-4, 16, settings={"resolution": 512}),
        "qwen-image": Recipe(600, 1e-4, 16, settings={"resolution": 512}),
    },
    "balanced": {
        "sd15": Recipe(2000, 5e-5, 32, batch_size=4, settings={"alpha": 16.0}),
        "sdxl": Recipe(2400, 5e-5, 32, batch_size=4),
        "sd3": Recipe(1200, 1e-4, 32),
        "flux1": Recipe(800, 2e-4, 16, settings={"resolution": 768}),
        "chroma": Recipe(800, 2e-4, 16, settings={"resolution": 768}),
        "flux2": Recipe(1200, 1e-4, 32, settings={"resolution": 768}),
        "zimage": Recipe(1200, 1e-4, 32, settings={"resolution": 768}),
        "qwen-image": Recipe(1200, 1e-4, 16, settings={"resolution": 768}),
    },
    "best": {
        "sd15": Recipe(4000, 5e-5, 32, batch_size=4, settings={"alpha": 16.0, **_HELD_OUT}),
        "sdxl": Recipe(4000, 5e-5, 32, batch_size=4, settings=_HELD_OUT),
        "sd3": Recipe(2000, 1e-4, 64, settings=_HELD_OUT),
        "flux1": Recipe(1600, 2e-4, 32, settings=_HELD_OUT),
        "chroma": Recipe(1600, 2e-4, 32, settings=_HELD_OUT),
        "flux2": Recipe(2400, 5e-5, 64, settings=_HELD_OUT),
        "zimage": Recipe(2400, 1e-4, 32, settings=_HELD_OUT),
        "qwen-image": Recipe(2400, 1e-4, 32, settings=_HELD_OUT),
    },
}
"""Name -> family -> recipe. With photos held out, likeness is measured and the best checkpoint is kept."""


def recipe_settings(name: str, family: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings of a recipe with those `given` in their place: steps and learning rate follow a given batch size, the
    rate a given method too.

    BadConfig for a name that is no recipe.
    """
    if name not in RECIPES:
        raise BadConfig(f"recipe {name!r}: choose one of {', '.join(RECIPES)}")
    recipe, given = RECIPES[name][family], given or {}
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
