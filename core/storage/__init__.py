"""Read and write files: atomic writes, safetensors, GGUF, lazily read tensors, locks and the cache folder."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .cache_folder import clear_cache as clear_cache
    from .cache_folder import content_key as content_key
    from .cache_folder import made_folder as made_folder
    from .drawn import inspect_mark as inspect_mark
    from .files import check_output as check_output
    from .files import check_writable as check_writable
    from .files import make_folder as make_folder
    from .files import read_json as read_json
    from .files import remove_leftovers as remove_leftovers
    from .files import write_file as write_file
    from .files import write_text as write_text
    from .files import writing as writing
    from .plain_values import is_text as is_text
    from .safetensors_file import Layout as Layout
    from .safetensors_file import SafetensorsFile as SafetensorsFile
    from .safetensors_file import cast_tensor as cast_tensor
    from .safetensors_file import layout_in as layout_in
    from .safetensors_file import layout_of as layout_of
    from .safetensors_file import save_safetensors as save_safetensors
    from .safetensors_file import tensor_bytes as tensor_bytes
    from .safetensors_file import write_safetensors as write_safetensors
    from .signature import HOW_TO_SIGN as HOW_TO_SIGN
    from .signature import can_sign as can_sign
    from .signature import inspect_signature as inspect_signature
    from .stored import LazyTensors as LazyTensors
    from .stored import Stored as Stored
    from .stored import dtype_and_shape as dtype_and_shape
    from .stored import shape_of as shape_of
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
