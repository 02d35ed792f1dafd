"""What the site has beside `docs/`: the README as its first page, two more of the root, and the library, room by room.

A hook of MkDocs (`make docs`). The pages of the root link to `docs/`, which is the site's root, and those of `docs/` to the
repository's.
"""

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
NOT_ON_THE_SITE = re.compile(r"\[([^\]]+)\]\((?:\.\./)?(?:NOTICE|LICENSE|core/[^)]*)\)")
"""A link to a file that is no page, of which the text stays."""


def on_config(config: Any) -> Any:
    """The settings of the site, with the version in its footer."""
    config.copyright = f"Version {import_module('core').__version__}"
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that `docs/` does not have."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    library = api_pages()
    for page, text in library.items():
        files.append(File.generated(config, page, content=text))
    next(entry for entry in config.nav if "Python" in entry)["Python"] = list(library)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The text of a page with links that lead somewhere on the site."""
    return NOT_ON_THE_SITE.sub(r"\1", re.sub(r"\]\(\.\./(?=\w+\.md)", "](", markdown))


def api_pages() -> dict[str, str]:
    """A page for the library's own names, and one for each of its rooms."""
    core = import_module("core")
    rooms = {name: room for name in core.__all__ if isinstance(room := getattr(core, name), ModuleType)}
    pages = {f"api/{name}.md": _page(f"facelora.{name}", room) for name, room in rooms.items()}
    return {"api/index.md": _page("facelora", core)} | pages


def _page(title: str, room: ModuleType) -> str:
    """The room's docstring, and each class and function that it hands out."""
    names = [name for name in getattr(room, "__all__", ()) if callable(getattr(room, name))]
    if not names:
        return f"# {title}\n\n::: {room.__name__}\n    options: {{show_root_heading: false}}\n"
    return "\n\n".join((f"# {title}", room.__doc__ or "", *(f"::: {room.__name__}.{name}" for name in names)))
