"""The methods. A new one is a file beside these that defines METHOD, a line in METHODS, and its name in `config.MethodName`."""

from collections.abc import Mapping

from torch import nn

from ...config import TrainConfig
from ...lora.file import LoraFile
from ...models.base import Base
from ...models.spec import FamilySpec
from . import dora, dreambooth, loha, lokr, lora, oft, pivotal, textual_inversion
from .method import Adapter, Method, Trained

METHODS: dict[str, Method] = {
    "dora": dora.METHOD,
    "dreambooth": dreambooth.METHOD,
    "loha": loha.METHOD,
    "lokr": lokr.METHOD,
    "lora": lora.METHOD,
    "oft": oft.METHOD,
    "pivotal": pivotal.METHOD,
    "textual-inversion": textual_inversion.METHOD,
}


def attach(
    networks: Mapping[str, nn.Module], family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None = None
) -> Adapter:
    """The Adapter of the method that the settings choose, on networks that it changes in place."""
    return METHODS[config.method].attach(networks, family, config, continue_from)


def peak_rate(config: TrainConfig) -> float:
    """The peak learning rate of a run: the set one, else what suits its method."""
    return METHODS[config.method].peak_rate(config)


def trains_text(config: TrainConfig) -> bool:
    """Whether the text is encoded anew in each step: there is no conditioning to compute beforehand then."""
    return METHODS[config.method].trains_text(config)


def files_beside(file: Trained, base: Base, config: TrainConfig) -> Mapping[str, LoraFile]:
    """What is written beside the trained file: addition to its name -> file."""
    return METHODS[config.method].beside(file, base, config)
