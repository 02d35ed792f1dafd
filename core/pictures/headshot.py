"""A headshot of a batch, and what the face pass did to it."""

from dataclasses import dataclass
from pathlib import Path

from .generate import Job


@dataclass(frozen=True)
class FaceOutcome:
    """What the face pass did to a picture; it travels in the PNG, so that it is done once."""

    below: float
    denoise: float
    before: float
    """Likeness of the picture as it was drawn first."""
    after: float | None
    """Likeness with the new face; None when no face is found in it any more."""

    @property
    def kept(self) -> bool:
        """The new face is kept only when it is no less like the person."""
        return self.after is not None and self.after >= self.before


@dataclass(frozen=True)
class Headshot:
    """A picture of the batch."""

    path: Path
    job: Job
    likeness: float | None = None
    """Cosine to the person's photos; None when there is no reference or no face in the picture."""
    kept: bool = False
    """Among the most alike: also in the folder `kept`."""
    face_pass: FaceOutcome | None = None
