"""Forecast how long training runs on a base model take, before there are any photos, and learn from each run."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..config import TrainConfig
from ..errors import FaceLoraError
from ..models.base import Base
from ..photos import Photo
from ..photos.captions import default_caption
from ..pictures.generate import PictureJob
from ..storage.safetensors_file import SafetensorsFile
from ..training.callbacks import NO_CALLBACKS, Callbacks
from ..training.job import TrainingJob
from ..training.store import Destination, find_or_train
from ..training.trained_file import TrainedFile
from .cost import Stopwatch
from .ledger import Basis, basis
from .speed import TRAIN, Span, Speed, remember_speed, speed_of

LEAST_SECONDS = 10.0
"""The shortest time of training that tells how fast the machine is."""


@dataclass(frozen=True)
class Forecast:
    """What the time of training runs on a base model follows from, for square photos and pictures. Build it with `on`."""

    base: Base
    shared: Basis
    speed: Speed
    photo: Photo

    @classmethod
    def on(cls, base: Base, config: TrainConfig, device: torch.device | None = None) -> "Forecast":
        """Choose the memory plan. The settings decide about resolution, method and memory.

        The denoiser is enough. Without text encoders, captions have their usual length and encoding them takes no time. Without
        a VAE, neither do encoding and decoding pictures. A safetensors file of the base model is closed after this.
        """
        side = config.resolution or base.resolution
        photo = Photo.from_image(Image.new("RGB", (side, side)), "photo")
        made = cls(base, basis([photo], base, config, device), speed_of(base, device, config.precision), photo)
        made.span(config, 1, 0)  # Reads all that later spans ask for.
        for file in base.files:
            if isinstance(file, SafetensorsFile):
                file.close()
        return made

    def span(self, config: TrainConfig, photos: int, pictures: int) -> Span:
        """Return the least and the most seconds of training on a number of photos and drawing pictures of the person."""
        job = PictureJob(default_caption(config.trigger_word, config.class_word), 1).on(self.base)
        ledger = self.shared.ledger([self.photo] * photos, config, [job] * pictures, redraws_faces=False)
        spans = ledger.seconds(self.speed).values()
        return sum(least for least, _ in spans), sum(most for _, most in spans)


def timed_training(
    job: TrainingJob,
    destination: Destination,
    *,
    device: torch.device,
    callbacks: Callbacks = NO_CALLBACKS,
    **others: Any,
) -> TrainedFile:
    """Find or train what the job makes, and keep the speed of training for later forecasts.

    The arguments are those of `find_or_train`. Nothing is kept of a run that was cancelled or took less than LEAST_SECONDS.
    """
    watch = Stopwatch()
    watch.enter("encode")
    made = find_or_train(job, destination, device=device, callbacks=watch.listening(callbacks), **others)
    cost = watch.cost(device, job.base.name, len(job.ready.photos))
    if cost.seconds["train"] < LEAST_SECONDS:
        return made
    base, config, photos = job.base, job.config, job.ready.photos
    with suppress(FaceLoraError):  # Forecasts then use the speed of before.
        shared = basis(photos, base, config, device, job.adapter)
        done = shared.ledger(photos, config, class_photos=len(job.class_photos)).done(cost.work.steps / config.steps, 0)
        remember_speed(base, config.precision, speed_of(base, device, config.precision), {TRAIN: done[TRAIN]}, cost)
    return made
