"""A custom node of ComfyUI for the tests: what a small graphics card makes of a model, and small text encoders."""

# pyright: reportMissingImports=false

import sys
from types import SimpleNamespace

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.supported_models
import comfy.text_encoders.flux
import comfy.text_encoders.z_image
import torch


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

# ComfyUI takes what is 3840 wide for a Z-Image; this is the narrow one of model_writer.py.
SMALL_ZIMAGE = {
    "dim": 1152, "n_heads": 9, "n_kv_heads": 9, "n_refiner_layers": 1, "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True,
    "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
detect = comfy.model_detection.detect_unet_config


def detect_also_small(*arguments, **options):
    config = detect(*arguments, **options)
    if config is None or config.get("dim") != SMALL_ZIMAGE["dim"]:
        return config
    return config | SMALL_ZIMAGE


comfy.model_detection.detect_unet_config = detect_also_small
comfy.supported_models.ZImage.unet_config = {"image_model": "lumina2", "dim": SMALL_ZIMAGE["dim"]}

# The text encoders of the diffusion transformers have billions of parameters, and ComfyUI knows them by their sizes. Here
# its loaders build them narrow, with random weights, whatever is in the file; tokenizers and everything else are its own.
QWEN3 = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
SIZES = {
    "flux": {
        "clip_l": {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2},
        "t5xxl": {"d_model": 64, "d_ff": 64, "d_kv": 64, "num_heads": 1, "num_layers": 1},
    },
    "flux2": {"qwen3_4b": {**QWEN3, "hidden_size": 32}},  # FLUX.2 reads three layers side by side
    "lumina2": {"qwen3_4b": QWEN3},
}
TARGETS = {
    "flux": (comfy.text_encoders.flux.flux_clip(torch.float32), comfy.text_encoders.flux.FluxTokenizer),
    "flux2": (comfy.text_encoders.flux.klein_te(torch.float32), comfy.text_encoders.flux.KleinTokenizer),
    "lumina2": (comfy.text_encoders.z_image.te(torch.float32), comfy.text_encoders.z_image.ZImageTokenizer),
}


def small_clip(kind: str):
    clip, tokenizer = TARGETS[kind]
    options = {f"{name}_model_config": sizes for name, sizes in SIZES[kind].items()}
    made = comfy.sd.CLIP(SimpleNamespace(params={}, clip=clip, tokenizer=tokenizer), model_options=options)
    generator = torch.Generator().manual_seed(3)
    for parameter in made.cond_stage_model.parameters():
        if parameter.ndim:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1, generator=generator)
    return made


def load_one(self, clip_name, type="stable_diffusion", device="default"):
    return (small_clip(type),)


def load_two(self, clip_name1, clip_name2, type, device="default"):
    return (small_clip(type),)


comfyui = sys.modules["nodes"]
comfyui.CLIPLoader.load_clip, comfyui.DualCLIPLoader.load_clip = load_one, load_two
