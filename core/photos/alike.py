"""Choose pictures that another program has drawn of a person: those that show them, and are varied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import BadPhoto, counted
from ..faces import FaceNetwork, Reference, likeness
from ..progress import OnProgress, counting, silent
from .measure import LIKENESS_LIMITS, Thresholds, hash_distance
from .reading import Photo
from .report import REJECT, PhotoReport, SetReport, check_photos


@dataclass(frozen=True, eq=False)
class Candidate:
    """A picture that may be chosen, and why it is not."""

    report: PhotoReport
    """The report on the picture. Its likeness is the cosine to the photos' mean face."""
    judged: float | None
    """The same cosine by the second network; None without one, or without a face."""
    reason: str
    """Why it is left out, in a sentence; "" for a chosen picture."""
    cause: str = ""
    """The reason in a word or two, to be counted."""

    def __str__(self) -> str:
        scores = " ".join(
            "  -  " if score is None else f"{score:5.2f}"
            for score in (self.report.likeness, *([] if self.judged is None else [self.judged]))
        )
        return f"{scores}  {self.report.photo.name}: {self.reason or 'chosen'}"


def choose_alike(
    pictures: Sequence[Photo],
    photos: Sequence[Photo],
    network: FaceNetwork,
    second: FaceNetwork | None = None,
    *,
    count: int = 0,
    thresholds: Thresholds | None = None,
    required: bool = True,
    on_progress: OnProgress = silent,
) -> list[Candidate]:
    """Compare pictures with real photos of a person, and choose those of the person. Returns a Candidate for each, in order.

    A picture is left out if the photo check rejects it, or if it shows other people too. It is also left out if its likeness is
    below `likeness_review`, or if the second network takes it for someone else. The last reason is that it nearly repeats a
    photo, or a picture that is more alike.

    With `count`, only so many are chosen: the next is always the one that differs most from the photos and from those chosen
    before, in view, framing, light and background.

    `on_progress(done, total)` is called after each photo and picture that a network has looked at: first for the photos, then
    for the pictures, then for the second network. It may raise to cancel.

    Raises BadPhoto if the photos don't tell who is meant, or, if it is `required`, that no picture can be chosen.
    """
    thresholds = thresholds or Thresholds.for_reference(network.name)
    real = check_real(photos, network, on_progress)
    vectors = np.stack([item.vector for item in real.usable if item.vector is not None])
    report = check_photos(pictures, network, thresholds, vectors, on_progress)
    judged: list[float | None] = [None] * len(pictures)
    if second:
        person = Reference.on((item.photo.image(shorter_side=640) for item in real.usable), second)
        judged = person.likeness(photo.image(shorter_side=640) for photo in counting(pictures, on_progress))
    lowest = LIKENESS_LIMITS.get(second.name, LIKENESS_LIMITS["sface"])[0] if second else -1.0
    found = [
        Candidate(item, score, *_against(item, score, thresholds, lowest))
        for item, score in zip(report.photos, judged, strict=True)
    ]
    found = _without_repeats(found, real.usable, thresholds)
    if required:
        check_chosen(found, thresholds)
    return _most_varied(found, real.usable, count) if count else found


def check_real(photos: Sequence[Photo], network: FaceNetwork, on_progress: OnProgress = silent) -> SetReport:
    """Return the report on real photos to compare pictures with. Raises BadPhoto if they don't tell who is meant."""
    report = check_photos(photos, network, Thresholds.for_reference(network.name), on_progress=on_progress)
    if not report.enough:
        raise BadPhoto(f"the photos to compare with: {report.headline}")
    return report


def check_chosen(found: Sequence[Candidate], thresholds: Thresholds) -> None:
    """Raise BadPhoto with the causes, and with the best likeness if it is too low, when no picture was chosen."""
    if not all(one.reason for one in found):
        return
    causes = ", ".join(f"{number} {cause}" for cause, number in Counter(one.cause for one in found).most_common())
    alike = max((one.report.likeness for one in found if one.report.likeness is not None), default=1.0)
    needed = thresholds.likeness_review
    best = f". The best likeness is {alike:.2f}, and {needed:.2f} is needed" if alike < needed else ""
    raise BadPhoto(f"none of the {counted(len(found), 'picture')} can be used: {causes}{best}")


def _against(item: PhotoReport, judged: float | None, limits: Thresholds, lowest: float) -> tuple[str, str]:
    """Return why a picture is left out, in a sentence and in a word or two; ("", "") if nothing is wrong with it."""
    if item.verdict == REJECT:
        return item.reason, item.cause
    if item.faces > 1:
        return f"{item.faces} people in the picture", "of several people"
    if item.likeness is not None and item.likeness < limits.likeness_review:
        cause = "not alike enough"
        return f"{cause}: likeness {item.likeness:.2f}, {limits.likeness_review:.2f} is needed", cause
    if judged is not None and judged < lowest:
        return f"someone else by the second network: {judged:.2f}, {lowest:.2f} is needed", "of someone else"
    return "", ""


def _without_repeats(found: Sequence[Candidate], real: Sequence[PhotoReport], limits: Thresholds) -> list[Candidate]:
    """Leave out pictures that nearly repeat a photo, or a picture that is more alike."""
    kept, result = list(real), list(found)
    for index in sorted(range(len(found)), key=lambda index: -(found[index].report.likeness or 0)):
        one = found[index]
        if one.reason:
            continue
        repeated = next((item for item in kept if is_repeat(one.report, item, limits)), None)
        if repeated is None:
            kept.append(one.report)
        else:
            reason = f"almost the same picture as {repeated.photo.name}"
            result[index] = replace(one, reason=reason, cause="almost twice")
    return result


def is_repeat(a: PhotoReport, b: PhotoReport, limits: Thresholds) -> bool:
    """Return whether two pictures are nearly the same."""
    if a.hash is None or b.hash is None or a.vector is None or b.vector is None:
        return False
    if hash_distance(a.hash, b.hash) > limits.similar_picture:  # first, since it takes far less time
        return False
    return float(likeness(a.vector[None], b.vector[None])[0, 0]) >= limits.same_picture_likeness


def _most_varied(found: Sequence[Candidate], real: Sequence[PhotoReport], count: int) -> list[Candidate]:
    """Choose `count` of the pictures without a reason, each time the one farthest from all photos and chosen pictures."""
    left = [index for index, one in enumerate(found) if not one.reason]
    chosen: list[int] = []
    while left and len(chosen) < count:
        near = [*real, *(found[index].report for index in chosen)]
        scores = {index: min(_difference(found[index].report, item) for item in near) for index in left}
        best = max(left, key=lambda index: (scores[index], found[index].report.likeness or 0))
        chosen.append(best)
        left.remove(best)
    reason = f"{counted(count, 'picture')} wanted, and others differ more"
    return [
        replace(one, reason=reason, cause="not needed") if index in left else one for index, one in enumerate(found)
    ]


def _difference(a: PhotoReport, b: PhotoReport) -> float:
    """Return how different two pictures are, 0 to 4: one each for view, framing, light and background."""
    far = [
        min(1.0, float(np.linalg.norm(first - second)))
        for first, second in ((a.light, b.light), (a.background, b.background))
        if first is not None and second is not None
    ]
    return (a.view != b.view) + (a.framing != b.framing) + sum(far)
