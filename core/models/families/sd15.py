"""Stable Diffusion 1.x (arXiv:2112.10752): a UNet with cross-attention on text from CLIP ViT-L/14; 512 px."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from ...tensor_names.stable_diffusion import SD15 as NAMES
from .. import clip, ldm, text
from ..recipe import Recipe, short, usual
from ..spec import Component, Conditioning, FamilySpec, Networks

TEXT = {"text_encoder": "clip_l"}
LATENT_SCALE = 0.18215


def split(tensors: Mapping[str, Tensor]) -> dict[str, Component]:
    denoiser = ldm.unet_component(tensors, head_width=None)
    vae = partial(ldm.vae_component, latent_scale=LATENT_SCALE)
    return {"denoiser": denoiser} | text.other_parts(tensors, vae, TEXT)


def encode_text(encoders: Networks, captions: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    encoder = encoders["text_encoder"]
    tokens = clip.token_chunks(captions, chunks, clip.END, clip.words_of(encoder))
    states, _ = clip.encode_chunks(encoder, tokens, layer=clip_skip, final_norm=True)
    return {"context": states}


def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    context = conditioning["context"].to(noisy_latents.dtype)
    return denoiser(noisy_latents, timesteps, encoder_hidden_states=context, return_dict=False)[0]


SD15 = FamilySpec(
    names=NAMES,
    title="Stable Diffusion 1.x",
    resolution=512,
    size_multiple=64,
    wording="tags",
    guidance=6.0,  # a little less than the usual 7.5, which makes skin look hard
    steps=20,  # enough for DPM++ 2M (arXiv:2211.01095: 15 to 20)
    recipes={
        # diffusers trains at a constant 1e-4. A rate that falls linearly from twice that took four fifths of the photos to the
        # same likeness on the demo's base model (docs/likeness.md). For `best`, sd-scripts' usual rank 32 and 1e-4 at batch 4,
        # for longer.
        "fast": short(2e-4, 16, least=500, schedule="linear"),
        "balanced": usual(2e-4, 32, least=800, most=1200, views=80, schedule="linear"),
        "best": Recipe(4000, 5e-5, 32, batch_size=4),
    },
    pipeline_class="StableDiffusionPipeline",
    other_pipelines=(
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
    ),
    text_encoders=TEXT,
    denoiser_targets=ldm.UNET_TARGETS,
    text_encoder_targets=clip.TEXT_TARGETS,
    in_channels=4,
    distilled_names=ldm.DISTILLED_NAMES,
    few_steps=replace(ldm.FEW_STEPS, lora="ByteDance/Hyper-SD/Hyper-SD15-8steps-lora.safetensors"),
    denoiser_has=(ldm.FIRST_WEIGHT,),
    denoiser_lacks=(ldm.POOLED_WEIGHT,),
    lookalikes={"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": "Stable Diffusion 2.x"},
    split=split,
    build=text.builder(ldm.build_unet, TEXT),
    latent_shape=ldm.unet_latent_shape,
    encode_text=encode_text,
    predict=predict,
    has_clip_skip=True,
    other_model=ldm.other_model,
)
