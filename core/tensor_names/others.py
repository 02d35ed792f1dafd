"""Recognise other models whose LoRA files look like those of a supported family, so that errors can name them."""

from collections.abc import Iterable

from .table import Sign

_OTHERS = (
    ("HunyuanVideo", Sign(r"^double_blocks\.\d+\.(img|txt)_(mod\.linear|mlp\.fc[12])$|individual_token_refiner")),
    # FLUX.1 has 19 double and 38 single blocks of the same width, HunyuanVideo 20 and 40.
    ("HunyuanVideo", Sign(r"^(double_blocks\.19|single_(transformer_)?blocks\.3[89])\.", frozenset({3072}))),
    ("HunyuanVideo 1.5", Sign(r"^(double_|transformer_)blocks\.\d+\.((img|txt)_)?attn[._]", frozenset({2048}))),
    ("FLUX.3 for video or actions", Sign(r"^content[._]mode[._]blocks[._](?!image)")),
    ("Wan", Sign(r"^blocks\.\d+\.(self|cross)[._]attn\.[qkvo]$|^blocks\.\d+\.ffn\.net\.")),
    ("a model like LTX-Video, CogVideoX, Mochi or PixArt", Sign(r"^transformer_blocks\.\d+\.attn1\.")),
    ("AuraFlow", Sign(r"^(joint[._]transformer_blocks|double[._]layers)\.\d+\.")),
    ("Lumina-Next", Sign(r"^layers\.\d+\.attn[12]\.")),
    ("Stable Cascade", Sign(r"^(down|up)_blocks\.\d+\.\d+\.")),
    ("a video model like AnimateDiff or SVD", Sign(r"motion[._]modules|temporal[._]transformer")),
    ("a language model", Sign(r"(^|\.)(model|text_model)\.layers\.\d+\.(self_attn|mlp)\.|(^|\.)h\.\d+\.(attn|mlp)\.c_")),
    ("a vision model like SAM or ViT", Sign(r"(^|\.)(image|vision)_(encoder|model)\.|(^|\.)encoder\.layer\.\d+\.")),
    ("the SDXL refiner", Sign(r"attn2\.to_[kv]$", frozenset({1280}), ratio=0.6)),
)  # fmt: skip


def other_model(modules: Iterable[tuple[str, str, tuple[int, ...] | None]]) -> str | None:
    """Return the name of the unsupported model with such modules (as in `families_of`); None if none is recognised."""
    given = list(modules)
    return next((title for title, sign in _OTHERS if any(sign.matches(*module) for module in given)), None)
