"""LongCat-Image (Meituan, 2025, arXiv:2512.07584): FLUX.1's blocks, half as many, with another text; 1024 px.

The text encoder is Qwen2.5-VL-7B, and the VAE is FLUX.1's. It uses neither pooled text nor distilled guidance.
LongCat-Image-Dev is a state before the last training, published for fine-tuning. It and LongCat-Image-Edit have the same
tensors, so only a diffusers folder distinguishes Edit.
"""

import re
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...tensor_names.flux import LONGCAT_IMAGE as NAMES
from .. import text, transformer
from ..objective import linear_shift
from ..spec import Conditioning, FamilySpec, Networks
from . import flux1

TEXT = {"text_encoder": "qwen25_7b"}
TEXT_TOKENS = 512
"""The number of tokens that captions are padded to. The denoiser sees the padding."""
TEMPLATE = (
    "<|im_start|>system\nAs an image captioning expert, generate a descriptive text prompt based on an image content, "
    "suitable for input to a text-to-image model.<|im_end|>\n<|im_start|>user\n"
)
"""The text before a caption. What the authors add after it doesn't change the states that are used."""
TEMPLATE_TOKENS = 36
"""The number of tokens in the template, whose states are dropped."""
_PADDING_AT = 1
"""The position of each padding token in the text encoder, as in transformers 4.57, which the authors use.

In ComfyUI and later versions of transformers, positions continue instead.
"""

_QUOTE = r"(?:(?<![a-zA-Z])'|'(?![a-zA-Z]))"
"""A single quotation mark. An apostrophe within a word does not count."""
_QUOTED = re.compile(rf"({_QUOTE}(?:[^']|(?<=[a-zA-Z])'(?=[a-zA-Z]))*{_QUOTE}|\"[^\"]*\"|‘[^‘’]*’|“[^“”]*”)")


_CONFIG_OF = partial(flux1.blocks_config, axes=flux1.ROTARY_AXES)
_DENOISER = partial(
    flux1.build_denoiser, name="LongCatImageTransformer2DModel", version=(0, 37), embedding="time_embed"
)


def pieces(caption: str) -> list[str]:
    """Split into the template and pieces of a caption that are tokenised separately. Quotations are split into characters."""
    parts = _QUOTED.split(caption)  # every second one is quoted
    return [TEMPLATE, *(piece for index, part in enumerate(parts) for piece in (part if index % 2 else [part]))]


def encode_text(encoders: Networks, captions: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    length = TEMPLATE_TOKENS + TEXT_TOKENS
    states = text.encode_qwen(
        encoders["text_encoder"],
        TEXT["text_encoder"],
        captions,
        length,
        multiple=length,
        padding_at=_PADDING_AT,
        pieces=pieces,
    )
    return {"context": states["context"][:, TEMPLATE_TOKENS:]}


def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    # The first number of a position is 0 for text and 1 for pictures. Rows and columns continue from the text's length.
    count = conditioning["context"].shape[1]
    of_picture = transformer.patch_positions(noisy_latents)
    of_picture[:, 0] += 1
    of_picture[:, 1:] += count
    of_text = F.pad(torch.arange(float(count), device=of_picture.device)[:, None].expand(-1, 2), (1, 0))
    return transformer.predicted(denoiser, noisy_latents, timesteps, conditioning, img_ids=of_picture, txt_ids=of_text)


LONGCAT_IMAGE = FamilySpec(
    names=NAMES,
    title="LongCat-Image",
    guidance=4.5,  # diffusers' default, as are the steps
    steps=50,
    pipeline_class="LongCatImagePipeline",
    text_encoders=TEXT,
    usual_tokens=TEXT_TOKENS,
    denoiser_targets=flux1.FLUX1.denoiser_targets,
    in_channels=64,
    denoiser_has=flux1.BLOCK_WEIGHTS,
    denoiser_lacks=(flux1.TEXT_WEIGHT,),
    split=transformer.splitter(_CONFIG_OF, NAMES, TEXT, transformer.flux1_vae),
    build=text.builder(_DENOISER, TEXT),
    latent_shape=partial(transformer.patch_latent_shape, patched=True),
    encode_text=encode_text,
    predict=predict,
    flow_shift=linear_shift(4096, 1.15),  # from the authors' pipeline
)
