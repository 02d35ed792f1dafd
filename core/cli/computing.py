"""Choose the device of a command that computes."""

import argparse

import torch

from ..device import best_device, stay_within_free_memory, usable_device
from ..errors import BadConfig


def device_from(options: argparse.Namespace) -> torch.device:
    """Return the device from the command line, else the best one. Raises BadConfig if it cannot compute.

    On Windows, the process's use of GPU memory is limited to what is free.
    """
    device = usable_device(named_or_best(options.device))
    stay_within_free_memory(device)
    return device


def named_or_best(name: str | None) -> torch.device:
    """Return the device of that name, else the best one, even if this torch has no kernels for it."""
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # Reading fails on the device "meta", which has no values.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        raise BadConfig(
            f"--device {name}: {reason}; available: {', '.join(name for name, here in available.items() if here)}"
        ) from None
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
