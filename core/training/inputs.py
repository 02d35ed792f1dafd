"""What a training run is computed from."""

from dataclasses import dataclass

import torch

from ..config import TrainConfig
from ..lora.file import LoraFile
from ..models.base import Base
from .encode import LatentCache
from .training_adapter import TrainingAdapter


@dataclass(frozen=True, eq=False)
class TrainingInputs:
    """What travels together from the encoded photos to each step: a run depends on nothing else."""

    cache: LatentCache
    """The encoded photos and captions."""
    base: Base
    config: TrainConfig
    device: torch.device
    dtype: torch.dtype
    """The dtype to compute with."""
    start: LoraFile | None = None
    """The LoRA to continue from."""
    adapter: TrainingAdapter | None = None
    """The LoRA that is active in training steps only."""

    @classmethod
    def on(
        cls,
        device: torch.device | str | None,
        cache: LatentCache,
        base: Base,
        config: TrainConfig,
        start: LoraFile | None = None,
        adapter: TrainingAdapter | None = None,
    ) -> "TrainingInputs":
        """Return the inputs on that device (None: the best one), with the dtype that the settings give there."""
        return cls(cache, base, config, *base.device_and_dtype(config.precision, device), start, adapter)
