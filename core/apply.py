"""Putting a LoRA on a model: on a diffusers pipeline, or on bare networks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoraMisfit
from .families import FAMILIES
from .lora_file import LoraFile, fit

ModuleId = tuple[str, str]
_PIPELINE_PARTS = {
    "unet": "denoiser",
    "transformer": "denoiser",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
}
_PIPELINE_FAMILIES = {family.pipeline_class: name for name, family in FAMILIES.items()} | {
    "StableDiffusionImg2ImgPipeline": "sd15",
    "StableDiffusionInpaintPipeline": "sd15",
    "StableDiffusionControlNetPipeline": "sd15",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
    "StableDiffusionXLControlNetPipeline": "sdxl",
    "FluxImg2ImgPipeline": "flux1",
    "FluxInpaintPipeline": "flux1",
    "FluxControlNetPipeline": "flux1",
}


@dataclass(frozen=True, eq=False)
class AppliedLora:
    """A LoRA that is merged into the weights of networks, and the way back."""

    originals: dict[ModuleId, Tensor]
    """The changed weights as they were."""
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
    LoraMisfit when any other key of the LoRA has no place in the target, UnmatchedKeys when one makes no sense; with an
    error nothing is changed.
    """
    family, networks = _networks(target)
    layers: dict[ModuleId, nn.Module] = {
        (part, _with_prefix(part, path)): module
        for part, network in networks.items()
        for path, module in network.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    }
    shapes = {module_id: tuple(layer.weight.shape) for module_id, layer in layers.items()}  # pyright: ignore
    present = _without_absent_parts(lora, networks)
    fit(present, family, shapes).check(lora.name)
    if text_encoder_strength is None:
        text_encoder_strength = strength
    applied = AppliedLora({}, layers)
    try:
        with torch.no_grad():
            for module_id, change in present.changes(lambda module_id: layers[module_id].weight.cpu()):  # pyright: ignore
                weight: Tensor = layers[module_id].weight  # pyright: ignore
                factor = strength if module_id[0] == "denoiser" else text_encoder_strength
                changed = weight.float() + factor * change.reshape(weight.shape).to(weight.device)
                applied.originals.setdefault(module_id, weight.data)
                layers[module_id].weight.data = changed.to(weight.dtype)  # pyright: ignore
    except BaseException:
        applied.remove()
        raise
    return applied


def _without_absent_parts(lora: LoraFile, networks: Mapping[str, nn.Module]) -> LoraFile:
    absent = {key for entry in lora.entries if entry.part not in networks for key in entry.keys.values()}
    return replace(lora, tensors={key: tensor for key, tensor in lora.tensors.items() if key not in absent})


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
