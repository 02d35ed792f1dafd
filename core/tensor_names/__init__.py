"""Map the names of LoRA tensors in every naming scheme to the modules of a model.

Everywhere else in the project a module is `(part, path)`, with the paths that diffusers and transformers use, such as
`("denoiser", "down_blocks.0.attentions.0.proj_in")` or `("text_encoder", "text_model.encoder.layers.0.mlp.fc1")`.
Each family has one `NameTable` with its names in every scheme, which families.py registers in `NAME_TABLES`.
"""

from .families import NAME_TABLES, families_of, family_named, other_model, plain_name
from .keys import EMBEDDING_KEYS, NamedTensor, bundled_embedding, bundled_name, parse_key
from .models import Identity, identify, is_published
from .stable_diffusion import NUMBERED, families_of_embedding, numbered_paths
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

__all__ = [
    "EMBEDDING_KEYS",
    "NAME_TABLES",
    "NUMBERED",
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
    "bundled_name",
    "families_of",
    "families_of_embedding",
    "family_named",
    "identify",
    "is_published",
    "is_text_path",
    "numbered_paths",
    "other_model",
    "parse_key",
    "plain_name",
    "shows_other_blocks",
    "text_encoder_path",
]
