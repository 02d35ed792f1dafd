"""The demo: the whole job on a small base model that comes with the package, with likeness measured.

It learns a person whom the base model has never seen from eight photos, with the code that trains on full-size checkpoints. Two
photos are held out as reference photos.
"""

import functools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..config import TrainConfig
from ..errors import BadConfig, BadFile
from ..faces import FaceNetwork, embed_images, likeness, load_faces, mean_face
from ..lora.file import LoraFile
from ..models.opening import DEMO_FILE, load_base
from ..photos import Photo
from ..pictures.generate import GenerateConfig, PictureJob, generate
from ..pictures.sheet import contact_sheet
from ..storage.drawn import PARTLY_DRAWN, save_png
from ..storage.files import make_folder, write_text
from ..training.callbacks import NO_CALLBACKS, Callbacks
from ..training.likeness import picture_change
from ..training.store import train
from .people import SEEN_PEOPLE, UNSEEN_PEOPLE, person_photos

FOLDER = Path(__file__).parent
BASE_FILE = DEMO_FILE
STYLE_PACK = "demo"
"""The style pack in FOLDER, with the only style that the base model knows."""
PICTURE_SIZE = (64, 80)
"""The width and height of a picture in pixels: the aspect of the photos at the base model's resolution."""
PICTURES = 8
"""The number of pictures drawn for each comparison, with seeds from 1."""
HELD_OUT = 2
"""The number of reference photos that are held out."""

CONFIG = TrainConfig(
    rank=16,
    steps=300,
    batch_size=8,
    learning_rate=3e-3,
    schedule="cosine",
    warmup_steps=10,
    min_snr_gamma=0.0,
    prior_prediction=0.5,
)
"""The demo's settings. Its learning rate suits a base model that is 200 times smaller than SD1.5's UNet."""
GUIDANCE = 2.5


@dataclass(frozen=True)
class DemoReport:
    """The measurements of a demo. Likeness is SFace's cosine: the same person has 0.55 or more, others less than 0.40."""

    person: int
    steps: int
    training_seconds: float
    file_bytes: int
    likeness_before: float
    """The mean likeness of the base model's pictures of the person to the held-out photos."""
    likeness_after: float
    """The mean likeness of pictures with the LoRA to the held-out photos."""
    likeness_of_photos: float
    """The mean likeness of the training photos to the held-out photos, as a perfect result would have."""
    rank1_before: int
    """The number of the base model's pictures that are more like the held-out photos than like any of 39 other people."""
    rank1_after: int
    """The number of pictures with the LoRA that are more like the held-out photos than like any of 39 other people."""
    pictures: int
    """The number of pictures of each kind."""
    class_likeness_before: float
    """The mean likeness of "a photo of person", without trigger word, to the held-out photos."""
    class_likeness_after: float
    """The mean likeness of "a photo of person" with the LoRA to the held-out photos: how much the class leaks."""
    class_change: float
    """The mean absolute change of the pictures of "a photo of person" by the LoRA, in grey levels (forgetting)."""
    faces_found: dict[str, int]
    """The number of pictures of each kind where a face was found; the others count as likeness 0."""

    @property
    def text(self) -> str:
        """The measurements in four lines for people to read."""
        return "\n".join(
            [
                f"person {self.person}, {self.steps} steps in {self.training_seconds:.0f} s, {self.file_bytes / 1e6:.2f} MB",
                f"likeness to held-out photos  {self.likeness_before:.2f} -> {self.likeness_after:.2f}"
                f"  (the photos themselves: {self.likeness_of_photos:.2f})",
                f"recognised among 40 people   {self.rank1_before} -> {self.rank1_after} of {self.pictures}",
                f'"a photo of person"          likeness {self.class_likeness_before:.2f} -> '
                f"{self.class_likeness_after:.2f}, changed by {self.class_change:.0f} grey levels",
            ]
        )


def run(
    output: str | os.PathLike[str],
    *,
    person: int = 35,
    config: TrainConfig | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
) -> DemoReport:
    """Train on eight photos of a person, and return a report; writes lora.safetensors and a contact sheet into `output`.

    `person` is one of UNSEEN_PEOPLE. The report is written to `output`/report.json, the sheet to `output`/contact_sheet.png.
    Raises BadConfig for another person, and MissingPackage if the photos or the face networks are not installed. Raises BadFile
    without the base model, or for a file of these names that is not a demo's.
    """
    if person not in UNSEEN_PEOPLE:
        raise BadConfig(f"person {person}: must be 35 to 40, since the base model has seen people 1 to 34")
    config = config or CONFIG
    output = make_folder(output)
    _check_files(output)
    faces = load_faces()
    photos = person_photos(person)
    training, held_out = photos[:-HELD_OUT], photos[-HELD_OUT:]
    base = load_base("demo")
    lora_path = output / "lora.safetensors"
    started = time.monotonic()
    train(
        [Photo.from_image(image, f"{number}.png") for number, image in enumerate(training, start=1)],
        base,
        config,
        output=lora_path,
        restart=True,
        callbacks=callbacks,
    )
    training_seconds = time.monotonic() - started
    lora = LoraFile.read(lora_path)

    def pictures(prompt: str, loras: Sequence[tuple[LoraFile, float]]) -> list[Image.Image]:
        jobs = [PictureJob(prompt, seed, size=PICTURE_SIZE, guidance=GUIDANCE) for seed in range(1, PICTURES + 1)]
        return [picture.image for picture in generate(base, loras, jobs, GenerateConfig(batch_size=PICTURES))]

    subject, subject_class = f"a photo of {config.trigger_word} {config.class_word}", f"a photo of {config.class_word}"
    before, after = pictures(subject, []), pictures(subject, [(lora, 1.0)])
    class_before, class_after = pictures(subject_class, []), pictures(subject_class, [(lora, 1.0)])

    named = {"before": before, "after": after, "class_before": class_before, "class_after": class_after}
    judge = Judge(faces, person, held_out)
    report = DemoReport(
        person=person,
        steps=config.steps,
        training_seconds=round(training_seconds, 1),
        file_bytes=lora_path.stat().st_size,
        likeness_before=_mean(judge.likeness(before)),
        likeness_after=_mean(judge.likeness(after)),
        likeness_of_photos=_mean(judge.likeness(training)),
        rank1_before=judge.recognised(before),
        rank1_after=judge.recognised(after),
        pictures=PICTURES,
        class_likeness_before=_mean(judge.likeness(class_before)),
        class_likeness_after=_mean(judge.likeness(class_after)),
        class_change=_mean([picture_change(a, b) for a, b in zip(class_before, class_after, strict=True)]),
        faces_found={
            name: int((~np.isnan(embed_images(faces, images)).any(axis=1)).sum())
            for name, images in named.items()
        },
    )  # fmt: skip
    rows = [
        ("photos to train on", training),
        ("photos held out", held_out),
        (f'the base model: "{subject}"', before),
        (f'with the LoRA: "{subject}"', after),
        (f'the base model: "{subject_class}"', class_before),
        (f'with the LoRA: "{subject_class}"', class_after),
    ]
    labels = [[f"{value:.2f}" for value in judge.likeness(images)] for _, images in rows]
    title = f"likeness to the photos held out: {report.likeness_before:.2f} before, {report.likeness_after:.2f} after"
    sheet = contact_sheet(rows, labels=labels, title=title)
    save_png(output / "contact_sheet.png", sheet, mark=PARTLY_DRAWN)  # It also has the photos.
    write_text(output / "report.json", json.dumps(asdict(report), indent=1) + "\n")
    return report


def _check_files(output: Path) -> None:
    lora, report, sheet = (output / name for name in ("lora.safetensors", "report.json", "contact_sheet.png"))
    foreign = []
    if lora.exists() and LoraFile.read(lora).metadata.get("ss_sd_model_name") != BASE_FILE.name:
        foreign.append(lora)
    if report.exists() and "class_likeness_before" not in report.read_text("utf-8", "replace"):
        foreign.append(report)
    if sheet.exists() and not report.exists():
        foreign.append(sheet)
    if foreign:
        raise BadFile(f"{foreign[0]}: the demo would replace this file, but did not make it; choose another output")


class Judge:
    """Judges pictures by a person's held-out photos and by the photos of all other people."""

    def __init__(self, faces: FaceNetwork, person: int, held_out: Sequence[Image.Image]):
        self.faces = faces
        self.reference: np.ndarray = _centre(faces, held_out)
        others = [other for other in (*SEEN_PEOPLE, *UNSEEN_PEOPLE) if other != person]
        self.others: np.ndarray = np.stack([_centre_of(faces, other) for other in others])

    def likeness(self, images: Sequence[Image.Image]) -> list[float]:
        """Return the cosine of each picture to the held-out photos; 0 if no face is found."""
        return [round(float(value), 4) for value in likeness(self._embed(images), self.reference[None])[:, 0]]

    def recognised(self, images: Sequence[Image.Image]) -> int:
        """Return the number of pictures that are more like the held-out photos than like any other person."""
        embedded = self._embed(images)
        own, other = likeness(embedded, self.reference[None])[:, 0], likeness(embedded, self.others).max(axis=1)
        return int((own > other).sum())

    def _embed(self, images: Sequence[Image.Image]) -> np.ndarray:
        return np.nan_to_num(embed_images(self.faces, images))


@functools.cache
def _centre_of(faces: FaceNetwork, person: int) -> np.ndarray:
    """Return the mean face of all ten photos of a person. It is cached, since judges of other people need it too."""
    return _centre(faces, person_photos(person))


def _centre(faces: FaceNetwork, photos: Sequence[Image.Image]) -> np.ndarray:
    person = mean_face(embed_images(faces, photos))
    assert person is not None, "every person in the set has a photo with a detectable face"
    return person


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)
