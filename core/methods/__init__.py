"""The methods. A new one is a file beside these that defines METHOD, and is chosen by the name of its file."""

from collections.abc import Mapping
from importlib import import_module

from torch import nn

from ..adapters import Adapter, Method
from ..base import Base
from ..config import METHOD_NAMES, TrainConfig
from ..families.spec import FamilySpec
from ..lora_file import LoraFile

METHODS: dict[str, Method] = {
    name: import_module(f".{name.replace('-', '_')}", __package__).METHOD for name in METHOD_NAMES
}


def attach(
    networks: Mapping[str, nn.Module], family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None = None
) -> Adapter:
    """The Adapter of the method that the settings choose, on networks that it changes in place."""
    return METHODS[config.method].attach(networks, family, config, continue_from)


def trains_text(config: TrainConfig) -> bool:
    """Whether the text is encoded anew in each step: there is no conditioning to compute beforehand then."""
    return METHODS[config.method].trains_text(config)


def files_beside(file: LoraFile, base: Base, config: TrainConfig) -> Mapping[str, LoraFile]:
    """What is written beside the trained file: addition to its name -> file."""
    return METHODS[config.method].beside(file, base, config)
