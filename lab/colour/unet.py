"""The UNet and the text encoder of a base model in colour: SD1.5's shapes at small widths, trained on the VAE's latents."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from core.config import TrainConfig
from core.faces import embed_images, embed_one_by_one, load_faces
from core.models import load_base
from core.models.clip import load_tokenizer
from core.models.objective import NoiseSchedule
from lab.pretrain_demo_base import LATENT_SCALE, build_text_encoder, standardise_latents

from .captions import caption, describe, sex_by_face
from .training import Training, draw_rows, jitter, load_average, plain
from .vae import SIZE, TIMES_SMALLER, build_vae, picture, read_crops, weights_of

CPU = torch.device("cpu")
WIDTHS = (64, 128, 192)
"""The first is 64 as the VAE's: with 32, the last norm would take away each channel's mean."""
BATCH = 16
COPIES = 4
"""Jittered latents of each picture."""
PROMPTS = (
    "a photo of a man", "a photo of a woman", "a photo of an old man, grey hair, beard",
    "a photo of a young woman, blonde hair, smile", "a photo of a person", "a photo of a man, glasses, black hair",
    "a photo of a woman, red hair, green background", "a photo of a man, white background, blue clothes",
    "a photo of a woman, black hair, dark light", "a photo of an old woman, white hair, side light",
    "a photo of a middle-aged man, bald, soft light", "a photo of a woman, red clothes, head and shoulders",
    "a painting of a man, beard, close-up", "a painting of a woman, brown hair", "a painting of an old man", "",
)  # fmt: skip
GUIDANCE, DRAWN_STEPS = 2.5, 25


def build_unet() -> Any:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    unet = UNet2DConditionModel(
        block_out_channels=WIDTHS,  # pyright: ignore[reportArgumentType]
        # Attention at full size would make a step seven times as long.
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=8,
    )
    # Half a step's time goes into torch's fused attention backward on a CPU at these head widths; plain products do not.
    unet.set_attn_processor(AttnProcessor())
    return unet


def load_vae(work: Path, start: Path | None = None) -> Any:
    """The VAE of the latents: that of `start`, or the averages when the first were written, scaled to a deviation of 1."""
    vae, file = build_vae().eval(), work / "latents" / "vae.pt"
    if file.exists():
        vae.load_state_dict(torch.load(file, weights_only=True))
        return vae
    if start:
        vae.load_state_dict(load_base(start).load("vae", CPU, torch.float32).state_dict())
        torch.save(vae.state_dict(), file)
        return vae
    load_average(work / "vae" / "state.pt", {"vae": vae})
    crops, rows = read_crops(work)
    seen = [i for i, row in enumerate(rows) if not (row["kept_out"] or row["only_vae"])]
    pixels = plain(torch.from_numpy(crops[seen[:: max(1, len(seen) // 96)]]), SIZE)
    torch.save(standardise_latents(vae, pixels).state_dict(), file)
    return vae


@torch.no_grad()
def write_latents(work: Path, start: Path | None) -> None:
    """Encode COPIES jittered copies of every picture that the base may see, as moments in fp16; goes on where it stopped."""
    crops, rows = read_crops(work)
    seen = [i for i, row in enumerate(rows) if not (row["kept_out"] or row["only_vae"])]
    folder = work / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    if not (work / "captions.jsonl").exists():
        described = [{**rows[i], **describe(crops[i], rows[i]["words"], rows[i]["share"])} for i in seen]
        vectors = embed_one_by_one(load_faces(), (Image.fromarray(crops[i]) for i in seen))
        np.save(work / "faces.npy", np.nan_to_num(vectors))
        sex_by_face(described, np.nan_to_num(vectors))
        lines = "".join(json.dumps(row) + "\n" for row in described)
        (work / "captions.jsonl").write_text(lines, encoding="utf-8")
    vae = load_vae(work, start)
    for copy in range(COPIES):
        if (file := folder / f"{copy}.npy").exists():
            continue
        draws, parts = torch.Generator().manual_seed(copy), []
        for first in range(0, len(seen), 32):
            pixels, _ = jitter(torch.from_numpy(crops[seen[first : first + 32]]), SIZE, draws)
            with torch.autocast("cpu", torch.bfloat16):
                parts.append(vae.quant_conv(vae.encoder(pixels)).float().numpy().astype(np.float16))
        np.save(file.with_suffix(".new.npy"), np.concatenate(parts))
        file.with_suffix(".new.npy").replace(file)
        print(f"{copy + 1} of {COPIES} copies", flush=True)


def train_unet(work: Path, start: Path | None, minutes: float, steps: int, every: float, photos: float) -> None:
    """Train UNet and text encoder together on the noise-prediction loss; photographic pictures are a share of `photos`.

    The weights are those of `start`, or random.
    """
    torch.manual_seed(1)
    folder = work / "latents"
    known = [json.loads(line) for line in (work / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    moments = [np.load(folder / f"{copy}.npy", mmap_mode="r") for copy in range(COPIES)]
    weights, tokenizer, process = weights_of(known, photos), load_tokenizer(), NoiseSchedule.scaled_linear()
    modules = {"unet": build_unet(), "text": build_text_encoder()}
    if start:
        base = load_base(start)
        for part, name in (("unet", "denoiser"), ("text", "text_encoder")):
            state = base.load(name, CPU, torch.float32).state_dict()
            modules[part].load_state_dict({key.removeprefix("text_model."): value for key, value in state.items()})
    words = modules["text"].get_input_embeddings().weight
    if not (folder / "words.pt").exists():
        torch.save(words.detach(), folder / "words.pt")
    with torch.no_grad():  # Random, but another version of torch would draw others.
        words.copy_(torch.load(folder / "words.pt", weights_only=True))
    print(f"unet {sum(value.numel() for value in modules['unet'].parameters()) / 1e6:.2f} M parameters")
    run = Training(work / "unet" / "state.pt", modules, rate=1e-3, decay=0.9995)

    def loss() -> Tensor:
        index = draw_rows(range(len(known)), weights, BATCH, run.random)
        copy = int(torch.randint(len(moments), (), generator=run.random))
        mean, logvar = torch.from_numpy(np.stack([moments[copy][i] for i in index]).astype(np.float32)).chunk(2, dim=1)
        latents = (mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=run.random)) * LATENT_SCALE
        noise = torch.randn(latents.shape, generator=run.random)
        times = torch.randint(1000, (BATCH,), generator=run.random)
        words_of = random.Random(int(torch.randint(1 << 30, (), generator=run.random)))
        captions = [caption(known[i], words_of) for i in index]
        tokens = tokenizer(
            captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            context = modules["text"](tokens).last_hidden_state
            noisy = process.add_noise(latents, noise, times)
            predicted = modules["unet"](noisy, times, context).sample.float()
        # min-SNR-5 (arXiv 2303.09556): composition before grain
        scales = process.loss_weights(times, TrainConfig(min_snr_gamma=5.0))
        return (scales * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()

    def report() -> None:
        averages = {"unet": build_unet(), "text": build_text_encoder()}
        with torch.no_grad():
            averages["text"].get_input_embeddings().weight.copy_(words)
        step = load_average(run.file, averages)
        drawn = draw(averages, work, PROMPTS)
        rows = [torch.cat(list(part), dim=2) for part in drawn.split(8)]
        picture(torch.cat(rows, dim=1)).save(run.file.with_name(f"sheet{step:06}.png"))
        faces = load_faces()
        found = embed_images(faces, [picture(value) for value in drawn])
        nearest = (np.nan_to_num(found) @ np.load(work / "faces.npy").T).max(axis=1)[~np.isnan(found).any(axis=1)]
        print(f"step {step}: {len(nearest)} faces in 16, cosine to the nearest trained on {np.sort(nearest).round(2)}")

    run.run(loss, minutes, steps, every, report)


@torch.no_grad()
def draw(modules: dict[str, nn.Module], work: Path, prompts: tuple[str, ...]) -> Tensor:
    """Pictures of the prompts by DDIM with guidance, each from a noise of its own that never changes."""
    vae = load_vae(work)
    tokens = load_tokenizer()(
        [*prompts, *[""] * len(prompts)], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids  # fmt: skip
    context = modules["text"](tokens).last_hidden_state
    signal = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)
    shape = (4, SIZE[1] // TIMES_SMALLER, SIZE[0] // TIMES_SMALLER)
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(len(prompts))]
    latents, moments = torch.stack(noises), torch.linspace(999, 0, DRAWN_STEPS).round().long().tolist()
    for now, after in zip(moments, [*moments[1:], None], strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            both = modules["unet"](torch.cat([latents, latents]), now, context).sample.float()
        wanted, unwanted = both.chunk(2)
        noise = unwanted + GUIDANCE * (wanted - unwanted)
        clean = (latents - (1 - signal[now]).sqrt() * noise) / signal[now].sqrt()
        keep = signal[after] if after is not None else torch.tensor(1.0)
        latents = keep.sqrt() * clean + (1 - keep).sqrt() * noise
    with torch.autocast("cpu", torch.bfloat16):
        return vae.decode(latents / LATENT_SCALE).sample.float().clamp(-1, 1)
