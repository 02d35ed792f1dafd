"""The jobs that go from photos to pictures: those of one person, and of many on one base model."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .cost import Cost as Cost
    from .cost import Work as Work
    from .cost import seconds_for as seconds_for
    from .estimates import Estimate as Estimate
    from .estimates import estimate as estimate
    from .many import forget as forget
    from .many import run as run
    from .people import Person as Person
    from .people import read_people as read_people
    from .person import Order as Order
    from .person import Outcome as Outcome
    from .person import check as check
    from .person import make as make
    from .person import trained_on as trained_on
    from .plans import Plan as Plan
    from .plans import plan as plan
    from .result import Result as Result
    from .result import Terms as Terms
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            ".cost": ("Cost", "Work", "seconds_for"),
            ".estimates": ("Estimate", "estimate"),
            ".many": ("forget", "run"),
            ".people": ("Person", "read_people"),
            ".person": ("Order", "Outcome", "check", "make", "trained_on"),
            ".plans": ("Plan", "plan"),
            ".result": ("Result", "Terms"),
        },
    )
