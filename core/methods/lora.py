"""LoRA (arXiv:2106.09685): each weight W becomes W + alpha / rank * B A, with the layers that peft puts in place."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters import PEFT_NAME, Adapter, Method, peft_layers, target_modules
from ..base import Base
from ..config import TrainConfig
from ..errors import LoraMisfit
from ..families.spec import FamilySpec
from ..lora_file import LoraFile, LoraModule, name_in_scheme
from ..lora_keys import FAMILIES, ModuleId


@dataclass(frozen=True, eq=False)
class LoraAdapter(Adapter):
    """LoRA layers on one or more networks."""

    networks: Mapping[str, nn.Module]
    layers: Mapping[ModuleId, nn.Module]
    """peft's layer in the place of each adapted module."""
    shared: Mapping[ModuleId, ModuleId]
    """Module -> the one whose A it uses: of layers that are one in the file (q, k and v), the first; else itself."""

    def parameters(self) -> dict[str, nn.Parameter]:
        found = {}
        for (part, path), layer in self.layers.items():
            if self.shared[part, path] == (part, path):
                found[f"{part}.{path}.down"] = layer.lora_A[PEFT_NAME].weight  # pyright: ignore
            found[f"{part}.{path}.up"] = layer.lora_B[PEFT_NAME].weight  # pyright: ignore
        return found

    def modules(self, values: Mapping[str, Tensor] | None = None) -> dict[ModuleId, LoraModule]:
        """The weight changes as they are now (or with other `values` in the place of the parameters), detached, on the CPU."""
        values = values or self.parameters()
        result = {}
        for (part, path), layer in self.layers.items():
            down = values[f"{'.'.join(self.shared[part, path])}.down"].detach().float().cpu().clone()
            up = values[f"{part}.{path}.up"].detach().float().cpu().clone()
            # The scale in use, whichever way it came about (rsLoRA), written as the alpha that means the same.
            result[part, path] = LoraModule(down, up, layer.scaling[PEFT_NAME] * down.shape[0])  # pyright: ignore
        return result

    def export(self, values: Mapping[str, Tensor], base: Base, metadata: Mapping[str, str]) -> LoraFile:
        return LoraFile.from_modules(base.family.name, self.modules(values), metadata, base.family.lora_scheme)

    def rate(self, name: str, config: TrainConfig) -> float:
        return super().rate(name, config) * (config.lora_plus_ratio if name.endswith(".up") else 1.0)

    @torch.no_grad()
    def load(self, modules: Mapping[ModuleId, LoraModule]) -> None:
        """Starts from given weight changes. LoraMisfit when modules or ranks are not those of this adapter."""
        if set(modules) != set(self.layers):
            odd = sorted(set(modules) ^ set(self.layers))[0]
            raise LoraMisfit(
                f"the LoRA to go on from adapts {len(modules)} modules, these settings {len(self.layers)}; "
                f"they differ at {odd[1]} of the {odd[0]}: choose the same targets"
            )
        for (part, path), module in modules.items():
            layer = self.layers[part, path]
            down, up = layer.lora_A[PEFT_NAME].weight, layer.lora_B[PEFT_NAME].weight  # pyright: ignore
            if module.down.numel() != down.numel() or module.up.numel() != up.numel():
                raise LoraMisfit(
                    f"the LoRA to go on from has rank {module.rank} at {path}, these settings {down.shape[0]}"
                )
            # Same product, whatever alpha the file has: the ratio of the scales goes into B.
            ratio = module.scale / layer.scaling[PEFT_NAME]  # pyright: ignore
            first = self.shared[part, path]
            if first != (part, path) and not torch.equal(module.down, modules[first].down):
                raise LoraMisfit(
                    f"the LoRA to go on from has matrices A of their own at {first[1]} and {path}, here they share one"
                )
            down.copy_(module.down.reshape(down.shape))
            up.copy_(module.up.reshape(up.shape).float() * ratio)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        for layer in self.layers.values():
            layer.enable_adapters(False)  # pyright: ignore
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)  # pyright: ignore


def attach(
    networks: Mapping[str, nn.Module], family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None = None
) -> LoraAdapter:
    """A LoraAdapter on the networks (denoiser, text encoders), which are changed in place.

    A is drawn Kaiming-uniform with a = sqrt 5 from the seed on the CPU, B is 0 (arXiv:2106.09685), so that a new adapter
    changes nothing and is the same on every machine.
    """
    from peft import LoraConfig

    targets = target_modules(family, config, networks)
    layers = peft_layers(
        networks, targets, config,
        lambda r, alpha, **options: LoraConfig(
            r=r, lora_alpha=alpha, lora_dropout=config.dropout, use_rslora=config.rslora, **options
        ),
    )  # fmt: skip
    shared = _shared(family, layers)
    for module_id, first in shared.items():
        layers[module_id].lora_A[PEFT_NAME] = layers[first].lora_A[PEFT_NAME]  # pyright: ignore
    adapter = LoraAdapter(networks, layers, shared)
    generator = torch.Generator().manual_seed(config.seed)
    for name, parameter in sorted(adapter.parameters().items()):
        # peft gives the adapter the dtype of the layer it sits on; it learns in float32 whatever that is.
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
        if name.endswith(".down"):
            bound = 1 / math.sqrt(parameter[0].numel())  # Kaiming with a = sqrt 5: 1 / sqrt(fan in)
            drawn = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
            parameter.data.copy_(drawn)
    if continue_from is not None:
        adapter.load(continue_from.modules())
    return adapter


def _shared(family: FamilySpec, layers: Mapping[ModuleId, nn.Module]) -> dict[ModuleId, ModuleId]:
    """Layers that the family's files name as one have one A, as if they were: else the file's rank would be their sum."""
    firsts: dict[tuple[str, int], ModuleId] = {}
    shared = {}
    for (part, path), layer in layers.items():
        name, _, _ = name_in_scheme(FAMILIES[family.name], part, path, family.lora_scheme)
        rank = layer.lora_A[PEFT_NAME].weight.shape[0]  # pyright: ignore
        shared[part, path] = firsts.setdefault((name, rank), (part, path))
    return shared


METHOD = Method("LoRA (arXiv:2106.09685)", attach)
