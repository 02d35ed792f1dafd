"""Putting a LoRA on a model: on a diffusers pipeline, or on bare networks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraMisfit, UnmatchedKeys
from ..models.families import FAMILIES
from ..models.narrow_layers import NarrowLayer
from ..tensor_names import ModuleId, text_encoder_path
from .file import LoraFile, fit
from .modules import LoraModule

LOW_RANK = ("lora", "locon")
"""The kinds of entries that can be applied to weights that are kept as they are stored."""
_PIPELINE_PARTS = {
    "unet": "denoiser",
    "transformer": "denoiser",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
}
_PIPELINE_FAMILIES = {family.pipeline_class: name for name, family in FAMILIES.items()} | {
    pipeline: name for name, family in FAMILIES.items() for pipeline in family.other_pipelines
}


@dataclass(frozen=True, eq=False)
class AppliedLora:
    """A LoRA that is merged into the weights and biases of networks, and the way back: a context at whose end it is removed."""

    name: str
    """The name of the LoRA in messages."""
    layers: Mapping[ModuleId, nn.Module]
    """The layers that it can change."""
    originals: dict[tuple[ModuleId, str], Any] = field(default_factory=dict)
    """(module, "weight" or "bias") -> the changed parameter as it was; of a weight that is narrow, its changes."""

    @torch.no_grad()
    def add(self, module_id: ModuleId, name: str, change: Tensor) -> None:
        """Adds the change, in any shape, to a parameter. Raises UnmatchedKeys where the sum is not finite in its precision."""
        if name == "weight" and isinstance(self.layers[module_id], NarrowLayer):
            raise UnmatchedKeys(
                f"{self.name}: the weight of {module_id[1]} is kept as it is stored, which only a plain LoRA can be added to"
            )
        parameter: Tensor = getattr(self.layers[module_id], name)
        changed = self._sum(module_id, name, parameter, change)
        self.originals.setdefault((module_id, name), parameter.data)
        parameter.data = changed.to(parameter.dtype)

    @torch.no_grad()
    def add_low_rank(self, module_id: ModuleId, module: LoraModule) -> None:
        """Adds a change to a weight, as `add` does; to one that is kept as it is stored, whenever it is widened."""
        layer = self.layers[module_id]
        if not isinstance(layer, NarrowLayer):
            self.add(module_id, "weight", module.delta())
            return
        change = _LowRank(module)
        self._sum(module_id, "weight", layer.weight, change(layer.narrow.parts[0].device))
        self.originals.setdefault((module_id, "weight"), layer.changes)
        layer.changes = (*layer.changes, change)

    def _sum(self, module_id: ModuleId, name: str, parameter: Tensor, change: Tensor) -> Tensor:
        changed = parameter.float() + change.reshape(parameter.shape).to(parameter.device)
        if not torch.linalg.vector_norm(changed, math.inf) <= torch.finfo(parameter.dtype).max:
            raise UnmatchedKeys(f"{self.name}: the {name} of {module_id[1]} would hold NaN or infinity")
        return changed

    @torch.no_grad()
    def remove(self) -> None:
        """Puts back everything as it was, bit for bit, where the networks are now and in the precision they have now.

        Of several LoRAs the last applied must be removed first.
        """
        for (module_id, name), original in self.originals.items():
            self._put(module_id, name, original)

    def swap(self) -> None:
        """Takes the LoRA off without forgetting it, and puts it on when called again: the changed parameters are kept too.

        While it is off nothing else may be removed that was applied before it.
        """
        for (module_id, name), other in self.originals.items():
            self.originals[module_id, name] = self._put(module_id, name, other)

    def _put(self, module_id: ModuleId, name: str, value: Any) -> Any:
        """Puts back a value of `originals`, and returns the one that it replaces."""
        layer = self.layers[module_id]
        if isinstance(value, tuple):
            assert isinstance(layer, NarrowLayer)
            before, layer.changes = layer.changes, value
            return before
        parameter: Tensor = getattr(layer, name)
        before = parameter.data
        parameter.data = value.to(parameter.device, parameter.dtype)
        return before

    def __enter__(self) -> "AppliedLora":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _LowRank:
    """A low-rank change that is computed on the device where it is added. Its matrices stay on the last one."""

    def __init__(self, module: LoraModule):
        self._module = module

    def __call__(self, device: torch.device) -> Tensor:
        module = self._module
        mid = None if module.mid is None else module.mid.to(device)
        self._module = replace(module, down=module.down.to(device), up=module.up.to(device), mid=mid)
        return self._module.delta()


def apply(
    lora: LoraFile, target: Any, strength: float = 1.0, text_encoder_strength: float | None = None
) -> AppliedLora:
    """The applied LoRA: every weight W of `target` that it names becomes W + strength * alpha / rank * up @ down; other
    kinds of adapters change it, and the bias, as they mean to. `remove`, or the end of a `with apply(...):`, undoes it.

    `target` is a diffusers pipeline, or a mapping part -> network (`denoiser`, `text_encoder`, ...; see `Base.load`) with
    the family's name under `family`. Text encoders that are not among the parts are left alone.
    LoraMisfit when any other key of the LoRA has no place in the target, UnmatchedKeys when one makes no sense or a
    changed weight would not be finite; with an error nothing is changed.
    """
    family, networks = _networks(target)
    layers: dict[ModuleId, nn.Module] = {
        (part, path if part == "denoiser" else text_encoder_path(path)): module
        for part, network in networks.items()
        for path, module in network.named_modules()
        if isinstance(module, NarrowLayer) or isinstance(getattr(module, "weight", None), Tensor)
    }
    shapes = {module_id: _weight_shape(layer) for module_id, layer in layers.items()}
    biased = {module_id for module_id, layer in layers.items() if isinstance(getattr(layer, "bias", None), Tensor)}
    unused = FAMILIES[family].unused if family in FAMILIES else r"$^"
    present = lora.of_parts({"denoiser", *networks}).of_loaded(shapes, unused)
    fit(present, family, shapes, biased).check(lora.name)
    if text_encoder_strength is None:
        text_encoder_strength = strength
    applied = AppliedLora(lora.name, layers)
    try:
        for entry in present.entries:
            factor = strength if entry.part == "denoiser" else text_encoder_strength
            if entry.kind in LOW_RANK and any(isinstance(layers[module], NarrowLayer) for module in entry.modules):
                for module_id, module in present.low_rank_of(entry, factor):
                    applied.add_low_rank(module_id, module)
            else:
                changes = present.changes_of(entry, lambda module_id: layers[module_id].weight.cpu())  # pyright: ignore
                for module_id, change in changes:
                    applied.add(module_id, "weight", factor * change)
            for module_id, change in present.bias_changes_of(entry, inputs=math.prod(shapes[entry.modules[0]][1:2])):
                applied.add(module_id, "bias", factor * change)
    except BaseException:  # nothing stays half applied
        applied.remove()
        raise
    return applied


def _weight_shape(layer: Any) -> tuple[int, ...]:
    return layer.narrow.shape if isinstance(layer, NarrowLayer) else tuple(layer.weight.shape)


def _networks(target: Any) -> tuple[str, dict[str, nn.Module]]:
    if isinstance(target, Mapping):
        networks = {part: network for part, network in target.items() if part != "family"}
        return target["family"], networks
    class_name = type(target).__name__
    if class_name not in _PIPELINE_FAMILIES:
        raise LoraMisfit(f"{class_name} is no pipeline that is known here; known: {', '.join(_PIPELINE_FAMILIES)}")
    found = [(part, getattr(target, name, None)) for name, part in _PIPELINE_PARTS.items()]
    return _PIPELINE_FAMILIES[class_name], {part: network for part, network in found if network is not None}
