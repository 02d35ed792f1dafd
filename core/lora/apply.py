"""Apply a LoRA to a model: a diffusers pipeline or bare networks."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import exact_arithmetic, keeps_quantised_weights
from ..errors import LoraMisfit, UnmatchedKeys
from ..models.families import FAMILIES
from ..models.quantised_layers import QuantisedLayer
from ..tensor_names import ModuleId, text_encoder_path
from .file import LoraFile, fit
from .kinds import LOW_RANK
from .modules import LoraModule
from .names import Entry

HAS_ALL_OPERATIONS = "cuda"
"""The kind of device that computes the changes of all kinds of adapters. Others lack some operations or dtypes."""
SUMS_APART = "cpu"
"""The kind of device where a low-rank change is computed before it is added, so that results never change in a bit."""
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
    """(module, "weight" or "bias") -> the original parameter; for a quantised weight, its original list of changes.

    They are in the computer's memory until `swap` needs them on the device, unless they are kept `at_hand`. LoRAs that are
    applied one on another may share them: `remove` of one then removes all.
    """
    for_good: bool = False
    """Whether originals are not kept, so that it cannot be removed."""
    at_hand: bool = False
    """Whether originals stay on the device of their parameter, so that `swap` copies nothing."""
    device: torch.device | None = None
    """The device that computes the changed parameters; None means each parameter's own."""
    _sound: dict[tuple[ModuleId, str], Tensor] = field(default_factory=dict)
    """Whether each changed parameter is finite in its precision. They are read together, since reading waits for the device."""

    def device_of(self, module_id: ModuleId) -> torch.device:
        """Return the device that computes the changed parameters of a layer."""
        layer: Any = self.layers[module_id]
        return self.device or (layer.quantised.parts[0] if isinstance(layer, QuantisedLayer) else layer.weight).device

    @torch.no_grad()
    def add(self, module_id: ModuleId, name: str, change: Tensor) -> None:
        """Add a change of any shape to a parameter. Raises UnmatchedKeys for a quantised weight."""
        if name == "weight" and isinstance(self.layers[module_id], QuantisedLayer):
            raise UnmatchedKeys(
                f"{self.name}: the weight of {module_id[1]} is quantised or in fp8, so only a plain LoRA can change it; "
                "convert the LoRA to a plain one"
            )
        parameter: Tensor = getattr(self.layers[module_id], name)
        device = self.device_of(module_id)
        changed = parameter.to(device).float() + change.reshape(parameter.shape).to(device)
        self._replace(module_id, name, changed, parameter)

    @torch.no_grad()
    def add_low_rank(self, module_id: ModuleId, module: LoraModule) -> None:
        """Add a low-rank change to a weight. A quantised weight stays as it is, and the change is beside it."""
        layer = self.layers[module_id]
        if isinstance(layer, QuantisedLayer):
            if not self.for_good:
                self.originals.setdefault((module_id, "weight"), layer.changes)
            layer.changes = (*layer.changes, _LowRank(module))
            return
        device = self.device_of(module_id)
        module = _on_device(module, device)
        if module.mid is not None or device.type == SUMS_APART:
            self.add(module_id, "weight", module.delta())
            return
        parameter: Any = layer.weight
        # W + scale * up @ down, in float32: a product in 16 bits would round the matrices first.
        weight, up, down = (matrix.flatten(1).float() for matrix in (parameter.to(device), module.up, module.down))
        self._replace(module_id, "weight", torch.addmm(weight, up, down, alpha=module.scale), parameter)

    def _replace(self, module_id: ModuleId, name: str, changed: Tensor, parameter: Tensor) -> None:
        """Give a parameter the changed values, in float32 and of any shape with as many numbers."""
        limit = torch.finfo(parameter.dtype).max
        self._sound[module_id, name] = torch.linalg.vector_norm(changed, math.inf) <= limit
        changed = changed.reshape(parameter.shape).to(parameter.dtype)  # rounded before it is copied
        if self.for_good and parameter.is_pinned():
            parameter.data.copy_(changed)  # into its place in page-locked memory
            return
        if not self.for_good and (module_id, name) not in self.originals:
            # A GPU that holds the network may have no room for a second one.
            self.originals[module_id, name] = parameter.data if self.at_hand else parameter.data.cpu()
        parameter.data = changed.to(parameter.device)

    def check(self) -> None:
        """Raise UnmatchedKeys when a changed parameter is not finite in its precision."""
        for device in {sound.device for sound in self._sound.values()}:
            found = {changed: sound for changed, sound in self._sound.items() if sound.device == device}
            if not torch.stack([*found.values()]).all():
                (_, path), name = next(changed for changed, sound in found.items() if not sound)
                raise UnmatchedKeys(f"{self.name}: the {name} of {path} would hold NaN or infinity")
        self._sound.clear()

    @torch.no_grad()
    def remove(self) -> None:
        """Restore all parameters bit for bit, on the networks' current device and in their current precision.

        If several LoRAs are applied, remove the last one first.
        """
        for (module_id, name), original in self.originals.items():
            self._put(module_id, name, original)

    def swap(self) -> None:
        """Take the LoRA off but keep its changes, or put it back on. Meanwhile, don't remove any LoRA applied before it."""
        for (module_id, name), other in self.originals.items():
            self.originals[module_id, name] = self._put(module_id, name, other)

    def _put(self, module_id: ModuleId, name: str, value: Any) -> Any:
        """Set a parameter to a value of `originals`, and return the value it replaces."""
        layer = self.layers[module_id]
        if isinstance(value, tuple):
            assert isinstance(layer, QuantisedLayer)
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
        self._factors: tuple[Tensor, Tensor] | None = None
        """Down and the scaled up, in the dtype of the last input."""

    def __call__(self, device: torch.device) -> Tensor:
        self._module = _on_device(self._module, device)
        return self._module.delta()

    def times(self, x: Tensor) -> Tensor:
        if self._factors is None or (self._factors[0].device, self._factors[0].dtype) != (x.device, x.dtype):
            module = self._module = _on_device(self._module, x.device)
            self._factors = module.down.to(x.dtype), (module.scale * module.up).to(x.dtype)
        down, up = self._factors
        return F.linear(F.linear(x, down), up)


def _on_device(module: LoraModule, device: torch.device) -> LoraModule:
    def moved(matrix: Tensor) -> Tensor:
        return (matrix if keeps_quantised_weights(device) else matrix.float()).to(device)

    mid = None if module.mid is None else moved(module.mid)
    return replace(module, down=moved(module.down), up=moved(module.up), mid=mid)


def apply(
    lora: LoraFile | str | os.PathLike[str],
    target: Any,
    strength: float = 1.0,
    text_encoder_strength: float | None = None,
    *,
    for_good: bool = False,
    at_hand: bool = False,
    device: torch.device | None = None,
    originals: dict[tuple[ModuleId, str], Any] | None = None,
) -> AppliedLora:
    """Apply a LoRA or its file. Each weight W that it changes becomes W + strength * alpha / rank * up @ down.

    Other kinds of adapters change weights and biases in their own ways. `remove`, or the end of a `with apply(...):`, undoes
    all changes.

    `target` is a diffusers pipeline, or a mapping part -> network (`denoiser`, `text_encoder`, ...; see `Base.load`) with
    the family's name under `family`. Changes of text encoders that the target doesn't have are ignored.

    Changed weights are computed on `device`, by default on each weight's own. Only the LoRA's matrices are copied to it, and
    weights that are elsewhere.

    Removing a LoRA requires the original weights, which fill as much of the computer's memory as the changed ones, or with
    `at_hand` of the device's. With `for_good` they are not kept, and the LoRA cannot be removed. LoRAs on one target may share
    a dict of `originals`, which has each weight as it was before the first of them. `remove` of one of them then removes all.

    Raises LoraMisfit when the target lacks any other module that the LoRA changes. Raises UnmatchedKeys when a tensor cannot
    be used or a changed weight would not be finite. After an error, the target is unchanged, except with `for_good`; LoRAs that
    share their originals are removed too.
    """
    if not isinstance(lora, LoraFile):
        lora = LoraFile.read(lora)
    family, networks = _networks(target)
    layers: dict[ModuleId, nn.Module] = {
        (part, path if part == "denoiser" else text_encoder_path(path)): module
        for part, network in networks.items()
        for path, module in network.named_modules()
        if isinstance(module, QuantisedLayer) or isinstance(getattr(module, "weight", None), Tensor)
    }
    shapes: dict[ModuleId, tuple[int, ...]] = {
        module_id: layer.quantised.shape if isinstance(layer, QuantisedLayer) else tuple(layer.weight.shape)  # pyright: ignore
        for module_id, layer in layers.items()
    }
    biased = {module_id for module_id, layer in layers.items() if isinstance(getattr(layer, "bias", None), Tensor)}
    unused = FAMILIES[family].unused if family in FAMILIES else r"$^"
    present = lora.of_parts({"denoiser", *networks}).of_loaded(shapes, unused)
    fit(present, family, shapes, biased).check(lora.name)
    if text_encoder_strength is None:
        text_encoder_strength = strength
    applied = AppliedLora(lora.name, layers, {} if originals is None else originals, for_good, at_hand, device)
    try:
        with exact_arithmetic(tf32=False):
            for entry in present.entries:
                factor = strength if entry.part == "denoiser" else text_encoder_strength
                _apply_entry(applied, present, entry, factor, math.prod(shapes[entry.modules[0]][1:2]))
            applied.check()
    except BaseException:  # Don't leave the LoRA half applied.
        applied.remove()
        raise
    return applied


def _apply_entry(applied: AppliedLora, lora: LoraFile, entry: Entry, factor: float, inputs: int) -> None:
    """Apply the changes of an entry times the factor. `inputs` is the number of input features of its weight."""
    layers = [applied.layers[module_id] for module_id in entry.modules]
    device = applied.device_of(entry.modules[0])
    is_beside = device.type != SUMS_APART or any(isinstance(layer, QuantisedLayer) for layer in layers)
    if entry.kind in LOW_RANK and is_beside:
        for module_id, module in lora.low_rank_of(entry, factor):
            applied.add_low_rank(module_id, module)
    else:
        there = device if device.type == HAS_ALL_OPERATIONS else torch.device("cpu")
        weights: Any = dict(zip(entry.modules, layers, strict=True))
        for module_id, change in lora.changes_of(entry, lambda module_id: weights[module_id].weight.to(there), there):
            applied.add(module_id, "weight", factor * change)
    for module_id, change in lora.bias_changes_of(entry, inputs):
        applied.add(module_id, "bias", factor * change)


def _networks(target: Any) -> tuple[str, dict[str, nn.Module]]:
    if isinstance(target, Mapping):
        return target["family"], {part: network for part, network in target.items() if part != "family"}
    class_name = type(target).__name__
    if class_name not in _PIPELINE_FAMILIES:
        raise LoraMisfit(f"LoRAs can't be applied to a {class_name}. Known pipelines: {', '.join(_PIPELINE_FAMILIES)}")
    found = [(part, getattr(target, name, None)) for name, part in _PIPELINE_PARTS.items()]
    return _PIPELINE_FAMILIES[class_name], {part: network for part, network in found if network is not None}
