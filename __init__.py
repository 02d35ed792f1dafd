"""ComfyUI-FaceLoRA. Installed it is the package `facelora`; everything is in `facelora.core`."""
