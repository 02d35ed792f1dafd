"""LoRA (arXiv:2106.09685): each adapted weight W becomes W + alpha / rank * B A."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...config import OptimizerSettings, TrainConfig
from ...errors import LoraMisfit, counted
from ...lora.file import LoraFile
from ...lora.modules import LoraModule, name_in_scheme
from ...models.base import Base
from ...models.spec import FamilySpec, Networks
from ...tensor_names import ModuleId
from .lora_layer import LoraLayer, SharedInput
from .method import Adapter, Method, switched_off, target_modules


@dataclass(frozen=True, eq=False)
class LoraAdapter(Adapter):
    """LoRA layers on one or more networks."""

    networks: Networks
    layers: Mapping[ModuleId, LoraLayer]
    """The layer that replaces each adapted module."""
    shared: Mapping[ModuleId, ModuleId]
    """The module whose A each module uses: itself, or the first of the modules that are one in the file (q, k and v)."""
    copies: dict[tuple[nn.Parameter, ...], Tensor] = field(default_factory=dict)
    """Copies of the parameters, some of them stacked, in the dtype of the arithmetic. Empty when that is float32."""
    _places: list[Tensor] = field(default_factory=list)
    """The part of the copies that belongs to each parameter, in their order."""

    def parameters(self) -> dict[str, nn.Parameter]:
        found = {}
        for (part, path), layer in self.layers.items():
            if self.shared[part, path] == (part, path):
                found[f"{part}.{path}.down"] = layer.down
            found[f"{part}.{path}.up"] = layer.up
        return found

    @torch.no_grad()
    def copy(self, stacks: Iterable[tuple[nn.Parameter, ...]], dtype: torch.dtype) -> None:
        """Make `cast_once` copy these parameters, those of a tuple stacked."""
        # Copy all or none: if memory runs out halfway, the step is repeated.
        copies = {stack: _stacked(stack, dtype) for stack in stacks}
        self.copies.update(copies)
        self._places.extend(part for stack, copy in copies.items() for part in _parts(copy.detach(), stack))

    @contextmanager
    def cast_once(self, dtype: torch.dtype) -> Iterator[None]:
        inputs = dict.fromkeys(layer.together for layer in self.layers.values())
        if dtype != torch.float32:
            self._cast(inputs, dtype)
        try:
            yield
        finally:
            for shared in inputs:
                shared.copies = None
                shared.forget()
            for copy in self.copies.values():
                copy.grad = None

    @torch.no_grad()
    def _cast(self, inputs: Iterable[SharedInput], dtype: torch.dtype) -> None:
        if not self.copies:
            self.copy([*map(SharedInput.downs, inputs), *((layer.up,) for layer in self.layers.values())], dtype)
        # A few kernels for all of them.
        torch._foreach_copy_(self._places, [parameter for stack in self.copies for parameter in stack])
        for shared in inputs:
            ups = [self.copies[layer.up,] for layer in shared.layers]
            shared.copies = self.copies[shared.downs()], ups

    @torch.no_grad()
    def take_gradients(self) -> None:
        found = [(stack, copy.grad) for stack, copy in self.copies.items() if copy.grad is not None]
        if not found:
            return
        parameters = [parameter for stack, _ in found for parameter in stack]
        sizes = list(map(torch.numel, parameters))
        places = parameters[0].new_empty(sum(sizes)).split(sizes)
        gradients = [place.view(parameter.shape) for place, parameter in zip(places, parameters, strict=True)]
        torch._foreach_copy_(gradients, [part for stack, gradient in found for part in _parts(gradient, stack)])
        for copy in self.copies.values():
            copy.grad = None
        sums = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                sums.append((parameter.grad, gradient))
        if sums:
            torch._foreach_add_(*map(list, zip(*sums, strict=True)))

    def modules(self, values: Mapping[str, Tensor] | None = None) -> dict[ModuleId, LoraModule]:
        """Return the low-rank change of each module, from the parameters or other `values`, as float32 copies on the CPU."""
        values = values or self.parameters()
        result = {}
        for (part, path), layer in self.layers.items():
            down = values[f"{'.'.join(self.shared[part, path])}.down"].detach().float().cpu().clone()
            up = values[f"{part}.{path}.up"].detach().float().cpu().clone()
            # Readers scale by alpha / rank, so rsLoRA's alpha / sqrt(rank) is written as a different alpha.
            result[part, path] = LoraModule(down, up, layer.scale * down.shape[0])
        return result

    def export(self, values: Mapping[str, Tensor], base: Base, metadata: Mapping[str, str]) -> LoraFile:
        return LoraFile.from_modules(base.family.name, self.modules(values), metadata, names=base.names)

    def rate(self, name: str, config: OptimizerSettings, peak: float) -> float:
        return super().rate(name, config, peak) * (config.lora_plus_ratio if name.endswith(".up") else 1.0)

    @torch.no_grad()
    def load(self, modules: Mapping[ModuleId, LoraModule]) -> None:
        """Start from the given changes. Raises LoraMisfit when their modules or ranks are not those of this adapter."""
        if set(modules) != set(self.layers):
            odd = sorted(set(modules) ^ set(self.layers))[0]
            raise LoraMisfit(
                f"the LoRA to continue from adapts {counted(len(modules), 'module')}, these settings {len(self.layers)}. "
                f"They differ at {odd[1]} of the {odd[0]}. Choose the same targets"
            )
        for (part, path), module in modules.items():
            layer = self.layers[part, path]
            if module.down.numel() != layer.down.numel() or module.up.numel() != layer.up.numel():
                raise LoraMisfit(
                    f"the LoRA to continue from has rank {module.rank} at {path}, these settings {layer.down.shape[0]}. "
                    "Choose the same rank"
                )
            # Scale B by the ratio of the scales, so that the change is the same whatever alpha the file has.
            ratio = module.scale / layer.scale
            first = self.shared[part, path]
            if first != (part, path) and not torch.equal(module.down, modules[first].down):
                raise LoraMisfit(
                    f"the LoRA to continue from has separate matrices A at {first[1]} and {path}, but here they share one"
                )
            layer.down.copy_(module.down.reshape(layer.down.shape))
            layer.up.copy_(module.up.reshape(layer.up.shape).float() * ratio)

    def disabled(self) -> AbstractContextManager[None]:
        return switched_off(self.layers.values())


def attach(networks: Networks, family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None) -> LoraAdapter:
    """Attach a LoraAdapter to the networks with `attach_layers`. Layers with the same input work together."""
    adapter = attach_layers(networks, family, config, target_modules(family, config, networks), family.names.scheme)
    if continue_from is not None:
        adapter.load(continue_from.modules())
    if not config.dropout:
        for layers in _with_same_input(adapter):
            shared = SharedInput(layers)
            for layer in layers:
                layer.together = shared
    return adapter


def attach_layers(
    networks: Networks,
    family: FamilySpec,
    config: TrainConfig,
    targets: Mapping[ModuleId, tuple[int, float]],
    scheme: str,
) -> LoraAdapter:
    """Attach a LoraAdapter to the `target_modules` of the networks (denoiser, text encoders), which are changed in place.

    `scheme` is the naming scheme of the file to be written.

    A is drawn Kaiming-uniform with a = sqrt 5 from the seed on the CPU, and B is 0 (arXiv:2106.09685). So a new adapter
    doesn't change anything and is the same on every machine.
    """
    layers: dict[ModuleId, LoraLayer] = {}
    for (part, path), (rank, alpha) in targets.items():
        frozen = networks[part].get_submodule(path)
        layers[part, path] = LoraLayer(frozen, rank, alpha, rslora=config.rslora, dropout=config.dropout)
        networks[part].set_submodule(path, layers[part, path])
    shared = _shared(family, layers, scheme)
    for module_id, first in shared.items():
        layers[module_id].down = layers[first].down
    adapter = LoraAdapter(networks, layers, shared)
    generator = torch.Generator().manual_seed(config.seed)
    for name, parameter in sorted(adapter.parameters().items()):
        if name.endswith(".down"):
            bound = 1 / math.sqrt(parameter[0].numel())  # Kaiming with a = sqrt 5: 1 / sqrt(fan in)
            drawn = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
            parameter.data.copy_(drawn)
    return adapter


def _shared(family: FamilySpec, layers: Mapping[ModuleId, LoraLayer], scheme: str) -> dict[ModuleId, ModuleId]:
    """Return the module whose A each module uses.

    Modules that are fused into one in files of that scheme share an A, since the file's rank would otherwise be their sum.
    """
    firsts: dict[tuple[str, int], ModuleId] = {}
    shared = {}
    for (part, path), layer in layers.items():
        name, _, _ = name_in_scheme(family.names, part, path, scheme)
        shared[part, path] = firsts.setdefault((name, layer.down.shape[0]), (part, path))
    return shared


_SAME_INPUT = (
    ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"), ("q_proj", "k_proj", "v_proj"), ("w1", "w3"),
)  # fmt: skip
"""The names of sibling layers that get the same input. In cross-attention, to_q gets a different one."""


def _with_same_input(adapter: LoraAdapter) -> list[list[LoraLayer]]:
    """Group the linear layers that get the same input, judging by their names or because they are one layer in the file."""
    users = Counter(adapter.shared.values())
    found: dict[object, list[LoraLayer]] = {}
    for module_id, layer in adapter.layers.items():
        if layer.down.ndim == 2:
            first = adapter.shared[module_id]
            key = first if users[first] > 1 else _input_of(adapter.networks, module_id, layer.down.shape[1])
            found.setdefault(key, []).append(layer)
    return list(found.values())


def _input_of(networks: Networks, module_id: ModuleId, width: int) -> object:
    """Return a key that is equal for layers that get the same input, of that width."""
    part, path = module_id
    parent, _, name = path.rpartition(".")
    crosses = getattr(networks[part].get_submodule(parent), "is_cross_attention", False)
    names = next((names for names in _SAME_INPUT if name in names), None)
    return module_id if names is None or (crosses and name == "to_q") else (part, parent, names, width)


def _stacked(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> Tensor:
    first = parameters[0]
    return first.new_empty(sum(map(len, parameters)), *first.shape[1:], dtype=dtype, requires_grad=True)


def _parts(stacked: Tensor, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor]:
    """Split a tensor from `_stacked` into one part for each of the parameters."""
    return stacked.split([len(parameter) for parameter in parameters]) if len(parameters) > 1 else (stacked,)


METHOD = Method("LoRA (arXiv:2106.09685)", attach, keeps_dtype=True)
