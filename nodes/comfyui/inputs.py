"""Inputs of ComfyUI's nodes that InvokeAI's nodes have too."""

# pyright: reportMissingImports=false

from typing import Any

from comfy_api.latest import io


def setting_input(settings: Any, name: str, **options: Any) -> Any:
    """Return a node's input for one of the fields in `settings`, with its default, range and help."""
    field = settings.__dataclass_fields__[name]
    given = {"default": field.default, "tooltip": field.metadata["help"]} | options
    if "options" in options:
        return io.Combo.Input(name, **given)
    if field.metadata["low"] is None:
        return io.String.Input(name, **given)
    kind = io.Int if isinstance(field.default, int) else io.Float
    return kind.Input(name, min=field.metadata["low"], max=field.metadata["high"], **given)
