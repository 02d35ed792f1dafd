"""The seam between the training loop and the methods: what a method puts on the frozen networks, and how it is read out.

A method is one file in `methods/`, which makes an `Adapter`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ...config import TrainConfig
from ...errors import BadConfig
from ...lora.file import LoraFile
from ...models.base import Base
from ...models.original_checkpoint import Checkpoint
from ...models.spec import FamilySpec
from ...tensor_names import ModuleId

PEFT_NAME = "facelora"
"""What peft calls our adapter."""
LORA_RATE = 1e-4
"""Peak learning rate of a LoRA that is told none."""
Trained = LoraFile | Checkpoint
"""What a training makes."""
_Number = TypeVar("_Number", int, float)


class Adapter(ABC):
    """Something trainable on frozen networks."""

    networks: Mapping[str, nn.Module]
    """Part -> network that it sits on."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained tensor, float32, under a name that stays the same from run to run and begins with its part."""

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Within it the networks are the frozen ones."""

    def cast_once(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Within it no parameter changes, and what has to be cast to that dtype for the arithmetic is so already."""
        return nullcontext()

    @abstractmethod
    def export(self, values: Mapping[str, Tensor], base: Base, metadata: Mapping[str, str]) -> Trained:
        """The file to save, with these values in the place of the parameters."""

    def constrain(self) -> None:  # noqa: B027, most have nothing to do
        """Called after each optimizer step: brings the parameters back to where they may be."""

    def rate(self, name: str, config: TrainConfig, peak: float) -> float:
        """The peak learning rate of a parameter, of which those of the denoiser have `peak`."""
        return peak if name.startswith("denoiser.") else config.text_encoder_lr


Attach = Callable[[Mapping[str, nn.Module], FamilySpec, TrainConfig, LoraFile | None], Adapter]
"""(part -> network, family, settings, file to go on from) -> the adapter; the networks are changed in place."""


@dataclass(frozen=True)
class Method:
    """A way to teach a base model a person."""

    title: str
    """What it is, for people."""
    attach: Attach
    trains_text: Callable[[TrainConfig], bool] = lambda config: config.text_encoder_lr > 0
    """Whether text is encoded anew in each step, since something trainable sits on the text encoders."""
    beside: Callable[[Trained, Base, TrainConfig], Mapping[str, LoraFile]] = lambda file, base, config: {}
    """What else is written beside the file: addition to its name -> file."""
    makes: Literal["lora", "embedding", "checkpoint"] = "lora"
    """What the file is: something that goes on a base model, or a base model itself."""
    rate_factor: float = 1.0
    """What a LoRA's learning rate is multiplied by to suit this method."""
    has_pefts_layers: bool = False
    """peft's cannot be built of tensors that hold no numbers: where memory is predicted, a LoRA's stand for them."""
    freezes_weights: bool = True
    """Whether the networks' own weights stay as they are, and so can be kept in 8 bits or away from the device."""
    keeps_dtype: bool = False
    """Whether its layers work in the dtype of their inputs, whatever their own, and so need no autocast."""

    def peak_rate(self, config: TrainConfig) -> float:
        """The peak learning rate: the set one, else what suits the method. Textual inversion's is that of its vectors."""
        if config.optimizer == "prodigy":
            return config.prodigy_rate
        if self.makes == "embedding":
            return config.embedding_lr
        return float(f"{LORA_RATE * self.rate_factor:.1e}") if config.learning_rate is None else config.learning_rate


def target_modules(
    family: FamilySpec, config: TrainConfig, networks: Mapping[str, nn.Module]
) -> dict[ModuleId, tuple[int, float]]:
    """(part, path) -> (rank, alpha) of everything that the settings adapt.

    BadConfig when a rank is above its layer's, when a network has nothing to adapt, or when a pattern matches nothing.
    """
    result: dict[ModuleId, tuple[int, float]] = {}
    for part, network in networks.items():
        pattern = family.denoiser_targets[config.targets] if part == "denoiser" else family.text_encoder_targets
        assert pattern is not None
        before = len(result)
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
        if len(result) == before:
            raise BadConfig(f"nothing in the {part.replace('_', ' ')} matches targets = {config.targets!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, name):
            if not any(re.search(pattern, path) for _, path in result):
                example = next(iter(result))[1]
                raise BadConfig(
                    f"{name}: {pattern!r} matches none of the {len(result)} adapted modules, e.g. {example}"
                )
    return result


def refuse_settings_of_lora(config: TrainConfig) -> None:
    """BadConfig for a setting that methods other than LoRA and DoRA have no use for."""
    for name in ("dropout", "rslora", "lora_plus_ratio"):
        if getattr(config, name) != getattr(TrainConfig, name):
            raise BadConfig(f"{name}: method {config.method!r} has none; it is for 'lora' and 'dora'")


def _by_pattern(patterns: Mapping[str, _Number], path: str, default: _Number) -> _Number:
    return next((value for pattern, value in patterns.items() if re.search(pattern, path)), default)


def peft_layers(
    networks: Mapping[str, nn.Module],
    targets: Mapping[ModuleId, tuple[int, float]],
    config: TrainConfig,
    peft_config: Callable[..., Any],
) -> dict[ModuleId, nn.Module]:
    """The layers that peft puts in the place of the targets, by its name PEFT_NAME.

    `peft_config` makes a configuration of the options that all kinds have: r, alpha, target_modules, patterns of both.
    """
    from peft import inject_adapter_in_model

    layers: dict[ModuleId, nn.Module] = {}
    for part, network in networks.items():
        ranks = {path: rank for (owner, path), (rank, _) in targets.items() if owner == part}
        alphas = {path: alpha for (owner, path), (_, alpha) in targets.items() if owner == part}
        configured = peft_config(
            r=config.rank,
            alpha=config.alpha_for(config.rank),
            target_modules=list(ranks),
            rank_pattern=_exceptions(ranks, config.rank),
            alpha_pattern=_exceptions(alphas, config.alpha_for(config.rank)),
        )
        inject_adapter_in_model(configured, network, adapter_name=PEFT_NAME)
        layers |= {(part, path): network.get_submodule(path) for path in ranks}
    return layers


def _exceptions(values: Mapping[str, _Number], default: _Number) -> dict[str, _Number]:
    """peft's pattern -> value for the modules whose value is not the default, one pattern for each value.

    peft tries the patterns in turn on every module, so hundreds of them would take minutes.
    """
    paths: dict[_Number, list[str]] = {}
    for path, value in values.items():
        if value != default:
            paths.setdefault(value, []).append(re.escape(path))
    return {f"^({'|'.join(group)})": value for value, group in paths.items()}
