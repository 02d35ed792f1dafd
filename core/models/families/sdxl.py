"""Stable Diffusion XL (arXiv:2307.01952): a larger UNet with two text encoders, conditioned on size and crop; 1024 px."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ...tensor_names.stable_diffusion import SDXL as NAMES
from .. import clip, ldm, text
from ..recipe import Recipe, short, usual
from ..spec import Component, Conditioning, FamilySpec, Networks

TEXT = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
LATENT_SCALE = 0.13025


def split(tensors: Mapping[str, Tensor]) -> dict[str, Component]:
    denoiser = ldm.unet_component(tensors, head_width=64)
    vae = partial(ldm.vae_component, latent_scale=LATENT_SCALE)
    return {"denoiser": denoiser} | text.other_parts(tensors, vae, TEXT)


def encode_text(encoders: Networks, captions: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    # Both encoders use the second to last layer, as in the model's training. The second encoder pads with 0.
    of_first, of_second = encoders["text_encoder"], encoders["text_encoder_2"]
    tokens = clip.token_chunks(captions, chunks, clip.END, clip.words_of(of_first))
    first, _ = clip.encode_chunks(of_first, tokens, layer=2, final_norm=False)
    tokens = clip.token_chunks(captions, chunks, 0, clip.words_of(of_second))
    second, output = clip.encode_chunks(of_second, tokens, layer=2, final_norm=False)
    pooled = output.text_embeds.reshape(len(captions), tokens.shape[1], -1)[:, 0]
    return {"context": torch.cat([first, second], dim=-1), "pooled": pooled}


def image_conditioning(
    original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
) -> Conditioning:
    # SDXL's six numbers, height before width: original size, top and left of the crop, target size.
    numbers = (original_size[1], original_size[0], crop_top_left[1], crop_top_left[0], target_size[1], target_size[0])
    return {"time_ids": torch.tensor([numbers], dtype=torch.float32)}


def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    dtype = noisy_latents.dtype
    # The sizes stay float32, since 1000 and 1003 are the same number in bf16.
    added = {"text_embeds": conditioning["pooled"].to(dtype), "time_ids": conditioning["time_ids"]}
    return denoiser(
        noisy_latents,
        timesteps,
        encoder_hidden_states=conditioning["context"].to(dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


SDXL = FamilySpec(
    names=NAMES,
    title="Stable Diffusion XL",
    size_multiple=64,
    smallest_picture=768,  # github.com/Stability-AI/generative-models, issue 98
    wording="tags",
    guidance=5.0,  # diffusers' default
    steps=20,  # enough for DPM++ 2M (arXiv:2211.01095: 15 to 20)
    recipes={
        # As for SD1.5, at 768 px as in Replicate's trainer: at 512 px its pictures break. `best` has sd-scripts' usual 1e-4 at
        # batch 4, for longer. `fast` is as long as 20 minutes of an RTX 3060 allow for a job with a speed LoRA.
        "fast": short(2e-4, 16, least=450, resolution=768, schedule="linear"),
        "balanced": usual(2e-4, 32, least=800, most=1200, views=80, resolution=768, schedule="linear"),
        "best": Recipe(4000, 5e-5, 32, batch_size=4),
    },
    pipeline_class="StableDiffusionXLPipeline",
    other_pipelines=(
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
    ),
    text_encoders=TEXT,
    context_from={"text_encoder": 1, "text_encoder_2": 1},
    pooled_from={"text_encoder_2": 1},
    denoiser_targets=ldm.UNET_TARGETS,
    text_encoder_targets=clip.TEXT_TARGETS,
    in_channels=4,
    distilled_names=ldm.DISTILLED_NAMES,
    few_steps=replace(ldm.FEW_STEPS, lora="ByteDance/SDXL-Lightning/sdxl_lightning_8step_lora.safetensors"),
    denoiser_has=(ldm.FIRST_WEIGHT, ldm.POOLED_WEIGHT),
    lookalikes={
        "conditioner.embedders.0.model.transformer.resblocks.0.ln_1.weight": "the SDXL refiner",
        "edm_mean": "Playground v2.5 (SDXL trained as EDM)",
        "edm_vpred.sigma_max": "CosXL (SDXL trained as EDM)",
    },
    split=split,
    build=text.builder(ldm.build_unet, TEXT),
    latent_shape=ldm.unet_latent_shape,
    encode_text=encode_text,
    image_conditioning=image_conditioning,
    predict=predict,
    other_model=ldm.other_model,
)
