"""A custom node of ComfyUI for the tests: what a small graphics card makes of a model."""

# pyright: reportMissingImports=false

import comfy.model_management


class PartlyLoaded:
    """MODEL as ComfyUI leaves it where memory is short: half of its weights patched in place, the rest as they are used.

    (ComfyUI takes `--lowvram` and `--cpu` not together.)
    """

    CATEGORY = "tests"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    def load(self, model):
        comfy.model_management.load_models_gpu([model])
        model.partially_unload(model.offload_device, model.model_size() // 2)
        assert model.model.model_lowvram
        return (model,)


NODE_CLASS_MAPPINGS = {"TestPartlyLoaded": PartlyLoaded}
