"""The two ways in which Apply LoRA applies a LoRA: patches of the model's weights, and hooks that don't change the weights."""

# pyright: reportMissingImports=false

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import comfy.weight_adapter
import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP
from comfy.weight_adapter.bypass import BypassForwardHook
from torch import Tensor

from ...core.lora.changes import weight_change
from ...core.lora.file import LoraFile
from ...core.lora.kinds import needs_base
from ...core.lora.names import Entry

WeightName = str | tuple[Any, ...]
"""The name of a weight, or (name, (dimension, start, length)) for a slice of it, as in ComfyUI's key maps."""


def load_patches(lora: LoraFile, entries: list[Entry], key_map: Mapping[str, Any], strength: float) -> dict[Any, Any]:
    """Return the patch that ComfyUI adds, times `strength`, by place in the model. `key_map` has the place of each entry.

    Raises UnmatchedKeys if a change times the strength is not finite, which ComfyUI would draw as a black picture.
    """
    theirs: dict[str, Tensor] = {}
    computed: dict[Any, ComputedChange] = {}
    for entry in entries:
        tensors = lora.sound_tensors_of(entry, strength)
        if needs_base(entry.kind, tensors):
            weights = (entry.kind, tuple(tensors), tuple(tensors.values()))
            computed[key_map[entry.name]] = ComputedChange(set(entry.keys.values()), weights)
            tensors = {role: tensor for role, tensor in tensors.items() if role in ("diff_b", "b_norm")}
        # An alpha that is only in peft's metadata has no key in the file.
        theirs |= {entry.keys.get(role, f"{entry.name}.{role}"): tensor for role, tensor in tensors.items()}
    return comfy.lora.load_lora(theirs, {entry.name: key_map[entry.name] for entry in entries}) | computed


class ComputedChange(comfy.weight_adapter.WeightAdapterBase):
    """A change of a weight that `core` computes, because ComfyUI's own code differs in these cases.

    - OFT and BOFT grow with the square of the strength.
    - Of a DoRA's magnitudes, only the layout (1, in) is read as intended. A magnitude for each output is divided by the norm of
      the weight without the LoRA. That of a convolution, written as (out, 1), is skipped with a line in the log.
    - peft's `lora_magnitude_vector` is not supported.
    """

    name = "facelora"

    def __init__(self, loaded_keys: set[str], weights: tuple[str, tuple[str, ...], tuple[Tensor, ...]]):
        # ComfyUI copies adapters by these two attributes, and moves the tensors in them to the device.
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
        # `function` at most swaps halves of the rows, so it leads to the file's order and back again.
        change = weight_change(kind, on_device, function(weight))
        weight += function((strength * change.reshape(weight.shape)).to(weight.dtype))
        return weight


class BypassAdapters:
    """Adapters whose change is added to the outputs of their modules, in a range of the sampling steps.

    They use PyTorch's forward hooks. ComfyUI's own bypass mode replaces `forward`, so a second LoRA cannot be
    removed again. Its scheduled hooks do not work with weights that are streamed to the device.
    """

    def __init__(self, sigmas: tuple[float, float] | None):
        """`sigmas` are the noise levels at which the range begins and ends, None for all steps."""
        self._sigmas = sigmas
        self._is_on = True
        self._adapters: list[tuple[WeightName, Any, float]] = []
        self._handles: list[Any] = []

    def add(self, adapters: Mapping[WeightName, Any], strength: float) -> None:
        self._adapters += [(place, adapter, strength) for place, adapter in adapters.items()]

    def attach(self, patcher: Any) -> None:
        """Attach them to a ModelPatcher, which adds the hooks when it loads the model and removes them when it unloads it."""
        key = f"facelora.{uuid.uuid4().hex}"
        patcher.set_injections(key, [PatcherInjection(inject=self._inject, eject=self._eject)])
        if self._sigmas is not None:
            patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, self._switch)

    def _switch(self, executor: Any, latents: Tensor, sigma: Tensor, *rest: Any, **others: Any) -> Any:
        assert self._sigmas is not None
        self._is_on = self._sigmas[0] >= float(sigma.max()) >= self._sigmas[1]
        try:
            return executor(latents, sigma, *rest, **others)
        finally:
            self._is_on = True

    def _inject(self, patcher: Any) -> None:
        self._eject(patcher)
        device = comfy.model_management.get_torch_device()
        for place, adapter, strength in self._adapters:
            name, rows = (place, None) if isinstance(place, str) else (place[0], place[1][1:])
            module = comfy.utils.get_attr(patcher.model, name.removesuffix(".weight"))
            BypassForwardHook(module, adapter, strength)  # sets what the adapter's `h` reads
            adapter.weights = tuple(
                value.to(device) if isinstance(value, Tensor) else value for value in adapter.weights
            )
            self._handles.append(module.register_forward_hook(self._hook(adapter, rows)))

    def _eject(self, patcher: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, adapter: Any, rows: Sequence[int] | None) -> Any:
        def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._is_on:
                return None
            change = adapter.h(inputs[0], output)
            if rows is None:
                return output + change
            output = output.clone()
            output.narrow(1 if adapter.is_conv else -1, *rows).add_(change)
            return output

        return add
