"""What a recipe is: how much a family's models are trained, and how, for little, usual or much time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RECIPES = ("fast", "balanced", "best")
"""The recipes that every family has, from the shortest to the longest."""


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
    """Whatever else differs from TrainConfig's defaults. With photos held out (`hold_out`), likeness is measured and the
    best checkpoint is kept."""
