"""Pivotal tuning (after arXiv:2106.05744): train token vectors of the trigger word together with a LoRA."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ...config import OptimizerSettings, TrainConfig
from ...lora.embeddings import bundled_tensors, embedding_files
from ...lora.file import LoraFile
from ...models.base import Base
from ...models.spec import FamilySpec, Networks
from .lora import LoraAdapter
from .lora import attach as attach_lora
from .method import Adapter, Method, Trained
from .textual_inversion import WordAdapter
from .textual_inversion import attach as attach_word


@dataclass(frozen=True, eq=False)
class PivotalAdapter(Adapter):
    """A LoRA and the token vectors of a new word."""

    networks: Networks
    lora: LoraAdapter
    word: WordAdapter

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.lora.parameters() | self.word.parameters()

    def rate(self, name: str, config: OptimizerSettings, peak: float) -> float:
        return (self.word if name.endswith(".vectors") else self.lora).rate(name, config, peak)

    def constrain(self) -> None:
        self.word.constrain()

    def export(self, values: Mapping[str, Tensor], base: Base, metadata: Mapping[str, str]) -> LoraFile:
        lora = self.lora.export(values, base, metadata)
        bundle = bundled_tensors(base.family.name, self.word.word, self.word.of_parts(values))
        return replace(lora, tensors={**lora.tensors, **bundle})

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self.lora.disabled(), self.word.disabled():
            yield


def attach(networks: Networks, family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None) -> Adapter:
    word = attach_word(networks, family, config, continue_from)
    adapted = networks if config.text_encoder_lr else {"denoiser": networks["denoiser"]}
    return PivotalAdapter(networks, attach_lora(adapted, family, config, None), word)


def embedding_beside(file: Trained, base: Base, config: TrainConfig) -> LoraFile:
    """Return the embedding as a separate file, for ComfyUI and other tools that don't read it from the LoRA."""
    assert isinstance(file, LoraFile)
    (embedding,) = embedding_files(file).values()
    return embedding


METHOD = Method(
    "pivotal tuning: a LoRA and vectors of a new word",
    attach,
    trains_text=lambda config: True,
    beside={"embedding": embedding_beside},
)
