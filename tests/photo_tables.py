"""The tables of docs/photos.md: `python -m tests.photo_tables` measures them and writes them there (about a minute)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from core.faces import likeness


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
