"""The pictures drawn during training: samples with the current adapter, and class images with the base model alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ..config import LikenessSettings, TrainConfig
from ..device import in_parts_that_fit
from ..models.base import Base
from ..models.spec import Pair
from ..photos import Photo, bucket_sizes
from ..photos.captions import class_caption, default_caption
from ..photos.reading import DAMAGED
from ..pictures.generate import PictureJob, generate, in_batches
from ..pictures.sampling import decode_latents, encode_pairs, load_vae, sample_latents
from ..pictures.sizes import checked_size
from ..progress import OnProgress, silent
from ..storage.cache_folder import content_key, made_folder
from .drawing import DrawShots, Shot
from .likeness import LikenessWatch
from .methods import METHODS

SAMPLE_BATCH = 4
"""The number of pictures in a batch of samples."""
SAMPLE_SCALE, SMALLEST_SAMPLE = 0.75, 512
"""The sides of samples as a share of the photos', and the side below which they are not made smaller.

A face network looks at 112 pixels of a face, and a picture of 768 pixels takes half as long as one of 1024.
"""


@dataclass(frozen=True)
class Samples:
    """The pictures that a training run draws with its intermediate LoRAs."""

    draw: DrawShots
    shots: Sequence[Shot] = ()
    """The pictures passed to `on_sample`."""
    watch: LikenessWatch | None = None
    """Measures likeness, on shots of its own. A shot in both lists is drawn once."""
    drawn_as: str = ""
    """Everything a picture depends on besides its shot and the networks."""


def sample_size(base: Base, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) of samples, in pixels, for training on photos of that size."""
    side = math.sqrt(size[0] * size[1])
    scale = min(1.0, max(SAMPLE_SCALE, SMALLEST_SAMPLE / side))
    scale = max(scale, min(base.family.smallest_picture, base.resolution) / side)
    width, height = (max(1, round(scale * side / base.size_multiple)) * base.size_multiple for side in size)
    return width, height


def build_draw_shots(
    base: Base,
    config: TrainConfig,
    encoded: Mapping[str, Pair],
    device: torch.device,
    size: tuple[int, int] | None = None,
    on_progress: OnProgress = silent,
) -> DrawShots:
    """Return a function that draws shots with the networks of a run.

    `encoded` has the conditioning of each prompt and of an empty negative prompt. It is not used when the run trains text
    encoders. `size` is (width, height) in pixels, by default the square that the base model was trained at. `on_progress` is
    called with (done, total) at each sampling step.
    """
    width_height = checked_size(base, size)
    dtype = base.device_and_dtype(config.precision, device)[1]
    steps_of_each = sampling_steps(base, config)

    def sample(denoiser: nn.Module, encoders: Mapping[str, nn.Module], shots: Sequence[Shot]) -> list[Image.Image]:
        texts = encoded
        if encoders:
            pairs = encode_pairs(base, encoders, {(prompt, "") for prompt, _ in shots}, config.clip_skip)
            texts = {prompt: pair for (prompt, _), pair in pairs.items()}
        vae = load_vae(base, device, dtype)
        images = {}
        batches = list(in_batches(shots, [texts[prompt] for prompt, _ in shots], SAMPLE_BATCH))
        for index, (batch, pairs) in enumerate(batches):

            def drawn(step: int, steps: int, earlier: int = index) -> None:
                on_progress(earlier * steps + step, len(batches) * steps)

            def draw(part: Sequence[tuple[Shot, Pair]], on_step: OnProgress = drawn) -> list[Image.Image]:
                latents = sample_latents(
                    base, denoiser, [prompt for _, (prompt, _) in part], [negative for _, (_, negative) in part],
                    device=device, dtype=dtype, autocast=not METHODS[config.method].keeps_dtype,
                    seeds=[seed for (_, seed), _ in part], size=width_height, steps=steps_of_each,
                    guidance=base.guidance if config.sample_guidance is None else config.sample_guidance,
                    on_step=on_step,
                )  # fmt: skip
                return decode_latents(base, vae, latents)

            images |= zip(batch, in_parts_that_fit(draw, list(zip(batch, pairs, strict=True))), strict=True)
        return [images[shot] for shot in shots]

    return sample


def sampling_steps(base: Base, config: LikenessSettings) -> int:
    """Return the number of sampling steps for a picture drawn during a training run."""
    steps = config.sample_steps or (20 if base.family.predicts_noise else 25)
    return min(steps, base.steps) if base.few_steps else steps


def sample_shots(config: TrainConfig) -> list[Shot]:
    """Return the pictures that a training run shows its user, as (prompt, seed)."""
    prompts = config.sample_prompts or (default_caption(config.trigger_word, config.class_word),)
    return [(prompt, config.seed + index) for index, prompt in enumerate(prompts)]


def make_class_images(
    base: Base,
    class_word: str,
    count: int,
    *,
    resolution: int | None = None,
    device: torch.device | None = None,
    on_progress: OnProgress = silent,
) -> list[Photo]:
    """Draw `count` pictures of "a photo of CLASS" with the base model, for prior preservation.

    They are cached, so later calls draw only the missing ones. `resolution` is the side, in pixels, of a square with their
    area. `on_progress(done, total)` may raise to cancel.
    """
    base, prompt = base.sped_up(None), class_caption(class_word)
    side = resolution or base.resolution
    size = min(bucket_sizes(side, base.size_multiple), key=lambda s: abs(s[0] - s[1]))
    steps, guidance = base.steps, base.guidance
    folder = made_folder("class", content_key("class images", prompt, size, steps, guidance, base.identity))
    paths = [folder / f"{index:05d}.png" for index in range(count)]
    missing = [index for index, path in enumerate(paths) if not is_whole(path)]
    jobs = [PictureJob(prompt, index, size=size, steps=steps, guidance=guidance) for index in missing]
    pictures = generate(base, [], jobs, device=device)
    for done, picture in enumerate(pictures if missing else (), start=1):
        picture.save(paths[picture.job.seed])
        on_progress(done, len(missing))
    return [Photo.from_image(Image.open(path), path.name) for path in paths]


def is_whole(path: Path) -> bool:
    """Return whether the picture exists and is undamaged."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except DAMAGED:
        return False
    return True
