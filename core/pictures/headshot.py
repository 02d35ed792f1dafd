"""A headshot in a batch, and the result of its face pass."""

from dataclasses import dataclass
from pathlib import Path

from .generate import Job


@dataclass(frozen=True)
class FaceOutcome:
    """The outcome of the face pass on a picture, written into the PNG so that the pass runs only once."""

    below: float
    denoise: float
    before: float
    """The likeness of the picture as it was first drawn."""
    after: float | None
    """The likeness with the new face; None if no face is found in the picture any more."""

    @property
    def kept(self) -> bool:
        """Whether the new face is used: it is if likeness didn't fall."""
        return self.after is not None and self.after >= self.before


@dataclass(frozen=True)
class Headshot:
    """A picture of a batch of headshots."""

    path: Path
    job: Job
    likeness: float | None = None
    """The cosine to the person's photos; None without a reference, or without a face in the picture."""
    kept: bool = False
    """Whether the picture is among the most alike, which are also copied to the folder `kept`."""
    face_pass: FaceOutcome | None = None
