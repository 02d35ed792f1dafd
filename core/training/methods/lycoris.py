"""The adapter of LoHa, LoKr and OFT, whose files have the form of LyCORIS."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...config import TrainConfig
from ...errors import LoraMisfit, counted
from ...lora.file import LoraFile
from ...lora.kinds import rank_of
from ...lora.modules import name_kinds, scheme_of_kinds
from ...models.base import Base
from ...models.spec import Networks
from ...tensor_names import NAME_TABLES, ModuleId
from .method import Adapter, refuse_settings_of_lora

Roles = Mapping[str, nn.Parameter]
"""The trained tensors of a layer by role, such as `hada_w1_a`, as in lora.kinds."""
KAIMING = None
"""As a deviation, it means uniform within 1 / sqrt(fan in), which is Kaiming's initialisation with a = sqrt 5."""
_SCALED_ROLES = ("hada_w2_a", "lokr_w2", "lokr_w2_a")
"""A ratio of scales is applied to the first of these factors that a layer has."""


@dataclass(frozen=True, eq=False)
class LycorisAdapter(Adapter):
    """Layers of one kind of adapter on one or more networks. Each layer has a method `enable_adapters(bool)`."""

    networks: Networks
    kind: str
    layers: Mapping[ModuleId, nn.Module]
    roles_of: Callable[[nn.Module], Roles]
    """Returns the trained tensors of a layer."""
    alphas: Mapping[ModuleId, float]
    network_arguments: Mapping[str, object]
    """The arguments with which LyCORIS would train the same, for the metadata."""

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{part}.{path}.{role}": parameter
            for (part, path), layer in self.layers.items()
            for role, parameter in self.roles_of(layer).items()
        }

    def start(
        self, family: str, config: TrainConfig, deviations: Mapping[str, float | None], continue_from: LoraFile | None
    ) -> None:
        """Load the tensors, float32, from a file, or draw them from the seed on the CPU, so that all machines start alike.

        `deviations` has the standard deviation of each role, or KAIMING. Raises BadConfig for settings that the kind doesn't
        support, and LoraMisfit when the file does not fit.
        """
        refuse_settings_of_lora(config)
        scheme_of_kinds(NAME_TABLES[family], self.layers)  # raise an error now if the file could not be written later
        generator = torch.Generator().manual_seed(config.seed)
        for name, parameter in sorted(self.parameters().items()):
            deviation = deviations[name.rpartition(".")[2]]
            if deviation is None:
                bound = 1 / math.sqrt(parameter[0].numel())
                parameter.data.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
            else:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
        if continue_from is not None:
            self._load(continue_from)

    def export(self, values: Mapping[str, Tensor], base: Base, metadata: Mapping[str, str]) -> LoraFile:
        tensors = {
            (part, path): {
                role: values[f"{part}.{path}.{role}"].detach().float().cpu().clone() for role in self.roles_of(layer)
            }
            | {"alpha": torch.tensor(self.alphas[part, path])}
            for (part, path), layer in self.layers.items()
        }
        described = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(dict(self.network_arguments))}
        return LoraFile(base.family.name, {**metadata, **described}, name_kinds(base.names, tensors))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        for layer in self.layers.values():
            layer.enable_adapters(False)  # pyright: ignore
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)  # pyright: ignore

    @torch.no_grad()
    def _load(self, file: LoraFile) -> None:
        """Start from a file. Raises LoraMisfit when its kind, modules or shapes are not those of this adapter."""
        entries = {entry.modules[0]: entry for entry in file.entries if entry.kind == self.kind}
        if set(entries) != set(self.layers) or len(entries) != len(file.entries):
            raise LoraMisfit(
                f"{file.name}: changes {counted(len(file.entries), 'module')} (kind {file.kind}), these settings "
                f"{len(self.layers)} (kind {self.kind}). Choose the same method and targets"
            )
        for module, layer in self.layers.items():
            tensors, roles = file.tensors_of(entries[module]), self.roles_of(layer)
            for role, parameter in roles.items():
                if role not in tensors or tensors[role].shape != parameter.shape:
                    raise LoraMisfit(
                        f"{file.name}: {entries[module].name} does not have the {role} of shape {list(parameter.shape)} that "
                        "these settings train. Choose the same rank and factor"
                    )
                parameter.copy_(tensors[role])
            if rank := rank_of(self.kind, {role: tuple(tensor.shape) for role, tensor in tensors.items()}):
                # One factor is scaled by the ratio of the alphas, so that the change is the same as in the file.
                alpha = tensors["alpha"].item() if "alpha" in tensors else float(rank)
                scaled = next(role for role in _SCALED_ROLES if role in roles)
                roles[scaled].mul_(alpha / self.alphas[module])
