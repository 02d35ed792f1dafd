"""Names that a package offers without loading the modules that define them until one is used.

Type checkers only understand import statements, so the names are read from the text of these. That takes a millisecond for
all packages together. A table beside them would list each of some 270 names twice.
"""

import re
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return the `__getattr__`, `__dir__` and `__all__` (PEP 562) of the package whose `__init__` is that file.

    It offers what the file imports for type checkers, so each name is listed once: a line `from .file import LoraFile as
    LoraFile` below `if TYPE_CHECKING:`, and `from . import lora as lora` for a module. A name must not also be the name of a
    submodule, which would replace it when loaded.
    """
    lines = re.findall(r"^    from \.([\w.]*) import (\w+) as \2$", Path(file).read_text("utf-8"), re.MULTILINE)
    home = {name: module for module, name in lines}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(f".{home[name] or name}", package)
        value = getattr(module, name) if home[name] else module
        setattr(sys.modules[package], name, value)  # Python finds it directly next time.
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *home}), sorted(home)


class ModulesOfAnother:
    """For `sys.meta_path`: the modules of another package under a package's own name, so that each is loaded once.

    `import facelora.photos` then imports `facelora.core.photos`, and both names have the same module. Each package has
    its own `__main__`, whose code `python -m` reads.
    """

    def __init__(self, package: str, other: str) -> None:
        self._package, self._other = package, other

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        package, *inner = name.split(".")
        if package != self._package or inner in ([], ["__main__"]) or name.startswith(self._other):
            return None
        if not find_spec(f"{self._other}.{inner[0]}"):
            return None
        state = ".".join((self._other, *inner))
        return ModuleSpec(name, self, loader_state=state)  # pyright: ignore[reportArgumentType] -- `importlib.abc` takes 6 ms

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(spec.loader_state)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back, which Python has replaced by that of the other name."""
        assert module.__spec__
        module.__spec__ = module.__spec__.loader_state
