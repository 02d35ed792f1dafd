"""Measure: what a machine can do, and training methods on the same photos."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .compare import REPORT as REPORT
    from .compare import SETTINGS as SETTINGS
    from .compare import Comparison as Comparison
    from .compare import MethodResult as MethodResult
    from .compare import summary_rows as summary_rows
    from .doctor import examine as examine
    from .doctor import format_doctor as format_doctor
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
