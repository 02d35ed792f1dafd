"""Map the names of LoRA tensors in every naming scheme to the modules of a model.

Everywhere else in the project a module is `(part, path)`, with the paths that diffusers and transformers use, such as
`("denoiser", "down_blocks.0.attentions.0.proj_in")` or `("text_encoder", "text_model.encoder.layers.0.mlp.fc1")`.
Each family has one `NameTable` with its names in every scheme; families.py lists them in `NAME_TABLES`. loaded_names.py has
what other programs load of these names.
"""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .families import NAME_TABLES as NAME_TABLES
    from .families import families_of as families_of
    from .families import model_named as model_named
    from .families import other_model as other_model
    from .families import plain_model_name as plain_model_name
    from .families import plain_name as plain_name
    from .keys import NamedTensor as NamedTensor
    from .keys import bundled_embedding as bundled_embedding
    from .keys import bundled_name as bundled_name
    from .keys import parse_key as parse_key
    from .keys import vectors_in as vectors_in
    from .models import Identity as Identity
    from .models import identify as identify
    from .models import is_published as is_published
    from .models import is_widened as is_widened
    from .stable_diffusion import families_of_embedding as families_of_embedding
    from .table import PUBLISHED_BLOCKS as PUBLISHED_BLOCKS
    from .table import SCHEMES as SCHEMES
    from .table import T5_PATHS as T5_PATHS
    from .table import Fusion as Fusion
    from .table import Listing as Listing
    from .table import ModuleId as ModuleId
    from .table import NameTable as NameTable
    from .table import Place as Place
    from .table import is_text_path as is_text_path
    from .table import text_encoder_path as text_encoder_path
    from .unet import blocks_in_a_level as blocks_in_a_level
    from .unet import shows_other_blocks as shows_other_blocks
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
