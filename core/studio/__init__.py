"""The jobs that go from photos to pictures: those of one person."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .estimate import Estimate as Estimate
    from .estimate import estimate as estimate
    from .person import Order as Order
    from .person import Outcome as Outcome
    from .person import check as check
    from .person import make as make
    from .person import trained_on as trained_on
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {".estimate": ("Estimate", "estimate"), ".person": ("Order", "Outcome", "check", "make", "trained_on")},
    )
