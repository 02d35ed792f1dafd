"""The training methods. To add one: a file here that defines METHOD, a line in METHODS, and its name in `config.MethodName`."""

from collections.abc import Mapping
from importlib.util import find_spec

from torch import nn

from ...config import MethodSettings, TrainConfig
from ...errors import MissingPackage, counted
from ...lora.file import LoraFile
from ...models.base import Base
from ...models.spec import FamilySpec, Networks
from . import dora, dreambooth, lora, lycoris, oft, pivotal, textual_inversion
from .method import Adapter, Method, Trained, left_out

METHODS: dict[str, Method] = {
    "dora": dora.METHOD,
    "dreambooth": dreambooth.METHOD,
    "loha": lycoris.LOHA,
    "lokr": lycoris.LOKR,
    "lora": lora.METHOD,
    "oft": oft.METHOD,
    "pivotal": pivotal.METHOD,
    "textual-inversion": textual_inversion.METHOD,
}


def attach(
    networks: Networks, family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None = None
) -> Adapter:
    """Attach the adapter of the configured method to the networks, which are changed in place.

    Raises BadConfig for settings that the method doesn't support, LoraMisfit when it can't continue from the file.
    """
    return METHODS[config.method].attach(networks, family, config, continue_from)


def what_is_left_out(denoiser: nn.Module, family: FamilySpec, config: MethodSettings) -> str | None:
    """Explain in a sentence which target modules the method leaves out and why. Returns None if it trains all of them."""
    if METHODS[config.method].joins_modules or not (paths := left_out(family, config, denoiser)):
        return None
    return (
        f"method {config.method!r} leaves out {counted(len(paths), 'module')} of targets = {config.targets!r}, such as "
        f"{paths[0]}: they are parts of one layer in files of {family.name}, where only method 'lora' fits"
    )


def check_installed(config: MethodSettings) -> None:
    """Raise MissingPackage, with the command that installs it, if the configured method lacks its package."""
    package = METHODS[config.method].package
    if package and find_spec(package) is None:
        raise MissingPackage(f"method {config.method!r} needs a package. Install it: pip install {package}")


def peak_rate(config: TrainConfig) -> float:
    """Return the peak learning rate of a run: the configured one, or else the method's default."""
    return METHODS[config.method].peak_rate(config)


def trains_text(config: TrainConfig) -> bool:
    """Return whether captions are encoded again in each step, so that their conditioning can't be computed in advance."""
    return METHODS[config.method].trains_text(config)


def files_beside(file: Trained, base: Base, config: TrainConfig) -> Mapping[str, LoraFile]:
    """Build the files to write beside the trained file, by the suffix added to its name."""
    return {addition: make(file, base, config) for addition, make in METHODS[config.method].beside.items()}
