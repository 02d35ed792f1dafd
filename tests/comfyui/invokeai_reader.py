"""Run in a process of its own, with InvokeAI's packages on its path: what does InvokeAI make of LoRA files?

Arguments: pairs of a family and a file. Prints one JSON line for each: why the file is refused, or for each module of the
model its change times a fixed vector, as `part.path` in InvokeAI's model. The weights are 0 before.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportPrivateUsage=false
import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

# Of their modules this one must come first: the others import each other in a circle.
from invokeai.backend.model_manager.configs.factory import ModelConfigFactory  # isort: skip
import diffusers
import transformers
from invokeai.backend.flux.model import Flux
from invokeai.backend.flux.util import get_flux_transformers_params
from invokeai.backend.model_manager.load.model_loaders.lora import LoRALoader
from invokeai.backend.model_manager.taxonomy import FluxVariantType
from invokeai.backend.patches.layer_patcher import LayerPatcher
from invokeai.backend.patches.lora_conversions.flux_bfl_peft_lora_conversion_utils import (
    convert_bfl_lora_patch_to_diffusers,
)

UNET = {"attention_head_dim": 8}
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "cross_attention_dim": 2048,
    "use_linear_projection": True,
}  # fmt: skip
SD2 = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
DEV = {"num_layers": 2, "num_single_layers": 2}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}


def clip(**sizes: int) -> torch.nn.Module:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))


def flux1() -> torch.nn.Module:
    params = get_flux_transformers_params(FluxVariantType.Dev)
    return Flux(
        params.model_copy(update={"depth": 2, "depth_single_blocks": 2}) if hasattr(params, "model_copy") else params
    )


# InvokeAI's base, and by part the prefix of keys and the model whose modules it patches.
MODELS: dict[str, tuple[str, dict[str, tuple[str, Callable[[], torch.nn.Module]]]]] = {
    "sd15": ("sd-1", {
        "denoiser": ("lora_unet_", lambda: diffusers.UNet2DConditionModel(**UNET, cross_attention_dim=768)),
        "text_encoder": ("lora_te_", lambda: clip(**CLIP_L))}),
    "sd2": ("sd-2", {
        "denoiser": ("lora_unet_", lambda: diffusers.UNet2DConditionModel(**SD2)),
        "text_encoder": ("lora_te_", lambda: clip(**CLIP_H))}),
    "sdxl": ("sdxl", {
        "denoiser": ("lora_unet_", lambda: diffusers.UNet2DConditionModel(**XL)),
        "text_encoder": ("lora_te1_", lambda: clip(**CLIP_L)),
        "text_encoder_2": ("lora_te2_", lambda: clip(**CLIP_G))}),
    "flux1": ("flux", {
        "denoiser": ("lora_transformer-", flux1),
        "text_encoder": ("lora_clip-", lambda: clip(**CLIP_L))}),
    "flux2": ("flux2", {"denoiser": ("lora_transformer-", lambda: diffusers.Flux2Transformer2DModel(**DEV))}),
    "zimage": ("z-image", {"denoiser": ("lora_transformer-", lambda: diffusers.ZImageTransformer2DModel(n_layers=2))}),
    "qwen-image": ("qwen-image", {
        "denoiser": ("lora_transformer-", lambda: diffusers.QwenImageTransformer2DModel(num_layers=2))}),
    "krea2": ("krea-2", {"denoiser": ("lora_transformer-", lambda: diffusers.Krea2Transformer2DModel(num_layers=2))}),
}  # fmt: skip


@functools.cache
def model_of(family: str, part: str) -> torch.nn.Module:
    with torch.device("meta"):
        return MODELS[family][1][part][1]()


def probe(inputs: int) -> torch.Tensor:
    return torch.randn(inputs, generator=torch.Generator().manual_seed(inputs))


def changes(family: str, patch) -> Iterator[tuple[str, list[float]]]:
    """As LayerPatcher.apply_smart_model_patch goes through the layers."""
    is_flat = not any("." in key for key in patch.layers)
    for part, (prefix, _) in MODELS[family][1].items():
        model = model_of(family, part)
        for key, layer in patch.layers.items():
            if not key.startswith(prefix):
                continue
            try:
                path, module = LayerPatcher._get_submodule(model, key[len(prefix) :], layer_key_is_flattened=is_flat)
            except (AttributeError, IndexError):  # a warning in its log
                continue
            empty = {name: torch.zeros(value.shape) for name, value in module.named_parameters(recurse=False)}
            found = layer.get_parameters(empty, weight=1.0)
            if "weight" not in found or found["weight"].numel() != empty["weight"].numel():
                continue
            matrix = found["weight"].float().reshape(empty["weight"].shape[0], -1)
            yield f"{part}.{path}", (matrix @ probe(matrix.shape[1])).tolist()


def report(family: str, path: Path) -> dict:
    base = MODELS[family][0]
    found = ModelConfigFactory.from_model_on_disk(path, {"hash": "none"}, allow_unknown=False).config
    if found is None or found.type.value != "lora":
        return {"refused": "is not recognised as a LoRA", "changes": {}}
    if found.base.value != base:
        return {"refused": f"is taken for {found.base.value}", "changes": {}}
    loader = LoRALoader.__new__(LoRALoader)
    loader._model_base, loader._torch_dtype = found.base, torch.float32
    found.path = str(path)
    try:
        patch = loader._load_model(found)
        if family == "flux2":  # as its denoiser does
            patch = convert_bfl_lora_patch_to_diffusers(patch)
        return {"refused": None, "changes": dict(changes(family, patch))}
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}", "changes": {}}


logging.disable(logging.WARNING)
for family, path in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    print("RESULT " + json.dumps(report(family, Path(path))), flush=True)
