"""The command `page`, which starts the local page. That is above the library, which finds it as an installed entry point."""

from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from ..errors import MissingPackage
from .options import Options, option
from .values import Folder

GROUP = "facelora.pages"
"""The entry points that offer a page: functions of the folder, the port, and whether to open a browser."""


@dataclass(frozen=True)
class PageOptions(Options):
    folder: Folder = option("Folder for people, LoRAs and headshots (default: ~/facelora)", default=Path("~/facelora"))
    port: int = option("Port of the address. 0 takes a free one (default: 8190)", default=8190)
    no_browser: bool = option("Don't open a browser")


def run(options: PageOptions) -> None:
    """Run the command until Ctrl-C."""
    found = entry_points(group=GROUP)
    if not found:
        raise MissingPackage("this copy of the project isn't installed. In its folder: pip install '.[page]'")
    try:
        serve = next(iter(found)).load()
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise MissingPackage(f"the page requires {error.name}: pip install starlette uvicorn") from None
    serve(options.folder.expanduser(), options.port, shows=not options.no_browser)
