"""The trainers that `python -m lab.peer_tables` compares: the same base model, photos and captions for each of them.

The rate of diffusers' page is times RATE_FACTOR: the demo's base model is 200 times smaller than SD1.5, and this project's own
recipe for it has a rate that much higher too. ComfyUI's rate is the node's, since it adapts every weight.
"""

import contextlib
import io
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.cli import main as facelora
from core.config import TrainConfig
from core.demo import BASE_FILE
from core.models import load_base
from core.models.base import Base
from core.models.families.sd15 import LATENT_SCALE
from core.models.spec import Conditioning
from core.photos import prepare, read_photos
from core.tensor_names.unet import diffusers_unet_path
from core.training.encode import LatentCache, encode
from lab.bench_loops import ComfyLoop, PlainLoop

CPU = torch.device("cpu")
RATE_FACTOR = 30


class Trainer(Protocol):
    """A program with its settings."""

    def train(self, photos: Path, seed: int, steps: Sequence[int], folder: Path) -> list[float]:
        """Save `folder`/STEPS.safetensors after each of the `steps`; return the processor seconds up to each.

        The seconds count from the photos on, without the start of Python and its imports.
        """
        ...


@dataclass(frozen=True)
class FaceLora:
    """This project's command with nothing but a length, and perhaps an option: a whole run for each number of steps."""

    options: str = ""

    def train(self, photos: Path, seed: int, steps: Sequence[int], folder: Path) -> list[float]:
        taken = []
        for count in steps:
            output, start = folder / f"{count}.safetensors", time.process_time()
            command = [
                "train",
                photos,
                "--base",
                "demo",
                "--output",
                output,
                "--seed",
                seed,
                "--steps",
                count,
                "--json",
            ]
            with contextlib.redirect_stdout(io.StringIO()):
                status = facelora([*map(str, command), *shlex.split(self.options)])
            if status:
                raise SystemExit(f"facelora ended with {status}")
            taken.append(time.process_time() - start)
        return taken


@dataclass(frozen=True)
class Diffusers:
    """diffusers' DreamBooth-LoRA script, with its settings and without its files."""

    rate: float = 1e-4 * RATE_FACTOR
    rank: int = 4
    batch_size: int = 1
    class_images: Path | None = None
    """A folder of pictures of the class for prior preservation. They are kept from person to person, so drawing isn't timed."""

    def train(self, photos: Path, seed: int, steps: Sequence[int], folder: Path) -> list[float]:
        base, config = _base(), _config(self.rate, self.rank, self.batch_size, seed)
        torch.manual_seed(seed)
        start, taken = time.process_time(), []
        loop = DreamBoothLoop(encoded(base, photos, config, self.class_images), base, config, CPU)
        for step in range(1, max(steps) + 1):
            loop.step()
            if step in steps:
                taken.append(time.process_time() - start)
                loop.save(folder / f"{step}.safetensors")
        return taken


class DreamBoothLoop(PlainLoop):
    """PlainLoop on random batches of the photos, with as many pictures of the class beside them if there are any."""

    def __init__(self, cache: LatentCache, base: Base, config: TrainConfig, device: torch.device):
        super().__init__(cache, base, config, device)
        of_class = torch.tensor([image.is_class for image in cache.images])
        self.kinds: list[Tensor] = [kind.nonzero()[:, 0] for kind in (~of_class, of_class) if kind.any()]
        self.batch_size: int = config.batch_size

    def batch(self) -> tuple[Tensor, Conditioning]:
        picked = torch.cat([kind[torch.randint(len(kind), (self.batch_size,))] for kind in self.kinds])
        return self.latents[picked], {name: part[picked] for name, part in self.conditioning.items()}

    def loss(self) -> Tensor:
        # The script adds the two means, each with a weight of 1.
        return super().loss() * len(self.kinds)

    def save(self, path: Path) -> None:
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft import get_peft_model_state_dict

        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.denoiser))
        StableDiffusionPipeline.save_lora_weights(path.parent, unet_lora_layers=layers, weight_name=path.name)


@dataclass(frozen=True)
class ComfyUI:
    """The code of ComfyUI's node Train LoRA, with the node's own settings but for fp32 and without recomputation."""

    comfyui: Path
    python: Path
    rate: float = 5e-4
    rank: int = 8
    batch_size: int = 1

    def train(self, photos: Path, seed: int, steps: Sequence[int], folder: Path) -> list[float]:
        base, config = _base(), _config(self.rate, self.rank, self.batch_size, seed)
        start, taken = time.process_time(), []
        cache = encoded(base, photos, config)
        seconds = time.process_time() - start
        # ComfyUI scales latents itself.
        images = tuple(replace(image, mean=image.mean / LATENT_SCALE) for image in cache.images)
        cache = replace(cache, images=images)
        original = replace(base.components["denoiser"], tensors=load_file(BASE_FILE))
        base = replace(base, components={"denoiser": original})
        loop = ComfyLoop(cache, base, config, CPU, self.comfyui, self.python)
        for step in range(1, max(steps) + 1):
            seconds += (loop.first if step == 1 else loop.step())["processor"]
            if step in steps:
                taken.append(seconds)
                loop.save(path := folder / f"{step}.safetensors")
                save_file({_kohya(name): tensor for name, tensor in load_file(path).items()}, path)
        loop.close()
        return taken


def _kohya(name: str) -> str:
    """The name in Kohya's format. In the original one, a LoRA's numbers of blocks are read as a published model's."""
    path, suffix = re.fullmatch(r"diffusion_model\.(.+?)\.(lora_.+|diff.*|alpha)", name).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return f"lora_unet_{diffusers_unet_path(path, layers_per_block=1).replace('.', '_')}.{suffix}"


def _base() -> Base:
    return load_base(BASE_FILE)


def _config(rate: float, rank: int, batch_size: int, seed: int) -> TrainConfig:
    return TrainConfig(
        learning_rate=rate, rank=rank, batch_size=batch_size, seed=seed, targets="attention", precision="fp32"
    )


def encoded(base: Base, photos: Path, config: TrainConfig, class_images: Path | None = None) -> LatentCache:
    """The latents and captions of the photos, and of the class images, as every trainer gets them."""
    dataset = prepare(
        read_photos(photos), resolution=base.resolution, size_multiple=base.size_multiple, trigger=config.trigger_word,
        class_word=config.class_word, class_photos=read_photos(class_images) if class_images else (),
    )  # fmt: skip
    return encode(dataset, base, config, device=CPU)
