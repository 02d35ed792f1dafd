"""Measure how alike faces are: to each other, to a person's photos, and to the photos that a LoRA was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

import numpy as np
from PIL import Image

from ..errors import BadPhoto, counted
from .face import Face, FaceNetwork
from .networks import load_faces

LIKENESS, TO_TRAINED_ON = "likeness", "similarity to the photos it was trained on"
"""What a cosine to photos is called: the second if a LoRA has seen all of them, so that it says little about the person."""


def embed_images(network: FaceNetwork, images: Sequence[Image.Image]) -> np.ndarray:
    """Return the identity vectors of the largest face in each picture, float32 (N, D); a row of NaN without a face."""
    found = [(i, image, faces[0]) for i, image in enumerate(images) if (faces := network.detect(image))]
    vectors = network.embed([image for _, image, _ in found], [face for _, _, face in found])
    result = np.full((len(images), vectors.shape[1]), np.nan, np.float32)
    result[[i for i, _, _ in found]] = vectors
    return result


def likeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosines (N, M), -1 to 1, of each row of `a` (N, D) with each row of `b` (M, D); NaN if a face is missing.

    With SFace, the same person is mostly above 0.55, and other people mostly below 0.40 (see docs/photos.md).
    """
    return a @ b.T


def mean_face(embeddings: np.ndarray) -> np.ndarray | None:
    """Return the mean of identity vectors (N, D), scaled to length 1: float32 (D,). None if every row is NaN.

    Rows of NaN, for pictures without a face, are ignored.
    """
    seen = embeddings[~np.isnan(embeddings).any(axis=1)]
    if not len(seen):
        return None
    mean = seen.mean(axis=0)
    return mean / np.linalg.norm(mean)


def likeness_to_rest(vectors: np.ndarray) -> list[float]:
    """Return each face's cosine to the mean face of the other rows (N, D), without rows of NaN. Empty for a single face."""
    seen = vectors[~np.isnan(vectors).any(axis=1)]
    rest = (mean_face(np.delete(seen, i, axis=0)) for i in range(len(seen)))
    return [float(row @ other) for row, other in zip(seen, rest, strict=True) if other is not None]


def copy_paste(pictures: np.ndarray, references: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Return how much each picture copies a photo instead of showing the person: (N,), 1 for a copy, 0 for neither.

    The measure of MultiID-Bench (arXiv:2510.14975): (angle to truth - angle to reference) / angle between truth and reference,
    from -1 to 1. The reference is the nearest of the photos trained on, `references` (M, D). The truth is the nearest of the
    photos that training has not seen, `truths` (K, D). All rows are identity vectors of faces that were found.
    """
    angles, between = (np.arccos(np.clip(likeness(rows, truths), -1, 1)) for rows in (pictures, references))
    to_reference = np.arccos(np.clip(likeness(pictures, references), -1, 1))
    reference, truth = to_reference.argmin(axis=1), angles.argmin(axis=1)
    return (angles.min(axis=1) - to_reference.min(axis=1)) / np.maximum(between[reference, truth], 1e-6)


def faces_one_by_one(network: FaceNetwork, images: Iterable[Image.Image]) -> tuple[list[Face | None], np.ndarray]:
    """Return the largest face in each picture, and the identity vectors, with only one picture in memory.

    A picture without a face has None and a row of NaN. The vectors are float32 (N, D).
    """
    rows = [network.embed([], [])]
    missing = np.full_like(rows[0], np.nan, shape=(1, rows[0].shape[1]))
    faces: list[Face | None] = []
    for image in images:
        found = network.detect(image)[:1]
        faces += found or [None]
        rows.append(network.embed([image], found) if found else missing)
    return faces, np.concatenate(rows)


def embed_one_by_one(network: FaceNetwork, images: Iterable[Image.Image]) -> np.ndarray:
    """Return the identity vectors of `faces_one_by_one`."""
    return faces_one_by_one(network, images)[1]


class Reference:
    """The mean face of a person on photos, which pictures are compared with."""

    def __init__(
        self,
        network: FaceNetwork,
        vectors: Sequence[np.ndarray],
        shares: Sequence[float],
        photos: int,
        measure: str = LIKENESS,
    ):
        """Take the identity vectors (D,) that the network found on `photos` photos; for `shares` see `share`.

        Raises BadPhoto without any vector, when no photo shows a face.
        """
        if not len(vectors):
            raise BadPhoto(f"no face was found in the {counted(photos, 'photo')} to compare with")
        self.network: FaceNetwork = network
        self.measure: str = measure
        """What its cosines are called: LIKENESS or TO_TRAINED_ON."""
        self._face: np.ndarray = np.mean(vectors, axis=0)
        self._face /= np.linalg.norm(self._face)
        self.share: float = median(shares)
        """The median share of a photo that the face fills: the square root of the face's area over the photo's."""

    @classmethod
    def on(cls, photos: Iterable[Image.Image], network: FaceNetwork | None = None) -> Reference:
        """Return the person on photos, using the largest face of each; `network` defaults to `load_faces()`.

        Photos are not kept, so an iterator needs memory for one at a time. Raises BadPhoto if no photo shows a face.
        """
        network = network or load_faces()
        vectors: list[np.ndarray] = []
        shares: list[float] = []
        count = 0
        for count, photo in enumerate(photos, start=1):  # noqa: B007, used in the error without a face
            if faces := network.detect(photo):
                vectors.append(network.embed([photo], faces[:1])[0])
                shares.append(faces[0].share_of(photo.size))
        return cls(network, vectors, shares, count)

    def likeness(self, images: Iterable[Image.Image]) -> list[float | None]:
        """Return the cosine of each picture's largest face to the person's; None if a picture shows no face."""
        return [score for score, _ in self.compare(images)]

    def compare(self, images: Iterable[Image.Image]) -> list[tuple[float | None, Face | None]]:
        """Return the cosine of each picture's largest face to the person's, and that face; (None, None) without a face."""
        found = ((image, self.network.detect(image)[:1]) for image in images)
        return [(self.of_faces(image, faces)[0], faces[0]) if faces else (None, None) for image, faces in found]

    def of_faces(self, image: Image.Image, faces: Sequence[Face]) -> list[float]:
        """Return the cosine of each of the picture's faces to the person's."""
        vectors = self.network.embed([image] * len(faces), faces)
        return [round(float(score), 4) for score in likeness(vectors, self._face[None])[:, 0]]
