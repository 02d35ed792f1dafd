"""The training methods. To add one: a file here that defines METHOD, a line in METHODS, and its name in `config.MethodName`."""

from collections.abc import Mapping

from torch import nn

from ...config import TrainConfig
from ...errors import counted
from ...lora.file import LoraFile
from ...models.base import Base
from ...models.spec import FamilySpec
from . import dora, dreambooth, loha, lokr, lora, oft, pivotal, textual_inversion
from .method import Adapter, Method, Trained, left_out

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


def what_is_left_out(denoiser: nn.Module, family: FamilySpec, config: TrainConfig) -> str | None:
    """Which modules that the settings adapt the method leaves out, and why, in a sentence; None where it leaves out none."""
    if METHODS[config.method].joins_modules or not (paths := left_out(family, config, denoiser)):
        return None
    return (
        f"method {config.method!r} leaves out {counted(len(paths), 'module')} of targets = {config.targets!r}, such as "
        f"{paths[0]}: they are parts of one layer in files of {family.name}, where only a plain LoRA fits (method 'lora')"
    )


def peak_rate(config: TrainConfig) -> float:
    """The peak learning rate of a run: that of the settings, else the default of its method."""
    return METHODS[config.method].peak_rate(config)


def trains_text(config: TrainConfig) -> bool:
    """Whether captions are encoded anew in each step, so that their conditioning cannot be computed beforehand."""
    return METHODS[config.method].trains_text(config)


def files_beside(file: Trained, base: Base, config: TrainConfig) -> Mapping[str, LoraFile]:
    """The files to write beside the trained file, by the addition to its name."""
    return {addition: make(file, base, config) for addition, make in METHODS[config.method].beside.items()}
