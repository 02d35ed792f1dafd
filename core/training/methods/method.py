"""The interface between the training loop and the training methods.

A method is a file in core/training/methods/ with a `Method`, which attaches an `Adapter` to the networks.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ...config import MethodSettings, OptimizerSettings, TrainConfig, name_matches
from ...errors import BadConfig
from ...lora.file import LoraFile
from ...lora.modules import stands_alone
from ...models.base import Base
from ...models.spec import FamilySpec, Networks
from ...progress import OnProgress, silent
from ...storage.safetensors_file import cast_tensor, layout_in, write_safetensors
from ...tensor_names import ModuleId

LORA_RATE = 1e-4
"""The default peak learning rate of a LoRA."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A whole base model, with tensors named as in a checkpoint file in the original naming."""

    family: str
    metadata: dict[str, str]
    tensors: Mapping[str, Tensor] = field(repr=False)
    name: str = "checkpoint"
    """The name of the checkpoint in messages: the file's path, if it is from a file."""

    def save(
        self,
        path: str | os.PathLike[str],
        dtype: torch.dtype = torch.float16,
        on_progress: OnProgress = silent,
    ) -> None:
        """Write the whole file or nothing, with floating-point tensors in that dtype. Raises BadFile when that fails."""
        layout = layout_in(self.tensors, dtype)

        def read(key: str) -> Tensor:
            return cast_tensor(key, self.tensors[key], layout[key][0])

        write_safetensors(path, layout, read, self.metadata, on_progress=on_progress)

    def with_metadata(self, metadata: Mapping[str, str]) -> "Checkpoint":
        """Return a checkpoint with the same tensors and other metadata."""
        return replace(self, metadata=dict(metadata))


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
    extra_files: Mapping[str, Callable[[Trained, Base, TrainConfig], LoraFile]] = field(default_factory=dict)
    """The function that makes each file written beside the trained one, by the suffix added to the name."""
    makes: Literal["lora", "embedding", "checkpoint"] = "lora"
    """The type of the trained file."""
    rate_factor: float = 1.0
    """The factor on a LoRA's learning rate that suits this method."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Other settings that recipes use for this method."""
    freezes_weights: bool = True
    """Whether the networks' own weights stay frozen, so that a memory plan may quantise or offload them."""
    package: str | None = None
    """The package that its layers come from, if it isn't one that every method needs."""
    keeps_dtype: bool = False
    """Whether its layers compute in the dtype of their inputs, so that autocast isn't needed."""
    joins_modules: bool = True
    """Whether its changes of several modules can be joined in a file where these modules are one layer, such as q, k and v.

    Otherwise each module has its own entry in the file, and modules that can't have one are left out (`left_out`).
    """

    def peak_rate(self, config: OptimizerSettings) -> float:
        """Return a run's peak learning rate: that of the vectors in textual inversion, else the configured or default one."""
        if config.finds_rate:
            return config.found_rate_factor
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
                modules = f"{len(result)} adapted modules, e.g. {next(iter(result))[1]}"
                raise BadConfig(f"{name}: {pattern!r} matches none of the {modules}")
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
