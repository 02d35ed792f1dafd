"""Writes a trained base model as one file in the original checkpoint naming, as ComfyUI and core load it."""

import json
from pathlib import Path

import torch

from core.models.ldm import ldm_vae_path, original_unet_names
from core.models.recipe import RECIPES_KEY
from core.storage.safetensors_file import save_safetensors
from lab.pretrain_demo_base import RECIPES, build_text_encoder

from .sources import SOURCES
from .training import load_average
from .unet import build_unet, load_vae
from .vae import SIZE, WIDTHS


def export(work: Path, output: Path) -> None:
    """Write VAE, and the running averages of UNet and text encoder, in fp16; the token table, which is random, in fp8."""
    vae, unet, text = load_vae(work), build_unet(), build_text_encoder()
    words = torch.load(work / "latents" / "words.pt", weights_only=True)
    text.load_state_dict({"embeddings.token_embedding.weight": words}, strict=False)
    step = load_average(work / "unet" / "state.pt", {"unet": unet, "text": text})
    tensors = {}
    state = unet.state_dict()
    for name, original in original_unet_names(state).items():
        tensors[f"model.diffusion_model.{original}"] = state[name].half()
    for name, value in text.state_dict().items():
        name = "text_model." + name.removeprefix("text_model.")
        dtype = torch.float8_e4m3fn if name.endswith("token_embedding.weight") else torch.float16
        tensors[f"cond_stage_model.transformer.{name}"] = value.to(dtype)
    for name, value in vae.state_dict().items():
        name = ldm_vae_path(name, len(WIDTHS))
        # The original attention has 1x1 convolutions, and that of diffusers linear layers.
        value = value[:, :, None, None] if ".attn_1." in name and value.ndim == 2 else value
        tensors[f"first_stage_model.{name}"] = value.half()
    (width, height), credits = SIZE, (f"{of.credit} ({of.licence})" for of in SOURCES.values())
    side = round((width * height) ** 0.5 / 8) * 8
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "FaceLoRA demo base in colour",
        "modelspec.description": "Small SD1.5-shaped model of invented people's portraits, trained on drawn pictures of "
        f"{', '.join(credits)} for {step} steps.",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "epsilon",
        "modelspec.license": "Apache-2.0",
        RECIPES_KEY: json.dumps(RECIPES),
    }
    save_safetensors(output, {name: value.contiguous() for name, value in sorted(tensors.items())}, metadata)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
