"""Fields of InvokeAI's nodes for the inputs that ComfyUI's nodes have too."""

# pyright: reportMissingImports=false

from typing import Any

from invokeai.invocation_api import InputField


def setting_field(settings: Any, name: str, description: str = "", **options: Any) -> Any:
    """Return a node's input for one of the fields in `settings`, with its default, range and help, or another description."""
    field = settings.__dataclass_fields__[name]
    limits = {} if field.metadata["low"] is None else {"ge": field.metadata["low"], "le": field.metadata["high"]}
    return InputField(default=field.default, description=description or field.metadata["help"], **(limits | options))
