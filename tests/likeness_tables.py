"""The tables of docs/likeness.md: `python -m tests.likeness_tables` measures them and writes them there (about half an hour).

Each of the people whom the demo's base model has never seen, and one person from colour photos, is trained with and without
prior prediction. One run gives two LoRAs: that of the last step, and the one that was selected by two held-out photos. Both
are judged by two further photos and by pictures of other seeds, which neither the training nor the selection has seen.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from core.base import load_base
from core.config import TrainConfig
from core.demo import BASE_FILE, CONFIG, GUIDANCE, PICTURE_SIZE, Judge
from core.demo.people import UNSEEN_PEOPLE, person_photos
from core.faces import load_faces
from core.generate import GenerateConfig, Job, generate
from core.likeness import LIKENESS_KEY, picture_change
from core.lora_file import LoraFile
from core.photos import Photo
from core.photos.captions import class_caption, default_caption
from core.photos_to_lora import train
from tests.face_samples import sdist_photos
from tests.photo_tables import replace_table, table

DOCUMENT = Path(__file__).parent.parent / "docs" / "likeness.md"
PRIORS = {"none": 0.0, "prior prediction 0.5": 0.5}
SEEDS = range(101, 109)
MEASUREMENTS = 5
"""Times that likeness is measured during a run."""


@dataclass(frozen=True)
class Result:
    person: str
    prior: str
    kept: str
    step: int
    likeness: float
    """Mean cosine to the test photos of pictures with the trigger word; 0 where no face is found."""
    rank1: float
    """Share of those pictures that are more like the test photos than like any other person of the set."""
    leakage: float
    """Rise of the cosine of pictures without the trigger word."""
    drift: float
    """Mean change of pictures of the class from the base's, in grey levels."""


@dataclass(frozen=True)
class Person:
    number: int
    """In the set; 0 for someone else."""
    training: Sequence[Image.Image]
    held_out: Sequence[Image.Image]
    test: Sequence[Image.Image]


def people() -> dict[str, Person]:
    """The unseen people with 6, 2 and 2 photos, and one in colour, of whom there are three pictures and a few crops."""
    found = {}
    for number in UNSEEN_PEOPLE:
        photos = person_photos(number)
        found[str(number)] = Person(number, photos[:6], photos[6:8], photos[8:])
    colour = sdist_photos("face_recognition", "1.3.0", "tests/test_images")

    def framed(*names: str) -> list[Image.Image]:
        return [framed_like_the_set(colour[f"obama{name}.jpg"]) for name in names]

    found["colour"] = Person(0, framed("", "_partial_face", "_partial_face2"), framed("2"), framed("3"))
    return found


def framed_like_the_set(image: Image.Image) -> Image.Image:
    """The part of a photo that has the face as large and as central as the set's photos, twice their size."""
    left, top, right, bottom = load_faces().detect(image)[0].box
    height = 1.55 * (bottom - top)
    x, y = (left + right) / 2 - height * 92 / 112 / 2, (top + bottom) / 2 - height / 2
    box = (round(x), round(y), round(x + height * 92 / 112), round(y + height))
    return image.crop(box).resize((184, 224), Image.Resampling.LANCZOS)


def measure(name: str, person: Person, config: TrainConfig, prior: str) -> list[Result]:
    """The Results of one run: of the last step and of the selected one."""
    base = load_base(BASE_FILE)
    judge = Judge(load_faces(), person.number, person.test)
    training, held_out = (
        [Photo.from_image(image, f"{number}.png") for number, image in enumerate(images)]
        for images in (person.training, person.held_out)
    )

    def draw(prompt: str, lora: LoraFile | None) -> list[Image.Image]:
        loras = [] if lora is None else [(lora, 1.0)]
        jobs = [Job(prompt, seed, size=PICTURE_SIZE, guidance=GUIDANCE) for seed in SEEDS]
        return [picture.image for picture in generate(base, loras, jobs, GenerateConfig(batch_size=len(jobs)))]

    with tempfile.TemporaryDirectory() as folder:
        selected = train(training, base, config, held_out=held_out, output=Path(folder) / "lora.safetensors")
        last = next(Path(folder).glob("lora-step*"), None)
        last = selected if last is None else LoraFile.read(last)
        print(selected.metadata[LIKENESS_KEY], flush=True)
        subject, of_class = default_caption(config.trigger_word, config.class_word), class_caption(config.class_word)
        class_before, results = draw(of_class, None), []
        for kept, lora in (("last step", last), ("selected", selected)):
            of_person, class_after = draw(subject, lora), draw(of_class, lora)
            results.append(
                Result(
                    name, prior, kept, int(lora.metadata["ss_steps"]),
                    likeness=float(np.mean(judge.likeness(of_person))),
                    rank1=judge.recognised(of_person) / len(of_person),
                    leakage=float(np.mean(judge.likeness(class_after)) - np.mean(judge.likeness(class_before))),
                    drift=float(np.mean([picture_change(a, b) for a, b in zip(class_before, class_after, strict=True)])),
                )
            )  # fmt: skip
    return results


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    return [
        (
            result.person, result.prior, result.kept, str(result.step), f"{result.likeness:.2f}", f"{result.rank1:.0%}",
            f"{result.leakage:.2f}", f"{result.drift:.1f}",
        )
        for result in results
    ]  # fmt: skip


def means(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Mean over the people (and standard deviation of likeness) of each way to train and to keep."""
    summary = []
    for prior in PRIORS:
        for kept in ("last step", "selected"):
            group = [result for result in results if (result.prior, result.kept) == (prior, kept)]
            alike = [result.likeness for result in group]
            summary.append(
                (
                    prior, kept, f"{np.mean([r.step for r in group]):.0f}", f"{np.mean(alike):.3f} ± {np.std(alike):.3f}",
                    f"{np.mean([r.rank1 for r in group]):.0%}", f"{np.mean([r.leakage for r in group]):.3f}",
                    f"{np.mean([r.drift for r in group]):.1f}",
                )
            )  # fmt: skip
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=CONFIG.steps, help="of each run")
    parser.add_argument("--person", action="append", help="only this one, and write nothing; may be repeated")
    options = parser.parse_args()
    results = []
    for name, person in people().items():
        if options.person and name not in options.person:
            continue
        for prior, share in PRIORS.items():
            started = time.monotonic()
            every = options.steps // MEASUREMENTS
            config = replace(
                CONFIG, steps=options.steps, prior_prediction=share, sample_every=every, save_every=options.steps,
                sample_guidance=GUIDANCE, sample_steps=12, likeness_pictures=8,
            )  # fmt: skip
            results += measure(name, person, config, prior)
            print(
                *(asdict(result) for result in results[-2:]),
                f"{time.monotonic() - started:.0f} s",
                sep="\n",
                flush=True,
            )
    columns = ("prior", "kept", "step", "likeness", "rank-1", "leakage", "drift")
    tables = {"people": table(("person", *columns), rows(results)), "means": table(columns, means(results))}
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, content in tables.items():
        print(f"\n{content}")
        text = replace_table(text, name, content)
    if not options.person:
        DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
