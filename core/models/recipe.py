"""The settings of a family's training for little, usual or much time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RECIPES = ("fast", "balanced", "best")
"""The recipes that every family has, from the shortest to the longest."""


@dataclass(frozen=True)
class Recipe:
    """The length and the settings of a training for one photo in a step; a batch size turns them into steps and a rate."""

    photos: int
    """The number of photos seen in the whole training; divided by the photos in a step it gives the steps."""
    rate: float
    """The learning rate for one photo in a step. It grows with the square root of the photos in a step
    (arXiv:2205.10287, for Adam)."""
    rank: int
    batch_size: int = 1
    """The photos in a forward pass, unless the user sets another number."""
    settings: Mapping[str, Any] | None = None
    """Other settings that differ from the defaults of TrainConfig."""
