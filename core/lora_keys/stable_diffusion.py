"""SD1.x, SD2.x and SDXL: UNets, whose original (LDM) names are arithmetic on diffusers' block numbers."""

from ..families.ldm import diffusers_unet_path, ldm_unet_path
from .family import FamilyKeys, Fusion

_ORIGINAL_ROOTS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")


def _of_original(path: str) -> Fusion | None:
    return Fusion(path, (diffusers_unet_path(path),)) if path.startswith(_ORIGINAL_ROOTS) else None


def _of_diffusers_sd1(path: str) -> Fusion:
    # The deepest up level of SD1.x and SD2.x has no attention.
    return Fusion(ldm_unet_path(path, attention_above=lambda level: level > 0), (path,))


def _of_diffusers_sdxl(path: str) -> Fusion:
    return Fusion(ldm_unet_path(path), (path,))


_ONE_TEXT_ENCODER = {"denoiser": "lora_unet_", "text_encoder": "lora_te_"}
_TWO_TEXT_ENCODERS = {"denoiser": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}

SD15 = FamilyKeys("sd15", _ONE_TEXT_ENCODER, False, _of_original, _of_diffusers_sd1)
SD2 = FamilyKeys("sd2", _ONE_TEXT_ENCODER, False, _of_original, _of_diffusers_sd1)
SDXL = FamilyKeys("sdxl", _TWO_TEXT_ENCODERS, True, _of_original, _of_diffusers_sdxl)
