"""The names of LoRA tensors in every naming scheme, and which module of a model each of them means.

Everywhere else in the project a module is `(part, path)`, with the paths that diffusers and transformers use, such as
`("denoiser", "down_blocks.0.attentions.0.proj_in")` or `("text_encoder", "text_model.encoder.layers.0.mlp.fc1")`.
The names of a family and of its modules in every scheme are one `NameTable`, which is registered in `NAME_TABLES` here.
"""

from collections.abc import Iterable

from .ernie import ERNIE_IMAGE
from .flux import CHROMA, FLUX1, FLUX2, FLUX3, LONGCAT_IMAGE
from .ideogram import IDEOGRAM4
from .keys import EMBEDDING_KEYS, NamedTensor, bundled_embedding, learn_words, parse_key
from .krea import KREA2
from .lumina import LUMINA2, ZIMAGE
from .models import Identity, identify, is_published
from .others import other_model
from .qwen import QWEN_IMAGE, QWEN_IMAGE_21
from .sd3 import SD3
from .stable_diffusion import SD2, SD15, SDXL, families_of_embedding
from .table import (
    PUBLISHED_BLOCKS,
    SCHEMES,
    T5_PATHS,
    Fusion,
    ModuleId,
    NameTable,
    Place,
    Sign,
    is_text_path,
    text_encoder_path,
)
from .unet import blocks_in_a_level, shows_other_blocks

_ALL = (
    SD15, SD2, SDXL, SD3, FLUX1, CHROMA, FLUX2, FLUX3, LUMINA2, ZIMAGE, QWEN_IMAGE, QWEN_IMAGE_21, KREA2, ERNIE_IMAGE,
    LONGCAT_IMAGE, IDEOGRAM4,
)  # fmt: skip
NAME_TABLES: dict[str, NameTable] = {family.name: family for family in _ALL}
"""The tables of all families by name. When a file fits several families equally, the first one counts."""
learn_words(word for family in _ALL for word in family.words)


def families_of(
    modules: Iterable[tuple[str, str, tuple[int, ...] | None]], among: Iterable[str] | None = None
) -> list[str]:
    """The names of the families with the most signs among the modules (part, path, shape of the weight); empty without any.

    Only the families `among` these count, of all for None.

    Signs in text encoders, which families share, only decide between families that fit equally without them.
    """
    scores = {name: [0, 0, 0, 0] for name in NAME_TABLES if among is None or name in among}
    for part, path, shape in modules:
        for name in scores:
            for sign in NAME_TABLES[name].signs:
                if sign.matches(part, path, shape):
                    scores[name][2 * (part != "denoiser") + (not sign.decisive)] += 1
    best = max(scores.values())
    return [name for name, score in scores.items() if score == best and any(score)]


__all__ = [
    "EMBEDDING_KEYS",
    "NAME_TABLES",
    "PUBLISHED_BLOCKS",
    "SCHEMES",
    "T5_PATHS",
    "Fusion",
    "Identity",
    "ModuleId",
    "NameTable",
    "NamedTensor",
    "Place",
    "Sign",
    "blocks_in_a_level",
    "bundled_embedding",
    "families_of",
    "families_of_embedding",
    "identify",
    "is_published",
    "is_text_path",
    "other_model",
    "parse_key",
    "shows_other_blocks",
    "text_encoder_path",
]
