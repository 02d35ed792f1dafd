"""Textual inversion (arXiv:2208.01618): train token vectors of the trigger word while the networks stay frozen.

Pivotal tuning (after arXiv:2106.05744) trains them together with a LoRA.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...config import OptimizerSettings, TrainConfig
from ...errors import BadConfig, LoraMisfit
from ...lora.embeddings import WORD_KEY, bundled_tensors, embedding_files, embedding_tensors
from ...lora.file import LoraFile
from ...models.base import Base
from ...models.clip import add_word, caption_tokens, token_table
from ...models.spec import FamilySpec, Networks
from ...tensor_names import NAME_TABLES
from .lora import LoraAdapter
from .lora import attach as attach_lora
from .method import Adapter, Method, Trained, refuse_settings_of_lora, switched_off


@dataclass(frozen=True, eq=False)
class WordAdapter(Adapter):
    """The token vectors of one new word on the text encoders."""

    networks: Networks
    word: str
    vectors: Mapping[str, nn.Parameter]
    """The vectors (count, width) on each text encoder, by part."""
    longest: Mapping[str, Tensor]
    """The largest norm of any token's vector in each text encoder, by part."""

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{part}.vectors": parameter for part, parameter in self.vectors.items()}

    def of_parts(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the vectors of each text encoder by part, as float32 copies on the CPU."""
        return {part: values[f"{part}.vectors"].detach().float().cpu().clone() for part in self.vectors}

    def export(self, values: Mapping[str, Tensor], base: Base, metadata: Mapping[str, str]) -> LoraFile:
        kept = {key: value for key, value in metadata.items() if not key.startswith("ss_network_")}
        architecture = {"modelspec.architecture": f"{base.family.architecture}/textual-inversion", WORD_KEY: self.word}
        tensors = embedding_tensors(base.family.name, self.of_parts(values))
        return LoraFile(base.family.name, {**kept, **architecture}, tensors)

    def rate(self, name: str, config: OptimizerSettings, peak: float) -> float:
        return config.embedding_rate

    @torch.no_grad()
    def constrain(self) -> None:
        # Vectors longer than those of all other words would drown out the rest of the prompt.
        for part, vectors in self.vectors.items():
            norms = vectors.norm(dim=1, keepdim=True)
            vectors.mul_((self.longest[part] / norms).clamp(max=1))

    def disabled(self) -> AbstractContextManager[None]:
        return switched_off(token_table(self.networks[part]) for part in self.vectors)


def attach(networks: Networks, family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None) -> WordAdapter:
    """Attach a WordAdapter to the text encoders, which are changed in place.

    Its vectors start as those of the tokens of `embedding_words`, repeated as needed. Raises BadConfig for a family without
    embedding files or a setting that the method doesn't support, LoraMisfit for a file to continue from.
    """
    parts = family.names.embedding_names
    if not parts:
        known = ", ".join(name for name, names in NAME_TABLES.items() if names.embedding_names)
        raise BadConfig(
            f"method {config.method!r}: embeddings are not supported for {family.title}. Supported: {known}"
        )
    if continue_from is not None:
        raise LoraMisfit(
            f"{continue_from.name}: method {config.method!r} starts from words, not from a file. Leave the file out"
        )
    refuse_settings_of_lora(config)
    start = caption_tokens(config.embedding_words or config.class_word)
    if not start:
        raise BadConfig(f"embedding_words = {config.embedding_words!r}: does not contain a word")
    tokens = torch.tensor([start[index % len(start)] for index in range(config.embedding_vectors)])
    vectors, longest = {}, {}
    for part in parts:
        table: Tensor = token_table(networks[part]).weight.detach()  # pyright: ignore
        start_at = table[tokens.to(table.device)]
        vectors[part] = add_word(networks[part], config.trigger_word, start_at).requires_grad_()
        longest[part] = table.float().norm(dim=1).max()
    return WordAdapter(networks, config.trigger_word, vectors, longest)


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


def attach_pivotal(
    networks: Networks, family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None
) -> Adapter:
    word = attach(networks, family, config, continue_from)
    adapted = networks if config.text_encoder_lr else {"denoiser": networks["denoiser"]}
    return PivotalAdapter(networks, attach_lora(adapted, family, config, None), word)


def embedding_beside(file: Trained, base: Base, config: TrainConfig) -> LoraFile:
    """Return the embedding as a separate file, for ComfyUI and other tools that don't read it from the LoRA."""
    assert isinstance(file, LoraFile)
    (embedding,) = embedding_files(file).values()
    return embedding


TEXTUAL_INVERSION = Method(
    "textual inversion: vectors of a new word (arXiv:2208.01618)",
    attach,
    trains_text=lambda config: True,
    makes="embedding",
)
PIVOTAL = Method(
    "pivotal tuning: a LoRA and vectors of a new word",
    attach_pivotal,
    trains_text=lambda config: True,
    extra_files={"embedding": embedding_beside},
    recipe={"embedding_lr": 1e-3},  # Eden's rate for faces
)
