"""Import diffusers without letting another package download code."""

import functools
import logging
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

HUB_KERNELS = "kernels"
"""A package that downloads compiled code from a hub on request. On some CPUs, bitsandbytes requests it when imported."""


@functools.cache
def import_diffusers() -> ModuleType:
    """Import diffusers. It imports an installed bitsandbytes, which is prevented from downloading code."""
    if "bitsandbytes" not in sys.modules and find_spec("bitsandbytes"):
        log = logging.getLogger("bitsandbytes")
        level, there = log.level, sys.modules.get(HUB_KERNELS)
        log.setLevel(logging.CRITICAL)  # it warns that it lacks kernels, which are not used here
        sys.modules[HUB_KERNELS] = None  # pyright: ignore[reportArgumentType]  # makes importing it fail
        try:
            import_module("bitsandbytes")
        except Exception:  # a broken installation, which only matters to the optimizer that needs it
            pass
        finally:
            log.setLevel(level)
            if there is None:
                del sys.modules[HUB_KERNELS]
            else:
                sys.modules[HUB_KERNELS] = there
    return import_module("diffusers")
