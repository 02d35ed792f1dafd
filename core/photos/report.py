"""The photo report: which photos will help in training, which won't, why, and what is missing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..errors import counted
from ..faces import Face, FaceNetwork, likeness, mean_face
from ..progress import OnProgress, counting, silent
from . import measure
from .dataset import MAX_ASPECT
from .measure import TURNS, MeasuredPhoto, Thresholds, measure_photo
from .reading import Photo

USE, CROP, REVIEW, REJECT = VERDICTS = ("use", "use with crop", "review", "reject")
FRAMINGS = ("close-up", "chest-up", "body")
VIEWS = ("front", "half-turned", "side")


@dataclass(frozen=True)
class Finding:
    """A problem of a photo, in a sentence for its owner."""

    verdict: str
    """One of VERDICTS."""
    sentence: str
    cause: str = ""
    """The fact in a word or two, as in "blurred", to be counted in a set."""


@dataclass(frozen=True, eq=False)
class PhotoReport:
    """The findings and measurements of one photo."""

    photo: Photo
    findings: tuple[Finding, ...]
    faces: int
    """The number of people in the picture, not counting small faces in the background."""
    face: Face | None
    """The person's face, in pixels of the photo."""
    other_faces: tuple[Face, ...] = ()
    share_in_frame: float | None = None
    sharpness: float | None = None
    highlights: float | None = None
    midtone: float | None = None
    likeness: float | None = None
    """The cosine to the most typical photo of the set; None if there is nothing to compare with."""
    yaw: float | None = None
    pitch: float | None = None
    view: str | None = None
    framing: str | None = None
    turn: int = 0
    """The degrees, counter-clockwise, by which to turn the photo to make it upright."""
    vector: np.ndarray | None = None
    """The identity vector of the person's face, float32 (D,)."""
    hash: np.ndarray | None = None
    """The picture's perceptual hash; None if no network was used."""
    light: np.ndarray | None = None
    """The light on the person's face, `measure.light`."""
    background: np.ndarray | None = None
    """The background beside it, `measure.background`."""

    @property
    def verdict(self) -> str:
        """The worst of the findings' verdicts; "use" without findings."""
        return max((finding.verdict for finding in self.findings), key=VERDICTS.index, default=USE)

    @property
    def reason(self) -> str:
        """Why the photo is rejected, in sentences; "" for one that is not."""
        return "; ".join(finding.sentence for finding in self.findings if finding.verdict == REJECT)

    @property
    def cause(self) -> str:
        """Why the photo is rejected, in a word or two; "" for one that is not."""
        return next((finding.cause for finding in self.findings if finding.verdict == REJECT), "")

    def to_dict(self) -> dict[str, Any]:
        """Return the report without pixels, as values for JSON."""
        face = self.face
        measured = ("share_in_frame", "sharpness", "highlights", "midtone", "likeness", "yaw", "pitch")
        return {
            "name": self.photo.name,
            "size": list(self.photo.size),
            "turn": self.turn,
            "verdict": self.verdict,
            "reasons": [finding.sentence for finding in self.findings],
            "faces": self.faces,
            "face_box": None if face is None else [round(value, 1) for value in face.box],
            "face_pixels": None if face is None else round(face.size),
            **{name: None if (value := getattr(self, name)) is None else round(value, 3) for name in measured},
            "view": self.view,
            "framing": self.framing,
        }


@dataclass(frozen=True, eq=False)
class SetReport:
    """The reports on all photos of a set, and advice on the set as a whole."""

    photos: tuple[PhotoReport, ...]
    thresholds: Thresholds
    network: str | None
    """The name of the face network that measured the likeness; None if none was used."""
    lights: int
    """The number of kinds of light in the usable photos."""
    backgrounds: int
    """The number of kinds of background in the usable photos."""
    advice: tuple[str, ...]
    """Sentences on what to add, and on problems of the set as a whole."""
    wishes: tuple[str, ...] = ()
    """What to add, each with a count, as in "2 in other light"."""
    people: tuple[int, ...] = ()
    """The number of the person on each photo, from 1, or 0 without a face. Empty unless the photos show different people and
    no one is in most of them."""

    @property
    def headline(self) -> str:
        """The report in one line, as in "9 of 10 usable; add 1 with the head turned to the left or right".

        If none is usable, it names what is wrong with them; of a single photo also what to do. It mentions when there are too
        few to measure likeness. Without a face network it mentions that faces were not looked for.
        """
        if self.people:
            found = Counter(number for number in self.people if number)
            each = ", ".join(f"person {number} on {counted(count, 'photo')}" for number, count in sorted(found.items()))
            return f"different people: {each}. Keep the photos of one"
        usable, needed = len(self.usable), self.thresholds.photos_needed
        causes = Counter(report.cause for report in self.photos if report.cause)
        if not usable and causes:
            each = [f"{count if len(causes) > 1 else 'all'} {cause}" for cause, count in causes.most_common()]
            wrong = self.photos[0].reason if len(self.photos) == 1 else ", ".join(each)
            return f"0 of {len(self.photos)} usable: {wrong}"
        few, wish = "", next(iter(self.wishes), "")
        if not self.enough:
            few = f", and {needed} {'is' if needed == 1 else 'are'} needed"
            wish = f"{needed - usable} or more" + (f", such as {wish.split(maxsplit=1)[1]}" if wish else "")
        elif self.network and usable < self.thresholds.photos_measured:
            few = ", too few to measure likeness"
        by = "" if self.network else " by size and brightness (no face was looked for)"
        return f"{usable} of {len(self.photos)} usable{by}{few}" + (f"; add {wish}" if wish else "")

    @property
    def usable(self) -> tuple[PhotoReport, ...]:
        """The photos that are not rejected."""
        return tuple(report for report in self.photos if report.verdict != REJECT)

    @property
    def enough(self) -> bool:
        """Whether there are enough usable photos of one person to train on."""
        return not self.people and len(self.usable) >= self.thresholds.photos_needed

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values for JSON."""
        return {
            "headline": self.headline,
            "network": self.network,
            "usable": len(self.usable),
            "enough": self.enough,
            "people": list(self.people),
            "verdicts": dict(Counter(report.verdict for report in self.photos)),
            "views": dict(Counter(report.view for report in self.usable if report.view)),
            "framings": dict(Counter(report.framing for report in self.usable if report.framing)),
            "lights": self.lights,
            "backgrounds": self.backgrounds,
            "advice": list(self.advice),
            "photos": [report.to_dict() for report in self.photos],
            "thresholds": asdict(self.thresholds),
        }


def check_photos(
    photos: Sequence[Photo],
    network: FaceNetwork | None,
    thresholds: Thresholds | None = None,
    like: np.ndarray | None = None,
    on_progress: OnProgress = silent,
) -> SetReport:
    """Check a set of photos, and return a report with a PhotoReport for each, in order. Photos are not changed or deleted.

    The photos themselves determine who "the person" is. The face most like a face in every other photo is the most typical
    one, and the face most like it in each photo is the person's. With `like`, identity vectors (N, D) of the person on other
    photos, their mean face takes its place. Without a network (None), only copies and pictures that are too small or too dark
    are found. `on_progress(photos, total)` is called after each photo, and may raise to cancel.
    """
    thresholds = thresholds or Thresholds()
    if network is None:
        return _without_faces(photos, thresholds, on_progress)
    measured = [measure_photo(photo, network, thresholds) for photo in counting(photos, on_progress)]
    chosen = _recognise(measured, None if like is None else mean_face(like))
    matches = [alike >= thresholds.likeness_reject for _, alike in chosen if alike is not None]
    # Without a majority for one person, nobody can tell who doesn't belong.
    majority = like is not None or 2 * sum(matches) > len(matches)
    is_identified = like is not None or _most_of_another(measured, chosen, thresholds) < sum(matches)
    reports = [
        _judge(item, index, alike, majority, is_identified, thresholds)
        for item, (index, alike) in zip(measured, chosen, strict=True)
    ]
    reports = _mark_copies(reports, measured, [index for index, _ in chosen], thresholds)
    usable = [
        (item, index)
        for item, (index, _), report in zip(measured, chosen, reports, strict=True)
        if report.verdict != REJECT
    ]
    lights = measure.kinds([item.lights[index] for item, index in usable])
    backgrounds = measure.kinds([item.backgrounds[index] for item, index in usable])
    wishes = _wishes([report for report in reports if report.verdict != REJECT], lights, backgrounds, thresholds)
    people = _people(measured, [index for index, _ in chosen], thresholds) if matches and not majority else ()
    advice = _advise(len(usable), wishes, several_people=bool(people), limits=thresholds)
    return SetReport(tuple(reports), thresholds, network.name, lights, backgrounds, advice, wishes, people)


def unseen(photos: Sequence[Photo], thresholds: Thresholds) -> SetReport:
    """Return a report on photos that have not been checked."""
    return SetReport(tuple(PhotoReport(photo, (), 0, None) for photo in photos), thresholds, None, 0, 0, ())


def _without_faces(photos: Sequence[Photo], limits: Thresholds, on_progress: OnProgress) -> SetReport:
    first: dict[str, str] = {}
    reports = []
    for photo in counting(photos, on_progress):
        findings = []
        if math.prod(photo.size) ** 0.5 < limits.face_pixels_reject:
            sentence = f"the picture is too small for a face of {limits.face_pixels_reject:.0f} pixels"
            findings.append(Finding(REJECT, sentence, "too small"))
        luma = np.asarray(photo.image(shorter_side=int(limits.sharpness_side)).convert("L"))
        if measure.highlights(luma) < limits.highlights_reject:
            findings.append(Finding(REJECT, "the picture is too dark", "too dark"))
        if photo.digest in first:
            findings.append(Finding(REJECT, f"the same picture as {first[photo.digest]}", "twice"))
        else:
            first[photo.digest] = photo.name
        reports.append(PhotoReport(photo, tuple(findings), faces=0, face=None))
    usable = sum(report.verdict != REJECT for report in reports)
    return SetReport(tuple(reports), limits, None, 0, 0, _advise(usable, (), several_people=False, limits=limits))


def _recognise(measured: Sequence[MeasuredPhoto], typical: np.ndarray | None) -> list[tuple[int, float | None]]:
    """Return the index of the person's face in each photo, and its likeness to the `typical` face: None for the set's own.

    The likeness is None in a photo without a face, and in all photos when fewer than two have a face and none is typical.
    """
    with_faces = [item for item in measured if item.faces]
    if typical is None:
        if len(with_faces) < 2:
            return [(0, None) for _ in measured]
        candidates = np.concatenate([item.vectors for item in with_faces])
        # (candidates, photos): how alike a candidate is to the most similar face of each photo.
        best = np.stack([likeness(candidates, item.vectors).max(1) for item in with_faces], 1)
        typical = candidates[best.sum(1).argmax()]
    found = [likeness(item.vectors, typical) if item.faces else None for item in measured]
    return [(0, None) if alike is None else (int(alike.argmax()), min(1.0, float(alike.max()))) for alike in found]


def _most_of_another(
    measured: Sequence[MeasuredPhoto], chosen: Sequence[tuple[int, float | None]], limits: Thresholds
) -> int:
    """Return on how many photos the most frequent person is who isn't the chosen one."""
    others = [
        np.delete(item.vectors, index, 0) for item, (index, _) in zip(measured, chosen, strict=True) if item.faces
    ]
    if not others:
        return 0
    everyone = np.concatenate(others)
    counts = sum((likeness(everyone, faces) >= limits.likeness_reject).any(1) for faces in others)
    return int(np.max(counts, initial=0))


def _people(measured: Sequence[MeasuredPhoto], chosen: Sequence[int], limits: Thresholds) -> tuple[int, ...]:
    """The number of the person on each photo, from 1 for the one on most of them; 0 where no face was found."""
    numbers = [0] * len(measured)
    left = [i for i, item in enumerate(measured) if item.faces]
    for number in range(1, len(measured) + 1):
        if not left:
            break
        vectors = np.stack([measured[i].vectors[chosen[i]] for i in left])
        alike = likeness(vectors, vectors) >= limits.likeness_reject
        same = alike[alike.sum(1).argmax()]
        for i, is_same in zip(left, same, strict=True):
            numbers[i] = number if is_same else 0
        left = [i for i in left if not numbers[i]]
    return tuple(numbers)


def _mark_copies(
    reports: Sequence[PhotoReport], measured: Sequence[MeasuredPhoto], chosen: Sequence[int], limits: Thresholds
) -> list[PhotoReport]:
    """Return the reports, with a finding added for each picture that has a better copy or a similar picture."""
    marked = list(reports)
    kept: list[int] = []
    with_faces = [i for i, report in enumerate(reports) if report.face]

    def rank(i: int) -> tuple[int, int, int]:
        # The better copy has the better verdict, then more pixels, then the earlier name.
        return VERDICTS.index(reports[i].verdict), -math.prod(measured[i].photo.size), i

    for i in sorted(with_faces, key=rank):
        copies = [
            (measure.hash_distance(measured[i].hash, measured[j].hash), j)
            for j in kept
            if likeness(measured[i].vectors[chosen[i]], measured[j].vectors[chosen[j]]) >= limits.same_picture_likeness
        ]
        distance, nearest = min(copies, default=(64, -1))
        found = reports[i].findings
        if distance <= limits.same_picture:
            stays = "" if reports[nearest].verdict == REJECT else ", which is kept"
            found += (Finding(REJECT, f"the same picture as {measured[nearest].photo.name}{stays}", "twice"),)
        else:
            kept.append(i)
            if distance <= limits.similar_picture:
                found += (Finding(REVIEW, f"almost the same picture as {measured[nearest].photo.name}"),)
        marked[i] = replace(reports[i], findings=found)
    return marked


def _judge(
    item: MeasuredPhoto, index: int, alike: float | None, majority: bool, is_identified: bool, limits: Thresholds
) -> PhotoReport:
    if not item.faces:
        nothing = "no face was found; make sure that the whole face can be seen"
        nobody = Finding(REJECT, TURNS.get(item.turn, nothing), "turned" if item.turn else "without a face")
        return PhotoReport(item.photo, (nobody,), faces=0, face=None, turn=item.turn)

    face, luma = item.faces[index], item.lumas[index]
    others = tuple(other for i, other in enumerate(item.faces) if i != index)
    in_frame = measure.share_in_frame(item.photo.size, face)
    sharp, bright, middle = measure.sharpness(luma), measure.highlights(luma), measure.midtone(luma)
    yaw, pitch = measure.pose(face)

    findings: list[Finding] = []

    def add(verdict: str, sentence: str, cause: str = "") -> None:
        findings.append(Finding(verdict, sentence, cause))

    pixels = f"the face is {face.size:.0f} pixels large"
    if face.size < limits.face_pixels_reject:
        add(REJECT, f"{pixels}; {limits.face_pixels_reject:.0f} are needed", "too small")
    elif face.size < limits.face_pixels_review:
        add(REVIEW, f"{pixels}; {limits.face_pixels_review:.0f} are better")
    if not measure.features_in_frame(item.photo.size, face):
        add(REJECT, "an eye, the nose or the mouth is cut off", "cut off")
    elif not measure.features_in_frame(item.photo.size, face, MAX_ASPECT):
        add(REJECT, "the face is outside the middle of a long picture: cut it to the part around the face", "too long")
    elif in_frame < limits.in_frame_review:
        add(REVIEW, "part of the face is outside the picture")
    if sharp < limits.sharpness_reject:
        add(REJECT, "the face is blurred", "blurred")
    elif sharp < limits.sharpness_review:
        add(REVIEW, "the face is not quite sharp")
    if measure.flatness(luma) >= limits.flatness_reject:
        add(REJECT, "this seems to be a drawing: areas of the face have one colour", "drawn")
    if bright < limits.highlights_reject:
        add(REJECT, "the face is too dark", "too dark")
    elif bright < limits.highlights_review:
        add(REVIEW, "the face is rather dark")
    if middle > limits.midtone_reject:
        add(REJECT, "the face is overexposed", "overexposed")
    elif middle > limits.midtone_review:
        add(REVIEW, "the face is rather bright")
    findings += _doubts(alike, majority, limits)
    if others and (alike is None or not is_identified):
        add(REJECT, f"{len(item.faces)} people, and no other photo to tell who is meant: crop it", "of several people")
    elif others:
        people = "another person" if len(others) == 1 else f"{len(others)} other people"
        add(CROP, f"{people} in the picture: crop it, or set face_crops or face_masks")
    if face.share_of(item.photo.size) < limits.face_share_crop:
        add(CROP, "the face is small in the picture: crop it, or set face_crops")

    return PhotoReport(
        item.photo,
        tuple(findings),
        faces=len(item.faces),
        face=face,
        other_faces=others,
        share_in_frame=in_frame,
        sharpness=sharp,
        highlights=bright,
        midtone=middle,
        likeness=alike,
        yaw=yaw,
        pitch=pitch,
        view=VIEWS[(abs(yaw) >= limits.turned) + (abs(yaw) >= limits.side)],
        framing=framing(face, item.photo.size[1]),
        vector=item.vectors[index],
        hash=item.hash,
        light=item.lights[index],
        background=item.backgrounds[index],
    )


def _doubts(alike: float | None, majority: bool, limits: Thresholds) -> list[Finding]:
    """Return a finding if the person's face is not like those on the other photos."""
    if alike is None or alike >= limits.likeness_review:
        return []
    figure = f"(likeness {alike:.2f} to the other photos)"
    if alike >= limits.likeness_reject:
        return [Finding(REVIEW, f"this may be someone else, or an unusual view {figure}")]
    if majority:
        return [Finding(REJECT, f"this seems to be someone else {figure}", "of someone else")]
    return [Finding(REVIEW, "the photos show different people, and no one is in most of them")]


def framing(face: Face, bottom: float) -> str:
    """Return the framing, one of FRAMINGS, by how much is visible between the chin and the picture's end at `bottom`.

    `bottom` is in pixels of the same picture as the face. Up to 0.8 face heights is a close-up (shoulders begin), up to 2.5
    is chest-up, and more shows the body. A body is about ten face heights (forehead to chin) tall.
    """
    _, top, _, chin = face.box
    below = (bottom - chin) / (chin - top)
    return FRAMINGS[(below > 0.8) + (below > 2.5)]


def _wishes(usable: Sequence[PhotoReport], lights: int, backgrounds: int, limits: Thresholds) -> tuple[str, ...]:
    turned = sum(report.view != VIEWS[0] for report in usable)
    further_away = sum(report.framing != FRAMINGS[0] for report in usable)
    missing = [
        (int(0 < turned == len(usable)), "facing the camera"),
        (limits.turned_wanted - turned, "with the head turned to the left or right"),
        (limits.chest_up_wanted - further_away, "from further away, down to the chest or the waist"),
        (limits.lights_wanted - lights, "in other light"),
        (limits.backgrounds_wanted - backgrounds, "in front of another background"),
    ]
    return tuple(f"{count} {what}" for count, what in missing if count > 0)


def _advise(usable: int, wishes: Sequence[str], several_people: bool, limits: Thresholds) -> tuple[str, ...]:
    advice = []
    if several_people:
        advice.append("The photos show different people, and no one is in most of them: sort them first.")
    if usable < limits.photos_needed:
        needed = f"{limits.photos_needed} {'is' if limits.photos_needed == 1 else 'are'}"
        advice.append(f"At least {needed} needed; {limits.photos_wanted} to 20 work best.")
    elif usable < limits.photos_measured:
        advice.append(
            f"With fewer than {limits.photos_measured}, likeness is not measured: no photo can be held out. Results can only "
            "be compared with the photos they were trained on."
        )
    if limits.photos_needed <= usable < limits.photos_wanted:
        advice.append(f"{limits.photos_wanted - usable} more would help.")
    if wishes:
        advice.append(f"More variety helps: add {', '.join(wishes)}. One photo can be several of these.")
    return tuple(advice)
