"""Apply a LoRA to a model: a diffusers pipeline or bare networks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoraMisfit, UnmatchedKeys
from ..models.families import FAMILIES
from ..models.narrow_layers import NarrowLayer
from ..tensor_names import ModuleId, text_encoder_path
from .file import LoraFile, fit
from .kinds import LOW_RANK
from .modules import LoraModule

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
    """A LoRA that is merged into the weights and biases of networks. As a context manager, it is removed at the end."""

    name: str
    """The name of the LoRA in messages."""
    layers: Mapping[ModuleId, nn.Module]
    """The layers that it can change."""
    originals: dict[tuple[ModuleId, str], Any] = field(default_factory=dict)
    """(module, "weight" or "bias") -> the original parameter; for a narrow weight, its original list of changes.

    They are in the computer's memory until `swap` needs them on the device.
    """
    for_good: bool = False
    """Whether originals are not kept, so that it cannot be removed."""

    @torch.no_grad()
    def add(self, module_id: ModuleId, name: str, change: Tensor) -> None:
        """Add a change of any shape to a parameter. Raises UnmatchedKeys when the sum is not finite in its precision."""
        if name == "weight" and isinstance(self.layers[module_id], NarrowLayer):
            raise UnmatchedKeys(
                f"{self.name}: the weight of {module_id[1]} is quantised or in fp8, so only a plain LoRA can change it; "
                "convert the LoRA to a plain one"
            )
        parameter: Tensor = getattr(self.layers[module_id], name)
        changed = self._sum(module_id, name, parameter, change)
        if not self.for_good and (module_id, name) not in self.originals:
            # A GPU that holds the network may have no room for a second one.
            self.originals[module_id, name] = parameter.data.cpu()
        parameter.data = changed.to(parameter.dtype)

    @torch.no_grad()
    def add_low_rank(self, module_id: ModuleId, module: LoraModule) -> None:
        """Add a change to a weight, as `add` does. A narrow weight stays as it is, and the change is beside it."""
        layer = self.layers[module_id]
        if not isinstance(layer, NarrowLayer):
            self.add(module_id, "weight", module.delta())
            return
        change = _LowRank(module)
        self._sum(module_id, "weight", layer.weight, change(layer.narrow.parts[0].device))
        if not self.for_good:
            self.originals.setdefault((module_id, "weight"), layer.changes)
        layer.changes = (*layer.changes, change)

    def _sum(self, module_id: ModuleId, name: str, parameter: Tensor, change: Tensor) -> Tensor:
        changed = parameter.float() + change.reshape(parameter.shape).to(parameter.device)
        if not torch.linalg.vector_norm(changed, math.inf) <= torch.finfo(parameter.dtype).max:
            raise UnmatchedKeys(f"{self.name}: the {name} of {module_id[1]} would hold NaN or infinity")
        return changed

    @torch.no_grad()
    def remove(self) -> None:
        """Restore all parameters bit for bit, on the networks' current device and in their current precision.

        If several LoRAs are applied, remove the last one first.
        """
        for (module_id, name), original in self.originals.items():
            self._put(module_id, name, original)

    def swap(self) -> None:
        """Take the LoRA off but keep its changed parameters. Call it again to put the LoRA back on.

        While it is off, don't remove any LoRA that was applied before it.
        """
        for (module_id, name), other in self.originals.items():
            self.originals[module_id, name] = self._put(module_id, name, other)

    def _put(self, module_id: ModuleId, name: str, value: Any) -> Any:
        """Set a parameter to a value of `originals`, and return the value it replaces."""
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
    """A low-rank change that is computed on the device of its weight. Its matrices stay on the last device used."""

    def __init__(self, module: LoraModule):
        self._module = module

    def __call__(self, device: torch.device) -> Tensor:
        return self._on(device).delta()

    def times(self, x: Tensor) -> Tensor:
        module = self._on(x.device)
        return F.linear(F.linear(x, module.down.to(x.dtype)), (module.scale * module.up).to(x.dtype))

    def _on(self, device: torch.device) -> LoraModule:
        module = self._module
        mid = None if module.mid is None else module.mid.to(device)
        self._module = replace(module, down=module.down.to(device), up=module.up.to(device), mid=mid)
        return self._module


def apply(
    lora: LoraFile,
    target: Any,
    strength: float = 1.0,
    text_encoder_strength: float | None = None,
    *,
    for_good: bool = False,
) -> AppliedLora:
    """Apply a LoRA. Each weight W that it changes becomes W + strength * alpha / rank * up @ down.

    Other kinds of adapters change weights and biases in their own ways. `remove`, or the end of a `with apply(...):`, undoes
    all changes.

    `target` is a diffusers pipeline, or a mapping part -> network (`denoiser`, `text_encoder`, ...; see `Base.load`) with
    the family's name under `family`. Changes of text encoders that the target doesn't have are ignored.

    Removing a LoRA requires the original weights, which fill as much memory as the changed ones. With `for_good` they are not
    kept, and the LoRA cannot be removed.

    Raises LoraMisfit when the target lacks any other module that the LoRA changes. Raises UnmatchedKeys when a tensor cannot
    be used or a changed weight would not be finite. After an error, the target is unchanged, except with `for_good`.
    """
    family, networks = _networks(target)
    layers: dict[ModuleId, nn.Module] = {
        (part, path if part == "denoiser" else text_encoder_path(path)): module
        for part, network in networks.items()
        for path, module in network.named_modules()
        if isinstance(module, NarrowLayer) or isinstance(getattr(module, "weight", None), Tensor)
    }
    shapes: dict[ModuleId, tuple[int, ...]] = {
        module_id: layer.narrow.shape if isinstance(layer, NarrowLayer) else tuple(layer.weight.shape)  # pyright: ignore
        for module_id, layer in layers.items()
    }
    biased = {module_id for module_id, layer in layers.items() if isinstance(getattr(layer, "bias", None), Tensor)}
    unused = FAMILIES[family].unused if family in FAMILIES else r"$^"
    present = lora.of_parts({"denoiser", *networks}).of_loaded(shapes, unused)
    fit(present, family, shapes, biased).check(lora.name)
    if text_encoder_strength is None:
        text_encoder_strength = strength
    applied = AppliedLora(lora.name, layers, for_good=for_good)
    try:
        for entry in present.entries:
            factor = strength if entry.part == "denoiser" else text_encoder_strength
            # Narrow weights stay as they are stored, beside a low-rank change.
            if entry.kind in LOW_RANK and any(isinstance(layers[module], NarrowLayer) for module in entry.modules):
                for module_id, module in present.low_rank_of(entry, factor):
                    applied.add_low_rank(module_id, module)
            else:
                changes = present.changes_of(entry, lambda module_id: layers[module_id].weight.cpu())  # pyright: ignore
                for module_id, change in changes:
                    applied.add(module_id, "weight", factor * change)
            for module_id, change in present.bias_changes_of(entry, inputs=math.prod(shapes[entry.modules[0]][1:2])):
                applied.add(module_id, "bias", factor * change)
    except BaseException:  # Don't leave the LoRA half applied.
        applied.remove()
        raise
    return applied


def _networks(target: Any) -> tuple[str, dict[str, nn.Module]]:
    if isinstance(target, Mapping):
        networks = {part: network for part, network in target.items() if part != "family"}
        return target["family"], networks
    class_name = type(target).__name__
    if class_name not in _PIPELINE_FAMILIES:
        raise LoraMisfit(f"the pipeline {class_name} is not supported; known: {', '.join(_PIPELINE_FAMILIES)}")
    found = [(part, getattr(target, name, None)) for name, part in _PIPELINE_PARTS.items()]
    return _PIPELINE_FAMILIES[class_name], {part: network for part, network in found if network is not None}
