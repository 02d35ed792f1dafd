"""How far a training run is, in words that every interface shows."""

from ..pictures.gallery import SAME_PERSON, SOMEONE_ELSE
from .callbacks import StepReport


def likeness_word(likeness: float) -> str:
    """The meaning of a likeness in words, by the limits of the default face network."""
    return "the same person" if likeness >= SAME_PERSON else "perhaps" if likeness >= SOMEONE_ELSE else "someone else"


def duration(seconds: float) -> str:
    """A number of seconds in words: "1 min 15 s" for 75."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def step_line(report: StepReport, elapsed: float) -> str:
    """The step, the loss, the likeness if it was measured after this step, and the seconds passed and left, in one line."""
    line = f"step {report.step} of {report.steps}, loss {report.loss:.4f}"
    if report.measured:
        line += f", likeness {report.measured.likeness:.2f} ({likeness_word(report.measured.likeness)})"
    return f"{line}, {duration(elapsed)} so far, {duration(report.seconds_left)} left"
