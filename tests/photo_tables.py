"""The tables of docs/photos.md: `python -m tests.photo_tables` measures them and writes them there (about a minute)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from core.faces import Face, FaceNetwork, likeness
from core.photos import Photo, Thresholds, check_photos
from tests.face_samples import NUMBERS, PEOPLE, orl


@dataclass(frozen=True)
class Verification:
    """How well likeness tells same-person pairs from other pairs."""

    auc: float
    """Probability that a same-person pair is more alike than a pair of two people."""
    equal_error_rate: float
    """Share of wrong answers at `threshold`, where both kinds of error are equally frequent."""
    threshold: float
    same: np.ndarray
    """Likeness of all same-person pairs, ascending."""
    other: np.ndarray
    """Likeness of all other pairs, ascending."""


def verification(vectors: np.ndarray, people: np.ndarray) -> Verification:
    """Figures over all pairs of rows of `vectors` (N, D), where people[i] says who row i is."""
    pairs = np.triu_indices(len(vectors), 1)
    alike = likeness(vectors, vectors)[pairs]
    is_same = (people[:, None] == people)[pairs]
    same, other = np.sort(alike[is_same]), np.sort(alike[~is_same])
    thresholds = np.linspace(-1, 1, 2001)
    refused = np.searchsorted(same, thresholds) / len(same)
    accepted = 1 - np.searchsorted(other, thresholds) / len(other)
    equal = int(np.abs(refused - accepted).argmin())
    auc = float(np.searchsorted(other, same).mean() / len(other))
    return Verification(auc, float(refused[equal] + accepted[equal]) / 2, float(thresholds[equal]), same, other)


class Remembering:
    """A face network that answers at once about a picture that it has seen before."""

    def __init__(self, network: FaceNetwork) -> None:
        self.name = network.name
        self._network = network
        self._faces: dict[bytes, list[Face]] = {}
        self._vectors: dict[tuple[bytes, bytes], np.ndarray] = {}

    def detect(self, image: Image.Image) -> list[Face]:
        key = _key(image)
        if key not in self._faces:
            self._faces[key] = self._network.detect(image)
        return self._faces[key]

    def embed(self, images: Sequence[Image.Image], faces: Sequence[Face]) -> np.ndarray:
        keys = [(_key(image), face.landmarks.tobytes()) for image, face in zip(images, faces, strict=True)]
        for key, image, face in zip(keys, images, faces, strict=True):
            if key not in self._vectors:
                self._vectors[key] = self._network.embed([image], [face])[0]
        return np.stack([self._vectors[key] for key in keys]) if keys else self._network.embed([], [])


def _key(image: Image.Image) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


def find_intruders(network: FaceNetwork) -> tuple[float, float]:
    """(share of intruders rejected, share of right photos taken for someone else) in 400 sets of ten ORL photos.

    In the set for photo k of person p, that photo is replaced by a random photo of a random other person.
    """
    photos = {(p, k): Photo.from_image(orl(p, k), f"{p}/{k}") for p in PEOPLE for k in NUMBERS}
    chance = random.Random(0)
    found, wrongly, right = 0, 0, 0
    for person in PEOPLE:
        for number in NUMBERS:
            other = chance.choice([p for p in PEOPLE if p != person])
            intruder = photos[other, chance.choice(NUMBERS)]
            members = [photos[person, k] for k in NUMBERS if k != number]
            report = check_photos([*members, intruder], network, Thresholds.for_resolution(64))
            named = [any("someone else (" in f.sentence for f in item.findings) for item in report.photos]
            found += named[-1]
            wrongly += sum(named[:-1])
            right += len(members)
    return found / (len(PEOPLE) * len(NUMBERS)), wrongly / right
