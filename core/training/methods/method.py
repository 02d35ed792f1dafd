"""The interface between the training loop and the methods.

A method is a file in core/training/methods/ with a `Method`, which puts an `Adapter` on the networks.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ...config import TrainConfig, name_matches
from ...errors import BadConfig
from ...lora.file import LoraFile
from ...lora.modules import stands_alone
from ...models.base import Base
from ...models.original_checkpoint import Checkpoint
from ...models.spec import FamilySpec
from ...tensor_names import ModuleId

PEFT_NAME = "facelora"
"""The name under which peft keeps our adapter in its layers."""
LORA_RATE = 1e-4
"""The default peak learning rate of a LoRA."""
Trained = LoraFile | Checkpoint
"""The result of a training."""
_Number = TypeVar("_Number", int, float)


class Adapter(ABC):
    """The trainable part of a training, on one or more networks."""

    networks: Mapping[str, nn.Module]
    """The networks that it is on, by part."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained tensors, float32, by names that begin with their part and are the same in every run."""

    def beside(self) -> list[Tensor]:
        """The tensors that it keeps beside its parameters and the networks."""
        return []

    def copies(self) -> Mapping[tuple[nn.Parameter, ...], Tensor]:
        """The tensors that `cast_once` has made, each by the parameters that it is a copy of."""
        return {}

    def copy(self, stacks: Iterable[tuple[nn.Parameter, ...]], dtype: torch.dtype) -> None:  # noqa: B027, as above
        """Has `cast_once` copy other parameters, which are no part of the adapter, like its own."""

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """A context in which the networks compute what they did before the adapter was attached."""

    def cast_once(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """A context in which no parameter changes, so that each is cast to the dtype of the arithmetic only once.

        The gradients of each backward pass in it are to be taken by `take_gradients`.
        """
        return nullcontext()

    def take_gradients(self) -> None:  # noqa: B027, most methods cast each parameter where it is used
        """Adds the gradients that a backward pass has given to what `cast_once` has cast to those of the parameters."""

    @abstractmethod
    def export(self, values: Mapping[str, Tensor], base: Base, metadata: Mapping[str, str]) -> Trained:
        """The file to save, with these values in the place of the parameters, on the given base model."""

    def constrain(self) -> None:  # noqa: B027, most methods have no constraint
        """Brings the parameters back into their allowed range, after each optimizer step."""

    def rate(self, name: str, config: TrainConfig, peak: float) -> float:
        """The peak learning rate of a parameter: `peak` on the denoiser, the settings' own on text encoders."""
        return peak if name.startswith("denoiser.") else config.text_encoder_lr


Attach = Callable[[Mapping[str, nn.Module], FamilySpec, TrainConfig, LoraFile | None], Adapter]
"""A function of (networks by part, family, settings, file to go on from) that puts an adapter on the networks in place."""


@dataclass(frozen=True)
class Method:
    """A way to teach a base model a person, and what the rest of the program needs to know about it."""

    title: str
    """A short description for people."""
    attach: Attach
    trains_text: Callable[[TrainConfig], bool] = lambda config: config.text_encoder_lr > 0
    """Whether captions are encoded anew in each step, since something on the text encoders is trained."""
    beside: Mapping[str, Callable[[Trained, Base, TrainConfig], LoraFile]] = field(default_factory=dict)
    """What makes each file that is written beside the trained one, by the addition to its name."""
    makes: Literal["lora", "embedding", "checkpoint"] = "lora"
    """The type of the trained file."""
    rate_factor: float = 1.0
    """The factor on a LoRA's learning rate that suits this method."""
    freezes_weights: bool = True
    """Whether the networks' own weights stay frozen, so that a memory plan may narrow or offload them."""
    keeps_dtype: bool = False
    """Whether its layers compute in the dtype of their inputs, so that no autocast is needed."""
    joins_modules: bool = True
    """Whether its change of several modules can be put together in a file where those are one layer, such as q, k and v.

    Otherwise each has to stand there by itself, and modules that cannot are left out (`left_out`)."""

    def peak_rate(self, config: TrainConfig) -> float:
        """The peak learning rate of a run: that of the settings, else the default of the method.

        For textual inversion it is the rate of the vectors.
        """
        if config.optimizer == "prodigy":
            return config.prodigy_rate
        if self.makes == "embedding":
            return config.embedding_lr
        return float(f"{LORA_RATE * self.rate_factor:.1e}") if config.learning_rate is None else config.learning_rate


def target_modules(
    family: FamilySpec, config: TrainConfig, networks: Mapping[str, nn.Module], joined: bool = True
) -> dict[ModuleId, tuple[int, float]]:
    """The (rank, alpha) of every module that the settings adapt, by (part, path), without those of `left_out`.

    `joined` is the method's `joins_modules`: nothing is left out then. Raises BadConfig when a rank is above its layer's,
    when a network has nothing to adapt, or when a pattern matches nothing.
    """
    result: dict[ModuleId, tuple[int, float]] = {}
    for part, network in networks.items():
        pattern = family.denoiser_targets[config.targets] if part == "denoiser" else family.text_encoder_targets
        assert pattern is not None
        before = len(result)
        without = set() if joined or part != "denoiser" else set(left_out(family, config, network))
        for path, module in network.named_modules():
            if path in without or not re.fullmatch(pattern, path):
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
            if not any(name_matches(pattern, path) for _, path in result):
                example = next(iter(result))[1]
                raise BadConfig(
                    f"{name}: {pattern!r} matches none of the {len(result)} adapted modules, e.g. {example}"
                )
    return result


def left_out(family: FamilySpec, config: TrainConfig, denoiser: nn.Module) -> list[str]:
    """The paths of the modules that the settings adapt, but which cannot stand by themselves in a file (`stands_alone`)."""
    pattern = family.denoiser_targets[config.targets]
    paths = (path for path, _ in denoiser.named_modules() if re.fullmatch(pattern, path))
    return [path for path in paths if not stands_alone(family.names, path)]


def refuse_settings_of_lora(config: TrainConfig) -> None:
    """Raises BadConfig for a setting that only LoRA and DoRA have."""
    for name in ("dropout", "rslora", "lora_plus_ratio"):
        if getattr(config, name) != getattr(TrainConfig, name):
            raise BadConfig(f"{name}: method {config.method!r} has none; it is for 'lora' and 'dora'")


def _by_pattern(patterns: Mapping[str, _Number], path: str, default: _Number) -> _Number:
    return next((value for pattern, value in patterns.items() if name_matches(pattern, path)), default)


def peft_layers(
    networks: Mapping[str, nn.Module],
    targets: Mapping[ModuleId, tuple[int, float]],
    config: TrainConfig,
    peft_config: Callable[..., Any],
) -> dict[ModuleId, nn.Module]:
    """The layers that peft puts in the place of the target modules, with the adapter name PEFT_NAME.

    `peft_config` makes peft's configuration from the options that all kinds share: r, alpha, target_modules, rank_pattern
    and alpha_pattern.
    """
    from peft import inject_adapter_in_model
    from torch._subclasses.fake_tensor import unset_fake_temporarily

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
        # Without numbers, which LycorisAdapter.start draws; nor fake ones, where memory is predicted, which peft cannot move.
        with unset_fake_temporarily():
            inject_adapter_in_model(configured, network, adapter_name=PEFT_NAME, low_cpu_mem_usage=True)
        layers |= {(part, path): network.get_submodule(path) for path in ranks}
    for layer in layers.values():
        for parameters in layer.children():
            if isinstance(parameters, nn.ParameterDict) and PEFT_NAME in parameters:
                numbers = torch.empty(parameters[PEFT_NAME].shape, device=layer.base_layer.weight.device)  # pyright: ignore
                parameters[PEFT_NAME] = nn.Parameter(numbers)
    return layers


def _exceptions(values: Mapping[str, _Number], default: _Number) -> dict[str, _Number]:
    """A pattern in peft's form for each value other than the default, with that value.

    peft tries every pattern on every module, so a pattern for each module would take minutes.
    """
    paths: dict[_Number, list[str]] = {}
    for path, value in values.items():
        if value != default:
            paths.setdefault(value, []).append(re.escape(path))
    return {f"^({'|'.join(group)})": value for value, group in paths.items()}
