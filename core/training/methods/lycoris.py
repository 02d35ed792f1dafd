"""LoHa and LoKr, with peft's layers, and the adapter that OFT uses too. The files have the form of LyCORIS.

LoHa (arXiv:2108.06098): the change is the element-wise product of two low-rank matrices. LoKr (arXiv:2309.14859): it is a
Kronecker product of a small matrix and a larger one, which may be low-rank.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...config import TrainConfig
from ...errors import LoraMisfit, counted
from ...lora.file import LoraFile
from ...lora.kinds import rank_of
from ...lora.modules import name_kinds, scheme_of_kinds
from ...models.base import Base
from ...models.spec import FamilySpec, Networks
from ...tensor_names import NAME_TABLES, ModuleId
from .method import Adapter, Method, refuse_settings_of_lora, target_modules

Roles = Mapping[str, nn.Parameter]
"""The trained tensors of a layer by role, such as `hada_w1_a`, as in lora.kinds."""
PEFT_NAME = "facelora"
"""The name under which peft keeps our adapter in its layers."""
_KAIMING = None
"""As a deviation, it means uniform within 1 / sqrt(fan in), which is Kaiming's initialisation with a = sqrt 5."""
_DEVIATIONS = {
    "hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0,
    "lokr_w1": _KAIMING, "lokr_w2": 0.0, "lokr_w2_a": _KAIMING, "lokr_w2_b": 0.0,
    "oft_blocks": 0.0,
}  # fmt: skip
"""The standard deviation that each role starts with: as in LyCORIS, one factor is 0, and the first step has an effect."""
_SCALED_ROLES = ("hada_w2_a", "lokr_w2", "lokr_w2_a")
"""A ratio of scales is applied to the first of these factors that a layer has."""


def _peft_roles(layer: nn.Module) -> Roles:
    return {role: getattr(layer, role)[PEFT_NAME] for role in _DEVIATIONS if PEFT_NAME in getattr(layer, role, ())}


@dataclass(frozen=True, eq=False)
class LycorisAdapter(Adapter):
    """Layers of one kind of adapter on one or more networks. Each layer has a method `enable_adapters(bool)`."""

    networks: Networks
    kind: str
    layers: Mapping[ModuleId, nn.Module]
    alphas: Mapping[ModuleId, float]
    network_arguments: Mapping[str, object]
    """The arguments with which LyCORIS would train the same, for the metadata."""
    roles_of: Callable[[nn.Module], Roles] = _peft_roles
    """Returns the trained tensors of a layer."""

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{part}.{path}.{role}": parameter
            for (part, path), layer in self.layers.items()
            for role, parameter in self.roles_of(layer).items()
        }

    def start(self, family: str, config: TrainConfig, continue_from: LoraFile | None) -> None:
        """Load the tensors, float32, from a file, or draw them from the seed on the CPU, so that all machines start alike.

        Raises BadConfig for settings that the kind doesn't support, and LoraMisfit when the file does not fit.
        """
        refuse_settings_of_lora(config)
        scheme_of_kinds(NAME_TABLES[family], self.layers)  # raise an error now if the file could not be written later
        generator = torch.Generator().manual_seed(config.seed)
        for name, parameter in sorted(self.parameters().items()):
            deviation = _DEVIATIONS[name.rpartition(".")[2]]
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


def _attach(
    networks: Networks, family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None, kind: str
) -> Adapter:
    """Replace the target modules by peft's layers of LoHa ("loha") or LoKr ("lokr"), under the name PEFT_NAME."""
    import peft

    peft_config: Callable[..., Any] = peft.LoHaConfig
    arguments: dict[str, object] = {"algo": kind}
    if kind == "lokr":
        peft_config = partial(peft.LoKrConfig, decompose_factor=config.lokr_factor)
        arguments |= {"factor": config.lokr_factor}
    targets = target_modules(family, config, networks, joined=False)
    alphas = {module: alpha for module, (_, alpha) in targets.items()}
    layers: dict[ModuleId, nn.Module] = {}
    for part, network in networks.items():
        ranks = {path: rank for (owner, path), (rank, _) in targets.items() if owner == part}
        alphas_here = {path: alpha for (owner, path), alpha in alphas.items() if owner == part}
        configured = peft_config(
            r=config.rank,
            alpha=config.alpha_for(config.rank),  # pyright: ignore[reportArgumentType]  # peft says int, but divides it
            target_modules=list(ranks),
            rank_pattern=_exceptions(ranks, config.rank),
            alpha_pattern=_exceptions(alphas_here, config.alpha_for(config.rank)),
            use_effective_conv2d=False,
        )
        with torch.device("meta"):  # without data, which LycorisAdapter.start draws
            peft.inject_adapter_in_model(configured, network, adapter_name=PEFT_NAME)
        layers |= {(part, path): network.get_submodule(path) for path in ranks}
    for module, layer in layers.items():
        for parameters in layer.children():
            if isinstance(parameters, nn.ParameterDict) and PEFT_NAME in parameters:
                numbers = torch.empty(parameters[PEFT_NAME].shape, device=layer.base_layer.weight.device)  # pyright: ignore
                parameters[PEFT_NAME] = nn.Parameter(numbers)
        if "lokr_w2" in _peft_roles(layer):
            # Neither factor has a rank to divide by, so LyCORIS and ComfyUI don't scale the product.
            layer.scaling[PEFT_NAME] = 1.0  # pyright: ignore
            alphas[module] = float(targets[module][0])
    adapter = LycorisAdapter(networks, kind, layers, alphas, arguments)
    adapter.start(family.name, config, continue_from)
    return adapter


def _exceptions(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Return a pattern in peft's form for each value other than the default, with that value.

    peft tries every pattern on every module, so a pattern for each module would take minutes.
    """
    paths: dict[float, list[str]] = {}
    for path, value in values.items():
        if value != default:
            paths.setdefault(value, []).append(re.escape(path))
    return {f"^({'|'.join(group)})": value for value, group in paths.items()}


LOHA = Method(
    "LoHa, the product of two LoRAs element by element (arXiv:2108.06098)",
    partial(_attach, kind="loha"),
    rate_factor=0.15,
    joins_modules=False,
    package="peft",
)
LOKR = Method(
    "LoKr, a Kronecker product (arXiv:2309.14859)",
    partial(_attach, kind="lokr"),
    rate_factor=1.0,
    joins_modules=False,
    package="peft",
)
