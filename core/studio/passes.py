"""Count the floating-point operations of single passes through a base model's networks, on tensors without values."""

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..config import TrainConfig
from ..models.base import Base
from ..models.memory_plan import MemoryPlan, count_flops
from ..models.spec import Component, Conditioning
from ..photos.captions import class_caption, default_caption
from ..photos.dataset import Size
from ..pictures.sampling import guided_prediction, predictions_per_step
from ..training.adapted_model import AdaptedModel
from ..training.encode import EncodedImage, LatentCache
from ..training.inputs import TrainingInputs
from ..training.memory_prediction import StepPrediction
from ..training.methods import trains_text
from ..training.training_adapter import TrainingAdapter

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Passes:
    """The operations of single passes through the networks of a base model."""

    predict: Callable[[Size], float]
    """One prediction for a picture of that size."""
    train: float
    """A pass with gradients, as a multiple of a prediction."""
    recompute: Callable[[MemoryPlan], float]
    """The extra cost of such a pass for what the plan recomputes, as a share of a prediction."""
    encode: Callable[[Size], float]
    """The VAE's encoder for a picture of that size; 0 if the base model has no VAE."""
    decode: Callable[[Size], float]
    caption: float
    """The text encoders for a caption."""

    def draw(self, base: Base, size: Size, steps: int, guidance: float) -> float:
        """Return the operations of drawing a picture."""
        return steps * predictions_per_step(base, guidance) * self.predict(size) + self.decode(size)


def count_passes(
    base: Base,
    config: TrainConfig,
    size: Size,
    training_adapter: TrainingAdapter | None = None,
    text: Conditioning | None = None,
) -> tuple[Passes, LatentCache]:
    """Return the passes of a training run on pictures up to that size, and a cache of one such picture and its caption.

    All values in the cache are 0, except for a text's mask. `text` is the conditioning of a caption, for a base model without
    text encoders.

    A prediction is counted at three squares. The operations at all sizes follow from a polynomial of the second degree in the
    number of pixels: layers grow linearly with it, attention with its square.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Machine and batch settings don't change the count for one picture.
    config = replace(config, precision="fp32", compile=False, batch_size=1, accumulation=1, prior_prediction=0.0)
    sizes = _three_sizes(size, base.size_multiple)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        faked = _without_numbers(base)
        caption, made = _caption(faked, config) if text is None else (0, text)
        encode, decode = _vae(faked, sizes)
    # Only its shapes matter, and how long its mask says it is.
    made = {name: torch.full(value.shape, name == "context_mask", dtype=value.dtype) for name, value in made.items()}
    cache = _cache(base, config, size, made)
    with torch.random.fork_rng([]):
        step = StepPrediction(TrainingInputs(cache, faked, config, _CPU, torch.float32, adapter=training_adapter))
        step.model.fast_layers = None  # Count without a CPU's faster convolutions, which are part of its speed.
        train = step.operations(step.run.accumulate)
        counted = {one: step.operations(partial(_predict, step.model, faked, made, one)) for one in {*sizes, size}}
    predictions = {math.prod(one): counted[one] for one in sizes}
    whole = counted[size]

    @functools.cache
    def recompute(plan: MemoryPlan) -> float:
        if not plan.recompute and not plan.selective:
            return 0.0
        step.model.memory.adopt(MemoryPlan(plan.recompute, selective=plan.selective))
        return (step.operations(step.run.accumulate) - train) / whole

    return Passes(_polynomial(predictions), train / whole, recompute, encode, decode, caption), cache


def _three_sizes(size: Size, multiple: int) -> list[Size]:
    """Return three squares, the largest of about that size.

    Their sides are eight multiples or more, since Z-Image fills up rows of positions to 32.
    """
    eights = max(3, math.isqrt(math.prod(size)) // (8 * multiple))
    sides = (8 * multiple * one for one in (eights // 2, 3 * eights // 4, eights))
    return [(side, side) for side in sides]


def _polynomial(points: Mapping[int, float]) -> Callable[[Size], float]:
    """Return the polynomial of the lowest degree through the points (pixels, operations)."""

    def value(size: Size) -> float:
        pixels = math.prod(size)
        return sum(
            operations * math.prod((pixels - other) / (at - other) for other in points if other != at)
            for at, operations in points.items()
        )

    return value


def _without_numbers(base: Base) -> Base:
    """Return the base model with empty tensors as weights: called with fake tensors, they use no memory."""
    components = {}
    for part, component in base.components.items():
        shapes = base.family.build_empty(part, component.config).state_dict()
        empty = {name: torch.empty(tensor.shape) for name, tensor in shapes.items()}
        components[part] = Component(component.config, empty)
    return replace(base, components=components)


def _caption(base: Base, config: TrainConfig) -> tuple[int, Conditioning]:
    """Return the operations of encoding a caption, and the shapes of its conditioning."""
    caption = default_caption(config.trigger_word, config.class_word)
    if base.caption_encoder:
        return 0, base.caption_encoder.encode(caption)
    encoders, made = base.load_text_encoders(_CPU, torch.float32), {}

    @torch.no_grad()
    def encode() -> None:
        made.update(base.family.encode_text(encoders, [caption], config.clip_skip, 1))

    return count_flops(encode), made


def _cache(base: Base, config: TrainConfig, size: Size, text: Conditioning) -> LatentCache:
    """Return a cache of a picture of that size, with all values 0, and of its caption."""
    shape = base.latent_shape
    latent = torch.zeros(shape.channels, size[1] // shape.pixels, size[0] // shape.pixels)
    of_class = class_caption(config.class_word)
    caption = default_caption(config.trigger_word, config.class_word)
    conditioning = base.family.image_conditioning(size, (0, 0), size)
    image = EncodedImage("", latent, latent, None, conditioning, caption, of_class, repeats=1, is_class=False)
    captions = () if trains_text(config) else (caption, of_class, "")
    return LatentCache((image,), dict.fromkeys(captions, text), chunks=1, digest="")


def _predict(model: AdaptedModel, base: Base, text: Conditioning, size: Size) -> None:
    """Make a prediction without gradients for a picture of that size."""
    predict = guided_prediction(
        base, model.denoiser, [text], [text], device=_CPU, dtype=torch.float32, size=size, guidance=1.0
    )
    shape, time = base.latent_shape, torch.zeros(())
    latents = torch.zeros(1, shape.channels, size[1] // shape.pixels, size[0] // shape.pixels)
    with torch.no_grad(), model.training_adapter.off() if model.training_adapter else nullcontext():
        predict(latents, time, time)


def _vae(base: Base, sizes: list[Size]) -> tuple[Callable[[Size], float], Callable[[Size], float]]:
    """Return the operations of the VAE's encoder and decoder; 0 if the base model has none."""
    if "vae" not in base.components:
        return lambda size: 0.0, lambda size: 0.0
    vae, shape = base.load("vae", _CPU, torch.float32), base.latent_shape
    encoded, decoded = {}, {}
    for width, height in sizes:
        pixels: Tensor = torch.zeros(1, 3, height, width)
        latents = torch.zeros(1, shape.channels, height // shape.pixels, width // shape.pixels)
        with torch.no_grad():
            encoded[width * height] = count_flops(lambda pixels=pixels: base.family.encode_image(vae, pixels))
            decoded[width * height] = count_flops(lambda latents=latents: base.family.decode_latents(vae, latents))
    return _polynomial(encoded), _polynomial(decoded)
