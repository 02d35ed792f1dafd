"""The VAE of a base model in colour: SD1.x's AutoencoderKL at small widths, with a tiny trained one as its teacher."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from core.faces import embed_images, load_faces

from .training import Training, draw_rows, jitter, load_average, plain

SIZE = (128, 160)
"""The width and height of the base's pictures."""
WIDTHS = (64, 64, 128)
"""SD1.x's norms have 32 groups. With 32 channels, each would lose its mean, and the pictures their colours."""
TIMES_SMALLER = 4
"""How many times smaller than the pictures the latents are."""
BATCH = 8
PART, WINDOW = 96, 64
"""The sides in pixels of the part of a picture in a step, and of its middle that the teacher sees."""
HUES = torch.tensor(((1.0, -1.0, 0.0), (-0.5, -0.5, 1.0)))
"""Red against green, and blue against both. Two latent channels get their means: all four would hold light and its slopes."""
CELL = 16
"""The side in pixels of the squares of these means. What is finer in the two channels is free for the face."""
TAPS = (1, 5, 9, 13, 14)
"""The teacher's layers that are compared."""


def build_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=WIDTHS,  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=4,
    )


def load_teacher(folder: Path) -> nn.Module:
    """FLUX.2's tiny autoencoder, of madebyollin/taesd (MIT): 32 channels, 8 times smaller, for pixels in [0, 1]."""
    spec = importlib.util.spec_from_file_location("taesd", folder / "taesd.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    teacher = module.TAESD(str(folder / "taef2_encoder.pth"), str(folder / "taef2_decoder.pth"))
    return teacher.float().eval().requires_grad_(False)


def read_crops(work: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    rows = [json.loads(line) for line in (work / "crops.jsonl").read_text(encoding="utf-8").splitlines()]
    return np.load(work / "crops.npy", mmap_mode="r"), rows


def weights_of(rows: list[dict[str, Any]], photos: float) -> Tensor:
    """How often each row is drawn: the photographic ones together make up a share of `photos`."""
    photo = torch.tensor([row["source"] != "artflow" for row in rows])
    share = photos if photo.any() and not photo.all() else 0.5
    return torch.where(photo, share / photo.sum().clamp(min=1), (1 - share) / (~photo).sum().clamp(min=1))


def train_vae(work: Path, minutes: float, steps: int, every: float) -> None:
    """Train the VAE, going on from its file. Every so often its figures are printed and its pictures saved."""
    torch.manual_seed(1)
    vae, teacher = build_vae(), load_teacher(work / "sources" / "taesd")
    crops, rows = read_crops(work)
    seen = [i for i, row in enumerate(rows) if not row["kept_out"]]
    weights = weights_of([rows[i] for i in seen], photos=0.4)
    folder = work / "vae"
    run = Training(folder / "state.pt", {"vae": vae}, rate=1e-3, decay=0.999)
    features = list(teacher.encoder.children())  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]

    def hues(pixels: Tensor) -> Tensor:
        return torch.einsum("bcyx,kc->bkyx", F.avg_pool2d(pixels, CELL), HUES)

    def taps(pixels: Tensor) -> list[Tensor]:
        found, values = [], pixels / 2 + 0.5
        for number, layer in enumerate(features):
            values = layer(values)
            if number in TAPS:
                found.append(values)
        return found

    def loss() -> Tensor:
        index = draw_rows(seen, weights, BATCH, run.random)
        pixels, _ = jitter(torch.from_numpy(crops[sorted(index)]), SIZE, run.random)
        x, y = (int(torch.randint(side - PART + 1, (), generator=run.random)) for side in SIZE)
        pixels = pixels[..., y : y + PART, x : x + PART]
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(pixels).latent_dist
            noise = torch.randn(latents.mean.shape, generator=run.random)
            decoded = vae.decode(latents.mean + latents.std * noise).sample.float()
        # L1 keeps it sharp, the gradients and the teacher keep eyes and mouth, the tiny KL keeps the latents bounded.
        value = F.l1_loss(decoded, pixels) + 1e-6 * latents.kl().float().mean()
        means = F.avg_pool2d(latents.mean[:, :2].float(), CELL // TIMES_SMALLER)
        value = value + F.l1_loss(means, 4 * hues(pixels)) + 2 * F.l1_loss(hues(decoded), hues(pixels))
        for dim in (2, 3):
            value = value + F.l1_loss(decoded.diff(dim=dim), pixels.diff(dim=dim))
        edge = (PART - WINDOW) // 2
        part = (..., slice(edge, edge + WINDOW), slice(edge, edge + WINDOW))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = taps(pixels[part])
            for given, target in zip(taps(decoded[part]), wanted, strict=True):
                value = value + 0.1 * (given - target).float().abs().mean() / target.float().abs().mean()
        return value

    def report() -> None:
        measured = build_vae()
        step = load_average(run.file, {"vae": measured})
        figures, sheet = measure(measured.eval(), crops, rows)
        sheet.save(folder / f"sheet{step:06}.png")
        line = json.dumps({"step": step, "minutes": round(run.seconds / 60, 1)} | figures)
        with (folder / "figures.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    run.run(loss, minutes, steps, every, report)


@torch.no_grad()
def measure(vae: Any, crops: np.ndarray, rows: list[dict[str, Any]]) -> tuple[dict, Image.Image]:
    """SFace's cosine between pictures kept out and what is left of them, PSNR, and a sheet with both above each other."""
    faces, figures, shown = load_faces(), {}, []
    for kind in ("photos", "paintings"):
        kept = [
            i for i, row in enumerate(rows) if row["kept_out"] and (row["source"] == "artflow") == (kind != "photos")
        ]
        if not kept:
            continue
        pixels = plain(torch.from_numpy(crops[kept[:: max(1, len(kept) // 48)][:48]]), SIZE)
        drawn = torch.cat([reconstruct(vae, part) for part in pixels.split(8)])
        psnr = -10 * ((drawn - pixels) / 2).square().mean(dim=(1, 2, 3)).log10().mean()
        vectors = [embed_images(faces, [picture(value) for value in values]) for values in (pixels, drawn)]
        cosines = (np.nan_to_num(vectors[0]) * np.nan_to_num(vectors[1])).sum(axis=1)[~np.isnan(vectors[0]).any(axis=1)]
        figures[kind] = {
            "sface": round(float(cosines.mean()), 3), "lowest tenth": round(float(np.quantile(cosines, 0.1)), 3),
            "psnr": round(float(psnr), 2), "pictures": len(cosines),
        }  # fmt: skip
        shown += [torch.cat(list(torch.cat([pixels[::5], drawn[::5]], dim=2)), dim=2)]
    return figures, picture(torch.cat(shown, dim=1))


def reconstruct(vae: Any, pixels: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return vae.decode(vae.encode(pixels).latent_dist.mean).sample.float().clamp(-1, 1)


def picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(((pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def yardstick(work: Path) -> dict:
    """The figures of the teacher, which has eight times as many channels, on the same pictures."""
    teacher = load_teacher(work / "sources" / "taesd")

    class Whole:
        @staticmethod
        def encode(pixels: Tensor) -> Any:
            mean = teacher.encoder(pixels / 2 + 0.5)  # pyright: ignore[reportCallIssue]
            return type("Encoded", (), {"latent_dist": type("Latents", (), {"mean": mean})})

        @staticmethod
        def decode(latents: Tensor) -> Any:
            return type("Decoded", (), {"sample": teacher.decoder(latents) * 2 - 1})  # pyright: ignore[reportCallIssue]

    return measure(Whole, *read_crops(work))[0]
