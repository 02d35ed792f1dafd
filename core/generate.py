"""Pictures from a base model and LoRAs, and sheets of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import nn

from .apply import apply
from .base import Base
from .cache import cache_folder, content_key
from .config import TrainConfig
from .errors import BadConfig
from .lora_file import LoraFile
from .photos import Photo, bucket_sizes
from .photos.captions import class_caption, default_caption
from .sampling import decode_latents, encode_prompts, sample_latents
from .training import Sampler, device_and_dtype


@dataclass(frozen=True)
class GenerateConfig:
    """How pictures are made."""

    negative: str = ""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None: the square that the base was trained at."""
    steps: int = 25
    guidance: float = 6.0
    sampler: str = "dpmpp_2m_karras"
    clip_skip: int = 1
    batch_size: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise BadConfig(f"steps = {self.steps}: must be between 1 and 1000")
        if not 0 <= self.guidance <= 100:
            raise BadConfig(f"guidance = {self.guidance}: must be between 0 and 100")
        if self.batch_size < 1:
            raise BadConfig(f"batch_size = {self.batch_size}: must be at least 1")


@dataclass(frozen=True)
class Picture:
    """A generated picture and what it takes to make it again."""

    image: Image.Image
    prompt: str
    seed: int
    parameters: str
    """The text that A1111 writes into a PNG, which ComfyUI, Forge and Civitai read."""

    def save(self, path) -> None:
        """Writes a PNG with the parameters in it."""
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", self.parameters)
        self.image.save(path, "PNG", pnginfo=info)


def generate(
    base: Base,
    loras: Sequence[tuple[LoraFile, float]],
    jobs: Sequence[tuple[str, int]],
    config: GenerateConfig,
    *,
    device: torch.device | None = None,
    precision: TrainConfig | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[Picture]:
    """One Picture per job (prompt, seed), in order, as each batch is done. LoRAs come with their strengths.

    A picture depends on its own prompt and seed alone, not on its neighbours in a batch (up to rounding).
    """
    device, dtype = device_and_dtype(precision or TrainConfig(), device)
    size = picture_size(base, config.size)
    encoders = base.load_text_encoders(device, dtype if device.type != "cpu" else torch.float32)
    denoiser = base.load("denoiser", device, dtype)
    for lora, strength in loras:
        apply(lora, {"family": base.family.name, "denoiser": denoiser, **encoders}, strength)
    prompts = sorted({prompt for prompt, _ in jobs} | {config.negative})
    encoded = dict(zip(prompts, encode_prompts(base, encoders, prompts, config.clip_skip), strict=True))
    del encoders
    vae = base.load("vae", device, torch.float32)
    for start in range(0, len(jobs), config.batch_size):
        batch = jobs[start : start + config.batch_size]
        latents = sample_latents(
            base, denoiser,
            [encoded[prompt] for prompt, _ in batch], [encoded[config.negative]] * len(batch),
            seeds=[seed for _, seed in batch], size=size, steps=config.steps,
            guidance=config.guidance, sampler=config.sampler, on_step=on_step,
        )  # fmt: skip
        for (prompt, seed), image in zip(batch, decode_latents(base, vae, latents), strict=True):
            yield Picture(image, prompt, seed, _parameters(base, loras, prompt, seed, size, config))


def picture_size(base: Base, size: tuple[int, int] | None) -> tuple[int, int]:
    """The wanted size, or the base's own square, checked against what the UNet can halve. BadConfig names the nearest."""
    multiple = base.size_multiple
    if size is None:
        side = base.resolution // multiple * multiple
        return side, side
    if any(side < multiple or side % multiple for side in size):
        near = tuple(max(multiple, round(side / multiple) * multiple) for side in size)
        raise BadConfig(
            f"size {size[0]}x{size[1]}: width and height must be multiples of {multiple}, e.g. {near[0]}x{near[1]}"
        )
    return size


def _parameters(
    base: Base,
    loras: Sequence[tuple[LoraFile, float]],
    prompt: str,
    seed: int,
    size: tuple[int, int],
    config: GenerateConfig,
) -> str:
    lines = [prompt]
    if config.negative:
        lines.append(f"Negative prompt: {config.negative}")
    settings = [
        f"Steps: {config.steps}",
        f"Sampler: {config.sampler}",
        f"CFG scale: {config.guidance:g}",
        f"Seed: {seed}",
        f"Size: {size[0]}x{size[1]}",
        f"Model: {base.name.removesuffix('.safetensors')}",
    ]
    if base.sha256:
        settings.append(f"Model hash: {base.sha256[:10]}")
    if config.clip_skip > 1:
        settings.append(f"Clip skip: {config.clip_skip}")
    hashes = [
        f"{lora.metadata.get('modelspec.title', 'lora')}: {lora.metadata['sshs_model_hash'][:12]}"
        for lora, _ in loras
        if lora.metadata.get("sshs_model_hash")
    ]
    if hashes:
        settings.append(f'Lora hashes: "{", ".join(hashes)}"')
    return "\n".join([*lines, ", ".join(settings)])


def training_sampler(base: Base, config: TrainConfig, encoded: dict, device: torch.device, steps: int = 20) -> Sampler:
    """A Sampler of the config's prompts, always with the same seeds; `encoded` holds their conditioning (and "")."""
    prompts = sample_prompts(config)
    size = picture_size(base, None)

    def sample(denoiser: nn.Module, encoders) -> list[Image.Image]:
        texts = encoded
        if encoders:
            wanted = [*prompts, ""]
            texts = dict(zip(wanted, encode_prompts(base, encoders, wanted, config.clip_skip), strict=True))
        vae = base.load("vae", device, torch.float32)
        images = []
        for index, prompt in enumerate(prompts):
            latents = sample_latents(
                base, denoiser, [texts[prompt]], [texts[""]],
                seeds=[config.seed + index], size=size, steps=steps, guidance=6.0,
            )  # fmt: skip
            images += decode_latents(base, vae, latents)
        return images

    return sample


def sample_prompts(config: TrainConfig) -> tuple[str, ...]:
    return config.sample_prompts or (default_caption(config.trigger_word, config.class_word),)


def make_class_images(
    base: Base,
    class_word: str,
    count: int,
    *,
    resolution: int | None = None,
    device: torch.device | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Photo]:
    """`count` pictures of "a photo of CLASS" by the base model itself, kept in the cache folder: made once, resumable."""
    prompt = class_caption(class_word)
    side = resolution or base.resolution
    size = min(bucket_sizes(side, base.size_multiple), key=lambda s: abs(s[0] - s[1]))
    identity = base.fingerprint("denoiser", "vae", *base.family.text_encoders)
    folder = cache_folder() / "class" / content_key("class images", prompt, size, identity)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:05d}.png" for index in range(count)]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    pictures = generate(base, [], [(prompt, index) for index in missing], GenerateConfig(size=size), device=device)
    for done, picture in enumerate(pictures if missing else (), start=1):
        path = paths[picture.seed]
        picture.save(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        if on_progress:
            on_progress(done, len(missing))
    return [Photo.from_image(Image.open(path), path.name) for path in paths]


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    tile: int = 160,
    labels: Sequence[Sequence[str]] | None = None,
    title: str = "",
) -> Image.Image:
    """One picture with a titled row per entry of `rows`, each image scaled to `tile` pixels high, its label below it."""
    font, small = ImageFont.load_default(18), ImageFont.load_default(13)
    gap, line = 8, 26
    scaled = [[_to_height(image, tile) for image in images] for _, images in rows]
    width = max([sum(image.width + gap for image in images) for images in scaled] + [320]) + gap
    below = 20 if labels else 0
    height = (line + 10 if title else 0) + sum(line + tile + below + gap for _ in rows) + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    y = gap
    if title:
        draw.text((gap, y), title, fill="black", font=ImageFont.load_default(22))
        y += line + 10
    for row, ((name, _), images) in enumerate(zip(rows, scaled, strict=True)):
        draw.text((gap, y), name, fill="black", font=font)
        y += line
        x = gap
        for column, image in enumerate(images):
            sheet.paste(image, (x, y))
            if labels and column < len(labels[row]):
                draw.text((x, y + tile + 2), labels[row][column], fill="#444444", font=small)
            x += image.width + gap
        y += tile + below + gap
    return sheet


def _to_height(image: Image.Image, height: int) -> Image.Image:
    width = max(1, round(image.width * height / image.height))
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
