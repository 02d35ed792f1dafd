"""Putting a LoRA on a model: on a diffusers pipeline, or on bare networks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoraMisfit
from .lora_file import LoraFile, fit

ModuleId = tuple[str, str]
_PIPELINE_PARTS = {
    "unet": "denoiser",
    "transformer": "denoiser",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
}
_PIPELINE_FAMILIES = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionImg2ImgPipeline": "sd15",
    "StableDiffusionInpaintPipeline": "sd15",
    "StableDiffusionControlNetPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
    "StableDiffusionXLControlNetPipeline": "sdxl",
}


@dataclass(frozen=True, eq=False)
class AppliedLora:
    """A LoRA that is merged into the weights of networks, and the way back."""

    originals: Mapping[ModuleId, Tensor]
    """The weights as they were."""
    layers: Mapping[ModuleId, nn.Module]

    @torch.no_grad()
    def remove(self) -> None:
        """Puts back the weights as they were, bit for bit. Of several LoRAs the last applied must be removed first."""
        for module_id, weight in self.originals.items():
            self.layers[module_id].weight.data = weight  # pyright: ignore


def apply(
    lora: LoraFile, target: Any, strength: float = 1.0, text_encoder_strength: float | None = None
) -> AppliedLora:
    """The applied LoRA: every weight W of `target` that it names becomes W + strength * alpha / rank * up @ down.

    `target` is a diffusers pipeline, or a mapping part -> network (`denoiser`, `text_encoder`, ...; see `Base.load`) with
    the family's name under `family`. Text encoders that are not among the parts are left alone.
    LoraMisfit, with nothing changed, when any other key of the LoRA has no place in the target.
    """
    family, networks = _networks(target)
    layers = {
        (part, _with_prefix(part, path)): module
        for part, network in networks.items()
        for path, module in network.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    }
    shapes = {module_id: tuple(layer.weight.shape) for module_id, layer in layers.items()}  # pyright: ignore
    present = lora if all(part in networks for part, _ in lora.modules()) else _without_absent_parts(lora, networks)
    fit(present, family, shapes).check(lora.name)
    if text_encoder_strength is None:
        text_encoder_strength = strength
    originals: dict[ModuleId, Tensor] = {}
    with torch.no_grad():
        for (part, path), module in present.modules().items():
            layer = layers[part, path]
            weight: Tensor = layer.weight  # pyright: ignore
            factor = strength if part == "denoiser" else text_encoder_strength
            change = factor * module.delta().to(weight.device)
            originals[part, path] = weight.data
            layer.weight.data = (weight.float() + change.reshape(weight.shape)).to(weight.dtype)  # pyright: ignore
    return AppliedLora(originals, {module_id: layers[module_id] for module_id in originals})


def _without_absent_parts(lora: LoraFile, networks: Mapping[str, nn.Module]) -> LoraFile:
    kept = {module_id: module for module_id, module in lora.modules().items() if module_id[0] in networks}
    return LoraFile.from_modules(lora.family, kept, lora.metadata)


def _networks(target: Any) -> tuple[str, dict[str, nn.Module]]:
    if isinstance(target, Mapping):
        networks = {part: network for part, network in target.items() if part != "family"}
        return target["family"], networks
    class_name = type(target).__name__
    if class_name not in _PIPELINE_FAMILIES:
        raise LoraMisfit(f"{class_name} is no pipeline that is known here; known: {', '.join(_PIPELINE_FAMILIES)}")
    found = {part: getattr(target, name, None) for name, part in _PIPELINE_PARTS.items()}
    return _PIPELINE_FAMILIES[class_name], {part: network for part, network in found.items() if network is not None}


def _with_prefix(part: str, path: str) -> str:
    """The project's name of a text encoder's module, whether or not the installed transformers says `text_model.`."""
    if part == "denoiser" or path.startswith("text_model.") or not path.startswith(("encoder.", "embeddings.")):
        return path
    return f"text_model.{path}"
