"""Names that a package hands out without loading the modules that define them before one of them is asked for."""

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, Collection[str]], modules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of a package (PEP 562) that hands out these names.

    `names` has the names by the module that they are in, relative to the package as in an import statement (".file").
    `modules` are submodules that are handed out themselves. A name must not be that of a submodule too, which would take
    its place as soon as it is loaded.
    """
    home = {name: module for module, inside in names.items() for name in inside}
    known = sorted({*home, *modules})

    def get(name: str) -> Any:
        if name in home:
            value = getattr(import_module(home[name], package), name)
        elif name in modules:
            value = import_module(f".{name}", package)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # the next time Python finds it by itself
        return value

    def names_there() -> list[str]:
        return sorted({*vars(sys.modules[package]), *known})

    return get, names_there, known
