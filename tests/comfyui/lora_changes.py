"""What ComfyUI, diffusers and peft make of LoRA files, as changes of weights, and files to ask them about.

A file changes every Linear and convolution of a denoiser, or those in its numbered blocks, or the layers of the text encoders,
with ranks 1 and 2 and alpha 0.5. A change is what a weight changes by, times a fixed vector.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.lora.file import LoraFile
from core.lora.modules import LoraModule
from core.tensor_names import NAME_TABLES, ModuleId
from tests.invokeai.setup_invokeai import PYTHON as INVOKEAI
from tests.small_models import IN_DIFFUSERS

from .scripts import printed_by

EXACT = 1e-3
"""Relative deviation that float32 sums of thousands of products can have, where they cancel."""
UNET = {"attention_head_dim": 8}
XL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# diffusers' class, its configuration with few layers and full width, and the pipeline whose LoRA loader is used.
MODELS = {
    "sd15": ("UNet2DConditionModel", {**UNET, "cross_attention_dim": 768}, "StableDiffusionPipeline"),
    "sd2": (
        "UNet2DConditionModel",
        {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
        "StableDiffusionPipeline",
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {**XL_BLOCKS, "cross_attention_dim": 2048, "use_linear_projection": True},
        "StableDiffusionXLPipeline",
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        "StableDiffusion3Pipeline",
    ),
    "flux1": (
        "FluxTransformer2DModel",
        {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True},
        "FluxPipeline",
    ),
    "chroma": ("ChromaTransformer2DModel", {"num_layers": 2, "num_single_layers": 2}, "ChromaPipeline"),
    "flux2": ("Flux2Transformer2DModel", {"num_layers": 2, "num_single_layers": 2}, "Flux2Pipeline"),
    "flux3": ("Flux3Transformer2DModel", {"num_layers": 2, "num_single_layers": 2}, "Flux3ModularPipeline"),
    "lumina2": ("Lumina2Transformer2DModel", {"num_layers": 2, "cap_feat_dim": 2304}, "Lumina2Pipeline"),
    "zimage": ("ZImageTransformer2DModel", {"n_layers": 2}, "ZImagePipeline"),
    "qwen-image": ("QwenImageTransformer2DModel", {"num_layers": 2}, "QwenImagePipeline"),
    "qwen-image-21": ("QwenImage21Transformer2DModel", {"num_layers": 2}, "QwenImage21Pipeline"),
    "krea2": ("Krea2Transformer2DModel", {"num_layers": 2}, "Krea2Pipeline"),
    "ernie-image": (
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_layers": 2,
            "ffn_hidden_size": 12288,
            "text_in_dim": 3072,
        },
        "ErnieImagePipeline",
    ),
    "longcat-image": (
        "LongCatImageTransformer2DModel",
        {"num_layers": 2, "num_single_layers": 2},
        "LongCatImagePipeline",
    ),
    "ideogram4": ("Ideogram4Transformer2DModel", {"num_layers": 2}, "Ideogram4Pipeline"),
}
CLIP_L, CLIP_H, CLIP_G = (12, 768), (23, 1024), (32, 1280)
TEXT_ENCODERS: dict[str, dict[str, tuple[int, int] | str]] = {
    "sd15": {"text_encoder": CLIP_L},
    "sd2": {"text_encoder": CLIP_H},
    "sdxl": {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    "sd3": {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": "T5"},
    "flux1": {"text_encoder": CLIP_L, "text_encoder_2": "T5"},
    "chroma": {"text_encoder": "T5"},
}
"""Family -> part -> layers and width of a CLIP, or T5 (two layers of it)."""
Changes = dict[str, Tensor]
"""Path of a module -> change of its weight times a fixed vector."""


def probe(inputs: int) -> Tensor:
    return torch.randn(inputs, generator=torch.Generator().manual_seed(inputs))


def probed(down: Tensor, up: Tensor, scale: float) -> Tensor:
    down, up = down.float().flatten(1), up.float().flatten(1)
    return scale * (up @ (down @ probe(down.shape[1])))


def family_of(name: str) -> str:
    """Of a family's name, or that after `small-`."""
    return name.removeprefix("small-")


def model_of(name: str) -> nn.Module:
    """diffusers' model without any values: its memory is never touched. `name` is a family's, or that after `small-`."""
    import diffusers

    cls, config, _ = MODELS[family_of(name)]
    with torch.device("meta"):
        model = getattr(diffusers, cls)(**config | (IN_DIFFUSERS[family_of(name)] if name != family_of(name) else {}))
    return model.to_empty(device="cpu")


@cache
def loras_of(name: str, blocks_only: bool) -> Mapping[ModuleId, LoraModule]:
    generator = torch.Generator().manual_seed(0)
    modules: dict[ModuleId, LoraModule] = {}
    for path, layer in model_of(name).named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        if blocks_only and (not re.search(r"\.\d+\.", path) or path.startswith("distilled")):
            continue
        rank, shape = 1 + len(modules) % 2, layer.weight.shape
        down = torch.randn(rank, *shape[1:], generator=generator)
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
        modules["denoiser", path] = LoraModule(down, up, 0.5)
    return modules


def text_model_of(name: str, part: str) -> nn.Module:
    """transformers' text encoder without any values, for a small model 64 wide and of a few layers."""
    import transformers

    size = TEXT_ENCODERS[family_of(name)][part]
    is_small = name != family_of(name)
    with torch.device("meta"):
        if isinstance(size, str):
            width = 64 if is_small else 4096
            config = transformers.T5Config(
                d_model=width, d_ff=width * 5 // 2, num_layers=2, num_heads=width // 64, feed_forward_proj="gated-gelu"
            )
            return transformers.T5EncoderModel(config).to_empty(device="cpu")
        layers, width = (3, 64) if is_small else size
        config = transformers.CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64
        )
        return transformers.CLIPTextModel(config).to_empty(device="cpu")


@cache
def text_loras_of(name: str) -> Mapping[ModuleId, LoraModule]:
    generator = torch.Generator().manual_seed(1)
    modules: dict[ModuleId, LoraModule] = {}
    for part in TEXT_ENCODERS[family_of(name)]:
        for path, layer in text_model_of(name, part).named_modules():
            if isinstance(layer, nn.Linear):
                rank = 1 + len(modules) % 2
                down = torch.randn(rank, layer.in_features, generator=generator)
                up = torch.randn(layer.out_features, rank, generator=generator)
                modules[part, project_path(path)] = LoraModule(down, up, 0.5)
    return modules


def project_path(path: str) -> str:
    """transformers 5 has CLIP's paths without the `text_model.` that all LoRA files have."""
    return f"text_model.{path}" if path.startswith("encoder.layers.") else path


def changes_of(modules: Mapping[ModuleId, LoraModule]) -> Changes:
    """Of the denoiser by path, of text encoders by part and path."""
    return {
        path if part == "denoiser" else f"{part}.{path}": probed(module.down, module.up, module.scale)
        for (part, path), module in modules.items()
    }


@cache
def plain_model_of(family: str) -> Any:
    """For those that leave it as it was."""
    return model_of(family)


def of_diffusers(family: str, lora: LoraFile, model: Any = None) -> Changes:
    """By diffusers' model, of the family's published width where none is given; empty where its pipeline loads no LoRAs."""
    import diffusers

    pipeline, model = getattr(diffusers, MODELS[family][2]), model or plain_model_of(family)
    if not hasattr(pipeline, "lora_state_dict"):
        return {}
    is_unet = lora.family in ("sd15", "sd2", "sdxl")
    state, alphas = converted_by(pipeline, lora, {"unet_config": model.config} if is_unet else {})
    load = pipeline.load_lora_into_unet if is_unet else pipeline.load_lora_into_transformer
    options = {"network_alphas": alphas} if "network_alphas" in inspect.signature(load).parameters else {}
    try:
        load(state, **{"unet" if is_unet else "transformer": model}, **options)
        return of_peft_layers(model)
    finally:
        model.unload_lora()


def converted_by(pipeline: Any, lora: LoraFile, options: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """The tensors in diffusers' names, and alphas where it does not multiply them in."""
    if "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters:
        options = {**options, "return_alphas": True}
    converted = pipeline.lora_state_dict(copied(lora), **options)
    return converted if isinstance(converted, tuple) else (converted, None)


def copied(lora: LoraFile) -> dict[str, Tensor]:
    """Copies: diffusers multiplies some tensors in place."""
    return {key: tensor.clone() for key, tensor in lora.tensors.items()}


def text_of_diffusers(family: str, lora: LoraFile) -> Changes:
    import diffusers

    pipeline = getattr(diffusers, MODELS[family][2])
    changes: Changes = {}
    if not hasattr(pipeline, "load_lora_into_text_encoder"):
        return changes
    options = {"unet_config": plain_model_of(family).config} if family == "sdxl" else {}
    state, alphas = converted_by(pipeline, lora, options)
    for part, size in TEXT_ENCODERS[family].items():
        if size != "T5":
            model = text_model_of(family, part)
            pipeline.load_lora_into_text_encoder(state, alphas, text_encoder=model, prefix=part)
            changes |= {f"{part}.{project_path(path)}": change for path, change in of_peft_layers(model).items()}
    return changes


def text_of_peft(family: str, lora: LoraFile) -> Changes:
    changes: Changes = {}
    for part in TEXT_ENCODERS[family]:
        found = into_peft(partial(text_model_of, family, part), lora, f"{part}.")
        changes |= {f"{part}.{project_path(path)}": change for path, change in found.items()}
    return changes


def of_peft(family: str, lora: LoraFile) -> Changes:
    return into_peft(partial(model_of, family), lora, NAME_TABLES[family].diffusers_prefix)


def into_peft(make_model: Callable[[], nn.Module], lora: LoraFile, prefix: str) -> Changes:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    state = {key.removeprefix(prefix): tensor for key, tensor in lora.tensors.items() if key.startswith(prefix)}
    ranks = {key.removesuffix(".lora_A.weight"): t.shape[0] for key, t in state.items() if ".lora_A." in key}
    if not ranks:
        return {}
    model = make_model()
    if not hasattr(model, "text_model"):
        # As diffusers does it.
        state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
        ranks = {path.removeprefix("text_model."): rank for path, rank in ranks.items()}
    # peft compiles a pattern for each module and each path here, and Python remembers 512 of them.
    others = {path: rank for path, rank in ranks.items() if rank != 1}
    config = LoraConfig(r=1, lora_alpha=1, target_modules=list(ranks), rank_pattern=others, alpha_pattern=dict(others))
    inject_adapter_in_model(config, model)
    set_peft_model_state_dict(model, state)
    return of_peft_layers(model)


def of_peft_layers(model: nn.Module) -> Changes:
    from peft.tuners.lora import LoraLayer

    changes: Changes = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            name = next(iter(layer.lora_A))
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            assert isinstance(down, Tensor) and isinstance(up, Tensor)
            changes[path] = probed(down.detach(), up.detach(), layer.scaling[name])
    return changes


def run_comfyui(files: Iterable[tuple[str, Path]], base: str = "zero") -> list[dict]:
    """What lora_reader.py says of each file; `base` is what the weights are before: zero or random."""
    arguments = (value for pair in files for value in pair)
    return results_in(printed_by("lora_reader.py", *arguments, LORA_READER_BASE=base))


def run_invokeai(files: Iterable[tuple[str, Path]], root: Path) -> list[dict]:
    """What invokeai_reader.py says of each file; `root` is a folder for what InvokeAI itself may write."""
    arguments = (value for pair in files for value in pair)
    found = printed_by("invokeai_reader.py", *arguments, python=INVOKEAI, PYTHONPATH="", INVOKEAI_ROOT=str(root))
    return results_in(found)


def results_in(printed: str) -> list[dict]:
    return [json.loads(line[7:]) for line in printed.splitlines() if line.startswith("RESULT ")]


def in_original_names(family: str, modules: Mapping[ModuleId, LoraModule]) -> Changes:
    """What each weight of the original model should change by."""
    parts: dict[str, dict[int, Tensor]] = {}
    swapped = set()
    for (_, path), module in modules.items():
        fusion = NAME_TABLES[family].of_diffusers(path)
        change = probed(module.down, module.up, module.scale)
        parts.setdefault(fusion.original, {})[fusion.parts.index(path)] = change
        if fusion.halves_swapped and len(change) == 2 * module.down.shape[1]:
            swapped.add(fusion.original)
    whole = {name: torch.cat([found[i] for i in sorted(found)]) for name, found in parts.items()}
    return {name: c.roll(len(c) // 2) if name in swapped else c for name, c in whole.items()}


@dataclass(frozen=True)
class Cell:
    matched: int
    total: int
    deviation: float

    def __str__(self) -> str:
        deviation = f"{self.deviation:.0e}" if self.deviation else "0"
        return f"{self.matched}/{self.total} {deviation}" if self.matched else "-"


def compare(found: Changes, wanted: Changes) -> Cell:
    common = [path for path in wanted if path in found]
    deviations = [((found[p] - wanted[p]).norm() / wanted[p].norm()).item() for p in common]
    return Cell(len(common), len(wanted), max(deviations, default=0.0))


def comfyui_changes(result: dict, prefix: str = "") -> Changes:
    return {
        name.removeprefix(prefix).removesuffix(".weight"): torch.tensor(change)
        for name, change in result["changes"].items()
    }
