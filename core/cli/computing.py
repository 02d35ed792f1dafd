"""The device of a command that computes."""

import argparse

import torch

from ..config import TrainConfig
from ..device import best_device, device_and_dtype, stay_within_free_memory
from ..errors import BadConfig


def device_from(options: argparse.Namespace) -> torch.device:
    """The device that the command line names, else the best there is. Raises BadConfig where it cannot compute.

    On Windows, what the process takes of a GPU is bounded by what is free.
    """
    device, _ = device_and_dtype(TrainConfig(), named_or_best(options.device))
    stay_within_free_memory(device)
    return device


def named_or_best(name: str | None) -> torch.device:
    """The device of that name, else the best there is, even where this torch has no kernels for it."""
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the device "meta" holds no values, so reading one fails
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        raise BadConfig(
            f"--device {name}: {reason}; there is {', '.join(name for name, here in available.items() if here)}"
        ) from None
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
