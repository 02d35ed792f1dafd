"""Adapters whose change depends on the weight, put into a model's weights as core computes it."""

# pyright: reportMissingImports=false

from collections.abc import Callable, Mapping
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.weight_adapter
import torch
from torch import Tensor

from ..core.lora.file import Entry, LoraFile
from ..core.lora.kinds import needs_base, weight_change


class OwnChange(comfy.weight_adapter.WeightAdapterBase):
    """A change that core computes, times the strength.

    ComfyUI's own OFT and BOFT grow with the square of the strength. Of DoRA it reads one layout as it is meant, (1, in): a
    magnitude for each output it divides by the norm of the weight without the LoRA, that of a convolution written as
    (out, 1) it logs and leaves out, and peft's `lora_magnitude_vector` it does not know.
    """

    name = "facelora"

    def __init__(self, loaded_keys: set[str], weights: tuple[str, tuple[str, ...], tuple[Tensor, ...]]):
        # ComfyUI makes copies of these two attributes, of the tensors on the device.
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self, weight: Tensor, key: str, strength: float, strength_model: float, offset: Any,
        function: Callable[[Tensor], Tensor], intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:  # fmt: skip
        kind, roles, tensors = self.weights
        on_device = {
            role: comfy.model_management.cast_to_device(tensor, weight.device, intermediate_dtype)
            for role, tensor in zip(roles, tensors, strict=True)
        }
        # `function` swaps halves of the rows, if anything: it leads to the file's order of them and back.
        change = weight_change(kind, on_device, function(weight))
        weight += function((strength * change.reshape(weight.shape)).to(weight.dtype))
        return weight


def load_patches(lora: LoraFile, entries: list[Entry], key_map: Mapping[str, Any]) -> dict[Any, Any]:
    """Place in the model -> what ComfyUI patches it with. `key_map` has the place for each entry's name."""
    theirs: dict[str, Tensor] = {}
    own: dict[Any, OwnChange] = {}
    for entry in entries:
        tensors = lora.tensors_of(entry)
        if needs_base(entry.kind, tensors):
            weights = (entry.kind, tuple(tensors), tuple(tensors.values()))
            own[key_map[entry.name]] = OwnChange(set(entry.keys.values()), weights)
            tensors = {role: tensor for role, tensor in tensors.items() if role in ("diff_b", "b_norm")}
        # An alpha that only peft's metadata has is in no key.
        theirs |= {entry.keys.get(role, f"{entry.name}.{role}"): tensor for role, tensor in tensors.items()}
    return comfy.lora.load_lora(theirs, {entry.name: key_map[entry.name] for entry in entries}) | own
