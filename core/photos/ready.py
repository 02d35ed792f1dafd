"""A person's photos after the one look that a job takes at them: which to train on, which to hold out, what was seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BadPhoto, counted
from ..faces import FaceNetwork, Reference, likeness, mean_face
from .measure import hash_distance
from .reading import Photo
from .report import REJECT, PhotoReport, SetReport, check_photos, unseen
from .thresholds import Thresholds

MIN_TRAINING_PHOTOS = 3
"""The number of photos that must be left to train on when others are held out."""


@dataclass(frozen=True, eq=False)
class Ready:
    """Photos that have been looked at once. What needs their faces takes them from here."""

    report: SetReport
    """On all photos that were given."""
    network: FaceNetwork | None
    """The network that found the faces; None where none looked."""
    used: tuple[PhotoReport, ...]
    """The photos of the job: without rejected ones, and with those held out."""
    held_out: tuple[PhotoReport, ...] = ()
    """The photos that likeness is measured to while training on the others."""

    @property
    def photos(self) -> list[Photo]:
        """The photos of the job, in the order given."""
        return [item.photo for item in self.used]

    def vectors(self, items: Sequence[PhotoReport]) -> np.ndarray:
        """The identity vectors of some of the photos, float32 (N, D); a row of NaN where no face was found."""
        dimensions = next((len(item.vector) for item in self.report.photos if item.vector is not None), 1)
        missing = np.full(dimensions, np.nan, np.float32)
        return np.stack([missing if item.vector is None else item.vector for item in items])

    @property
    def training(self) -> tuple[PhotoReport, ...]:
        """The photos of the job that are not held out."""
        return tuple(item for item in self.used if item not in self.held_out)

    def reference(self) -> Reference | None:
        """The person's mean face on the photos of the job, to rank pictures by; None where no network looked.

        Raises BadPhoto when no photo shows a face.
        """
        if self.network is None:
            return None
        seen = [
            (item.vector, item.face.share_of(item.photo.size))
            for item in self.used
            if item.vector is not None and item.face
        ]
        return Reference(self.network, [vector for vector, _ in seen], [share for _, share in seen], len(self.used))


def make_ready(
    photos: Sequence[Photo],
    network: FaceNetwork | None,
    thresholds: Thresholds,
    *,
    check: bool,
    hold_out: int = 0,
    at_least: int = 0,
    on_warning: Callable[[str], None] = lambda message: None,
) -> Ready:
    """The photos, looked at once by the network; without one, only `check` looks at their size and light.

    With `check`, photos that the report rejects are left out, and `on_warning` hears of each. `hold_out` photos are held
    out: those nearest to the person's mean face, but never one that nearly repeats another, since its twin would be trained
    on. With `at_least`, none is held out where fewer than that many photos are usable or too few are fit for it, and
    `on_warning` hears why. Raises BadPhoto where too few photos are usable, or too few can be held out.
    """
    report = check_photos(photos, network, thresholds) if check or network else unseen(photos, thresholds)
    used = _good(report, on_warning) if check else report.photos
    held_out: tuple[PhotoReport, ...] = ()
    if hold_out and check and len(used) < at_least:
        left = counted(len(used), "photo is", "photos are")
        on_warning(f"only {left} usable: none is held out, and likeness is not measured")
    elif hold_out:
        try:
            held_out = _typical(used, hold_out, thresholds)
        except BadPhoto as problem:
            if not at_least:
                raise
            on_warning(f"{problem}: none is held out, and likeness is not measured")
    return Ready(report, network, used, held_out)


def _good(report: SetReport, on_warning: Callable[[str], None]) -> tuple[PhotoReport, ...]:
    """The photos that the report does not reject. Raises BadPhoto when too few are left."""
    rejected = [item for item in report.photos if item.verdict == REJECT]
    for item in rejected:
        on_warning(f"{item.photo.name} is left out: {' '.join(f.sentence for f in item.findings)}")
    if not report.enough:
        raise BadPhoto(f"{report.headline} (check_photos = false trains on all that there are)")
    if rejected:
        on_warning(f"photos: {report.headline}")
    return report.usable


def _typical(used: Sequence[PhotoReport], count: int, limits: Thresholds) -> tuple[PhotoReport, ...]:
    """The `count` photos that are nearest to the person's mean face and repeat no other, in the order of `used`."""
    seen = [item for item in used if item.vector is not None]
    fit: list[PhotoReport] = []
    if seen:
        vectors = np.stack([item.vector for item in seen if item.vector is not None])
        centre = mean_face(vectors)
        assert centre is not None
        alike = likeness(vectors, vectors) >= limits.same_picture_likeness
        hashes = [item.hash for item in seen if item.hash is not None]

        def repeats_another(i: int) -> bool:
            return any(
                alike[i, j] and hash_distance(hashes[i], other) <= limits.similar_picture
                for j, other in enumerate(hashes)
                if j != i
            )

        nearest = np.argsort(-likeness(vectors, centre[None])[:, 0])
        fit = [seen[i] for i in nearest if not repeats_another(i)]
    if len(fit) < count or len(used) - count < MIN_TRAINING_PHOTOS:
        raise BadPhoto(
            f"hold_out = {count}: of {len(used)} photos {len(fit)} show a face and repeat no other, and at least "
            f"{MIN_TRAINING_PHOTOS} must be left to train on; hold out fewer (0: none), or add photos"
        )
    return tuple(item for item in used if item in fit[:count])
