"""List the names of all families, and find the family of a set of modules or of a base model's name."""

import re
from collections.abc import Iterable
from functools import cache

from .ernie import ERNIE_IMAGE
from .flux import CHROMA, FLUX1, FLUX2, FLUX3, LONGCAT_IMAGE
from .ideogram import IDEOGRAM4
from .krea import KREA2
from .lumina import LUMINA2, ZIMAGE
from .models import stranger_names
from .moss import MOSS_IMAGE
from .qwen import QWEN_IMAGE, QWEN_IMAGE_21
from .sd3 import SD3
from .signs import Sign
from .stable_diffusion import SD2, SD15, SDXL
from .table import NameTable

_ALL = (
    SD15, SD2, SDXL, SD3, FLUX1, CHROMA, FLUX2, FLUX3, LUMINA2, ZIMAGE, QWEN_IMAGE, QWEN_IMAGE_21, KREA2, ERNIE_IMAGE,
    LONGCAT_IMAGE, IDEOGRAM4, MOSS_IMAGE,
)  # fmt: skip
NAME_TABLES: dict[str, NameTable] = {family.name: family for family in _ALL}
"""The tables of all families by name. When a file fits several families equally, the first one is used."""


def plain_name(name: str) -> str:
    """Return only the letters and digits of a base model's name, because programs punctuate it differently."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


@cache
def _by_name() -> dict[str, str]:
    strangers = {plain_name(name): title for name, title in stranger_names().items()}
    return strangers | {plain_name(name): table.name for table in _ALL for name in table.base_versions}


_SUBFOLDER = re.compile(r"(text_encoder|tokenizer|transformer|unet)(_\d)?|snapshots|[0-9a-f]{40}|")


def plain_model_name(name: str) -> str:
    """Return the plain name of a base model in metadata: a word, a hub id, a path on any system, or in the hub's cache."""
    folders = [folder for folder in re.split(r"[/\\]|--", name) if not _SUBFOLDER.fullmatch(folder)]
    return plain_name(folders[-1]) if folders else ""


def model_named(name: str) -> str | None:
    """Return the family of a base model named in metadata, or the title of one without a family; None for an unknown name."""
    plain = plain_model_name(name)
    return _by_name().get(max(filter(plain.startswith, _by_name()), key=len, default=""))


def families_of(
    modules: Iterable[tuple[str, str, tuple[int, ...] | None]], among: Iterable[str] | None = None
) -> list[str]:
    """Return the names of the families with the most signs among the modules; empty if no sign matches.

    Each module is (part, path, shape of the weight). `among` restricts the families; None means all.
    Families share text encoders, so their signs only break ties between families that fit equally without them.
    """
    scores = {name: [0, 0, 0, 0] for name in NAME_TABLES if among is None or name in among}
    for part, path, shape in modules:
        for name in scores:
            for sign in NAME_TABLES[name].signs:
                if sign.matches(part, path, shape):
                    scores[name][2 * (part != "denoiser") + (not sign.decisive)] += 1
    best = max(scores.values())
    return [name for name, score in scores.items() if score == best and any(score)]


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
    ("a language model like BERT", Sign(r"(^|\.)\w*bert\w*\.|\.layer\.\d+\.attention\.self\.")),
    ("a vision model like SAM or ViT", Sign(r"(^|\.)(vit|(image|vision)_(encoder|model))\.|\.layer\.\d+\.attention\.atten")),
    ("a language or vision model", Sign(r"(^|\.)encoder\.layer\.\d+\.")),
    ("the SDXL refiner", Sign(r"attn2\.to_[kv]$", frozenset({1280}), ratio=0.6)),
)  # fmt: skip


def other_model(modules: Iterable[tuple[str, str, tuple[int, ...] | None]]) -> str | None:
    """Return the name of the unsupported model with such modules (as in `families_of`); None if none is recognised."""
    given = list(modules)
    return next((title for title, sign in _OTHERS if any(sign.matches(*module) for module in given)), None)
