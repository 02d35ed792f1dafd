"""Names that a package offers without loading the modules that define them until one is used."""

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, Collection[str]], modules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return the `__getattr__`, `__dir__` and `__all__` of a package (PEP 562) that offers these names.

    `names` has the names by their module, relative to the package as in an import statement (".file"). `modules` are submodules
    that are offered themselves. A name must not also be the name of a submodule, which would replace it when loaded.
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
        setattr(sys.modules[package], name, value)  # Python finds it directly next time.
        return value

    def names_there() -> list[str]:
        return sorted({*vars(sys.modules[package]), *known})

    return get, names_there, known
