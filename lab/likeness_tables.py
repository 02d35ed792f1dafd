"""The tables of docs/likeness.md: `python -m lab.likeness_tables` measures them and writes them there (over an hour).

Each of the people whom the demo's base model has never seen, and one person from colour photos, is trained with and without
prior prediction. In each run likeness is measured four times by two held-out photos, which is what the selection sees.
The LoRA of each of these steps is then judged by two further photos and by pictures of other seeds, which neither the
training nor the selection has seen. A run's record is a file, so that the work can be done in pieces, and so that other
rules can be tried on the same runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from core.config import TrainConfig
from core.demo import BASE_FILE, CONFIG, GUIDANCE, PICTURE_SIZE, Judge
from core.demo.people import UNSEEN_PEOPLE, person_photos
from core.faces import load_faces
from core.lora.file import LoraFile
from core.models import Base, load_base
from core.photos import Photo
from core.photos.captions import class_caption, default_caption
from core.pictures.generate import GenerateConfig, PictureJob, generate
from core.storage.files import write_text
from core.training import train
from core.training.callbacks import Callbacks, StepReport
from core.training.likeness import TOLERANCE, LikenessPoint, LikenessWatch, Selection, faces_of, picture_change
from tests.face_samples import sdist_photos
from tools.tables import table, write_tables

DOCUMENT = Path(__file__).parent.parent / "docs" / "likeness.md"
PRIORS = {"none": 0.0, "prior prediction 0.5": 0.5}
KEPT = ("last step", "selected")
SEEDS = range(101, 109)
"""Of the pictures to judge by; the selection's count from 1."""
SAMPLE_STEPS = 10
MEASUREMENTS = 4
"""Times that likeness is measured during a run."""


@dataclass(frozen=True)
class Judgement:
    """What an intermediate LoRA is worth on photos and pictures that the selection has not seen."""

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
class Record:
    """One run: what the selection saw at each step, and what each of these steps is worth."""

    person: str
    prior: str
    points: tuple[LikenessPoint, ...]
    judgements: tuple[Judgement, ...]


@dataclass(frozen=True)
class Result:
    person: str
    prior: str
    kept: str
    """One of KEPT."""
    judgement: Judgement


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


def photos(images: Sequence[Image.Image]) -> list[Photo]:
    return [Photo.from_image(image, f"{number}.png") for number, image in enumerate(images)]


def settings(prior: str) -> TrainConfig:
    """Return the demo's settings with half the batch and a constant rate. With a falling rate, the last LoRAs hardly differ."""
    every = CONFIG.steps // MEASUREMENTS
    return replace(
        CONFIG, batch_size=4, schedule="constant", prior_prediction=PRIORS[prior], sample_every=every, save_every=every,
        keep="last", sample_guidance=GUIDANCE, sample_steps=SAMPLE_STEPS, likeness_pictures=8,
    )  # fmt: skip


def measure(name: str, person: Person, prior: str) -> Record:
    """The Record of one run."""
    base, config = load_base(BASE_FILE), settings(prior)
    judge = Judge(load_faces(), person.number, person.test)
    points: list[LikenessPoint] = []

    def on_step(report: StepReport) -> None:
        if report.likeness and report.likeness not in points:
            points.append(report.likeness)
            print(f"{name}, {prior}: step {report.step}, likeness {report.likeness.likeness:.3f}", flush=True)

    judged, judgements = judged_by(judge, base, config), []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "lora.safetensors"
        train(
            photos(person.training),
            base,
            config,
            held_out=photos(person.held_out),
            output=output,
            restart=True,
            callbacks=Callbacks(on_step=on_step),
        )
        for path in [*sorted(output.parent.glob("lora-step*")), output]:
            judgements.append(judged(LoraFile.read(path)))
    return Record(name, prior, tuple(points), tuple(judgements))


def judged_by(judge: Judge, base: Base, config: TrainConfig) -> Callable[[LoraFile], Judgement]:
    """A function from a LoRA to its Judgement, by the same pictures for each."""

    def draw(prompt: str, lora: LoraFile | None) -> list[Image.Image]:
        loras = [] if lora is None else [(lora, 1.0)]
        jobs = [PictureJob(prompt, seed, size=PICTURE_SIZE, guidance=GUIDANCE, steps=SAMPLE_STEPS) for seed in SEEDS]
        return [picture.image for picture in generate(base, loras, jobs, GenerateConfig(batch_size=len(jobs)))]

    subject, of_class = default_caption(config.trigger_word, config.class_word), class_caption(config.class_word)
    class_before = draw(of_class, None)

    def judgement(lora: LoraFile) -> Judgement:
        of_person, class_after = draw(subject, lora), draw(of_class, lora)
        return Judgement(
            int(lora.metadata["ss_steps"]),
            likeness=float(np.mean(judge.likeness(of_person))),
            rank1=judge.recognised(of_person) / len(of_person),
            leakage=float(np.mean(judge.likeness(class_after)) - np.mean(judge.likeness(class_before))),
            drift=float(np.mean([picture_change(a, b) for a, b in zip(class_before, class_after, strict=True)])),
        )

    return judgement


def read_record(path: Path) -> Record:
    values = json.loads(path.read_text(encoding="utf-8"))
    points = (LikenessPoint(**point | {"scores": tuple(point["scores"])}) for point in values["points"])
    judgements = (Judgement(**judgement) for judgement in values["judgements"])
    return Record(values["person"], values["prior"], tuple(points), tuple(judgements))


def watch_of(record: Record, person: Person) -> LikenessWatch:
    """What has measured the record's points."""
    network = load_faces()
    training, held_out = (faces_of(network, photos(some)) for some in (person.training, person.held_out))
    return LikenessWatch(network, training, held_out, settings(record.prior))


def results_of(record: Record, watch: LikenessWatch) -> list[Result]:
    """What the last step is worth, and what the step that the selection keeps."""
    selection = Selection(watch)
    for point in record.points:
        selection.add(point, {})
    kept, _ = selection.choose()
    judged = {judgement.step: judgement for judgement in record.judgements}
    return [
        Result(record.person, record.prior, name, judged[point.step])
        for name, point in zip(KEPT, (record.points[-1], kept), strict=True)
    ]


def most_alike(watch: LikenessWatch, points: Sequence[LikenessPoint]) -> LikenessPoint:
    return max(points, key=lambda point: point.likeness)


def one_standard_error(watch: LikenessWatch, points: Sequence[LikenessPoint]) -> LikenessPoint:
    """The cheapest whose mean shortfall is within its standard error: Breiman et al., 1984."""

    def may_be_as_alike(point: LikenessPoint) -> bool:
        shortfall = np.subtract(most_alike(watch, points).scores, point.scores)
        return shortfall.mean() <= max(shortfall.std(ddof=1) / len(shortfall) ** 0.5, TOLERANCE * watch.scale)

    return min(filter(may_be_as_alike, points), key=watch.cost)


RULES = {
    "most alike": most_alike,
    "one standard error": one_standard_error,
    "shown to be as alike": LikenessWatch.choose,
}


def rules(records: Sequence[Record], watches: Sequence[LikenessWatch]) -> list[tuple[str, ...]]:
    """What each rule gains over the last step, with all pictures and with each choice of fewer."""
    summary = []
    for name, rule in RULES.items():
        for count in (2, 4, 8):
            gains = []
            for record, watch in zip(records, watches, strict=True):
                judged = {judgement.step: judgement for judgement in record.judgements}
                last = judged[record.points[-1].step]
                for chosen in itertools.combinations(range(8), count):
                    points = [seen_by(point, chosen) for point in record.points]
                    kept = judged[rule(watch, points).step]
                    gains.append((kept.likeness - last.likeness, kept.leakage - last.leakage, kept.drift - last.drift))
            alike, leakage, drift = np.array(gains).T
            worst = f"{alike.min():+.2f}"
            summary.append(
                (name, str(count), f"{alike.mean():+.4f}", worst, f"{leakage.mean():+.4f}", f"{drift.mean():+.2f}")
            )
    return summary


def seen_by(point: LikenessPoint, pictures: Sequence[int]) -> LikenessPoint:
    """The point if likeness had been measured on those of its pictures alone."""
    scores = tuple(point.scores[index] for index in pictures)
    return replace(point, scores=scores, likeness=float(np.mean(scores)))


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    return [
        (
            result.person, result.prior, result.kept, str(judged.step), f"{judged.likeness:.2f}", f"{judged.rank1:.0%}",
            f"{judged.leakage:.2f}", f"{judged.drift:.1f}",
        )
        for result in results
        for judged in [result.judgement]
    ]  # fmt: skip


def means(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Mean over the people (and standard deviation of likeness) of each way to train and to keep."""
    summary = []
    for prior in PRIORS:
        for kept in KEPT:
            group = [result.judgement for result in results if (result.prior, result.kept) == (prior, kept)]
            alike = [judged.likeness for judged in group]
            summary.append(
                (
                    prior, kept, f"{np.mean([j.step for j in group]):.0f}", f"{np.mean(alike):.3f} ± {np.std(alike):.3f}",
                    f"{np.mean([j.rank1 for j in group]):.0%}", f"{np.mean([j.leakage for j in group]):.3f}",
                    f"{np.mean([j.drift for j in group]):.1f}",
                )
            )  # fmt: skip
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--records", type=Path, required=True, metavar="DIR", help="what is there is not measured again"
    )
    parser.add_argument("--person", action="append", help="only this one, and write no table; may be repeated")
    parser.add_argument("--prior", action="append", choices=tuple(PRIORS), help="likewise")
    options = parser.parse_args()
    options.records.mkdir(parents=True, exist_ok=True)
    runs = [
        (options.records / f"{name}-{PRIORS[prior]:g}.json", name, person, prior)
        for prior in options.prior or PRIORS
        for name, person in people().items()
        if not options.person or name in options.person
    ]
    for path, name, person, prior in runs:
        if not path.exists():
            started = time.monotonic()
            write_text(path, json.dumps(asdict(measure(name, person, prior)), indent=1) + "\n")
            print(f"{path.name}: {time.monotonic() - started:.0f} s", flush=True)
    records = [read_record(path) for path, *_ in runs]
    watches = [watch_of(record, person) for record, (_, _, person, _) in zip(records, runs, strict=True)]
    results = [result for record, watch in zip(records, watches, strict=True) for result in results_of(record, watch)]
    columns = ("prior", "kept", "step", "likeness", "rank-1", "leakage", "drift")
    tables = {"people": table(("person", *columns), rows(results))}
    if not options.person and not options.prior:
        tables["means"] = table(columns, means(results))
        header = ("rule", "pictures", "likeness", "worst", "leakage", "drift")
        tables["rules"] = table(header, rules(records, watches))
    print(*tables.values(), sep="\n\n")
    if "means" in tables:
        write_tables(DOCUMENT, tables)


if __name__ == "__main__":
    main()
