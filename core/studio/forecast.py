"""Forecast how long training runs on a base model take, before there are any photos."""

from dataclasses import dataclass

import torch
from PIL import Image

from ..config import TrainConfig
from ..models.base import Base
from ..photos import Photo
from ..photos.captions import default_caption
from ..pictures.generate import Job
from ..storage.safetensors_file import SafetensorsFile
from .ledger import Basis, basis
from .speed import Span, Speed, speed_of


@dataclass(frozen=True)
class Forecast:
    """What the time of training runs on a base model follows from, for square photos and pictures. Build it with `on`."""

    base: Base
    shared: Basis
    speed: Speed
    photo: Photo

    @classmethod
    def on(cls, base: Base, config: TrainConfig, device: torch.device | None = None) -> "Forecast":
        """Count the passes, which takes seconds. The settings decide about resolution, method and memory.

        A safetensors file of the base model is closed after this.
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
        job = Job(default_caption(config.trigger_word, config.class_word), 1).on(self.base)
        ledger = self.shared.ledger([self.photo] * photos, config, [job] * pictures, redraws_faces=False)
        spans = ledger.seconds(self.speed).values()
        return sum(least for least, _ in spans), sum(most for _, most in spans)
