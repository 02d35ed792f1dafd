"""The table of docs/methods.md: `python -m tools.method_tables DIR PHOTOS...` trains all methods on each person, and measures.

PHOTOS is a folder of photos for each person, two of which are kept back as reference photos. The LoRAs, rows of pictures and
results go into DIR. Results that are already there are not made again.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from core.config import TrainConfig
from core.demo import BASE_FILE
from core.faces import FaceNetwork, embed_images, likeness, load_faces, mean_face
from core.lora.file import LoraFile
from core.models import load_base
from core.models.base import Base
from core.photos import Photo, Thresholds, make_ready, prepare, read_photos
from core.photos.captions import class_caption, default_caption
from core.pictures.generate import GenerateConfig, Job, generate
from core.pictures.sampling import encode_pictures, encode_prompts
from core.pictures.sheet import contact_sheet
from core.training import train
from core.training.callbacks import Callbacks
from core.training.likeness import NEUTRAL_PROMPTS, picture_change
from core.training.methods import METHODS, peak_rate
from core.training.samples import SAMPLE_BATCH
from tools.photo_tables import replace_table, table
from tools.timing import peak_memory

DOCUMENT = Path(__file__).parent.parent / "docs" / "methods.md"
COMPARED = ("lora", "textual-inversion", "dreambooth", "pivotal", "dora", "loha", "lokr", "oft")
CONFIG = TrainConfig(
    steps=100, batch_size=8, learning_rate=4e-3, schedule="cosine", warmup_steps=10, min_snr_gamma=0.0,
    precision="fp32", sample_guidance=2.5, sample_steps=8, check_photos=False,
)  # fmt: skip
"""The settings of every method, apart from the method and its learning rate."""
PICTURES = 8
"""The number of pictures of the person, and of the class, with seeds 1, 2, ..."""
VIEWS = ("left view", "front view", "right view")
"""What is added to prompts to measure adherence: whether pictures show it."""
DRAWS = 8
"""The number of noise and timestep samples with which the base model classifies a picture."""


@dataclass(frozen=True)
class MethodResult:
    """The measurements of one method on one person; the method "base" is the base model itself."""

    person: str
    method: str
    learning_rate: float
    steps: int
    likeness: float
    """The mean cosine of the trigger's pictures to the mean face of the held-out photos; a picture without a face counts 0."""
    seconds: float
    """The processor seconds of the steps, which other work on the machine does not change."""
    file_bytes: int
    adherence: float
    """The share, 0 to 1, of pictures with a view in the prompt that the base model classifies as that view."""
    leakage: float
    """The increase, over the base model, of the cosine of class pictures to the person."""
    drift: float
    """The mean absolute change of pictures of NEUTRAL_PROMPTS from the base model's, in grey levels, 0 to 255."""
    memory: int
    """The growth of the process during training, in bytes."""


def config_of(method: str, settings: TrainConfig = CONFIG) -> TrainConfig:
    """Return the settings of a method: its learning rate is theirs, times what suits the method."""
    config = replace(settings, method=method)
    if METHODS[method].makes == "embedding" or settings.learning_rate is None:
        return config
    return replace(config, learning_rate=settings.learning_rate * METHODS[method].rate_factor)


class MethodTrial:
    """Trains methods on one person, and measures them with held-out photos and the base model."""

    def __init__(self, base: Base, photos: Sequence[Photo], faces: FaceNetwork, settings: TrainConfig = CONFIG):
        ready = make_ready(photos, faces, Thresholds(), check=False, hold_out=2)
        self.base, self.faces, self.settings = base, faces, settings
        self.training = [item.photo for item in ready.training]
        centre = mean_face(ready.vectors(ready.held_out))
        assert centre is not None, "held-out photos show a face"
        self._person = centre
        self._subject = default_caption(settings.trigger_word, settings.class_word)
        self._class = class_caption(settings.class_word)
        dataset = prepare(
            self.training, resolution=base.resolution, size_multiple=base.size_multiple,
            trigger=settings.trigger_word, class_word=settings.class_word, upscale=settings.upscale,
        )  # fmt: skip
        self._size = max(dataset.bucket_counts().items(), key=lambda bucket: bucket[1])[0]

    @cached_property
    def _before(self) -> list[list[Image.Image]]:
        return self._pictures(self.base, [])

    def result(self, person: str, method: str, output: Path) -> tuple[MethodResult, list[Image.Image]]:
        """Return the result of a method, or of "base", and its pictures of the person."""
        if method == "base":
            nothing = MethodResult(person, method, 0.0, 0, 0.0, 0.0, 0, 0.0, 0.0, 0.0, 0)
            return replace(nothing, **self._measured(self._before)), self._before[0]
        path, config, marks = output / f"{person}-{method}.safetensors", config_of(method, self.settings), []
        callbacks = Callbacks(on_step=lambda report: marks.append(time.process_time()))
        cpu = torch.device("cpu")
        used_before = peak_memory(lambda: None, cpu) or 0
        work = partial(
            train, self.training, self.base, config, output=path, restart=True, device=cpu, callbacks=callbacks
        )
        used = peak_memory(work, cpu)
        # Measure from the end of the first step, which also warms up.
        seconds = (marks[-1] - marks[0]) * len(marks) / max(1, len(marks) - 1)
        file = LoraFile.read(path) if METHODS[method].makes != "checkpoint" else None
        pictures = self._pictures(self.base if file else load_base(path), [(file, 1.0)] if file else [])
        result = MethodResult(
            person, method, peak_rate(config), len(marks), seconds=round(seconds, 1),
            file_bytes=path.stat().st_size, memory=max(0, (used or 0) - used_before), **self._measured(pictures),
        )  # fmt: skip
        return result, pictures[0]

    def _pictures(self, base: Base, files: Sequence[tuple[LoraFile, float]]) -> list[list[Image.Image]]:
        """Return the pictures of the person, of the class, of the neutral prompts, and of the person in each view."""
        prompts = [(self._subject, PICTURES), (self._class, PICTURES), *((prompt, 1) for prompt in NEUTRAL_PROMPTS)]
        prompts += [(f"{self._subject}, {view}", PICTURES // 2) for view in VIEWS]
        config = self.settings
        guidance = base.guidance if config.sample_guidance is None else config.sample_guidance
        jobs = [
            Job(prompt, seed, size=self._size, steps=config.sample_steps, guidance=guidance)
            for prompt, count in prompts
            for seed in range(1, count + 1)
        ]
        options = GenerateConfig(batch_size=SAMPLE_BATCH, precision=config.precision)
        drawn = iter([picture.image for picture in generate(base, files, jobs, options)])
        person, of_class = (list(islice(drawn, PICTURES)) for _ in range(2))
        return [person, of_class, list(islice(drawn, len(NEUTRAL_PROMPTS))), list(drawn)]

    def _measured(self, pictures: Sequence[Sequence[Image.Image]]) -> dict[str, float]:
        person, of_class, neutral, in_views = pictures
        changes = [picture_change(a, b) for a, b in zip(self._before[2], neutral, strict=True)]
        measured = {
            "likeness": self._alike(person),
            "adherence": self._adherence(in_views),
            "leakage": self._alike(of_class) - self._alike(self._before[1]),
            "drift": float(np.mean(changes)),
        }
        return {name: round(value, 4) for name, value in measured.items()}

    def _alike(self, images: Sequence[Image.Image]) -> float:
        return float(np.nan_to_num(likeness(embed_images(self.faces, images), self._person[None])[:, 0]).mean())

    def _adherence(self, images: Sequence[Image.Image]) -> float:
        """Return the share of the pictures, ordered by view, that the base model classifies as their view.

        A noisy picture is predicted best with the prompt that describes it (diffusion classifier, arXiv:2303.16203).
        """
        base, config, cpu = self.base, self.settings, torch.device("cpu")
        latents = encode_pictures(base, base.load("vae", cpu, torch.float32), images)
        encoders = base.load_text_encoders(cpu, torch.float32)
        texts = encode_prompts(base, encoders, [f"{self._class}, {view}" for view in VIEWS], config.clip_skip)
        denoiser, schedule = base.load("denoiser", cpu, torch.float32), base.schedule()
        generator = torch.Generator().manual_seed(config.seed)
        errors = torch.zeros(len(VIEWS), len(images))
        shape = base.family.image_conditioning(self._size, (0, 0), self._size)
        with torch.inference_mode():
            for _ in range(DRAWS):
                noise = torch.randn(latents.shape, generator=generator)
                timesteps = schedule.draw_timesteps(latents, config, generator)
                noisy = schedule.add_noise(latents, noise, timesteps)
                target = schedule.target(latents, noise, timesteps)
                for row, text in enumerate(texts):
                    whole = {
                        name: value.expand(len(images), *value.shape[1:]) for name, value in (text | shape).items()
                    }
                    prediction = base.family.predict(denoiser, noisy, timesteps, whole)
                    errors[row] += ((prediction - target) ** 2).mean(dim=(1, 2, 3))
        asked = torch.arange(len(images)) // (PICTURES // 2)
        return float((errors.argmin(dim=0) == asked).float().mean())


COLUMNS = {
    "likeness (to held-out photos)": ("likeness", 1, "{:.2f}"),
    "time (seconds)": ("seconds", 1, "{:.0f}"),
    "file (MB)": ("file_bytes", 1e6, "{:.3f}"),
    "adherence (share of views)": ("adherence", 1, "{:.2f}"),
    "leakage (into the class)": ("leakage", 1, "{:.2f}"),
    "drift (grey levels)": ("drift", 1, "{:.1f}"),
    "memory (MB)": ("memory", 1e6, "{:.0f}"),
}
"""The measurement, its unit and its number format in each column of the table."""


def summary_rows(results: Sequence[MethodResult]) -> list[tuple[str, ...]]:
    """Return a row for each method with the mean and the standard deviation over the people."""
    rows = []
    for method in dict.fromkeys(result.method for result in results):
        of_method = [result for result in results if result.method == method]
        cells = [method, str(len(of_method))]
        for name, unit, form in COLUMNS.values():
            found = [getattr(result, name) / unit for result in of_method]
            cells.append(f"{form.format(np.mean(found))} ± {form.format(np.std(found))}")
        rows.append(tuple(cells))
    return rows


def measure(
    people: Sequence[Path], output: Path, methods: Sequence[str], settings: TrainConfig = CONFIG
) -> list[MethodResult]:
    """Return the results of the base model and each method on each person; those in `output` are read from there."""
    output.mkdir(exist_ok=True)
    base, faces, results = load_base(BASE_FILE), load_faces(), []
    for folder in people:
        trial = MethodTrial(base, read_photos(folder), faces, settings)
        for method in ("base", *methods):
            path = output / f"{folder.name}-{method}.json"
            if not path.exists():
                result, pictures = trial.result(folder.name, method, output)
                contact_sheet([(method, pictures)], tile=112).save(path.with_suffix(".png"))
                path.write_text(json.dumps(asdict(result), indent=1), "utf-8")
            results.append(MethodResult(**json.loads(path.read_text("utf-8"))))
            print(results[-1], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="DIR")
    parser.add_argument("people", type=Path, nargs="+", metavar="PHOTOS")
    options = parser.parse_args()
    rows = summary_rows(measure(options.people, options.output, COMPARED))
    header = ("method", "people", *COLUMNS)
    DOCUMENT.write_text(replace_table(DOCUMENT.read_text("utf-8"), "methods", table(header, rows)), "utf-8")


if __name__ == "__main__":
    main()
