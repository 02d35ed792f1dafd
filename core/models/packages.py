"""diffusers, imported without anything that another package would fetch."""

import functools
import logging
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

HUB_KERNELS = "kernels"
"""A package that loads compiled code from a hub when it is asked to. bitsandbytes asks it on some CPUs when it is imported."""


@functools.cache
def import_diffusers() -> ModuleType:
    """The package diffusers. It imports bitsandbytes where that is installed, which is kept from fetching code by it."""
    if "bitsandbytes" not in sys.modules and find_spec("bitsandbytes"):
        _import_bitsandbytes()
    return import_module("diffusers")


def _import_bitsandbytes() -> None:
    log = logging.getLogger("bitsandbytes")
    level, there = log.level, sys.modules.get(HUB_KERNELS)
    log.setLevel(logging.CRITICAL)  # it warns that it has no kernels, which are not used here
    sys.modules[HUB_KERNELS] = None  # pyright: ignore[reportArgumentType]  # by which importing it fails
    try:
        import_module("bitsandbytes")
    except Exception:  # a broken installation, which only its own optimizer needs
        pass
    finally:
        log.setLevel(level)
        if there is None:
            del sys.modules[HUB_KERNELS]
        else:
            sys.modules[HUB_KERNELS] = there
