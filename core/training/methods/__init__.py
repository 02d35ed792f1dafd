"""The training methods. To add one: a `Method` in a file here, a line in METHODS, and its name in `config.MethodName`."""

from collections.abc import Mapping

from ...config import TrainConfig
from ...lora.file import LoraFile
from ...models.base import Base
from ...models.spec import FamilySpec, Networks
from . import dora, dreambooth, lora, lycoris, oft, textual_inversion
from .method import Adapter, Method, Trained

METHODS: dict[str, Method] = {
    "dora": dora.METHOD,
    "dreambooth": dreambooth.METHOD,
    "loha": lycoris.LOHA,
    "lokr": lycoris.LOKR,
    "lora": lora.METHOD,
    "oft": oft.METHOD,
    "pivotal": textual_inversion.PIVOTAL,
    "textual-inversion": textual_inversion.TEXTUAL_INVERSION,
}


def attach(
    networks: Networks, family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None = None
) -> Adapter:
    """Attach the adapter of the configured method to the networks, which are changed in place.

    Raises BadConfig for settings that the method doesn't support, LoraMisfit when it can't continue from the file.
    """
    return METHODS[config.method].attach(networks, family, config, continue_from)


def peak_rate(config: TrainConfig) -> float:
    """Return the peak learning rate of a run: the configured one, or else the method's default."""
    return METHODS[config.method].peak_rate(config)


def trains_text(config: TrainConfig) -> bool:
    """Return whether captions are encoded again in each step, so that their conditioning can't be computed in advance."""
    return METHODS[config.method].trains_text(config)


def files_beside(file: Trained, base: Base, config: TrainConfig) -> Mapping[str, LoraFile]:
    """Build the files to write beside the trained file, by the suffix added to its name."""
    return {addition: make(file, base, config) for addition, make in METHODS[config.method].extra_files.items()}
