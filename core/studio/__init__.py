"""Complete jobs from photos to pictures, for one person or for many on one base model."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .cost import Cost as Cost
    from .cost import Stopwatch as Stopwatch
    from .cost import Work as Work
    from .forecast import Forecast as Forecast
    from .forecast import timed_training as timed_training
    from .forgetting import forget as forget
    from .ledger import PARTS as PARTS
    from .ledger import Ledger as Ledger
    from .ledger import basis as basis
    from .many import Plan as Plan
    from .many import make_people as make_people
    from .many import plan_ledger as plan_ledger
    from .many import plan_people as plan_people
    from .people import REPORT as REPORT
    from .people import Person as Person
    from .people import read_people as read_people
    from .person import Order as Order
    from .person import Outcome as Outcome
    from .person import check_drawn_on as check_drawn_on
    from .person import ledger_of as ledger_of
    from .person import ready_photos as ready_photos
    from .person import train_and_draw as train_and_draw
    from .result import Result as Result
    from .result import Terms as Terms
    from .speed import DRAW as DRAW
    from .speed import Span as Span
    from .speed import Speed as Speed
    from .speed import remember_speed as remember_speed
    from .speed import speed_of as speed_of
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
