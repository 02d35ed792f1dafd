"""Encode photos to latents and captions to conditioning, once before training, and put them into batches.

Results are cached on disk by content.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from ..config import BaseSettings, PersonSettings, TrainConfig
from ..device import explained_memory_error, whole_or_in_tiles
from ..errors import BadFile
from ..models.base import Base
from ..models.clip import chunk_count
from ..models.objective import shrink_mask
from ..models.spec import Conditioning, Pair
from ..photos import Dataset, TrainingImage
from ..photos.captions import class_caption
from ..progress import OnProgress, silent
from ..storage.cache_folder import cache_folder, content_key, made_folder
from ..storage.safetensors_file import SafetensorsFile, save_safetensors, tensor_bytes
from .methods import trains_text


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """A training picture in the form that the training loop uses."""

    name: str
    """The photo's file name, used only in messages."""
    mean: Tensor
    """(C, h, w) float32: the mean of the VAE's latent distribution, in the denoiser's scale."""
    deviation: Tensor
    """(C, h, w) float32: the standard deviation of that distribution, so that every step can draw new latents."""
    mask: Tensor | None
    """(1, h, w) in [0, 1]: the weight of the loss at each position. None means equal weights."""
    conditioning: Conditioning
    """The conditioning on the picture itself, a batch of 1: size and crop for SDXL, empty for most families."""
    caption: str
    class_caption: str
    """The caption without the trigger word. Prior prediction uses it to preserve the frozen model's predictions."""
    repeats: int
    is_class: bool


@dataclass(frozen=True, eq=False)
class LatentCache:
    """An encoded data set."""

    images: tuple[EncodedImage, ...]
    text: dict[str, Conditioning]
    """The conditioning of every caption that the run needs, each a batch of 1. Empty when text encoders are trained."""
    chunks: int
    """The number of 77-token chunks that every caption is padded to."""
    digest: str
    """A hash that is equal for equal photos, crops, captions and encoders."""
    prompts: dict[str, Pair] = field(default_factory=dict)
    """The conditioning of each sample prompt and of an empty negative prompt, with as many chunks as the prompt needs."""


def encode(
    dataset: Dataset,
    base: Base,
    config: TrainConfig,
    *,
    device: torch.device,
    extra_prompts: Sequence[str] = (),
    on_progress: OnProgress = silent,
) -> LatentCache:
    """Compute the latents and the text conditioning of a data set, or read them from the cache folder.

    The encoders are loaded one after another, only when something has to be computed, and are then freed. `extra_prompts` are
    the prompts of samples. `on_progress(done, total)` may raise to cancel. Raises OutOfMemory when an encoder does not fit
    into memory.
    """
    captions = [image.caption for image in dataset.images]
    class_captions = [without_trigger(image.caption, config) for image in dataset.images]
    chunks = chunk_count(captions)
    wanted = {(caption, chunks) for caption in (*captions, *(class_captions if config.prior_prediction else ()), "")}
    pairs = {prompt: ((prompt, count := chunk_count([prompt])), ("", count)) for prompt in extra_prompts}
    if trains_text(config):
        wanted, pairs = set(), {}
    texts = wanted.union(*pairs.values())
    total = len(dataset.images) + len(texts)
    text_print = base.text_fingerprint

    def progress(done: int) -> None:
        on_progress(done, total)

    with explained_memory_error("a lower resolution or the device cpu"):
        latents, keys = _encode_images(dataset.images, base, device, progress)
        text = _encode_prompts(
            sorted(texts), base, config, text_print, device, lambda done: progress(len(dataset.images) + done)
        )
    encoded = []
    for image, (mean, deviation), caption_of_class in zip(dataset.images, latents, class_captions, strict=True):
        mask = image.mask()
        encoded.append(
            EncodedImage(
                name=image.photo.name,
                mean=mean,
                deviation=deviation,
                mask=None if mask is None else shrink_mask(mask, (mean.shape[1], mean.shape[2])),
                conditioning=base.family.image_conditioning(image.original_size, image.crop_top_left, image.bucket),
                caption=image.caption,
                class_caption=caption_of_class,
                repeats=image.repeats,
                is_class=image.is_class,
            )
        )
    described = [
        (key, image.caption, image.repeats, image.is_class, _mask_digest(image.mask))
        for key, image in zip(keys, encoded, strict=True)
    ]
    return LatentCache(
        tuple(encoded),
        {caption: text[caption, count] for caption, count in wanted},
        chunks,
        content_key(described, text_print, chunks),
        {prompt: (text[given], text[empty]) for prompt, (given, empty) in pairs.items()},
    )


def without_trigger(caption: str, config: PersonSettings) -> str:
    """Remove the trigger word, so that the caption describes the class. Without the word, return "a photo of CLASS"."""
    trigger = rf"(?<!\w){re.escape(config.trigger_word)}(?!\w)"
    remaining, count = re.subn(trigger, " ", caption, flags=re.IGNORECASE)
    return (" ".join(remaining.split()) if count else "") or class_caption(config.class_word)


def _mask_digest(mask: Tensor | None) -> str:
    return "" if mask is None else hashlib.sha256(mask.contiguous().numpy().tobytes()).hexdigest()


def _encode_images(
    images: Sequence[TrainingImage], base: Base, device: torch.device, progress: Callable[[int], None]
) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    vae_print = base.fingerprint("vae")
    scale = [base.components["vae"].config.get(name) for name in ("scaling_factor", "shift_factor")]
    vae, results, keys = None, [], []
    for index, image in enumerate(images):
        key = content_key("latents", image.photo.digest, image.crop, image.bucket, image.flip, vae_print, scale)
        keys.append(key)
        found = _read("latents", key)
        if not found:
            # Always in fp32, since SDXL's VAE overflows in fp16 and encoding takes only seconds.
            vae = vae or base.load("vae", device, torch.float32)
            with torch.inference_mode():
                pixels = image.pixels().unsqueeze(0).to(device)
                mean, deviation = whole_or_in_tiles(vae, partial(base.family.encode_image, vae, pixels))
                found = {"mean": mean[0].cpu(), "deviation": deviation[0].cpu()}
            found = {name: tensor.clone() for name, tensor in found.items()}
            if not _is_finite(found):
                raise _damaged(base, "VAE", image.photo.name)
            # tiles change the result a little, and a later run may have enough memory for whole pictures
            if not vae.use_tiling:
                _write("latents", key, found, {_PHOTO: image.photo.digest})
        results.append((found["mean"], found["deviation"]))
        progress(index + 1)
    return results, keys


def _encode_prompts(
    prompts: Iterable[tuple[str, int]],
    base: Base,
    config: BaseSettings,
    text_print: str,
    device: torch.device,
    progress: Callable[[int], None],
) -> dict[tuple[str, int], Conditioning]:
    encoders, results = None, {}
    for index, (prompt, chunks) in enumerate(prompts):
        key = content_key("text", prompt, base.family.name, config.clip_skip, chunks, text_print)
        found = _read("text", key)
        if not found:
            with torch.inference_mode():
                if base.caption_encoder:
                    conditioning = base.caption_encoder.encode(prompt)
                else:
                    encoders = encoders or base.load_text_encoders(device, torch.float32)
                    conditioning = base.family.encode_text(encoders, [prompt], config.clip_skip, chunks)
            found = {name: tensor.cpu().clone() for name, tensor in conditioning.items()}
            if not _is_finite(found):
                raise _damaged(base, "text encoder", repr(prompt))
            _write("text", key, found)
        results[prompt, chunks] = found
        progress(index + 1)
    return results


_CHECKSUM = "checksum"
"""The key of the checksum in the metadata of a cache file."""
_PHOTO = "photo"
"""The key of the photo's digest in the metadata of its latents."""


def forget_latents(digests: Set[str]) -> None:
    """Deletes the latents of the photos with these digests from the cache folder."""
    for path in (cache_folder() / "latents").glob("*.safetensors"):
        with suppress(BadFile):
            if SafetensorsFile.open(path).metadata.get(_PHOTO) in digests:
                path.unlink()


def _read(kind: str, key: str) -> dict[str, Tensor] | None:
    """Read the tensors cached under the key. Returns None when they are missing, damaged or not finite."""
    try:
        file = SafetensorsFile.open(cache_folder() / kind / f"{key}.safetensors")
        tensors = {name: tensor.clone() for name, tensor in file.items()}
    except BadFile:
        return None
    as_written = file.metadata.get(_CHECKSUM) == _checksum(key, tensors)
    return tensors if as_written and _is_finite(tensors) else None


def _damaged(base: Base, network: str, what: str) -> BadFile:
    return BadFile(
        f"{base.name}: its {network} turns {what} into NaN or infinite values. The file may be damaged: download it again, or "
        "use another"
    )


def _is_finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(tensor.isfinite().all() for tensor in tensors.values())


def _write(kind: str, key: str, tensors: dict[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})) -> None:
    written = {_CHECKSUM: _checksum(key, tensors), **metadata}
    try:
        save_safetensors(made_folder(kind) / f"{key}.safetensors", tensors, written)
    except BadFile:  # `clear_cache` may have deleted the folder or the temporary file meanwhile.
        save_safetensors(made_folder(kind) / f"{key}.safetensors", tensors, written)


def _checksum(key: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash the tensors, their names, types and shapes, and the key they are cached under."""
    digest = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


class Batches:
    """The pictures of each forward pass. They depend only on the seed and the pass number, so no state has to be saved.

    An epoch contains every picture `repeats` times, in batches of one latent shape each. The last of a shape may be smaller.
    """

    def __init__(self, images: Sequence[EncodedImage], batch_size: int, seed: int):
        self.seed = seed
        self.batch_size = batch_size
        self.buckets: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            self.buckets.setdefault(tuple(image.mean.shape), []).extend([index] * image.repeats)
        self.per_epoch: int = sum(-(-len(indices) // batch_size) for indices in self.buckets.values())
        self._mean_size: float = sum(map(len, self.buckets.values())) / self.per_epoch
        self._epoch, self._order = -1, []

    def at(self, number: int) -> list[int]:
        """Return the indices of the pictures in forward pass `number`, counted from 0: at most `batch_size`."""
        epoch, position = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._order[position]

    def share(self, number: int) -> float:
        """Return the factor on the mean loss of forward pass `number` with which every picture of an epoch counts alike."""
        return len(self.at(number)) / self._mean_size

    def _shuffled(self, epoch: int) -> list[list[int]]:
        order = random.Random(f"{self.seed}/{epoch}")
        batches = []
        for indices in self.buckets.values():
            indices = order.sample(indices, len(indices))
            batches += [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        order.shuffle(batches)
        return batches
