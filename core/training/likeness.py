"""Measure likeness during training: how much each intermediate LoRA's pictures look like the person, and which one to keep.

An intermediate LoRA is judged by pictures of fixed prompts and seeds. Likeness is measured against photos held out from
training, because a network that has memorised its photos reproduces those and not always the person.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..config import LikenessSettings, TrainConfig
from ..errors import BadPhoto, counted
from ..faces import (
    Face,
    FaceNetwork,
    check_judge,
    copy_paste,
    embed_images,
    embed_one_by_one,
    likeness,
    likeness_to_rest,
    mean_face,
)
from ..models.base import Base
from ..photos import Photo, Thresholds
from ..photos.captions import class_caption, default_caption
from ..photos.measure import pose

NEUTRAL_PROMPTS = ("a photo of a street", "a photo of a dog", "a landscape with trees")
"""Prompts whose pictures a LoRA of a person should not change."""
LIKENESS_KEY = "facelora.likeness"
"""The key of the measured curve in a LoRA's metadata: JSON with the index of the point that was kept."""
MAX_CANDIDATES = 4
"""The number of most alike intermediate LoRAs that stay in memory until one is chosen."""
TOLERANCE = 0.015
"""A difference in likeness that nobody sees, as a share of `LikenessWatch.scale`.

For comparison, SFace's cosine moves by 0.01 when a photo is recompressed.
"""
FACE_SIDE = 640
"""The shorter side, in pixels, of photos when faces are searched for. Smaller JPEGs decode faster."""
FACES_NEEDED = 0.75
"""The share of an intermediate LoRA's pictures in which a face must be found, for likeness to choose it."""
PATIENCE = 3
"""The number of measurements without an improvement after which likeness counts as flat."""


@dataclass(frozen=True)
class LikenessPoint:
    """The measurement of one intermediate LoRA on its pictures. All cosines are from the watch's face network."""

    step: int
    likeness: float
    """The mean of `scores`, -1 to 1."""
    scores: tuple[float, ...]
    """The cosine of each trigger-word picture to the mean face of the held-out photos. 0 for a picture without a face."""
    copying: float
    """The cosine to the nearest training photo minus that to the nearest held-out photo, averaged over pictures with a face."""
    leakage: float
    """How much closer "a photo of CLASS", without the trigger word, is to the person than the base model's (in cosine)."""
    drift: float
    """The mean absolute change of the pictures of NEUTRAL_PROMPTS from the base model's, in grey levels, 0 to 255."""
    copy_paste: float = 0.0
    """MultiID-Bench's measure of copying (`faces.copy_paste`), averaged over pictures with a face; 1 is a copy."""
    judged: LikenessPoint | None = None
    """The same pictures measured by the watch's judge, or None without a judge."""
    rough: bool = False
    """Whether the pictures are too poor to tell whom they show (`Base.draws_roughly`)."""

    @property
    def faces(self) -> int:
        """The number of trigger-word pictures in which a face was found."""
        return sum(score != 0 for score in self.scores)


@dataclass(frozen=True)
class Score:
    """The likeness of one picture, and why it may be unreliable."""

    image: str
    likeness: float | None
    """The cosine to the person's mean face. None for a picture without a face."""
    face_pixels: float | None
    yaw: float | None
    """The turn of the head from `photos.measure.pose`: 0 is frontal, 0.35 a side view."""
    doubt: str | None
    """The reason why the number is unreliable, or None."""
    judged: float | None = None
    """The cosine from a second face network. None without one, and for a picture without a face."""

    @classmethod
    def of(cls, image: str, likeness: float | None, face: Face | None, judged: float | None = None) -> Score:
        if likeness is None or face is None:
            return cls(image, None, None, None, "no face", judged)
        yaw, _ = pose(face)
        doubts = []
        if face.size < 56:  # Half of SFace's input.
            doubts.append(f"face of {face.size:.0f} px")
        if abs(yaw) >= Thresholds().side:
            doubts.append("side view")
        return cls(image, likeness, round(face.size, 1), round(yaw, 3), ", ".join(doubts) or None, judged)

    def __str__(self) -> str:
        number = "  -  " if self.likeness is None else f"{self.likeness:5.2f}"
        second = "" if self.judged is None else f" {self.judged:5.2f}"
        return number + second + (f"  ({self.doubt})" if self.doubt else "")


@dataclass(frozen=True)
class Figures:
    """What papers report of a set of pictures of one person, by one face network. None: what it takes was not given."""

    likeness: float
    """The mean cosine to the mean face of the reference photos; a picture without a face counts 0."""
    photos: float | None
    """The mean cosine of each reference photo to the mean face of the others: what real photos have."""
    copy_paste: float | None
    """MultiID-Bench's measure (`faces.copy_paste`), averaged over pictures with a face. Takes the photos trained on."""

    @property
    def share(self) -> float | None:
        """The likeness as a share of the photos' own."""
        return round(self.likeness / self.photos, 4) if self.photos and self.photos > 0 else None

    def __str__(self) -> str:
        parts = [f"likeness {self.likeness:.2f}"]
        if self.share is not None:
            parts[0] += f", {self.share:.0%} of the photos' own {self.photos:.2f}"
        if self.copy_paste is not None:
            parts.append(f"copy-paste {self.copy_paste:.2f}")
        return "; ".join(parts)

    @classmethod
    def of(cls, pictures: np.ndarray, reference: np.ndarray, trained: np.ndarray | None = None) -> Figures:
        """Compute the figures from identity vectors (N, D) of pictures and photos, with rows of NaN where no face was found.

        `reference` are photos of the person that training has not seen, `trained` those that it has.
        Raises BadPhoto when no reference photo shows a face.
        """
        count, photos = len(pictures), len(reference)
        pictures, reference = _seen(pictures), _seen(reference)
        person = mean_face(reference)
        if person is None:
            raise BadPhoto(f"no face was found in the {counted(photos, 'photo')} to compare with")
        own = likeness_to_rest(reference)
        copying = None
        if trained is not None and len(trained := _seen(trained)) and len(pictures):
            copying = round(float(copy_paste(pictures, trained, reference).mean()), 4)
        return cls(
            likeness=round(float(likeness(pictures, person[None]).sum()) / max(count, 1), 4),
            photos=round(float(np.mean(own)), 4) if own else None,
            copy_paste=copying,
        )


def pictures_per_measurement(config: LikenessSettings) -> tuple[int, int, int]:
    """Return how many pictures are drawn per measurement: of the trigger word, of the class, and of NEUTRAL_PROMPTS.

    Likeness chooses the intermediate LoRA. The other two only stop a run that leaks, so half as many pictures are enough.
    """
    half = (config.likeness_pictures + 1) // 2
    return config.likeness_pictures, half, min(half, len(NEUTRAL_PROMPTS))


class LikenessWatch:
    """Measures intermediate LoRAs of one person on the pictures that `train_lora` draws with them."""

    def __init__(
        self,
        network: FaceNetwork,
        training: np.ndarray,
        held_out: np.ndarray,
        config: TrainConfig,
        judge: LikenessWatch | None = None,
    ):
        """Prepare to measure likeness to the held-out photos.

        `training` and `held_out` are the network's identity vectors of the photos, (N, D), with rows of NaN where no face was
        found (`faces_of`). `judge` measures the same pictures for `LikenessPoint.judged`, but selects nothing.

        Raises BadPhoto when none of the training photos, or none of the held-out photos, shows a face. Raises BadConfig when
        the judge uses the same network.
        """
        if judge:
            check_judge(judge.network, network)
        self.network = network
        self.judge = judge
        self._training, self._held_out = _seen(training), _seen(held_out)
        person = mean_face(self._held_out)
        if person is None or not len(self._training):
            photos, use = (held_out, "held out") if person is None else (training, "trained on")
            which = f"{counted(len(photos), 'photo')} {use}"
            raise BadPhoto(f"no face was found in the {which}, so likeness cannot be measured")
        self._person = person
        of_person, self._of_class, of_nobody = pictures_per_measurement(config)
        subject, of_class = default_caption(config.trigger_word, config.class_word), class_caption(config.class_word)
        self.base_shots: list[tuple[str, int]] = [
            *((of_class, config.seed + number) for number in range(self._of_class)),
            *((prompt, config.seed) for prompt in NEUTRAL_PROMPTS[:of_nobody]),
        ]
        """The (prompt, seed) of each picture of the base model that `set_base_pictures` takes. None is about the person."""
        self.shots: list[tuple[str, int]] = [
            *((subject, config.seed + number) for number in range(of_person)),
            *self.base_shots,
        ]
        """The (prompt, seed) of each picture that `measure` takes, in order."""
        self.own: float = float(np.mean(self._alike(self._training)))
        """The likeness of the training photos themselves, which a perfect LoRA would reach."""
        nearest = likeness(self._training, self._training)
        np.fill_diagonal(nearest, -1)
        copied = nearest.max(axis=1) - likeness(self._training, self._held_out).max(axis=1)
        self.own_copying: float = float(np.mean(copied)) if len(nearest) > 1 else 0.0
        """How much each training photo appears copied from the others, which counts as no copying. 0 for a single photo."""
        self._base: Sequence[Image.Image] = ()
        self._base_class = 0.0

    def set_base_pictures(self, images: Sequence[Image.Image]) -> None:
        """Take the base model's pictures of `base_shots`, the reference for leakage and drift."""
        if self.judge:
            self.judge.set_base_pictures(images)
        of_class, self._base = images[: self._of_class], images[self._of_class :]
        self._base_class = float(np.mean(self._alike(embed_images(self.network, of_class))))

    def measure(self, step: int, images: Sequence[Image.Image]) -> LikenessPoint:
        """Measure an intermediate LoRA that drew these pictures of `shots`. Call `set_base_pictures` first."""
        first = len(images) - len(self.base_shots)
        second = first + self._of_class
        of_person, of_class, neutral = images[:first], images[first:second], images[second:]
        embedded = embed_images(self.network, of_person)
        scores = self._alike(embedded)
        seen = _seen(embedded)
        gap = copied = np.zeros(1)
        if len(seen):
            copied = copy_paste(seen, self._training, self._held_out)
            gap = likeness(seen, self._training).max(axis=1) - likeness(seen, self._held_out).max(axis=1)
        leaked = float(np.mean(self._alike(embed_images(self.network, of_class))))
        return LikenessPoint(
            step,
            likeness=float(np.mean(scores)),
            scores=tuple(float(score) for score in scores),
            copying=float(np.mean(gap)),
            leakage=leaked - self._base_class,
            drift=float(np.mean([picture_change(a, b) for a, b in zip(self._base, neutral, strict=True)])),
            copy_paste=float(np.mean(copied)),
            judged=self.judge.measure(step, images) if self.judge else None,
        )

    @property
    def scale(self) -> float:
        """How far the likeness of the person's photos is above that of the base model's class pictures, at least 0.01.

        Differences are divided by it, since some people's faces are nearer to the class than others.
        """
        return max(self.own - self._base_class, 0.01)

    def cost(self, point: LikenessPoint) -> float:
        """Return an intermediate LoRA's damage, about 0 to 1: leakage, copying above `own_copying`, and drift over 255."""
        spoiled = max(0.0, point.leakage) + max(0.0, point.copying - self.own_copying)
        return spoiled / self.scale + point.drift / 255

    def choose(self, points: Sequence[LikenessPoint]) -> LikenessPoint:
        """Choose the point to keep: among those shown to be as alike as the most alike one, the one with the lowest cost.

        A point is as alike when its mean shortfall over the same prompts and seeds, plus the standard error, is within
        TOLERANCE. This tests non-inferiority. With few pictures most differences are within the noise, which proves nothing.
        """
        best = max(points, key=lambda point: point.likeness)
        return min((point for point in points if self._is_as_alike(point, best)), key=self.cost)

    def enough(self, points: Sequence[LikenessPoint]) -> str | None:
        """Return why more steps would not help, or None: likeness is flat, or the class is turning into the person."""
        if not points:
            return None
        best = max(points, key=lambda point: point.likeness)
        # Compare with the first point about as good as the best. Otherwise a slowly creeping likeness would never end the run.
        first = next(i for i, point in enumerate(points) if point.likeness >= best.likeness - TOLERANCE * self.scale)
        if len(points) - 1 - first >= PATIENCE:
            return f"likeness has not risen since step {points[first].step}"
        limit = 0.5 * self.scale  # of leakage, above which the class counts as lost
        if len(points) > 1 and min(point.leakage for point in points[-2:]) > limit:
            return f"pictures without the trigger word look like the person too (leakage above {limit:.2f})"
        return None

    def _is_as_alike(self, point: LikenessPoint, best: LikenessPoint) -> bool:
        shortfall = np.subtract(best.scores, point.scores)
        error = shortfall.std(ddof=1) / math.sqrt(len(shortfall)) if len(shortfall) > 1 else 0.0
        return bool(shortfall.mean() + error <= TOLERANCE * self.scale)

    def _alike(self, embedded: np.ndarray) -> np.ndarray:
        """Return the cosine (N,) of each identity vector to the person, 0 where no face was found."""
        return np.nan_to_num(likeness(embedded, self._person[None])[:, 0])


class Selection:
    """The intermediate LoRAs of a run that may still be kept, and all measurements."""

    def __init__(self, watch: LikenessWatch):
        self.watch = watch
        self.points: list[LikenessPoint] = []
        self._values: dict[int, dict[str, Tensor]] = {}
        """The adapter's values at a point, on the CPU, by the point's index."""

    def add(self, point: LikenessPoint, values: Mapping[str, Tensor]) -> None:
        """Add an intermediate LoRA, and drop the values of all but the MAX_CANDIDATES most alike."""
        self._values[len(self.points)] = {name: value.detach().cpu().clone() for name, value in values.items()}
        self.points.append(point)
        self._values = {index: self._values[index] for index in self._ranked()[:MAX_CANDIDATES]}

    def why_not_to_choose(self, base: Base) -> str | None:
        """Return why the pictures of that base model are too poor for choosing or ending by likeness, or None."""
        if base.draws_roughly:
            return f"{base.name} draws well only in many steps, or with a speed LoRA"
        best = max(self.points, key=lambda point: point.likeness)
        if best.faces < FACES_NEEDED * len(best.scores):
            return f"a face was found in only {best.faces} of {len(best.scores)} pictures"
        return None

    def has(self, step: int) -> bool:
        """Return whether the intermediate LoRA at that step was measured."""
        return any(point.step == step for point in self.points)

    def choose(self) -> tuple[LikenessPoint, dict[str, Tensor]]:
        """Return the candidate that `LikenessWatch.choose` selects, and its adapter's values."""
        point = self.watch.choose([self.points[index] for index in self._values])
        return point, next(values for index, values in self._values.items() if self.points[index] is point)

    def others(self, kept: LikenessPoint) -> list[tuple[LikenessPoint, dict[str, Tensor]]]:
        """Return the candidates except the kept one, each with its adapter's values."""
        candidates = ((self.points[index], values) for index, values in self._values.items())
        return [(point, values) for point, values in candidates if point is not kept]

    def metadata(self, kept: LikenessPoint, by_speed_lora: bool = False) -> dict[str, str]:
        """Describe the curve for the file's metadata in plain numbers, which don't reveal what the person looks like.

        `by_speed_lora` says that a speed LoRA helped to draw the pictures. Likeness without one is not comparable.
        """
        described = {
            "network": self.watch.network.name,
            "photos": round(self.watch.own, 4),
            "photos_copying": round(self.watch.own_copying, 4),
            "kept": self.points.index(kept),
            "points": [_described(point) for point in self.points],
        }
        if judge := self.watch.judge:
            described["judge"] = {"network": judge.network.name, "photos": round(judge.own, 4)}
        if by_speed_lora:
            described["speed_lora"] = True
        return {LIKENESS_KEY: json.dumps(described)}

    def _ranked(self) -> list[int]:
        return sorted(self._values, key=lambda index: -self.points[index].likeness)

    def pack(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Convert the selection to tensors and plain values for a run's state. `unpack` restores it."""
        tensors = {
            f"candidate.{index}.{name}": value
            for index, values in self._values.items()
            for name, value in values.items()
        }
        return tensors, [asdict(point) for point in self.points]

    def unpack(self, tensors: Mapping[str, Tensor], points: Sequence[Mapping[str, Any]]) -> None:
        """Restore what `pack` returned. Other tensors are ignored."""
        self.points = [_unpacked(point) for point in points]
        for key, value in tensors.items():
            if key.startswith("candidate."):
                index, _, name = key.removeprefix("candidate.").partition(".")
                self._values.setdefault(int(index), {})[name] = value


def faces_of(network: FaceNetwork, photos: Sequence[Photo]) -> np.ndarray:
    """Return the identity vector of each photo's largest face, float32 (N, D), with a row of NaN for a photo without a face."""
    return embed_one_by_one(network, (photo.image(shorter_side=FACE_SIDE) for photo in photos))


def _seen(embedded: np.ndarray) -> np.ndarray:
    return embedded[~np.isnan(embedded).any(axis=1)]


def _unpacked(values: Mapping[str, Any]) -> LikenessPoint:
    """Rebuild a point from its `asdict` values. JSON turned its tuples into lists."""
    judged = {"judged": _unpacked(values["judged"])} if values.get("judged") else {}
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return LikenessPoint(**{**values, **tuples, **judged})


def _described(point: LikenessPoint) -> dict[str, Any]:
    """Return the point's numbers, rounded, without those of single pictures."""
    names = ("step", "likeness", "copying", "copy_paste", "leakage", "drift")
    values = {name: getattr(point, name) for name in names}
    described = {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}
    return described | ({"judged": _described(point.judged)} if point.judged else {})


def picture_change(a: Image.Image, b: Image.Image) -> float:
    """Return the mean absolute difference of two pictures of the same size, in grey levels, 0 to 255."""
    return float(np.abs(np.asarray(a, dtype=np.float32) - np.asarray(b, dtype=np.float32)).mean())
