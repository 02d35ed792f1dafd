"""ComfyUI-FaceLoRA: a node pack in ComfyUI and InvokeAI; installed the package `facelora`, which hands out `facelora.core`.

import facelora

lora = facelora.train("photos", "sd15.safetensors", output="me.safetensors")
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .core import *  # noqa: F403
    from .core import __version__ as __version__
elif __package__:  # pytest also imports this file alone, as a module outside any package
    from . import core as _core

    __getattr__, __dir__, __all__ = _core.__getattr__, _core.__dir__, _core.__all__

    if __name__ == "facelora":  # Node packs have other names, and no scripts.
        from .core.lazy_names import ModulesOfAnother

        sys.meta_path.insert(0, ModulesOfAnother(__name__, _core.__name__))

    # InvokeAI imports the pack and then has the nodes. A wheel has none for it.
    if (
        "invokeai.app.invocations.load_custom_nodes" in sys.modules
        and Path(__file__).parent.joinpath("nodes", "invokeai").is_dir()
    ):
        from .nodes import invokeai as invokeai

WEB_DIRECTORY = "web"
"""Scripts for ComfyUI's pages, and the help pages of the nodes."""


async def comfy_entrypoint() -> object:
    """What ComfyUI asks for the nodes. Nothing of ComfyUI is imported before."""
    from .nodes.comfyui import FaceLoraExtension

    return FaceLoraExtension()
