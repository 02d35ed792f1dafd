"""The interface between the training loop and the training methods.

A method is a file in core/training/methods/ with a `Method`, which attaches an `Adapter` to the networks.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ...config import MethodSettings, OptimizerSettings, TrainConfig, name_matches
from ...errors import BadConfig
from ...lora.file import LoraFile
from ...lora.modules import stands_alone
from ...models.base import Base
from ...models.spec import FamilySpec, Networks
from ...tensor_names import ModuleId
from .original_checkpoint import Checkpoint

PEFT_NAME = "facelora"
"""The name under which peft keeps our adapter in its layers."""
LORA_RATE = 1e-4
"""The default peak learning rate of a LoRA."""
Trained = LoraFile | Checkpoint
"""The result of a training run."""
_Number = TypeVar("_Number", int, float)


class Adapter(ABC):
    """The trainable part of a training run, on one or more networks."""

    networks: Networks
    """The networks that it is attached to, by part."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors, float32, by name. Names begin with the part and are the same in every run."""

    def beside(self) -> list[Tensor]:
        """Return the tensors that it keeps in addition to its parameters and the networks."""
        return []

    def copies(self) -> Mapping[tuple[nn.Parameter, ...], Tensor]:
        """Return the tensors that `cast_once` has made, each by the parameters that it copies."""
        return {}

    def copy(self, stacks: Iterable[tuple[nn.Parameter, ...]], dtype: torch.dtype) -> None:  # noqa: B027, as above
        """Make `cast_once` also copy other parameters that don't belong to the adapter."""

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Make the networks compute, within this context, what they did before the adapter was attached."""

    def cast_once(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Cast each parameter to the dtype of the arithmetic only once. No parameter may change within this context.

        Call `take_gradients` after each backward pass in it.
        """
        return nullcontext()

    def take_gradients(self) -> None:  # noqa: B027, most methods cast each parameter where it is used
        """Add the gradients of the copies that `cast_once` made to those of the parameters. Call it after a backward pass."""

    @abstractmethod
    def export(self, values: Mapping[str, Tensor], base: Base, metadata: Mapping[str, str]) -> Trained:
        """Build the file to save, with these values instead of the parameters, on the given base model."""

    def constrain(self) -> None:  # noqa: B027, most methods have no constraint
        """Bring the parameters back into their allowed range after each optimizer step."""

    def rate(self, name: str, config: OptimizerSettings, peak: float) -> float:
        """Return a parameter's peak learning rate: `peak` on the denoiser, `text_encoder_lr` on text encoders."""
        return peak if name.startswith("denoiser.") else config.text_encoder_lr


Attach = Callable[[Networks, FamilySpec, TrainConfig, LoraFile | None], Adapter]
"""A function of (networks by part, family, settings, file to continue from) that attaches an adapter in place."""


@dataclass(frozen=True)
class Method:
    """A way to teach a person to a base model, and what the rest of the program needs to know about it."""

    title: str
    """A short description for people."""
    attach: Attach
    trains_text: Callable[[TrainConfig], bool] = lambda config: config.text_encoder_lr > 0
    """Whether captions are encoded again in each step, because something on the text encoders is trained."""
    beside: Mapping[str, Callable[[Trained, Base, TrainConfig], LoraFile]] = field(default_factory=dict)
    """The function that makes each file written beside the trained one, by the suffix added to the name."""
    makes: Literal["lora", "embedding", "checkpoint"] = "lora"
    """The type of the trained file."""
    rate_factor: float = 1.0
    """The factor on a LoRA's learning rate that suits this method."""
    freezes_weights: bool = True
    """Whether the networks' own weights stay frozen, so that a memory plan may narrow or offload them."""
    package: str | None = None
    """The package that its layers come from, if it isn't one that every method needs."""
    keeps_dtype: bool = False
    """Whether its layers compute in the dtype of their inputs, so that autocast isn't needed."""
    joins_modules: bool = True
    """Whether its changes of several modules can be joined in a file where these modules are one layer, such as q, k and v.

    Otherwise each module has its own entry in the file, and modules that can't have one are left out (`left_out`).
    """

    def peak_rate(self, config: OptimizerSettings) -> float:
        """Return the peak learning rate of a run: the configured one, or else the method's default.

        For textual inversion it is the rate of the vectors.
        """
        if config.optimizer == "prodigy":
            return config.prodigy_rate
        if self.makes == "embedding":
            return config.embedding_lr
        return float(f"{LORA_RATE * self.rate_factor:.1e}") if config.learning_rate is None else config.learning_rate


@contextmanager
def switched_off(layers: Iterable[Any]) -> Iterator[None]:
    """Set `enabled` of these layers to False within this context."""
    layers = list(layers)
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def target_modules(
    family: FamilySpec, config: MethodSettings, networks: Networks, joined: bool = True
) -> dict[ModuleId, tuple[int, float]]:
    """Return the (rank, alpha) of every target module of the settings, by (part, path), except those in `left_out`.

    With `joined`, the method's `joins_modules`, nothing is left out. Raises BadConfig when a rank is above its layer's, when a
    network has nothing to adapt, or when a pattern matches nothing.
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
                    f"rank {rank} is larger than {path} ({out_size} x {in_size}) allows. "
                    f"Use at most {min(out_size, in_size)}, or rank_pattern for this layer"
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


def left_out(family: FamilySpec, config: MethodSettings, denoiser: nn.Module) -> list[str]:
    """List the paths of target modules that can't have their own entry in a file (`stands_alone`)."""
    pattern = family.denoiser_targets[config.targets]
    paths = (path for path, _ in denoiser.named_modules() if re.fullmatch(pattern, path))
    return [path for path in paths if not stands_alone(family.names, path)]


def refuse_settings_of_lora(config: TrainConfig) -> None:
    """Raise BadConfig for a setting that only LoRA and DoRA have."""
    for name in ("dropout", "rslora", "lora_plus_ratio"):
        if getattr(config, name) != getattr(TrainConfig, name):
            raise BadConfig(f"{name}: method {config.method!r} doesn't have this setting. Only 'lora' and 'dora' do")


def _by_pattern(patterns: Mapping[str, _Number], path: str, default: _Number) -> _Number:
    return next((value for pattern, value in patterns.items() if name_matches(pattern, path)), default)


def peft_layers(
    networks: Networks,
    targets: Mapping[ModuleId, tuple[int, float]],
    config: MethodSettings,
    peft_config: Callable[..., Any],
) -> dict[ModuleId, nn.Module]:
    """Replace the target modules with peft's layers, under the adapter name PEFT_NAME, and return these.

    `peft_config` makes peft's configuration from the options that all kinds share: r, alpha, target_modules, rank_pattern and
    alpha_pattern.
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
        # Without data, which LycorisAdapter.start draws. Without fake tensors too, used in memory prediction: peft can't move
        # them.
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
    """Return a pattern in peft's form for each value other than the default, with that value.

    peft tries every pattern on every module, so a pattern for each module would take minutes.
    """
    paths: dict[_Number, list[str]] = {}
    for path, value in values.items():
        if value != default:
            paths.setdefault(value, []).append(re.escape(path))
    return {f"^({'|'.join(group)})": value for value, group in paths.items()}
