"""The nodes' texts outside of their code: `python -m tests.comfyui.texts` writes them anew from what a server says.

`locales/en/nodeDefs.json` has all of them; in `web/docs/<node id>.md`, the help pages, everything below the prose is written
here: the tables of inputs, outputs and settings.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from core.config import TrainConfig

from .server import PACK, ComfyServer, running_server

LOCALES = PACK / "locales"
HELP = PACK / "web" / "docs"
TABLES = "## Inputs\n"
"""Where the prose of a help page ends."""
Info = Mapping[str, Any]
"""What the server says of a node."""


def node_infos(server: ComfyServer) -> dict[str, Info]:
    """Node id -> what the server says of it, for the nodes of this pack."""
    return {name: info for name, info in server.get("/object_info").items() if info["category"] == "FaceLoRA"}


def inputs(info: Info) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Name -> type and options of every input."""
    given = [pair for part in ("required", "optional") for pair in info["input"].get(part, {}).items()]
    return {name: (kind if isinstance(kind, str) else "COMBO", options) for name, (kind, options) in given}


def english(info: Info) -> dict[str, Any]:
    """The node's entry of nodeDefs.json."""
    outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
    entry = {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {name: {"name": name, "tooltip": options["tooltip"]} for name, (_, options) in inputs(info).items()},
        "outputs": {str(index): {"name": name, "tooltip": tooltip} for index, (name, tooltip) in enumerate(outputs)},
    }
    if "\n" in info["description"]:
        # It says what this installation has, e.g. style packs that are not used: a text from here would hide that.
        del entry["description"]
    return entry


def tables(name: str, info: Info) -> str:
    """The part of a help page from TABLES on."""
    lines = [TABLES, "| input | type | default | what it is |", "|---|---|---|---|"]
    for key, (kind, options) in inputs(info).items():
        default = f"`{options['default']}`" if options.get("default") not in (None, "") else ""
        notes = [options["tooltip"], "(advanced)"] if options.get("advanced") else [options["tooltip"]]
        lines.append(_row(f"`{key}`", kind.replace(",", " or "), default, " ".join(notes)))
    lines += ["", "## Outputs\n", "| output | type | what it is |", "|---|---|---|"]
    for key, kind, tooltip in zip(info["output_name"], info["output"], info["output_tooltips"], strict=True):
        lines.append(_row(f"`{key}`", kind, tooltip))
    if name == "FaceLoRATrain":
        lines += ["", "## Settings\n", "What `settings` takes, as lines of TOML, e.g. `text_encoder_lr = 1e-5`:\n"]
        lines += ["| setting | default | what it is |", "|---|---|---|"]
        for setting in fields(TrainConfig):
            shown = "" if setting.default in (MISSING, None, "", ()) else f"`{_toml(setting.default)}`"
            lines.append(_row(f"`{setting.name}`", shown, setting.metadata["help"]))
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _toml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | str) else f"{value}"


def write_all() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models" / "loras").mkdir(parents=True)
        (Path(folder) / "input").mkdir()
        with running_server(Path(folder)) as server:
            infos = node_infos(server)
    texts = {name: english(info) for name, info in infos.items()}
    target = LOCALES / "en" / "nodeDefs.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, info in infos.items():
        page = HELP / f"{name}.md"
        prose = (
            page.read_text(encoding="utf-8").partition(TABLES)[0] if page.exists() else f"# {info['display_name']}\n\n"
        )
        page.write_text(prose + tables(name, info), encoding="utf-8")


if __name__ == "__main__":
    write_all()
