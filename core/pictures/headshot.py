"""A headshot of a batch, and what the face pass did to it."""

from dataclasses import dataclass
from pathlib import Path

from .generate import Job


@dataclass(frozen=True)
class FaceOutcome:
    """The outcome of the face pass on a picture. It is written into the PNG, so that the pass is done once."""

    below: float
    denoise: float
    before: float
    """The likeness of the picture as it was drawn first."""
    after: float | None
    """The likeness with the new face; None when no face is found in the picture any more."""

    @property
    def kept(self) -> bool:
        """Whether the new face is kept, which is when it is no less like the person."""
        return self.after is not None and self.after >= self.before


@dataclass(frozen=True)
class Headshot:
    """A picture of a batch of headshots."""

    path: Path
    job: Job
    likeness: float | None = None
    """The cosine to the person's photos; None when there is no reference or no face in the picture."""
    kept: bool = False
    """Whether the picture is among the most alike, which are also in the folder `kept`."""
    face_pass: FaceOutcome | None = None
