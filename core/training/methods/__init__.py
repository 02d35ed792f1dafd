"""The training methods. To add one: a file here that defines METHOD, a line in METHODS, and its name in `config.MethodName`."""

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
    """The adapter of the method in the settings, put on the networks, which are changed in place.

    Raises BadConfig for settings that the method does not have, LoraMisfit when it cannot go on from the file.
    """
    return METHODS[config.method].attach(networks, family, config, continue_from)


def peak_rate(config: TrainConfig) -> float:
    """The peak learning rate of a run: that of the settings, else the default of its method."""
    return METHODS[config.method].peak_rate(config)


def trains_text(config: TrainConfig) -> bool:
    """Whether captions are encoded anew in each step, so that their conditioning cannot be computed beforehand."""
    return METHODS[config.method].trains_text(config)


def files_beside(file: Trained, base: Base, config: TrainConfig) -> Mapping[str, LoraFile]:
    """The files to write beside the trained file, by the addition to its name."""
    return {addition: make(file, base, config) for addition, make in METHODS[config.method].beside.items()}
