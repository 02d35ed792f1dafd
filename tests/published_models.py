"""The published models in their sizes, as tensors that hold no numbers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core.config import TrainConfig
from core.models.base import Base
from core.models.families import FAMILIES
from core.models.quantised import dequantised
from core.models.spec import Component
from core.training.encode import EncodedImage, LatentCache
from tests.random_models import denoiser_config


@dataclass(frozen=True)
class Model:
    """A published model: its denoiser's configuration, and how long and wide its texts are."""

    family: str
    resolution: int
    config: dict[str, Any]
    latent: tuple[int, int]
    """Channels, and pixels of a side of a latent's pixel."""
    tokens: int
    width: int
    pooled: int | None = None
    masked: bool = False
    """Whether there is a mask of the text's length."""


QWEN = {"num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584, "num_layers": 60}

MODELS = {
    "SD1.5": Model("sd15", 512, denoiser_config("sd15"), (4, 8), 77, 768),
    "SDXL": Model("sdxl", 1024, denoiser_config("sdxl"), (4, 8), 77, 2048, 1280),
    "SD3.5 medium": Model(
        "sd3", 1024,
        {"sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
         "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm", "in_channels": 16},
        (16, 8), 333, 4096, 2048,
    ),
    "FLUX.1-dev": Model("flux1", 512, {"guidance_embeds": True, "in_channels": 64}, (16, 8), 512, 4096, 768),
    "FLUX.2 klein 4B": Model(
        "flux2", 1024,
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
         "guidance_embeds": False, "in_channels": 128},
        (128, 16), 512, 7680,
    ),
    "FLUX.2 dev": Model(
        "flux2", 1024,
        {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "joint_attention_dim": 15360,
         "guidance_embeds": True, "in_channels": 128},
        (128, 16), 512, 15360,
    ),
    "FLUX.3 Klein": Model("flux3", 1024, {"in_channels": 128, "flow_map": False}, (128, 16), 160, 20480, masked=True),
    "Z-Image": Model("zimage", 1024, {"in_channels": 16}, (16, 8), 128, 2560, masked=True),
    "Qwen-Image": Model("qwen-image", 1024, {**QWEN, "in_channels": 64}, (16, 8), 128, 3584, masked=True),
    "Qwen-Image 2.1": Model("qwen-image-21", 1024, {"in_channels": 64}, (64, 16), 128, 4096, masked=True),
    "Krea 2": Model(
        "krea2", 1024, {"num_layers": 28, "num_text_layers": 12, "in_channels": 64}, (16, 8), 128, 12 * 2560, masked=True
    ),
    "ERNIE-Image": Model(
        "ernie-image", 1024,
        {"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 36, "ffn_hidden_size": 12288, "text_in_dim": 3072,
         "in_channels": 128},
        (128, 16), 128, 3072, masked=True,
    ),
    "LongCat-Image": Model(
        "longcat-image", 1024, {"num_layers": 10, "num_single_layers": 20, "in_channels": 64}, (16, 8), 512, 3584
    ),
    "MOSS-Image": Model(
        "moss-image", 1024,
        {"dim": 3072, "ffn_dim": 8192, "num_heads": 24, "num_layers": 42, "text_dim": 4096, "freq_dim": 256,
         "latent_channels": 128, "rope_base": 10000.0},
        (128, 16), 128, 4096, masked=True,
    ),
    "Ideogram 4": Model("ideogram4", 1024, {"in_channels": 128, "num_layers": 34}, (128, 16), 128, 13 * 4096, masked=True),
}  # fmt: skip

STORED = {
    "scaled fp8": ("float8_e4m3fn", torch.float8_e4m3fn, 1, {"weight_scale": (torch.float32, lambda rows, columns: ())}),
    "NVFP4": (
        "nvfp4", torch.uint8, 2,
        {
            "weight_scale": (torch.float8_e4m3fn, lambda rows, columns: (-(-rows // 128) * 128, columns // 16)),
            "weight_scale_2": (torch.float32, lambda rows, columns: ()),
        },
    ),
}  # fmt: skip
"""What quantised files have of a layer: the format's name, the dtype of a weight and how many numbers are in one of it, and the
dtype and the shape of each scale of a weight of (rows, columns)."""

_BLOCKS = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_QWEN = {"temperal_downsample": [False, True, True]}
VAES: dict[str, dict[str, Any] | None] = {"Qwen-Image": _QWEN, "Krea 2": _QWEN, "Qwen-Image 2.1": None}
"""The configurations of VAEs that differ from Stable Diffusion's, which the other models have but for the latents."""


def stored_tensors(model: Model, form: str) -> Mapping[str, Tensor]:
    """The denoiser's tensors in a file in which the matrices of blocks are quantised, without numbers."""
    named, dtype, numbers, scales = STORED[form]
    said = torch.tensor(list(json.dumps({"format": named}).encode()), dtype=torch.uint8)
    tensors = FAMILIES[model.family].build_empty("denoiser", model.config).state_dict()
    for name, tensor in list(tensors.items()):
        if "blocks." in name and name.endswith(".weight") and tensor.ndim == 2:
            rows, columns = tensor.shape
            layer = name.removesuffix("weight")
            tensors[name] = torch.empty(rows, columns // numbers, dtype=dtype, device="meta")
            for end, (of_scale, shape) in scales.items():
                tensors[layer + end] = torch.empty(shape(rows, columns), dtype=of_scale, device="meta")
            tensors[f"{layer}comfy_quant"] = said
    return dequantised(tensors, form)


def base_of(model: Model, form: str = "") -> Base:
    """The model without numbers, in a form in which weights are stored if one is given."""
    family = FAMILIES[model.family]
    tensors = stored_tensors(model, form) if form else family.build_empty("denoiser", model.config).state_dict()
    return Base(
        family=family, name="published size", components={"denoiser": Component(model.config, tensors)},
        prediction_type=family.prediction_type("epsilon"), zero_terminal_snr=False, resolution=model.resolution,
    )  # fmt: skip


def config_of(model: Model) -> TrainConfig:
    """The settings of a LoRA of rank 16 on one picture at a time, in bf16."""
    return TrainConfig(rank=16, precision="bf16", resolution=model.resolution)


def cache_of(model: Model, base: Base) -> LatentCache:
    """A picture of the model's resolution and its caption, without numbers of any meaning."""
    channels, pixels = model.latent
    latent = torch.zeros(channels, model.resolution // pixels, model.resolution // pixels)
    side = (model.resolution, model.resolution)
    caption = "a photo of sks person"
    image = EncodedImage(
        name="", mean=latent, deviation=latent, mask=None, conditioning=base.family.image_conditioning(side, (0, 0), side),
        caption=caption, class_caption="a photo of person", repeats=1, is_class=False,
    )  # fmt: skip
    text = {"context": torch.zeros(1, model.tokens, model.width)}
    if model.pooled:
        text["pooled"] = torch.zeros(1, model.pooled)
    if model.masked:
        text["context_mask"] = torch.ones(1, model.tokens)
    return LatentCache((image,), {caption: text}, chunks=1, digest="")


def with_vae(name: str) -> Base:
    """The model with a VAE of the published size, at its own resolution."""
    model, base = MODELS[name], base_of(MODELS[name])
    channels = {"latent_channels": model.latent[0], "scaling_factor": 1.0} if model.latent[1] == 8 else {}
    config = VAES.get(name, {**_BLOCKS, **channels})
    vae = {}
    if config is not None:
        vae["vae"] = Component(config, base.family.build_empty("vae", config).state_dict())
    return replace(base, components={**base.components, **vae}, resolution=base.family.resolution)
