"""LoRAs that are computed beside a model's weights instead of being put into them."""

# pyright: reportMissingImports=false

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP
from comfy.weight_adapter.bypass import BypassForwardHook

Place = str | tuple[Any, ...]
"""A weight of the model, or (weight, (dimension, start, length)) for some of its rows, as ComfyUI's key maps say it."""


class BesideWeights:
    """Adapters whose part is added to the outputs of their modules, in a range of the sampling steps.

    ComfyUI's own bypass mode replaces `forward`, of which a second LoRA cannot be taken off again, and its scheduled hooks
    do not work with weights that are streamed to the device; hooks of PyTorch do both.
    """

    def __init__(self, sigmas: tuple[float, float] | None):
        """`sigmas` are the noise levels at which the range begins and ends, None for all steps."""
        self._sigmas = sigmas
        self._is_on = True
        self._adapters: list[tuple[Place, Any, float]] = []
        self._handles: list[Any] = []

    def add(self, adapters: Mapping[Place, Any], strength: float) -> None:
        self._adapters += [(place, adapter, strength) for place, adapter in adapters.items()]

    def attach(self, patcher: Any) -> None:
        """To a ModelPatcher, which puts the hooks in when it loads the model and takes them out when it unloads it."""
        key = f"facelora.{uuid.uuid4().hex}"
        patcher.set_injections(key, [PatcherInjection(inject=self._inject, eject=self._eject)])
        if self._sigmas is not None:
            patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, self._switch)

    def _switch(self, executor: Any, latents: torch.Tensor, sigma: torch.Tensor, *rest: Any, **others: Any) -> Any:
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
            BypassForwardHook(module, adapter, strength)  # tells the adapter what kind of module it is on
            adapter.weights = tuple(
                value.to(device) if isinstance(value, torch.Tensor) else value for value in adapter.weights
            )
            self._handles.append(module.register_forward_hook(self._hook(adapter, rows)))

    def _eject(self, patcher: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, adapter: Any, rows: Sequence[int] | None) -> Any:
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if not self._is_on:
                return None
            change = adapter.h(inputs[0], output)
            if rows is None:
                return output + change
            output = output.clone()
            output.narrow(1 if adapter.is_conv else -1, *rows).add_(change)
            return output

        return add
