"""The documentation as a site: `make docs`."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.ci

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """The ids of a page, and the addresses that a browser loads when the page is opened."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.ids |= {values["id"]} if "id" in values else set()
        if tag != "a":
            self.loaded |= {values[name] for name in ("src", "href") if name in values}


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere_and_all_that_is_handed_out_is_on_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", "tools/mkdocs.yml"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        [*command, "--site-dir", tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    pages = {path.relative_to(tmp_path).parent.as_posix(): Page(path) for path in tmp_path.rglob("index.html")}
    assert {path.stem for path in ROOT.glob("docs/*.md")} <= pages.keys()
    core = import_module("core")
    rooms = {name: room for name in core.__all__ if isinstance(room := getattr(core, name), ModuleType)}
    for page, room in {"api": core, **{f"api/{name}": room for name, room in rooms.items()}}.items():
        names = [name for name in getattr(room, "__all__", ()) if callable(getattr(room, name))]
        missing = [name for name in names if not any(re.search(rf"\b{name}$", one) for one in pages[page].ids)]
        assert not missing, page
    # Nothing is asked of anybody's server.
    assert not {address for page in pages.values() for address in page.loaded if re.match("(https?:)?//", address)}
