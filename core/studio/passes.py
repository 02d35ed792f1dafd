"""The operations of single passes through the networks of a base model, from those of published models.

`lab/count_passes.py` has counted those. Layers grow with the pixels and attention with their square, so three factors tell a
pass of any size. Other sizes of a network take as many more operations as they have weights. A step of a published model is
told within 2 %, and of a pruned one within a fifth. `loha` takes up to a quarter more on pictures of 64 pixels.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import TrainConfig
from ..models.base import Base
from ..models.memory_plan import MemoryPlan
from ..photos.dataset import Size
from ..pictures.sampling import predictions_per_step
from ..storage.files import read_json
from ..storage.stored import dtype_and_shape
from ..training.methods import METHODS, trains_text
from ..training.training_adapter import TrainingAdapter

FILE = Path(__file__).with_name("passes.json")
Row = dict[str, Any]
"""The family of a published model, its `weights` by part, the `tokens` of a caption, and the `factors` of passes."""


@dataclass(frozen=True)
class _Added:
    """What a method's own computations add to a pass with gradients, as shares of counted work."""

    lora: float = 0.0
    """Of a LoRA's products, per rank."""
    adapted: float = 0.0
    """Of the gradients of the adapted layers' weights."""
    whole: float = 0.0
    """Of a prediction: gradients of all weights."""


_ADDED: Mapping[str, _Added] = {
    "lora": _Added(lora=1.0), "pivotal": _Added(lora=1.0), "dora": _Added(lora=1.2), "oft": _Added(lora=0.3),
    "loha": _Added(adapted=3.0), "lokr": _Added(adapted=2.9), "dreambooth": _Added(whole=0.93), "textual-inversion": _Added(),
}  # fmt: skip
"""The shares were measured on the demo's base model, at ranks of 4 and 32."""
_EMBEDDING = re.compile("embed|shared")


@dataclass(frozen=True)
class Passes:
    """The operations of single passes through the networks of a base model."""

    predict: Callable[[Size], float]
    """One prediction for a picture of that size."""
    train: Callable[[Size], float]
    """A pass with gradients."""
    recompute_all: Callable[[Size], float]
    """What such a pass computes again if all blocks are recomputed."""
    encode: Callable[[Size], float]
    """The VAE's encoder for a picture of that size; 0 if the base model has no VAE."""
    decode: Callable[[Size], float]
    caption: float
    """The text encoders for a caption; 0 if another program encodes it."""

    @classmethod
    def of(cls, base: Base, config: TrainConfig, training_adapter: TrainingAdapter | None = None) -> "Passes":
        """Return the passes of a training run with these settings."""
        of_denoiser, of_vae = _work(base, "denoiser"), _work(base, "vae")
        caption = _caption(base)
        changes = training_adapter.changes.values() if training_adapter else ()
        # The adapter's own weights never change, so they only take a prediction's products and those of its gradients.
        beside = 2 * sum(part.numel() for change in changes for part in change.tensors()) / weights_of(base, "denoiser")
        added = _ADDED[config.method]
        # A pass back through frozen weights takes one product, through trained ones two.
        texts = (2 if METHODS[config.method].freezes_weights else 3) * caption if trains_text(config) else 0.0

        def train(size: Size) -> float:
            lora, adapted = config.rank * added.lora, added.adapted
            learned = lora * of_denoiser("lora", size) + adapted * of_denoiser("adapted", size)
            predictions = (1 + beside + added.whole) * of_denoiser("predict", size)
            return predictions + of_denoiser("gradients", size) + learned + texts

        return cls(
            functools.partial(of_denoiser, "predict"),
            train,
            lambda size: of_denoiser("recompute", size) + config.rank * added.lora * of_denoiser("lora", size) / 3,
            functools.partial(of_vae, "encode"),
            functools.partial(of_vae, "decode"),
            caption,
        )

    def recompute(self, plan: MemoryPlan, size: Size) -> float:
        """Return what a pass with gradients computes again under a memory plan, which keeps what is expensive if it selects."""
        return plan.recompute * self.recompute_all(size)

    def draw(self, base: Base, size: Size, steps: int, guidance: float) -> float:
        """Return the operations of drawing a picture."""
        return steps * predictions_per_step(base, guidance) * self.predict(size) + self.decode(size)


def tokens_of(base: Base) -> int:
    """Return the usual number of tokens of a caption."""
    return _row(base, "denoiser")["tokens"] if _encodes(base) else base.family.usual_tokens


def _row(base: Base, part: str) -> Row:
    """Return what was counted on the network with the most similar number of weights, of the family if it was counted.

    A VAE is compared with those of all families, since many share one.
    """
    rows, weights = [row for row in _rows() if part in row["weights"]], weights_of(base, part)
    if part == "denoiser":
        rows = [row for row in rows if row["family"] == base.family.name] or rows
    return min(rows, key=lambda row: abs(math.log(row["weights"][part] / weights)))


def _work(base: Base, part: str) -> Callable[[str, Size], float]:
    """Return the function that returns the operations of a pass through a part of the base model: 0 without the part."""
    if part not in base.components:
        return lambda work, size: 0.0
    row, shape, more = _row(base, part), base.latent_shape, 0
    ratio = weights_of(base, part) / row["weights"][part]
    if part == "denoiser" and not base.family.names.is_unet:
        # In a transformer, a token of the text costs as much as a position of the picture.
        more = (tokens_of(base) - row["tokens"]) * (shape.pixels * shape.positions_side) ** 2

    def operations(work: str, size: Size) -> float:
        pixels = math.prod(size) + more
        return ratio * sum(factor * pixels**power for power, factor in enumerate(row["factors"][work]))

    return operations


def weights_of(base: Base, part: str) -> int:
    """Return the number of weights of a part of the base model."""
    return base.weight_bytes(part, torch.uint8)


def _encodes(base: Base) -> bool:
    """Return whether the base model has the text encoders that encode its captions."""
    return not base.caption_encoder and all(part in base.components for part in base.text_encoders)


def _caption(base: Base) -> float:
    """Return the operations of encoding a caption: each token goes through all weights but the table of tokens."""
    if not _encodes(base):
        return 0.0
    numbers = 0
    for part in base.text_encoders:
        tensors = base.components[part].tensors
        numbers += sum(math.prod(dtype_and_shape(tensors, name)[1]) for name in tensors if not _EMBEDDING.search(name))
    return 2.0 * numbers * base.family.usual_tokens


@functools.cache
def _rows() -> Sequence[Row]:
    return read_json(FILE)
