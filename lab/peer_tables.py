"""The comparison with other trainers in docs/other-trainers.md: `python -m lab.peer_tables --work DIR` makes what is missing.

Each trainer learns the same people, from the same photos and captions, on the demo's base model, with one thread. Its LoRAs
after each budget of processor time go into DIR, where they aren't trained again. Then three networks compare their pictures of
fixed seeds with two further photos; only FaceLoRA selects by one of them, SFace. The results are lines of RECORDS.

How many steps fit into a budget is counted from COSTS, which `--costs` measures in turns: other work on the machine would give
the trainers unequal minutes. It needs dlib (pip install dlib-bin && pip install --no-deps face_recognition_models), the file
`fr_feature.onnx` of the npm package faceplugin-face-recognition-js 0.0.1 (MIT), and a ComfyUI with the Python that runs it.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from core.demo.people import SEEN_PEOPLE, UNSEEN_PEOPLE, person_photos
from core.faces import FaceNetwork, embed_images, likeness, load_faces, mean_face
from core.lora.file import LoraFile
from core.photos.captions import class_caption, default_caption
from core.storage.files import write_text
from core.training.likeness import picture_change
from lab.peer_trainers import ComfyUI, Diffusers, FaceLora, Trainer
from lab.recipe_tables import TEST, by_base, copying, draw, mean, with_error
from tools.tables import table, write_tables

DOCUMENT = Path(__file__).parent.parent / "docs" / "other-trainers.md"
PLOT = DOCUMENT.parent / "images" / "other-trainers.svg"
RECORDS, COSTS = (Path(__file__).with_name(name) for name in ("peer_runs.jsonl", "peer_costs.json"))
COLOURS = ("#1d4ed8", "#b45309", "#047857", "#be123c", "#6d28d9", "#475569")
MINUTES = (0.5, 1.0, 2.0)
"""The budgets of processor time. FaceLoRA's own length takes 1.7 minutes by COSTS."""
RATE = ", rate "
PROBES = (24, 72)
"""The steps of the two runs that a trainer's cost is computed from."""
HEADER = (
    "trainer", "minutes", "steps", "likeness: SFace", "dlib", "Faceplugin", "leakage: SFace", "dlib", "Faceplugin", "drift",
    "rank-1", "copying",
)  # fmt: skip
CLASS_IMAGES = 200
"""As diffusers' page recommends."""


@dataclass(frozen=True)
class Cost:
    """Processor seconds of a trainer: of a run whatever its length, and of each step."""

    fixed: float
    step: float

    def steps(self, minutes: float) -> int:
        """The steps that fit into so many minutes."""
        return max(1, int((60 * minutes - self.fixed) / self.step))


@dataclass(frozen=True)
class Verdict:
    """What one face network says of the pictures of one LoRA."""

    likeness: float
    """Mean cosine to the test photos of pictures with the trigger word; 0 where no face is found."""
    leakage: float
    """How much nearer the pictures of the class come to the test photos through the LoRA."""
    rank1: float
    """Share of the pictures that are more like the test photos than like any other person of the set."""
    copying: float
    """As `recipe_tables.copying`: mean cosine to the nearest training photo minus that to the nearest test photo."""


@dataclass(frozen=True)
class Row:
    """One LoRA."""

    trainer: str
    person: int
    seed: int
    minutes: float
    steps: int
    drift: float
    """Mean change of pictures of the class from the base's, in grey levels."""
    verdicts: dict[str, Verdict]
    """By the network's name."""


def trainers(
    class_images: Path, comfyui: Path | None, python: Path | None, rate: float | None
) -> Mapping[str, Trainer]:
    """All trainers by their name in the table, the peers at that rate if one is given."""
    of_ours = {
        name: FaceLora(options)
        for name, options in {
            "FaceLoRA": "",
            "FaceLoRA without prior prediction": "--prior-prediction 0",
            "FaceLoRA without selection": "--hold-out 0",
        }.items()
    }
    others: dict[str, Diffusers | ComfyUI] = {
        "diffusers": Diffusers(),
        "diffusers, class images": Diffusers(class_images=class_images),
        "diffusers, rank 16, batch 4": Diffusers(rank=16, batch_size=4),
        "diffusers, rank 16, batch 4, class images": Diffusers(rank=16, batch_size=4, class_images=class_images),
    }
    if comfyui and python:
        others["ComfyUI's Train LoRA"] = ComfyUI(comfyui, python)
    if rate is None:
        return of_ours | others
    return {f"{name}{RATE}{rate:g}": replace(trainer, rate=rate) for name, trainer in others.items()}


def train(
    name: str, trainer: Trainer, person: int, seed: int, steps: Mapping[float, int], work: Path
) -> dict[float, Path]:
    """The LoRA after each number of steps, trained where it is missing."""
    folder = work / name.replace(" ", "-") / f"{person}-{seed}"
    files = {minutes: folder / f"{count}.safetensors" for minutes, count in steps.items()}
    missing = [steps[minutes] for minutes, file in files.items() if not file.exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as photos:
            save_all(person_photos(person)[:-TEST], Path(photos))
            trainer.train(Path(photos), seed, missing, folder)
    return files


def save_all(images: Sequence[Image.Image], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, start=1):
        image.save(folder / f"{number}.png")


def judged(file: Path, person: int, judges: Sequence[FaceNetwork]) -> tuple[float, dict[str, Verdict]]:
    """The drift of a LoRA, and what each network says of it."""
    lora, of_class = LoraFile.read(file), class_caption("person")
    of_person, before, after = draw(default_caption("sks", "person"), lora), by_base(of_class), draw(of_class, lora)
    verdicts = {}
    for network in judges:
        known = vectors(network)
        test, others = centre(known[person][-TEST:]), [centre(rows) for other, rows in known.items() if other != person]
        drawn = embed_images(network, of_person)
        seen, leaked = (np.nan_to_num(rows) for rows in (drawn, embed_images(network, after)))
        scores = seen @ test
        verdicts[network.name] = Verdict(
            likeness=round(float(scores.mean()), 4),
            leakage=round(float((leaked @ test).mean() - (of_base(network) @ test).mean()), 4),
            rank1=float(np.mean(scores > likeness(seen, np.stack(others)).max(axis=1))),
            copying=copying(drawn, known[person][:-TEST], known[person][-TEST:]),
        )
    return mean([picture_change(a, b) for a, b in zip(before, after, strict=True)]), verdicts


def centre(vectors: np.ndarray) -> np.ndarray:
    person = mean_face(vectors)
    assert person is not None, "every person in the set has a photo with a detectable face"
    return person


@functools.cache
def vectors(network: FaceNetwork) -> dict[int, np.ndarray]:
    """The identity vectors of all photos of everybody in the set, by person."""
    return {person: embed_images(network, person_photos(person)) for person in (*SEEN_PEOPLE, *UNSEEN_PEOPLE)}


@functools.cache
def of_base(network: FaceNetwork) -> np.ndarray:
    """The identity vectors of the base model's pictures of the class; zeros where no face was found."""
    return np.nan_to_num(embed_images(network, by_base(class_caption("person"))))


def measure_costs(every: Mapping[str, Trainer], person: int) -> dict[str, Cost]:
    """The cost of each trainer, from runs in turns."""
    costs = {}
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        save_all(person_photos(person)[:-TEST], photos)
        for number, (name, trainer) in enumerate([*every.items(), *every.items()]):
            output = Path(folder, str(number))
            output.mkdir()
            # Its first run loads libraries and fills caches, so it isn't timed.
            steps = PROBES if number >= len(every) else PROBES[:1]
            seconds = [trainer.train(photos, number, [count], output)[0] for count in steps]
            step = (seconds[-1] - seconds[0]) / (PROBES[1] - PROBES[0])
            costs[name] = Cost(round(max(0.0, seconds[0] - PROBES[0] * step), 2), round(step, 4))
    return costs


def read_records(path: Path = RECORDS) -> list[Row]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return [
        Row(**row | {"verdicts": {name: Verdict(**verdict) for name, verdict in row["verdicts"].items()}})
        for row in rows
    ]


def read_costs() -> dict[str, Cost]:
    text = COSTS.read_text(encoding="utf-8") if COSTS.exists() else "{}"
    return {name: Cost(**values) for name, values in json.loads(text).items()}


def summary(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Of each trainer and budget, means over people and seeds; the errors are over the people."""
    cells = []
    for (name, minutes), group in by_trainer(rows).items():
        each = [list(row.verdicts.values()) for row in group]
        cells.append(
            (
                name, f"{minutes:g}", f"{group[0].steps}",
                *(over_people(group, [v[i].likeness for v in each], 3 if i != 1 else 4) for i in range(len(each[0]))),
                *(over_people(group, [v[i].leakage for v in each], 3) for i in range(len(each[0]))),
                f"{np.mean([row.drift for row in group]):.1f}", f"{np.mean([v[-1].rank1 for v in each]):.0%}",
                f"{np.mean([v[-1].copying for v in each]):+.3f}",
            )
        )  # fmt: skip
    return cells


def by_trainer(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    groups: dict[tuple[str, float], list[Row]] = {}
    rows = [row for row in rows if row.person in UNSEEN_PEOPLE]
    for row in sorted(rows, key=lambda row: row.minutes):
        groups.setdefault((row.trainer, row.minutes), []).append(row)
    order = list(dict.fromkeys(row.trainer for row in rows))
    return dict(sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def over_people(group: Sequence[Row], values: Sequence[float], digits: int) -> str:
    """The mean, and its standard error over the people."""
    of: dict[int, list[float]] = {}
    for row, value in zip(group, values, strict=True):
        of.setdefault(row.person, []).append(value)
    return with_error([float(np.mean(each)) for each in of.values()], digits, sign="")


def plot(rows: Sequence[Row]) -> str:
    """An SVG of likeness by the last network over the minutes, a line for each trainer with more than one budget."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for (name, minutes), group in by_trainer(rows).items():
        value = float(np.mean([list(row.verdicts.values())[-1].likeness for row in group]))
        lines.setdefault(name, []).append((80 + 360 * minutes / max(MINUTES), 310 - 360 * value))
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 352" font-family="sans-serif" font-size="13">',
        '<rect width="760" height="352" fill="#fff"/>',
    ]
    for tenth in range(0, 9, 2):
        y = 310 - 36 * tenth
        parts.append(
            f'<path d="M80 {y}H440" stroke="#ddd"/><text x="72" y="{y + 4}" text-anchor="end">0.{tenth}</text>'
        )
    for minutes in MINUTES:
        x = 80 + 360 * minutes / max(MINUTES)
        parts.append(f'<text x="{x}" y="326" text-anchor="middle">{minutes:g}</text>')
    parts.append('<text x="260" y="344" text-anchor="middle">minutes of one core</text>')
    parts.append('<text x="80" y="14" text-anchor="middle">likeness</text>')
    ends = sorted((points[-1][1], name) for name, points in lines.items() if len(points) > 1)
    below = 0.0
    for number, (end, name) in enumerate(ends):
        points, colour = lines[name], COLOURS[number % len(COLOURS)]
        below = max(end, below + 18)
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="452" y="{below + 4:.1f}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="for LoRAs and class images")
    parser.add_argument("--third", type=Path, metavar="FILE", help="fr_feature.onnx; nothing is judged without it")
    parser.add_argument("--comfyui", type=Path, metavar="DIR", help="a ComfyUI; skipped without one")
    parser.add_argument("--comfyui-python", type=Path, metavar="FILE", help="the Python that runs it")
    parser.add_argument("--trainer", action="append", help="default: all; repeatable")
    parser.add_argument("--person", action="append", type=int, help="default: 35 to 40, whom the table has; repeatable")
    parser.add_argument("--seed", action="append", type=int, help="default: 1; repeatable")
    parser.add_argument("--rate", action="append", type=float, help="of the peers, default: their own; repeatable")
    parser.add_argument("--minutes", action="append", type=float, choices=MINUTES, help="default: all; repeatable")
    parser.add_argument("--costs", action="store_true", help="measure the costs of the trainers instead")
    options = parser.parse_args()
    class_images = options.work / "class-images"
    every = {
        name: trainer
        for rate in options.rate or [None]
        for name, trainer in trainers(class_images, options.comfyui, options.comfyui_python, rate).items()
    }
    chosen = {name: trainer for name, trainer in every.items() if name.split(RATE)[0] in (options.trainer or [name])}
    budgets = options.minutes or MINUTES
    if not options.costs and (lacking := {name.split(RATE)[0] for name in chosen} - read_costs().keys()):
        parser.error(f"measure these with --costs first, or choose others with --trainer: {'; '.join(sorted(lacking))}")
    if not class_images.exists():
        save_all(draw(class_caption("person"), None, range(1, CLASS_IMAGES + 1)), class_images)
    if options.costs:
        costs = read_costs() | measure_costs(chosen, SEEN_PEOPLE[-1])
        write_text(COSTS, json.dumps({name: asdict(cost) for name, cost in costs.items()}, indent=1) + "\n")
        return
    judges = [load_faces(), load_faces("dlib"), load_faces(options.third)] if options.third else []
    finished, costs = {(row.trainer, row.person, row.seed, row.minutes) for row in read_records()}, read_costs()
    for seed in options.seed or [1]:
        for person in options.person or UNSEEN_PEOPLE:
            for name, trainer in chosen.items():
                missing = [minutes for minutes in budgets if (name, person, seed, minutes) not in finished]
                steps = {minutes: costs[name.split(RATE)[0]].steps(minutes) for minutes in missing}
                files = train(name, trainer, person, seed, steps, options.work)
                for minutes, file in files.items() if judges else ():
                    drift, verdicts = judged(file, person, judges)
                    row = Row(name, person, seed, minutes, int(file.stem), drift, verdicts)
                    with RECORDS.open("a", encoding="utf-8") as records:
                        records.write(json.dumps(asdict(row)) + "\n")
    rows = read_records()
    write_tables(DOCUMENT, {"likeness": table(HEADER, summary(rows))})
    write_text(PLOT, plot(rows))


if __name__ == "__main__":
    main()
