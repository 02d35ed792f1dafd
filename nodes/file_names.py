"""Names of files that users type into a node."""

import re

from ..core.errors import BadConfig


def lora_path(name: str) -> str:
    """The name, or FOLDER/NAME, without an ending of its own. BadConfig for what is no file below a folder, on any system."""
    parts = re.split(r"[\\/]", name.removesuffix(".safetensors"))
    if any(part.strip() in ("", ".", "..") for part in parts) or re.search(r'[<>:"|?*\x00-\x1f]', name):
        raise BadConfig(f"name {name!r}: give a file name, or FOLDER/NAME below the loras folder")
    return "/".join(parts)
