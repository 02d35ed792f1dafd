"""ComfyUI-FaceLoRA. Installed it is the package `facelora`, all of it in `facelora.core`; in ComfyUI it is a node pack."""

WEB_DIRECTORY = "web"
"""Scripts for ComfyUI's pages, and the help pages of the nodes."""


async def comfy_entrypoint():
    """What ComfyUI asks for the nodes. Nothing of ComfyUI is imported before."""
    from .nodes import FaceLoraExtension

    return FaceLoraExtension()
