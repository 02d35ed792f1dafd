"""Examine and measure what a machine can do."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .doctor import examine as examine
    from .doctor import format_doctor as format_doctor
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
