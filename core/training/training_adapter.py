"""LoRAs beside the layers of a denoiser in training: training adapters, and speed LoRAs.

A training adapter undoes a base model's distillation. Training on a model that was distilled to a few steps undoes the
distillation, and the trained file learns that too. With such a LoRA beside its layers, the distillation is already undone, so
only the person is learned. The adapter is off while pictures are drawn. A speed LoRA is the opposite: it is attached only
while pictures are drawn. Neither is part of the trained file.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import FaceLoraError, LoraMisfit
from ..lora.file import LoraFile, fit
from ..lora.hashes import model_hash
from ..lora.modules import without_tucker
from ..lora.names import Entry
from ..models.base import Base
from ..tensor_names import ModuleId

Places = tuple[Any, ...] | None
"""A convolution's stride, padding, dilation and groups. None for a linear layer."""
METADATA_KEY = "facelora.training_adapter"
"""The key of the training adapter's tensor hash in a trained file's metadata."""


@dataclass(frozen=True, eq=False)
class LayerChange:
    """What a training adapter adds to a layer."""

    factors: tuple[Tensor, ...] = ()
    """The change of the weight, or the matrices whose product it is, starting at the input."""
    bias: Tensor | None = None
    """The change of the bias, (out,) or for a convolution (out, 1, 1)."""

    def tensors(self) -> Iterator[Tensor]:
        yield from self.factors
        if self.bias is not None:
            yield self.bias

    def map(self, function: Any) -> "LayerChange":
        """Return the change with `function` applied to each tensor."""
        return LayerChange(tuple(map(function, self.factors)), None if self.bias is None else function(self.bias))


@dataclass(frozen=True, eq=False)
class TrainingAdapter:
    """A training adapter that fits a base model."""

    digest: str
    """The hash of its tensors."""
    changes: Mapping[str, LayerChange] = field(repr=False)
    """The change of each layer of the denoiser, by its path."""

    @classmethod
    def open(cls, source: "TrainingAdapter | LoraFile | str | os.PathLike[str]", base: Base) -> "TrainingAdapter":
        """Read a training adapter from a LoRA of any supported kind and naming. One that is open is returned unchanged.

        Raises a FaceLoraError that names the file when it is not a usable LoRA, or LoraMisfit when it does not fit the base
        model.
        """
        if isinstance(source, TrainingAdapter):
            return source
        usual = base.family.training_adapter
        expected = f"expected a LoRA for {base.family.title} in safetensors" + (f", such as {usual}" if usual else "")
        try:
            lora = source if isinstance(source, LoraFile) else LoraFile.read(source)
            changes = layer_changes(lora, base)
        except FaceLoraError as error:
            raise type(error)(f"training adapter: {error} ({expected})") from None
        return cls(model_hash(lora.tensors), changes)


def layer_changes(lora: LoraFile, base: Base) -> dict[str, LayerChange]:
    """Return what a LoRA adds to each layer of the base model's denoiser, by the layer's path.

    Raises a FaceLoraError that names the file when it is not a usable LoRA, or LoraMisfit when it does not fit.
    """
    shapes = {module: shape for module, shape in base.module_shapes().items() if module[0] == "denoiser"}
    names = base.components["denoiser"].tensors
    biased = {("denoiser", name.removesuffix(".bias")) for name in names if name.endswith(".bias")}
    used = lora.of_loaded(shapes, base.family.unused)
    fit(used, base.family.name, shapes, biased).check(lora.name)
    used.check()
    changes: dict[str, LayerChange] = {}
    for entry in used.entries:
        changes |= _changes(used, entry, base, shapes)
    return changes


def _changes(
    lora: LoraFile, entry: Entry, base: Base, shapes: Mapping[ModuleId, tuple[int, ...]]
) -> dict[str, LayerChange]:
    """Return the changes that an entry makes, by path. Raises LoraMisfit if one can't be added to a layer's output."""

    def weight(module: ModuleId) -> Tensor:
        return base.components["denoiser"].tensors[f"{module[1]}.weight"]

    if odd := [path for _, path in entry.modules if len(shapes["denoiser", path]) not in (2, 4)]:
        raise LoraMisfit(
            f"{lora.name}: changes {odd[0]}, which is neither a linear layer nor a convolution. Merge it into the base model "
            "instead"
        )
    ones = (1,) * (len(shapes[entry.modules[0]]) - 2)
    factors: dict[ModuleId, tuple[Tensor, ...]] = {}
    if entry.kind in ("lora", "locon"):
        for module, tucker in lora.low_rank_of(entry):
            low = without_tucker(tucker)
            down = low.down.float().reshape(low.rank, *shapes[module][1:])
            factors[module] = down, low.scale * low.up.float().reshape(-1, low.rank, *ones)
    else:
        for module, change in lora.changes_of(entry, weight):
            factors[module] = (change.reshape(shapes[module]),)
    biases = dict(lora.bias_changes_of(entry, shapes[entry.modules[0]][1]))
    return {
        module[1]: LayerChange(factors.get(module, ()), biases[module].reshape(-1, *ones) if module in biases else None)
        for module in entry.modules
    }


class AttachedAdapter:
    """A LoRA beside the layers of a denoiser. It adds to their outputs and leaves the layers unchanged."""

    def __init__(
        self,
        changes: Mapping[str, LayerChange],
        denoiser: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        name: str = "training adapter",
    ):
        """Attach the changes to the layers, also those of a method. Raises LoraMisfit with the `name` for an embedding."""
        self._on = True
        self._changes = {path: change.map(lambda t: t.to(device, dtype)) for path, change in changes.items()}
        layers = {path: denoiser.get_submodule(path) for path in changes}
        if path := next((path for path, layer in layers.items() if isinstance(layer, nn.Embedding)), None):
            raise LoraMisfit(f"the {name} changes {path}, which is an embedding. Merge it into the base model instead")
        adding = {path: partial(self._add, self._changes[path], _places(layer)) for path, layer in layers.items()}
        self._hooks = [layer.register_forward_hook(adding[path]) for path, layer in layers.items()]

    def tensors(self) -> list[Tensor]:
        """Return its tensors, which stay on the device."""
        return [tensor for change in self._changes.values() for tensor in change.tensors()]

    def detach(self) -> None:
        """Remove it from the layers."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Turn it off within this context."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def _add(self, change: LayerChange, places: Places, _: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> Any:
        """Return what a layer with the change in it outputs, given its `output` without the change."""
        if not self._on:
            return None
        factors = [factor.to(output.dtype) for factor in change.factors]
        x = inputs[0].to(output.dtype)
        if factors and places:
            x = F.conv2d(x, factors[0], None, *places)
            for factor in factors[1:]:
                x = F.conv2d(x, factor)
            output = output + x
        elif factors:
            for factor in factors[:-1]:
                x = F.linear(x, factor)
            # The product and the sum in one kernel, so that the sum is rounded once.
            output = torch.addmm(output.flatten(0, -2), x.flatten(0, -2), factors[-1].t()).view(output.shape)
        return output if change.bias is None else output + change.bias.to(output.dtype)


def _places(layer: nn.Module) -> Places:
    """Return the stride, padding, dilation and groups of a convolution, also a wrapped one. None for a linear layer."""
    convolution = next((module for module in layer.modules() if isinstance(module, nn.Conv2d)), None)
    return convolution and (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
