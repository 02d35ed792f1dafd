"""Base models: checkpoints, their networks and text encoders, how they predict, and plans to fit them into memory."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .base import Base as Base
    from .clip import caption_tokens as caption_tokens
    from .families import FAMILIES as FAMILIES
    from .memory_plan import MemoryPlan as MemoryPlan
    from .opening import has_all_parts as has_all_parts
    from .opening import load_base as load_base
    from .opening import named_file as named_file
    from .spec import Conditioning as Conditioning
    from .spec import FamilySpec as FamilySpec
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
