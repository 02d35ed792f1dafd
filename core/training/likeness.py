"""Likeness while training: how much the pictures of each checkpoint look like the person, what they cost, which to keep.

A checkpoint is judged by pictures of fixed prompts and seeds. Likeness is measured to photos that were held out from the
training: a network that has learnt its photos by heart looks like those, and not always like the person.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import TrainConfig
from ..errors import BadPhoto
from ..faces import Face, FaceNetwork, embed_images, embed_one_by_one, likeness, mean_face
from ..photos import Photo, Thresholds
from ..photos.captions import class_caption, default_caption
from ..photos.measure import hash_distance, perceptual_hash, pose

NEUTRAL_PROMPTS = ("a photo of a street", "a photo of a dog", "a landscape with trees")
"""What a LoRA of a person should leave alone."""
LIKENESS_KEY = "facelora.likeness"
"""In a LoRA's metadata: the measured curve as JSON, with the index of the point that was kept."""
MIN_TRAINING_PHOTOS = 3
MAX_CANDIDATES = 4
"""Checkpoints that are kept in memory until one is chosen: the most alike ones."""
TOLERANCE = 0.015
"""Likeness that nobody sees, as a share of `LikenessWatch.scale`: SFace's cosine moves by 0.01 when a photo is recompressed."""
SURE_FACE = 56
"""Pixels of a face below which its likeness says little: half of what SFace looks at; ORL's faces have 72 and more."""
FACE_SIDE, HASH_SIDE = 640, 64
"""Shorter side, in pixels, at which a photo is enough for its face, and for its perceptual hash: JPEG files decode faster."""
PATIENCE = 3
"""Measurements without a better one after which likeness counts as flat."""
LEAK_LIMIT = 0.5
"""Share of the way from the base's class pictures to the person's own photos at which the class counts as lost."""


@dataclass(frozen=True)
class LikenessPoint:
    """What a checkpoint's pictures look like. All cosines are those of the watch's face network."""

    step: int
    likeness: float
    """Mean cosine of the trigger's pictures to the mean face of the held-out photos; a picture without a face counts 0."""
    scores: tuple[float, ...]
    """The same of each picture."""
    copying: float
    """Mean over the pictures of: cosine to the nearest training photo minus cosine to the nearest held-out photo."""
    leakage: float
    """How much more "a photo of CLASS", without the trigger, looks like the person than the base's picture did: cosine."""
    drift: float
    """Mean absolute change of the pictures of neutral prompts from the base's, in grey levels, 0 to 255."""
    merged: tuple[int, ...] = ()
    """Steps of the checkpoints that this one is the average of."""


@dataclass(frozen=True)
class Score:
    """How alike one picture is, and how far that can be trusted."""

    image: str
    likeness: float | None
    """Cosine to the person's mean face; None without a face."""
    face_pixels: float | None
    yaw: float | None
    """`photos.measure.pose`: 0 frontal, 0.35 a side view."""
    doubt: str | None
    """Why the number says little, or None."""

    @classmethod
    def of(cls, image: str, likeness: float | None, face: Face | None) -> Score:
        if likeness is None or face is None:
            return cls(image, None, None, None, "no face")
        yaw, _ = pose(face)
        doubts = []
        if face.size < SURE_FACE:
            doubts.append(f"face of {face.size:.0f} px")
        if abs(yaw) >= Thresholds().side:
            doubts.append("side view")
        return cls(image, likeness, round(face.size, 1), round(yaw, 3), ", ".join(doubts) or None)

    def __str__(self) -> str:
        number = "  -  " if self.likeness is None else f"{self.likeness:5.2f}"
        return number + (f"  ({self.doubt})" if self.doubt else "")


class LikenessWatch:
    """Measures checkpoints of one person: what `train_lora` shows its pictures to."""

    def __init__(self, network: FaceNetwork, training: Sequence[Photo], held_out: Sequence[Photo], config: TrainConfig):
        """BadPhoto when no photo that is trained on, or none that is held out, shows a face."""
        self.network = network
        self._training = _seen(_faces_of(network, training))
        self._held_out = _seen(_faces_of(network, held_out))
        person = mean_face(self._held_out)
        if person is None:
            raise BadPhoto(f"no face was found in the {len(held_out)} photos held out: likeness cannot be measured")
        if not len(self._training):
            raise BadPhoto(
                f"no face was found in the {len(training)} photos that are trained on: likeness cannot be measured"
            )
        self._person = person
        self._count = config.likeness_pictures
        seeds = range(config.seed, config.seed + self._count)
        subject = default_caption(config.trigger_word, config.class_word)
        self.shots: list[tuple[str, int]] = [
            *((subject, seed) for seed in seeds),
            *((class_caption(config.class_word), seed) for seed in seeds),
            *((prompt, config.seed) for prompt in NEUTRAL_PROMPTS),
        ]
        """(prompt, seed) of the pictures that `measure` wants, in this order."""
        self.own = float(np.mean(self._alike(self._training)))
        """Likeness of the training photos themselves: what a perfect LoRA would have."""
        nearest = likeness(self._training, self._training)
        np.fill_diagonal(nearest, -1)
        self.own_copying = (
            float(np.mean(nearest.max(axis=1) - likeness(self._training, self._held_out).max(axis=1)))
            if len(nearest) > 1
            else 0.0
        )
        """The copying that the training photos show among themselves (a single one none): zero copying has this value."""
        self._base: list[Image.Image] = []
        self._base_class = 0.0

    def see_base(self, images: Sequence[Image.Image]) -> None:
        """Takes the base model's pictures of `shots`, which leakage and drift are measured from."""
        _, of_class, self._base = self._split(images)
        self._base_class = float(np.mean(self._alike(embed_images(self.network, of_class))))

    def measure(self, step: int, images: Sequence[Image.Image], merged: tuple[int, ...] = ()) -> LikenessPoint:
        """The LikenessPoint of a checkpoint that made these pictures of `shots`."""
        of_person, of_class, neutral = self._split(images)
        embedded = embed_images(self.network, of_person)
        scores = self._alike(embedded)
        seen = _seen(embedded)
        gap = (
            likeness(seen, self._training).max(axis=1) - likeness(seen, self._held_out).max(axis=1)
            if len(seen)
            else [0]
        )
        leaked = float(np.mean(self._alike(embed_images(self.network, of_class))))
        return LikenessPoint(
            step,
            likeness=float(np.mean(scores)),
            scores=tuple(float(score) for score in scores),
            copying=float(np.mean(gap)),
            leakage=leaked - self._base_class,
            drift=float(np.mean([picture_change(a, b) for a, b in zip(self._base, neutral, strict=True)])),
            merged=merged,
        )

    @property
    def scale(self) -> float:
        """Likeness from the base's pictures of the class to the person's own photos: what counts as much, for this person."""
        return max(self.own - self._base_class, 0.01)

    def cost(self, point: LikenessPoint) -> float:
        """What a checkpoint spoils, about 0 to 1: leakage, copying beyond the photos' own, and drift as a share of white."""
        spoiled = max(0.0, point.leakage) + max(0.0, point.copying - self.own_copying)
        return spoiled / self.scale + point.drift / 255

    def choose(self, points: Sequence[LikenessPoint]) -> LikenessPoint:
        """The point to keep: the most alike one, or of those that are shown to be as alike the one that costs least.

        Shown: over the same prompts and seeds, the mean shortfall plus its standard error is within TOLERANCE. That is
        a test of non-inferiority: with few pictures most differences are within the noise, which proves nothing.
        """
        best = max(points, key=lambda point: point.likeness)
        return min((point for point in points if self._is_as_alike(point, best)), key=self.cost)

    def enough(self, points: Sequence[LikenessPoint]) -> str | None:
        """Why more steps would not help, or None: likeness is flat, or the class is turning into the person."""
        best = max(points, key=lambda point: point.likeness)
        # The first of those as good as the best, so that a run that creeps up by a hair does not go on for ever.
        first = next(i for i, point in enumerate(points) if point.likeness >= best.likeness - TOLERANCE * self.scale)
        if len(points) - 1 - first >= PATIENCE:
            return f"likeness has not risen since step {points[first].step}"
        limit = LEAK_LIMIT * self.scale
        if len(points) > 1 and min(point.leakage for point in points[-2:]) > limit:
            return f"pictures without the trigger word look like the person too (leakage above {limit:.2f})"
        return None

    def _is_as_alike(self, point: LikenessPoint, best: LikenessPoint) -> bool:
        shortfall = np.subtract(best.scores, point.scores)
        error = shortfall.std(ddof=1) / math.sqrt(len(shortfall)) if len(shortfall) > 1 else 0.0
        return bool(shortfall.mean() + error <= TOLERANCE * self.scale)

    def _split(self, images: Sequence[Image.Image]) -> tuple[list[Image.Image], list[Image.Image], list[Image.Image]]:
        """The pictures of the trigger, of the class, and of the neutral prompts."""
        images = list(images)
        return images[: self._count], images[self._count : 2 * self._count], images[2 * self._count :]

    def _alike(self, embedded: np.ndarray) -> np.ndarray:
        """Cosines (N,) to the person; 0 where no face was found."""
        return np.nan_to_num(likeness(embedded, self._person[None])[:, 0])


class Selection:
    """The checkpoints of a run that may still be kept, with everything that was measured."""

    def __init__(self, watch: LikenessWatch):
        self.watch = watch
        self.points: list[LikenessPoint] = []
        self._values: dict[int, dict[str, Tensor]] = {}
        """Index of a point -> its adapter, on the CPU."""

    def add(self, point: LikenessPoint, values: Mapping[str, Tensor]) -> None:
        """Takes a checkpoint, and forgets those that are not of the MAX_CANDIDATES most alike."""
        self._values[len(self.points)] = {name: value.detach().cpu().clone() for name, value in values.items()}
        self.points.append(point)
        self._values = {index: self._values[index] for index in self._ranked()[:MAX_CANDIDATES]}

    def has(self, step: int) -> bool:
        """Whether the checkpoint of that step was measured."""
        return any(point.step == step and not point.merged for point in self.points)

    def average(self, count: int) -> tuple[tuple[int, ...], dict[str, Tensor]] | None:
        """Steps and mean values of the `count` most alike candidates (arXiv:1803.05407); None with fewer than two."""
        chosen = self._ranked()[:count]
        if len(chosen) < 2:
            return None
        parts = [self._values[index] for index in chosen]
        mean = {name: torch.stack([part[name] for part in parts]).mean(dim=0) for name in parts[0]}
        return tuple(sorted(self.points[index].step for index in chosen)), mean

    def choose(self) -> tuple[LikenessPoint, dict[str, Tensor]]:
        """The candidate to keep, by the watch's rule, and its adapter."""
        point = self.watch.choose([self.points[index] for index in self._values])
        return point, next(values for index, values in self._values.items() if self.points[index] is point)

    def metadata(self, kept: LikenessPoint) -> dict[str, str]:
        """The curve, for the file: numbers alone, which tell nobody what the person looks like."""
        described = {
            "network": self.watch.network.name,
            "photos": round(self.watch.own, 4),
            "photos_copying": round(self.watch.own_copying, 4),
            "kept": self.points.index(kept),
            "points": [
                {name: _rounded(value) for name, value in asdict(point).items() if name != "scores"}
                for point in self.points
            ],
        }
        return {LIKENESS_KEY: json.dumps(described)}

    def _ranked(self) -> list[int]:
        """Indices of the candidates, the most alike first."""
        return sorted(self._values, key=lambda index: -self.points[index].likeness)

    def pack(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Tensors and plain values for the state of a run, from which `unpack` makes the same selection."""
        tensors = {
            f"candidate.{index}.{name}": value
            for index, values in self._values.items()
            for name, value in values.items()
        }
        return tensors, [asdict(point) for point in self.points]

    def unpack(self, tensors: Mapping[str, Tensor], points: Sequence[Mapping[str, Any]]) -> None:
        """Goes on from what `pack` gave, among whatever other tensors."""
        self.points = [LikenessPoint(**_with_tuples(point)) for point in points]
        for key, value in tensors.items():
            if key.startswith("candidate."):
                index, _, name = key.removeprefix("candidate.").partition(".")
                self._values.setdefault(int(index), {})[name] = value


def hold_out(photos: Sequence[Photo], count: int, network: FaceNetwork) -> tuple[list[Photo], list[Photo]]:
    """(photos to train on, `count` photos held out), in their order: those nearest to the person's mean face are held out.

    A photo that nearly repeats another is never held out: its twin would be trained on. BadPhoto when too few are left.
    """
    embedded = _faces_of(network, photos)
    centre = mean_face(embedded)
    typical = (
        np.full(len(photos), -1.0) if centre is None else np.nan_to_num(likeness(embedded, centre[None])[:, 0], nan=-1)
    )
    hashes = [perceptual_hash(photo.image(shorter_side=HASH_SIDE)) for photo in photos]
    limits = Thresholds.for_resolution(1024, network.name)

    def repeats_another(index: int) -> bool:
        return any(
            i != index
            and hash_distance(hashes[index], other) <= limits.similar_picture
            and embedded[index] @ embedded[i] >= limits.same_picture_likeness
            for i, other in enumerate(hashes)
        )

    fit = [index for index in np.argsort(-typical) if typical[index] > -1 and not repeats_another(index)]
    if len(fit) < count or len(photos) - count < MIN_TRAINING_PHOTOS:
        raise BadPhoto(
            f"hold_out = {count}: of {len(photos)} photos {len(fit)} show a face and repeat no other, and at least "
            f"{MIN_TRAINING_PHOTOS} must be left to train on; hold out fewer, or add photos"
        )
    chosen = set(fit[:count])
    return (
        [photo for index, photo in enumerate(photos) if index not in chosen],
        [photo for index, photo in enumerate(photos) if index in chosen],
    )


def _faces_of(network: FaceNetwork, photos: Sequence[Photo]) -> np.ndarray:
    """float32 (N, D): who each photo shows; NaN without a face."""
    return embed_one_by_one(network, (photo.image(shorter_side=FACE_SIDE) for photo in photos))


def _seen(embedded: np.ndarray) -> np.ndarray:
    """The rows that are faces."""
    return embedded[~np.isnan(embedded).any(axis=1)]


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def picture_change(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of two pictures of one size, in grey levels, 0 to 255."""
    return float(np.abs(np.asarray(a, dtype=np.float32) - np.asarray(b, dtype=np.float32)).mean())
