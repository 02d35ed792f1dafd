"""What the steps of a training run see: pictures with noise on them, and captions."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..config import TrainConfig
from ..models.objective import Schedule, draw_noise
from ..models.spec import Conditioning, placed, stack_conditioning
from .adapted_model import AdaptedModel
from .encode import Batches, EncodedImage
from .inputs import TrainingInputs


@dataclass(frozen=True, eq=False)
class Pass:
    """The inputs of one forward pass."""

    kind: Literal["pictures", "class pictures", "prior"]
    """What the loss is computed on: photos, class pictures, or prior prediction."""
    latents: Tensor
    noise: Tensor
    noisy_latents: Tensor
    timesteps: Tensor
    conditioning: Conditioning
    masks: Tensor | None = None
    frozen_conditioning: Conditioning | None = None
    """The frozen model's conditioning if it differs, which happens in prior prediction with trained text encoders."""
    share: float = 1.0
    """The factor on the mean loss: the number of pictures, divided by its mean over the passes of an epoch."""


class Examples:
    """The encoded photos and captions on the device, and the random draws of each forward pass.

    What a pass sees depends only on the seed and its number, so no state has to be saved.
    """

    def __init__(self, inputs: TrainingInputs, model: AdaptedModel):
        cache, config = inputs.cache, inputs.config
        self.config: TrainConfig = config
        self.model: AdaptedModel = model
        self.schedule: Schedule = inputs.base.schedule().to(inputs.device)
        images = [_to_device(image, inputs.device) for image in cache.images]
        self.images: list[EncodedImage] = [image for image in images if not image.is_class]
        self.class_images: list[EncodedImage] = [image for image in images if image.is_class]
        self.text: dict[str, Conditioning] = {
            caption: placed(conditioning, inputs.device, inputs.dtype) for caption, conditioning in cache.text.items()
        }
        self.chunks: int = cache.chunks
        self.batches: Batches = Batches(self.images, config.batch_size, config.seed)
        self.class_batches: Batches | None = (
            Batches(self.class_images, config.batch_size, config.seed + 1) if self.class_images else None
        )

    def passes(self, number: int) -> Iterator[Pass]:
        """Yield the inputs of each loss in forward pass `number`, one by one so that only one graph is in memory."""
        config = self.config
        generator = self.generator("noise", number)
        pictures, share = [self.images[index] for index in self.batches.at(number)], self.batches.share(number)
        if random.Random(f"{config.seed}/prior/{number}").random() < config.prior_prediction:
            yield replace(self._prior_pass(pictures, self.generator("prior", number)), share=share)
        dropped = random.Random(f"{config.seed}/dropout/{number}")
        captions = ["" if dropped.random() < config.caption_dropout else picture.caption for picture in pictures]
        yield replace(self.picture_pass(pictures, captions, generator), share=share)
        if self.class_batches:
            pictures = [self.class_images[index] for index in self.class_batches.at(number)]
            captions = [picture.caption for picture in pictures]
            made = self.picture_pass(pictures, captions, self.generator("class", number))
            yield replace(made, kind="class pictures", share=self.class_batches.share(number))

    def picture_pass(
        self, pictures: Sequence[EncodedImage], captions: Sequence[str], generator: torch.Generator
    ) -> Pass:
        """Build a pass on pictures of one latent shape."""
        masks = None
        if any(picture.mask is not None for picture in pictures):
            masks = torch.stack([torch.ones_like(p.mean[:1]) if p.mask is None else p.mask for p in pictures])
        return Pass("pictures", *self.noised(pictures, generator), self.conditioning(pictures, captions), masks)

    def _prior_pass(self, pictures: Sequence[EncodedImage], generator: torch.Generator) -> Pass:
        noised = self.noised(pictures, generator)
        captions = [picture.class_caption for picture in pictures]
        frozen = None
        if self.model.encoders:
            with torch.no_grad(), self.model.adapter.disabled():
                frozen = self.conditioning(pictures, captions)
        return Pass("prior", *noised, self.conditioning(pictures, captions), frozen_conditioning=frozen)

    def noised(
        self, pictures: Sequence[EncodedImage], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw latents, noise, noisy latents and timesteps of these pictures."""
        mean = torch.stack([picture.mean for picture in pictures])
        deviation = torch.stack([picture.deviation for picture in pictures])
        latents = mean + deviation * torch.randn(mean.shape, generator=generator, device=mean.device)
        noise, input_noise = draw_noise(latents, self.config, generator)
        timesteps = self.schedule.draw_timesteps(latents, self.config, generator)
        return latents, noise, self.schedule.add_noise(latents, input_noise, timesteps), timesteps

    def conditioning(self, pictures: Sequence[EncodedImage], captions: Sequence[str]) -> Conditioning:
        """Return what the denoiser is told of these pictures: the captions' conditioning, and the pictures' own."""
        if self.model.encoders:
            text = self.model.encode_text(captions, self.chunks)
        else:
            text = stack_conditioning([self.text[caption] for caption in captions])
        return text | stack_conditioning([picture.conditioning for picture in pictures])

    def generator(self, purpose: str, number: int) -> torch.Generator:
        """Return the random numbers of a pass for one purpose. With dropout, torch's own are seeded too."""
        seed = hashlib.sha256(f"{self.config.seed}/{purpose}/{number}".encode()).digest()
        if self.config.dropout:
            torch.manual_seed(int.from_bytes(seed[8:15], "big"))
        return torch.Generator(self.model.device).manual_seed(int.from_bytes(seed[:7], "big"))

    def names(self, step: int) -> list[str]:
        """Return the names of the photos that a step sees, sorted."""
        passes = range(step * self.config.accumulation, (step + 1) * self.config.accumulation)
        return sorted({self.images[index].name for number in passes for index in self.batches.at(number)})


def _to_device(image: EncodedImage, device: torch.device) -> EncodedImage:
    return replace(
        image,
        mean=image.mean.to(device),
        deviation=image.deviation.to(device),
        mask=None if image.mask is None else image.mask.to(device),
        conditioning={name: value.to(device) for name, value in image.conditioning.items()},
    )
