"""Adapters on frozen networks: small trainable changes of their weights, put in place by peft and read out as modules.

One method is one way to attach; all that the loop needs of it is an `Adapter`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .errors import BadConfig, LoraMisfit
from .families.spec import FamilySpec
from .lora_file import LoraFile, LoraModule

ModuleId = tuple[str, str]
"""(part, path): which network, and the dotted path of the module in it."""
_NAME = "facelora"
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA layers on one or more networks."""

    networks: Mapping[str, nn.Module]
    layers: Mapping[ModuleId, nn.Module]
    """peft's layer in the place of each adapted module."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained tensor, float32, under a name that stays the same from run to run."""
        return {
            f"{part}.{path}.{side}": getattr(layer, f"lora_{letter}")[_NAME].weight
            for (part, path), layer in self.layers.items()
            for side, letter in (("down", "A"), ("up", "B"))
        }

    def modules(self, values: Mapping[str, Tensor] | None = None) -> dict[ModuleId, LoraModule]:
        """The weight changes as they are now (or with other `values` in the place of the parameters), detached, on the CPU."""
        values = values or self.parameters()
        result = {}
        for (part, path), layer in self.layers.items():
            down = values[f"{part}.{path}.down"].detach().float().cpu().clone()
            up = values[f"{part}.{path}.up"].detach().float().cpu().clone()
            # The scale in use, whichever way it came about (rsLoRA), written as the alpha that means the same.
            result[part, path] = LoraModule(down, up, layer.scaling[_NAME] * down.shape[0])  # pyright: ignore
        return result

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
            down, up = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight  # pyright: ignore
            if module.down.numel() != down.numel() or module.up.numel() != up.numel():
                raise LoraMisfit(
                    f"the LoRA to go on from has rank {module.rank} at {path}, these settings {down.shape[0]}"
                )
            # Same product, whatever alpha the file has: the ratio of the scales goes into B.
            ratio = module.scale / layer.scaling[_NAME]  # pyright: ignore
            down.copy_(module.down.reshape(down.shape))
            up.copy_(module.up.reshape(up.shape).float() * ratio)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the networks are the frozen ones."""
        for layer in self.layers.values():
            layer.enable_adapters(False)  # pyright: ignore
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)  # pyright: ignore


def target_modules(
    family: FamilySpec, config: TrainConfig, networks: Mapping[str, nn.Module]
) -> dict[ModuleId, tuple[int, float]]:
    """(part, path) -> (rank, alpha) of everything that the settings adapt. BadConfig when a rank is above its layer's."""
    result: dict[ModuleId, tuple[int, float]] = {}
    for part, network in networks.items():
        pattern = family.denoiser_targets[config.targets] if part == "denoiser" else family.text_encoder_targets
        for path, module in network.named_modules():
            if not re.fullmatch(pattern, path):
                continue
            rank = _by_pattern(config.rank_pattern, path, config.rank)
            alpha = _by_pattern(config.alpha_pattern, path, config.alpha_for(rank))
            out_size, in_size = module.weight.shape[0], module.weight[0].numel()  # pyright: ignore
            if rank > min(out_size, in_size):
                raise BadConfig(
                    f"rank {rank} is larger than {path} ({out_size} x {in_size}) allows; "
                    f"use at most {min(out_size, in_size)}, or rank_pattern for this layer"
                )
            result[part, path] = (rank, float(alpha))
    return result


def _by_pattern(patterns: Mapping[str, _Number], path: str, default: _Number) -> _Number:
    return next((value for pattern, value in patterns.items() if re.search(pattern, path)), default)


def attach(
    networks: Mapping[str, nn.Module], family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None = None
) -> Adapter:
    """An Adapter on the networks (denoiser, text encoders), which are changed in place.

    A is drawn Kaiming-uniform with a = sqrt 5 from the seed on the CPU, B is 0 (arXiv:2106.09685), so that a new adapter
    changes nothing and is the same on every machine.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = target_modules(family, config, networks)
    layers: dict[ModuleId, nn.Module] = {}
    for part, network in networks.items():
        ranks = {path: rank for (owner, path), (rank, _) in targets.items() if owner == part}
        if not ranks:
            raise BadConfig(f"nothing in the {part.replace('_', ' ')} matches targets = {config.targets!r}")
        alphas = {path: alpha for (owner, path), (_, alpha) in targets.items() if owner == part}
        peft_config = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha_for(config.rank),  # pyright: ignore
            target_modules=list(ranks),
            lora_dropout=config.dropout,
            use_rslora=config.rslora,
            rank_pattern=_exceptions(ranks, config.rank),
            alpha_pattern=_exceptions(alphas, config.alpha_for(config.rank)),
        )
        inject_adapter_in_model(peft_config, network, adapter_name=_NAME)
        for path in ranks:
            layers[part, path] = network.get_submodule(path)
    adapter = Adapter(networks, layers)
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


def _exceptions(values: Mapping[str, _Number], default: _Number) -> dict[str, _Number]:
    """peft's pattern -> value for the modules whose value is not the default, one pattern for each value.

    peft tries the patterns in turn on every module, so hundreds of them would take minutes.
    """
    paths: dict[_Number, list[str]] = {}
    for path, value in values.items():
        if value != default:
            paths.setdefault(value, []).append(re.escape(path))
    return {f"^({'|'.join(group)})": value for value, group in paths.items()}
