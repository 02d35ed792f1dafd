"""The photo report: which photos will teach the person well, which not, why, and what is missing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from ..errors import BadConfig
from ..faces import Face, FaceNetwork, likeness
from . import measure
from .reading import Photo

USE, CROP, REVIEW, REJECT = VERDICTS = ("use", "use with crop", "review", "reject")
TURNS = {
    90: "the picture lies on its side: turn it to the left",
    180: "the picture stands on its head: turn it round",
    270: "the picture lies on its side: turn it to the right",
}
"""The advice for a picture that must be turned, by the degrees, counter-clockwise, that make it upright."""
UPRIGHT_SCORE, UPRIGHT_MARGIN = 0.91, 0.03
"""The detector's score from which a face counts as upright, and the lead that a turned picture's score must have over it.

On ORL, YuNet gives upright faces 0.914 and more, and at least 0.035 more than the same faces turned.
"""
FRAMINGS = ("close-up", "chest-up", "body")
VIEWS = ("front", "half-turned", "side")


@dataclass(frozen=True)
class Thresholds:
    """The values at which verdicts change: starting points, each with its origin. docs/photos.md shows their effect."""

    face_pixels_reject: float = 200
    """The size of a face, in pixels of the photo, below which it is rejected: half of what headshot services ask for."""
    face_pixels_review: float = 410
    """The size of a face, in pixels, below which it is reviewed: HeadshotPro's minimum, 40 % of a 1024 pixel picture."""
    in_frame_review: float = 0.95
    """The share of the face's box inside the picture below which it is reviewed. Two photos cut beside an eye (package
    face_recognition) have 0.87 and 0.92, whole faces 0.98 and more. With an eye or the mouth cut off a photo is rejected."""
    sharpness_reject: float = 0.015
    """The `measure.sharpness` below which a face is rejected: blurred by 2 pixels or enlarged 6 times it has 0.006 to 0.015."""
    sharpness_review: float = 0.05
    """The sharpness below which a face is reviewed. Sharp portraits and ORL have 0.06 to 1.4, soft group pictures 0.01 to
    0.09."""
    highlights_reject: float = 40
    """The `measure.highlights` below which a face is rejected as dark: portraits darkened to 15 % have 24 to 29."""
    highlights_review: float = 80
    """The highlights below which a face is reviewed: portraits darkened to 30 % have 54 to 59, all of ORL is above 130."""
    midtone_review: float = 225
    """The `measure.midtone` above which a face is reviewed as bright: ordinary faces have 50 to 175."""
    midtone_reject: float = 245
    """The midtone above which a face is rejected: portraits brightened 2.5 times have 234 to 255."""
    likeness_reject: float = 0.40
    """The cosine to the set's most typical photo below which a face is someone else's: SFace's equal-error threshold."""
    likeness_review: float = 0.55
    """The cosine below which a face is reviewed: 98.7 % of ORL's photos reach it, and no photo of someone else does."""
    same_picture: int = 2
    """The bits, of 64, by which the hashes of copies differ: scaled, recompressed or recoloured by 0 to 2, rarely 4."""
    similar_picture: int = 6
    """The bits by which the hashes of similar pictures differ: copies cropped by 2 % or turned by 1 degree by 2 to 6."""
    same_picture_likeness: float = 0.85
    """The cosine of the faces from which pictures with equal hashes are copies: those have 0.90 to 0.99."""
    face_share_crop: float = 0.12
    """The share of the picture (square roots of the areas) below which a face is small: 120 of 1024 pixels are too few."""
    other_face: float = 0.3
    """The share of the largest face's size below which a face is taken for background."""
    turned: float = 0.12
    """The yaw (`measure.pose`) from which a face is half-turned: about 15 degrees; nine in ten ORL photos are below."""
    side: float = 0.35
    """The yaw from which a face is seen from the side: about 38 degrees."""
    photos_needed: int = 5
    """The number of usable photos below which there is nothing to train on: one less than headshot services accept."""
    photos_wanted: int = 10
    """The number of usable photos that is enough: headshot services ask for 6 to 20, and 8 to 15 do best."""
    turned_wanted: int = 3
    """The number of usable photos with a turned head, so that the LoRA learns the person and not the view."""
    chest_up_wanted: int = 3
    """The number of usable photos that show more than the face."""
    lights_wanted: int = 3
    """The number of kinds of light (`measure.light`) among the usable photos."""
    backgrounds_wanted: int = 3
    """The number of kinds of background (`measure.background`), so that no wall becomes part of the person."""

    @classmethod
    def for_resolution(cls, resolution: int, network: str = "sface") -> Thresholds:
        """The thresholds for training at a resolution, in pixels, with likeness measured by a face network.

        The defaults are for 1024 pixels: sizes of faces grow in proportion. A network that is not in LIKENESS_LIMITS is
        taken to be like SFace. Raises BadConfig for a resolution below 1.
        """
        if resolution < 1:
            raise BadConfig(f"resolution = {resolution}: must be at least 1")
        default = cls()
        reject, review, same_picture = LIKENESS_LIMITS.get(network, LIKENESS_LIMITS["sface"])
        return replace(
            default,
            face_pixels_reject=default.face_pixels_reject * resolution / 1024,
            face_pixels_review=default.face_pixels_review * resolution / 1024,
            likeness_reject=reject,
            likeness_review=review,
            same_picture_likeness=same_picture,
        )


LIKENESS_LIMITS = {
    "sface": (Thresholds.likeness_reject, Thresholds.likeness_review, Thresholds.same_picture_likeness),
    "dlib": (0.93, 0.95, 0.985),
}
"""The (likeness_reject, likeness_review, same_picture_likeness) of each face network for which they were measured.

On ORL dlib's equal-error threshold is 0.925; 98.0 % of the photos reach 0.95, and no photo of someone else exceeds 0.942.
Copies that are scaled, recompressed, cropped by 2 % or turned by 1 degree have 0.992 and more.
"""


@dataclass(frozen=True)
class Finding:
    """A fact that counts against a photo as it is, in a sentence for its owner."""

    verdict: str
    """One of VERDICTS."""
    sentence: str


@dataclass(frozen=True, eq=False)
class PhotoReport:
    """The findings and measurements of one photo."""

    photo: Photo
    findings: tuple[Finding, ...]
    faces: int
    """The number of people in the picture, without small faces in the background."""
    face: Face | None
    """The person's face, in pixels of the photo."""
    other_faces: tuple[Face, ...] = ()
    share_in_frame: float | None = None
    sharpness: float | None = None
    highlights: float | None = None
    midtone: float | None = None
    likeness: float | None = None
    """The cosine to the most typical photo of the set; None where there is nothing to compare with."""
    yaw: float | None = None
    pitch: float | None = None
    view: str | None = None
    framing: str | None = None
    turn: int = 0
    """The degrees, counter-clockwise, by which the photo must be turned to be upright."""

    @property
    def verdict(self) -> str:
        """The worst of the findings' verdicts; "use" without findings."""
        return max((finding.verdict for finding in self.findings), key=VERDICTS.index, default=USE)

    def to_dict(self) -> dict[str, Any]:
        """The report without pixels, as values for JSON."""
        face = self.face
        return {
            "name": self.photo.name,
            "size": list(self.photo.size),
            "turn": self.turn,
            "verdict": self.verdict,
            "reasons": [finding.sentence for finding in self.findings],
            "faces": self.faces,
            "face_box": None if face is None else [round(value, 1) for value in face.box],
            "face_pixels": None if face is None else round(face.size),
            "share_in_frame": _rounded(self.share_in_frame),
            "sharpness": _rounded(self.sharpness),
            "highlights": _rounded(self.highlights),
            "midtone": _rounded(self.midtone),
            "likeness": _rounded(self.likeness),
            "yaw": _rounded(self.yaw),
            "pitch": _rounded(self.pitch),
            "view": self.view,
            "framing": self.framing,
        }


@dataclass(frozen=True, eq=False)
class SetReport:
    """The reports on all photos of a set, and advice on the set as a whole."""

    photos: tuple[PhotoReport, ...]
    thresholds: Thresholds
    network: str | None
    """The name of the face network that measured the likeness; None where none looked at the photos."""
    lights: int
    """The number of kinds of light in the usable photos."""
    backgrounds: int
    """The number of kinds of background in the usable photos."""
    advice: tuple[str, ...]
    """Sentences on what to add, and on what is wrong with the set as a whole."""
    wishes: tuple[str, ...] = ()
    """What to add, each with its number, as in "2 in other light"."""

    @property
    def headline(self) -> str:
        """The report in one line, as in "5 of 6 usable; add 1 with the head turned to a side".

        Without a face network it says that no face was looked for.
        """
        usable, needed = len(self.usable), self.thresholds.photos_needed
        few = "" if self.enough else f", and {needed} are needed"
        wish = next(iter(self.wishes), "")
        if not self.enough and (not wish or int(wish.split()[0]) < needed - usable):
            wish = f"{needed - usable} more" + (f", of them {wish}" if wish else "")
        by = "" if self.network else " by size and brightness (no face was looked for)"
        return f"{usable} of {len(self.photos)} usable{by}{few}" + (f"; add {wish}" if wish else "")

    @property
    def usable(self) -> tuple[PhotoReport, ...]:
        """The photos that are not rejected."""
        return tuple(report for report in self.photos if report.verdict != REJECT)

    @property
    def enough(self) -> bool:
        """Whether there are enough usable photos to train on."""
        return len(self.usable) >= self.thresholds.photos_needed

    def to_dict(self) -> dict[str, Any]:
        """The report as values for JSON."""
        return {
            "headline": self.headline,
            "network": self.network,
            "usable": len(self.usable),
            "enough": self.enough,
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
    photos: Sequence[Photo], network: FaceNetwork | None, thresholds: Thresholds | None = None
) -> SetReport:
    """The report on a set of photos, with a PhotoReport for each in the order given. No photo is changed or deleted.

    The photos themselves decide who "the person" is: the face that is most like a face of each other photo is the most
    typical one, and in every photo the face most like it is the person's. Without a network (None) nothing is known of
    faces, and only pictures that are too small for one, too dark, or twice the same are found.
    """
    thresholds = thresholds or Thresholds()
    if network is None:
        return _without_faces(photos, thresholds)
    looks = [_look(photo, network, thresholds) for photo in photos]
    chosen = _recognise(looks)
    matches = [alike >= thresholds.likeness_reject for _, alike in chosen if alike is not None]
    # With no majority for one person, nobody can say who of them is the intruder.
    majority = len(matches) > 2 and 2 * sum(matches) > len(matches)
    reports = [
        _judge(look, index, alike, majority, thresholds) for look, (index, alike) in zip(looks, chosen, strict=True)
    ]
    reports = _mark_copies(reports, looks, [index for index, _ in chosen], thresholds)
    usable = [
        (look, index)
        for look, (index, _), report in zip(looks, chosen, reports, strict=True)
        if report.verdict != REJECT
    ]
    lights = measure.kinds([look.lights[index] for look, index in usable])
    backgrounds = measure.kinds([look.backgrounds[index] for look, index in usable])
    wishes = _wishes([report for report in reports if report.verdict != REJECT], lights, backgrounds, thresholds)
    advice = _advise(len(usable), wishes, several_people=len(matches) > 2 and not majority, limits=thresholds)
    return SetReport(tuple(reports), thresholds, network.name, lights, backgrounds, advice, wishes)


def _without_faces(photos: Sequence[Photo], limits: Thresholds) -> SetReport:
    """The report on what can be said of pictures without looking for faces."""
    first: dict[str, str] = {}
    reports = []
    for photo in photos:
        findings = []
        if math.prod(photo.size) ** 0.5 < limits.face_pixels_reject:
            findings.append(
                Finding(REJECT, f"the picture is too small for a face of {limits.face_pixels_reject:.0f} pixels")
            )
        if measure.highlights(np.asarray(photo.image(shorter_side=measure.SHARPNESS_SIDE).convert("L"))) < (
            limits.highlights_reject
        ):
            findings.append(Finding(REJECT, "the picture is too dark"))
        if photo.digest in first:
            findings.append(Finding(REJECT, f"the same picture as {first[photo.digest]}"))
        else:
            first[photo.digest] = photo.name
        reports.append(PhotoReport(photo, tuple(findings), faces=0, face=None))
    usable = sum(report.verdict != REJECT for report in reports)
    advice = _advise(usable, (), several_people=False, limits=limits)
    return SetReport(tuple(reports), limits, None, 0, 0, advice)


@dataclass(frozen=True, eq=False)
class _Look:
    """The measurements of one photo before it is compared with the others; lists have one entry for each face."""

    photo: Photo
    hash: np.ndarray
    turn: int
    faces: list[Face]
    """The faces in pixels of the photo, largest first, without those that are small beside the largest."""
    vectors: np.ndarray
    lumas: list[np.ndarray]
    lights: list[np.ndarray]
    backgrounds: list[np.ndarray]


def _look(photo: Photo, network: FaceNetwork, thresholds: Thresholds) -> _Look:
    # The detector works at 640 pixels; a face is judged at SHARPNESS_SIDE. Decode no more than that needs.
    image = photo.image(shorter_side=640)
    faces = network.detect(image)
    if faces and faces[0].size < measure.SHARPNESS_SIDE and image.size != photo.size:
        needed = min(image.size) * measure.SHARPNESS_SIDE / max(faces[0].size, 1)
        larger = photo.image(shorter_side=int(min(needed, *photo.size)))
        faces = [_scaled(face, image, larger.size) for face in faces]
        image = larger
    turn = _turn(image, faces, network)
    # The landmarks of a face that is not upright are wrong.
    faces = [] if turn else [face for face in faces if face.size >= thresholds.other_face * faces[0].size]
    return _Look(
        photo,
        measure.perceptual_hash(image),
        turn,
        [_scaled(face, image, photo.size) for face in faces],
        network.embed([image] * len(faces), faces),
        [measure.face_luma(image, face) for face in faces],
        [measure.light(image, face) for face in faces],
        [measure.background(image, face) for face in faces],
    )


def _turn(image: Image.Image, faces: Sequence[Face], network: FaceNetwork) -> int:
    """The degrees, counter-clockwise, that would make the faces upright; 0 where they are, or where there are none."""
    upright = _surest(faces)
    if upright >= UPRIGHT_SCORE:
        return 0
    scores = {degrees: _surest(network.detect(image.rotate(degrees, expand=True))) for degrees in TURNS}
    best = max(scores, key=lambda degrees: scores[degrees])
    return best if scores[best] > upright + UPRIGHT_MARGIN else 0


def _surest(faces: Sequence[Face]) -> float:
    return max((face.score for face in faces), default=0.0)


def _scaled(face: Face, image: Image.Image, size: tuple[int, int]) -> Face:
    """The face of `image` in pixels of the same picture at another size."""
    factors = np.array(size) / image.size
    left, top, right, bottom = (np.array(face.box) * np.tile(factors, 2)).tolist()
    return Face((left, top, right, bottom), (face.landmarks * factors).astype(np.float32), face.score)


def _recognise(looks: Sequence[_Look]) -> list[tuple[int, float | None]]:
    """The index of the person's face in each photo, and its likeness to the most typical face.

    The likeness is None in a photo without a face, and in all of them when fewer than two photos have one.
    """
    with_faces = [look for look in looks if look.faces]
    if len(with_faces) < 2:
        return [(0, None) for _ in looks]
    candidates = np.concatenate([look.vectors for look in with_faces])
    # (candidates, photos): how alike a candidate is to the most similar face of each photo.
    best = np.stack([likeness(candidates, look.vectors).max(1) for look in with_faces], 1)
    typical = candidates[best.sum(1).argmax()]
    chosen: list[tuple[int, float | None]] = []
    for look in looks:
        if look.faces:
            alike = likeness(look.vectors, typical)
            chosen.append((int(alike.argmax()), min(1.0, float(alike.max()))))
        else:
            chosen.append((0, None))
    return chosen


def _mark_copies(
    reports: Sequence[PhotoReport], looks: Sequence[_Look], chosen: Sequence[int], limits: Thresholds
) -> list[PhotoReport]:
    """The reports, with a finding added for each picture of which there is a better copy or a similar picture."""
    marked = list(reports)
    kept: list[int] = []
    with_faces = [i for i, report in enumerate(reports) if report.face]

    def rank(i: int) -> tuple[int, int, int]:
        # The better copy has the better verdict, then more pixels, then the earlier name.
        return VERDICTS.index(reports[i].verdict), -math.prod(looks[i].photo.size), i

    for i in sorted(with_faces, key=rank):
        copies = [
            (measure.hash_distance(looks[i].hash, looks[j].hash), j)
            for j in kept
            if likeness(looks[i].vectors[chosen[i]], looks[j].vectors[chosen[j]]) >= limits.same_picture_likeness
        ]
        distance, nearest = min(copies, default=(64, -1))
        if distance <= limits.same_picture:
            stays = "" if reports[nearest].verdict == REJECT else ", which is kept"
            finding = Finding(REJECT, f"the same picture as {looks[nearest].photo.name}{stays}")
        elif distance <= limits.similar_picture:
            finding = Finding(REVIEW, f"almost the same picture as {looks[nearest].photo.name}")
        else:
            finding = None
        if finding:
            marked[i] = replace(reports[i], findings=(*reports[i].findings, finding))
        if distance > limits.same_picture:
            kept.append(i)
    return marked


def _judge(look: _Look, index: int, alike: float | None, majority: bool, limits: Thresholds) -> PhotoReport:
    if not look.faces:
        nothing = "no face was found; make sure that the whole face can be seen"
        nobody = Finding(REJECT, TURNS.get(look.turn, nothing))
        return PhotoReport(look.photo, (nobody,), faces=0, face=None, turn=look.turn)

    face, luma = look.faces[index], look.lumas[index]
    others = tuple(other for i, other in enumerate(look.faces) if i != index)
    in_frame = measure.share_in_frame(look.photo.size, face)
    sharp, bright, middle = measure.sharpness(luma), measure.highlights(luma), measure.midtone(luma)
    yaw, pitch = measure.pose(face)
    share = face.size / (look.photo.size[0] * look.photo.size[1]) ** 0.5

    findings = []
    if face.size < limits.face_pixels_reject:
        findings.append(
            Finding(REJECT, f"the face is {face.size:.0f} pixels large; {limits.face_pixels_reject:.0f} are needed")
        )
    elif face.size < limits.face_pixels_review:
        findings.append(
            Finding(REVIEW, f"the face is {face.size:.0f} pixels large; {limits.face_pixels_review:.0f} are better")
        )
    if not measure.features_in_frame(look.photo.size, face):
        findings.append(Finding(REJECT, "an eye, the nose or the mouth is cut off"))
    elif in_frame < limits.in_frame_review:
        findings.append(Finding(REVIEW, "part of the face is outside the picture"))
    if sharp < limits.sharpness_reject:
        findings.append(Finding(REJECT, "the face is blurred"))
    elif sharp < limits.sharpness_review:
        findings.append(Finding(REVIEW, "the face is not quite sharp"))
    if bright < limits.highlights_reject:
        findings.append(Finding(REJECT, "the face is too dark"))
    elif bright < limits.highlights_review:
        findings.append(Finding(REVIEW, "the face is rather dark"))
    if middle > limits.midtone_reject:
        findings.append(Finding(REJECT, "the face is overexposed"))
    elif middle > limits.midtone_review:
        findings.append(Finding(REVIEW, "the face is rather bright"))
    if alike is not None and alike < limits.likeness_reject:
        if majority:
            findings.append(
                Finding(REJECT, f"this seems to be someone else (likeness {alike:.2f} to the other photos)")
            )
        else:
            findings.append(Finding(REVIEW, "the photos show different people, and no one is in most of them"))
    elif alike is not None and alike < limits.likeness_review:
        findings.append(
            Finding(REVIEW, f"this may be someone else, or an unusual view (likeness {alike:.2f} to the other photos)")
        )
    if others and alike is None:
        findings.append(Finding(REVIEW, f"{len(look.faces)} people, and no other photo to tell which one is meant"))
    elif others:
        people = "another person" if len(others) == 1 else f"{len(others)} other people"
        findings.append(Finding(CROP, f"{people} in the picture: cropped out or masked"))
    if share < limits.face_share_crop:
        findings.append(Finding(CROP, "the face is small in the picture: a closer part is used"))

    return PhotoReport(
        look.photo,
        tuple(findings),
        faces=len(look.faces),
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
        framing=framing(face, look.photo.size[1]),
    )


def framing(face: Face, bottom: float) -> str:
    """The framing, one of FRAMINGS, by how much is seen between the chin and the picture's end at `bottom`.

    `bottom` is in pixels of the same picture as the face. Up to 0.8 face heights is a close-up (shoulders begin), up to
    2.5 is chest-up, and more shows the body. A body is about ten face heights (forehead to chin) tall.
    """
    _, top, _, chin = face.box
    below = (bottom - chin) / (chin - top)
    return FRAMINGS[(below > 0.8) + (below > 2.5)]


def _wishes(usable: Sequence[PhotoReport], lights: int, backgrounds: int, limits: Thresholds) -> tuple[str, ...]:
    """What the usable photos lack in variety, each with the number of photos to add."""
    missing = [
        (limits.turned_wanted - sum(report.view != VIEWS[0] for report in usable), "with the head turned to a side"),
        (
            limits.chest_up_wanted - sum(report.framing != FRAMINGS[0] for report in usable),
            "from further away, down to the chest or the waist",
        ),
        (limits.lights_wanted - lights, "in other light"),
        (limits.backgrounds_wanted - backgrounds, "in front of another background"),
    ]
    return tuple(f"{count} {what}" for count, what in missing if count > 0)


def _advise(usable: int, wishes: Sequence[str], several_people: bool, limits: Thresholds) -> tuple[str, ...]:
    advice = []
    if several_people:
        advice.append("The photos show different people, and no one is in most of them: sort them first.")
    if usable < limits.photos_needed:
        advice.append(f"At least {limits.photos_needed} are needed; {limits.photos_wanted} to 20 work best.")
    elif usable < limits.photos_wanted:
        advice.append(f"{limits.photos_wanted - usable} more would help.")
    if wishes:
        advice.append(f"More variety helps: add {', '.join(wishes)}. One photo can be several of these.")
    return tuple(advice)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
