"""A person's photos after a job has checked them once: which to train on, which to hold out, what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import BadPhoto, counted
from ..faces import LIKENESS, TO_TRAINED_ON, FaceNetwork, Reference, likeness, mean_face
from ..progress import OnWarning, silent
from .alike import is_repeat
from .measure import Thresholds
from .reading import Photo
from .report import REJECT, PhotoReport, SetReport, check_photos, unseen

MIN_TRAINING_PHOTOS = 3
"""The number of photos that must remain to train on when others are held out."""
TWO_HELD_OUT = 12
"""With this many usable photos or more, two are held out instead of one."""
SWITCH = "check_photos = false"
"""The setting that the error names if too few photos can be used. An interface replaces it by its own name."""


@dataclass(frozen=True, eq=False)
class Ready:
    """Photos that have been checked once, with their measurements for everything that needs faces."""

    report: SetReport
    """The report on all photos that were given."""
    network: FaceNetwork | None
    """The network that found the faces; None if none was used."""
    used: tuple[PhotoReport, ...]
    """The photos of the job: without rejected photos, including those held out."""
    held_out: tuple[PhotoReport, ...] = ()
    """The reference photos: likeness is measured to them while training on the others."""
    drawn: tuple[PhotoReport, ...] = ()
    """Pictures of the person that a program has drawn, to train on too. They are never held out or compared with."""

    @property
    def photos(self) -> list[Photo]:
        """The photos of the job in the order given, and the drawn pictures after them."""
        return [item.photo for item in (*self.used, *self.drawn)]

    @property
    def to_train_on(self) -> list[Photo]:
        """The photos that are not held out, and the drawn pictures.

        Photos are repeated so often that each epoch has at least as many of them as drawn pictures.
        """
        photos, drawn = [item.photo for item in self.training], [item.photo for item in self.drawn]
        real, made = (sum(photo.repeats for photo in group) for group in (photos, drawn))
        times = max(1, math.ceil(made / max(1, real)))
        return [*(replace(photo, repeats=photo.repeats * times) for photo in photos), *drawn]

    def vectors(self, items: Sequence[PhotoReport]) -> np.ndarray:
        """Return the identity vectors of some of the photos, float32 (N, D); a row of NaN where no face was found."""
        dimensions = next((len(item.vector) for item in self.report.photos if item.vector is not None), 1)
        missing = np.full(dimensions, np.nan, np.float32)
        return np.stack([missing if item.vector is None else item.vector for item in items])

    @property
    def training(self) -> tuple[PhotoReport, ...]:
        """The photos of the job that are not held out."""
        return tuple(item for item in self.used if item not in self.held_out)

    def reference(self) -> Reference | None:
        """Return the person's mean face on the photos of the job, to rank pictures by; None without a face network.

        Raises BadPhoto when no photo shows a face.
        """
        if self.network is None:
            return None
        seen = [
            (item.vector, item.face.share_of(item.photo.size))
            for item in self.used
            if item.vector is not None and item.face
        ]
        measure = LIKENESS if self.held_out else TO_TRAINED_ON
        return Reference(self.network, [one for one, _ in seen], [share for _, share in seen], len(self.used), measure)


def usual_hold_out(usable: int) -> int:
    """Return how many of the usable photos to hold out: none below 8, one below 12, else two."""
    return (usable >= Thresholds.photos_measured) + (usable >= TWO_HELD_OUT)


def make_ready(
    photos: Sequence[Photo],
    network: FaceNetwork | None,
    thresholds: Thresholds,
    *,
    check: bool,
    hold_out: int = 0,
    at_least: int = 0,
    drawn: Sequence[Photo] = (),
    on_warning: OnWarning = silent,
) -> Ready:
    """Check the photos once with the network; without one, `check` only looks at their size and light.

    With `check`, photos that the report rejects are left out, and `on_warning` is told of each. `hold_out` photos are held
    out: typical ones, but not the one nearest to the person's mean face, which teaches the most. Near-copies of other
    photos are never held out, since the copy would be trained on. With `at_least`, at most `usual_hold_out` are, and none if
    fewer than that many photos are usable or suitable: `on_warning` is told why, and which photo to add. `drawn` pictures are
    compared with the photos, and only checked with a network. Raises BadPhoto if too few photos are usable, or too few can be
    held out.
    """
    report = check_photos(photos, network, thresholds) if check or network else unseen(photos, thresholds)
    used = report.usable if check else report.photos
    if check:
        _tell_rejected(report, on_warning)
        if not report.enough:
            raise BadPhoto(f"{report.headline}. To train on all photos anyway: {SWITCH}")
        if len(used) < len(report.photos):
            on_warning(f"photos: {report.headline}")
    held_out: tuple[PhotoReport, ...] = ()
    hold_out = min(hold_out, usual_hold_out(len(used))) if at_least else hold_out
    if len(used) < at_least:
        few = counted(len(used), "photo is", "photos are")
        most = f" What would help most: {report.wishes[0]}." if report.wishes else ""
        on_warning(
            f"{few} too few to hold any out: likeness is not measured, and pictures can only be compared with the photos that "
            f"were trained on.{most}"
        )
    elif hold_out:
        try:
            held_out = _typical(used, hold_out, thresholds)
        except BadPhoto as problem:
            if not at_least:
                raise
            on_warning(f"no photo is held out, and likeness is not measured: {problem}")
    alike = _alike(drawn, used, network if check else None, thresholds, on_warning)
    return Ready(report, network, used, held_out, alike)


def _alike(
    drawn: Sequence[Photo],
    used: Sequence[PhotoReport],
    network: FaceNetwork | None,
    limits: Thresholds,
    on_warning: OnWarning,
) -> tuple[PhotoReport, ...]:
    """Return the reports on the drawn pictures that show the person on the photos; `on_warning` is told of the others."""
    vectors = [item.vector for item in used if item.vector is not None]
    if network is None or not vectors:
        return unseen(drawn, limits).photos
    report = check_photos(drawn, network, limits, like=np.stack(vectors))
    _tell_rejected(report, on_warning)
    return report.usable


def _tell_rejected(report: SetReport, on_warning: OnWarning) -> None:
    for item in report.photos:
        if item.verdict == REJECT:
            on_warning(f"{item.photo.name} is left out: {'; '.join(f.sentence for f in item.findings)}")


def _typical(used: Sequence[PhotoReport], count: int, limits: Thresholds) -> tuple[PhotoReport, ...]:
    """Return `count` photos, in the order of `used`: those nearest to the person's mean face that don't repeat another.

    The nearest of all is left to train on, unless the others are too few.
    """
    seen = [item for item in used if item.vector is not None]
    centre = mean_face(np.stack([item.vector for item in seen if item.vector is not None])) if seen else None

    def is_single(item: PhotoReport) -> bool:
        return not any(is_repeat(item, other, limits) for other in seen if other is not item)

    def distance(item: PhotoReport) -> float:
        assert item.vector is not None and centre is not None
        return -float(likeness(item.vector[None], centre[None])[0, 0])

    fit = sorted(filter(is_single, seen), key=distance)
    if len(fit) < count or len(used) - count < MIN_TRAINING_PHOTOS:
        raise BadPhoto(
            f"hold_out = {count}: {len(fit)} of {len(used)} photos show a face and repeat no other, and "
            f"{MIN_TRAINING_PHOTOS} must remain to train on. Hold out fewer (0 for none) or add photos"
        )
    return tuple(item for item in used if item in fit[: count + 1][-count:])
