"""Train a LoRA with a loop of your own: photos, latents, the steps, the file, and pictures drawn with it.

    python docs/examples/lora_by_hand.py PHOTOS BASE    # a folder of photos of one person, and a checkpoint or "demo"

`facelora.train` does the same in one call. It also checks the photos, keeps what the model knows of other people, fits into
less memory, measures likeness and continues interrupted training runs. Start from this file to try out a loss, an adapter or a
schedule of your own. Train only people who have agreed to it.
"""

import random
import re
import sys

import torch
from facelora import (
    Base,
    LoraFile,
    LoraModule,
    PictureJob,
    TrainConfig,
    contact_sheet,
    encode,
    generate,
    load_base,
    prepare,
    read_photos,
)
from facelora.training import LatentCache
from torch import Tensor, nn

STEPS, PICTURES_PER_STEP, RANK, LEARNING_RATE = 300, 4, 16, 2e-3  # The last is for the demo's small model, else 1e-4.


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained change of low rank beside it: y = W x + B A x (arXiv:2106.09685)."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)  # A
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))  # B: the model is unchanged before the first step

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def encoded_photos(folder: str, base: Base, config: TrainConfig, device: torch.device) -> LatentCache:
    """Crop the photos of a folder, and encode them and their captions."""
    dataset = prepare(
        read_photos(folder),
        resolution=config.resolution or base.resolution,
        size_multiple=base.size_multiple,
        trigger=config.trigger_word,
        class_word=config.class_word,
        upscale=True,
    )
    return encode(dataset, base, config, device=device)


def attach(denoiser: nn.Module, targets: str, rank: int) -> dict[str, LoraLinear]:
    """Replace the linear layers whose path matches `targets`, and return the new ones by path."""
    layers: dict[str, LoraLinear] = {}
    for path, layer in list(denoiser.named_modules()):
        if isinstance(layer, nn.Linear) and re.fullmatch(targets, path):
            layers[path] = LoraLinear(layer, rank)
            parent, _, name = path.rpartition(".")
            setattr(denoiser.get_submodule(parent), name, layers[path])
    return layers


def train_by_hand(cache: LatentCache, base: Base, config: TrainConfig, device: torch.device) -> LoraFile:
    """Train the adapters of the attention layers, and return them as a LoRA."""
    denoiser = base.load("denoiser", device, torch.float32)
    layers = attach(denoiser, base.family.denoiser_targets["attention"], RANK)
    schedule = base.schedule().to(device)
    noise_source = torch.Generator(device).manual_seed(config.seed)
    optimizer = torch.optim.AdamW([p for layer in layers.values() for p in (layer.down, layer.up)], lr=LEARNING_RATE)

    for step in range(1, STEPS + 1):
        total = 0.0
        for image in random.sample(cache.images, min(PICTURES_PER_STEP, len(cache.images))):
            latents = image.mean[None].to(device)
            noise = torch.randn(latents.shape, generator=noise_source, device=device)
            timesteps = schedule.draw_timesteps(latents, config, noise_source)
            conditioning = cache.text[image.caption] | image.conditioning
            prediction = base.family.predict(
                denoiser,
                schedule.add_noise(latents, noise, timesteps),
                timesteps,
                {name: value.to(device) for name, value in conditioning.items()},
            )
            loss = nn.functional.mse_loss(prediction, schedule.target(latents, noise, timesteps)) / PICTURES_PER_STEP
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step} of {STEPS}, loss {total:.4f}")

    modules = {("denoiser", path): LoraModule(x.down.detach(), x.up.detach(), RANK) for path, x in layers.items()}
    return LoraFile.from_modules(base.family.name, modules, {"ss_output_name": "by hand"}, names=base.names)


def main(photos: str, source: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(source)
    config = TrainConfig(trigger_word="sks", class_word="person")
    lora = train_by_hand(encoded_photos(photos, base, config, device), base, config, device)
    lora.save("by_hand.safetensors")
    jobs = [PictureJob("a photo of sks person", seed) for seed in range(1, 5)]
    before, after = ([p.image for p in generate(base, loras, jobs)] for loras in ([], [(lora, 1.0)]))
    contact_sheet([("without the LoRA", before), ("with the LoRA", after)]).save("by_hand.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
