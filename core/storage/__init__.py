"""Read and write files: atomic writes, safetensors, GGUF, lazily read tensors, locks and the cache folder."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .cache_folder import clear_cache as clear_cache
    from .drawn import inspect_mark as inspect_mark
    from .safetensors_file import SafetensorsFile as SafetensorsFile
    from .safetensors_file import save_safetensors as save_safetensors
    from .signature import HOW_TO_SIGN as HOW_TO_SIGN
    from .signature import can_sign as can_sign
    from .signature import inspect_signature as inspect_signature
    from .stored import LazyTensors as LazyTensors
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
