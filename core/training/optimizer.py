"""The optimizer of a training run and its learning rate schedule."""

import contextlib
import math
from importlib import import_module

import torch
from torch import nn

from ..config import OPTIMIZERS, OptimizerSettings, TrainConfig
from ..errors import MissingPackage
from .methods import peak_rate
from .methods.method import Adapter


def learning_rate_factor(step: int, config: OptimizerSettings) -> float:
    """Return the factor, 0 to 1, on the peak learning rate in a step, counted from 0: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.schedule == "linear":
        return 1 - progress
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


def build_optimizer(adapter: Adapter, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer of the adapter's parameters, in groups of equal peak learning rate.

    `peak` in each group is that rate, which the schedule scales. Raises MissingPackage, with the command that installs the
    optimizer's package.
    """
    peak = peak_rate(config)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in adapter.parameters().items():
        groups.setdefault(adapter.rate(name, config, peak), []).append(parameter)
    described = [{"params": parameters, "lr": rate, "peak": rate} for rate, parameters in groups.items()]
    kind = OPTIMIZERS[config.optimizer]
    module, _, name = kind.made_by.rpartition(".")
    try:
        build = getattr(import_module(module), name)
    except ImportError:
        if not kind.package:
            raise
        raise MissingPackage(
            f"optimizer {config.optimizer!r} needs a package. Install it: pip install {kind.package}"
        ) from None
    with contextlib.redirect_stdout(None):  # Prodigy's constructor prints, which would mix with JSON reports.
        return build(described, weight_decay=config.weight_decay, **kind.arguments)
