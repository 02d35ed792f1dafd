"""Names of SD1.x, SD2.x and SDXL: UNets whose original (LDM) block numbers can be computed from those of diffusers."""

import re
from collections.abc import Mapping
from functools import partial

from . import loaded_names
from .signs import CLIP_G_SIGN, Sign, clip_signs
from .table import Fusion, Listing, NameTable
from .unet import diffusers_unet_path, ldm_unet_path

_ORIGINAL_ROOTS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")


def _of_original(path: str) -> Fusion | None:
    return Fusion(path, (diffusers_unet_path(path),)) if path.startswith(_ORIGINAL_ROOTS) else None


def _kernel(path: str, linear_projections: bool) -> int | None:
    if re.search(r"(^|\.)(conv1|conv2|conv|conv_in|conv_out)$", path):
        return 3
    if path.endswith(".conv_shortcut"):
        return 1
    return 1 if path.endswith((".proj_in", ".proj_out")) and not linear_projections else None


def _signs(context_width: int, text_width: int) -> tuple[Sign, ...]:
    return (
        Sign(r"(^|\.)(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)\."),
        Sign(r"attn2\.to_[kv]$", frozenset({context_width})),
        *clip_signs(text_width),
    )


_SD2_TEXT_WIDTH = 1024
"""The width of SD2.x's text encoder, which distinguishes its embeddings from SD1.x's."""

SD15 = NameTable(
    name="sd15",
    base_versions=("sd_v1", "sd_1", "stable-diffusion-v1", "stable-diffusion-1"),
    architecture="stable-diffusion-v1",
    comfyui_classes=("SD15",),
    a1111_version="SD1",
    signs=_signs(context_width=768, text_width=768),
    of_original=_of_original,
    # The deepest up level of SD1.x and SD2.x has no attention.
    of_diffusers=lambda path: Fusion(ldm_unet_path(path, attention_above=lambda level: level > 0), (path,)),
    listings={"SD 1.5": Listing("SD 1.5", "CreativeML Open RAIL-M")},
    loaded=loaded_names.SD15,
    kernel=partial(_kernel, linear_projections=False),
    diffusers_prefix="unet.",
    kohya_prefixes={"denoiser": "lora_unet_", "text_encoder": "lora_te_"},
    comfy_prefixes={"denoiser": "diffusion_model.", "text_encoder": "text_encoders.clip_l.transformer."},
    original_in_kohya=False,
    checkpoint_prefixes={"text_encoder": "cond_stage_model.transformer."},
    embedding_names={"text_encoder": "emb_params"},
    # The blocks with attention, and all blocks.
    block_lists=("BASE IN01-02 IN04-05 IN07-08 M00 OUT03-11", "BASE IN00-11 M00 OUT00-11"),
)
SD2 = NameTable(
    name="sd2",
    base_versions=("sd_v2", "sd_2", "stable-diffusion-v2", "stable-diffusion-2"),
    architecture="stable-diffusion-v2-768-v",
    a1111_version="SD2",
    signs=_signs(context_width=1024, text_width=_SD2_TEXT_WIDTH),
    of_original=SD15.of_original,
    of_diffusers=SD15.of_diffusers,
    listings={"SD 2": Listing("SD 2.1", "CreativeML Open RAIL++-M")},
    loaded=loaded_names.SD2,
    kernel=partial(_kernel, linear_projections=True),
    # As in SD1, sd-scripts builds SD2 with convolutions, but the original model and diffusers have Linear layers.
    kernel_in_kohya=SD15.kernel,
    diffusers_prefix="unet.",
    kohya_prefixes=SD15.kohya_prefixes,
    comfy_prefixes={"denoiser": "diffusion_model.", "text_encoder": "text_encoders.clip_h.transformer."},
    original_in_kohya=False,
    checkpoint_prefixes={"text_encoder": "cond_stage_model.model."},
    embedding_names=SD15.embedding_names,
    block_lists=SD15.block_lists,
)
SDXL = NameTable(
    name="sdxl",
    base_versions=("sdxl_base_v1-0", "sdxl", "stable-diffusion-xl"),
    architecture="stable-diffusion-xl-v1-base",
    comfyui_classes=("SDXL",),
    a1111_version="SDXL",
    signs=(
        *_signs(context_width=2048, text_width=768),
        # SDXL has up to ten consecutive transformer blocks, SD1.x and SD2.x have one.
        Sign(r"\.transformer_blocks\.[1-9]\.", frozenset({640, 1280, 2048, 2560, 5120})),
        Sign(r"\.transformer_blocks\.[1-9]\."),
        CLIP_G_SIGN,
    ),
    of_original=_of_original,
    of_diffusers=lambda path: Fusion(ldm_unet_path(path), (path,)),
    listings={
        "SDXL": Listing(
            "SDXL 1.0",
            "CreativeML Open RAIL++-M",
            editions={
                "noob": Listing("NoobAI", "NoobAI License"),
                "illustrious": Listing("Illustrious", "Illustrious License"),
                "pony": Listing("Pony", "Pony License"),
            },
        )
    },
    loaded=loaded_names.SDXL,
    kernel=partial(_kernel, linear_projections=True),
    diffusers_prefix="unet.",
    kohya_prefixes={"denoiser": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    comfy_prefixes={
        "denoiser": "diffusion_model.",
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
    },
    checkpoint_prefixes={
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    embedding_names={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    block_lists=("BASE IN04-05 IN07-08 M00 OUT00-05", "BASE IN00-08 M00 OUT00-08"),
)


def families_of_embedding(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the families that an embedding file may be for, by what its tensors are for (`vectors_in`) and their shapes.

    The likeliest is first. There is none for the widths of other text encoders: CLIP-G, Qwen3 and T5.
    """
    if any(name.startswith(tuple(SDXL.embedding_names.values())) for name in shapes):
        return [SDXL.name]
    (width,) = shapes.get("emb_params", ())[-1:] or (0,)
    if width in (1280, 2560, 4096):
        return []
    return [SD2.name, SD15.name] if width == _SD2_TEXT_WIDTH else [SD15.name, SD2.name]
