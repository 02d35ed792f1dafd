"""Compare training methods on the same people, photos and number of steps.

Every method is trained at its own learning rate, and pictures of the same prompts and seeds are measured. Likeness is measured
to reference photos, which are held out from training.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..config import TrainConfig
from ..device import device_and_dtype, usable_device
from ..errors import BadConfig, BadFile
from ..faces import FaceNetwork, embed_images, likeness, mean_face
from ..lora.file import LoraFile
from ..models.base import Base
from ..models.opening import load_base
from ..photos import Photo, Thresholds, make_ready, prepare
from ..photos.captions import class_caption, default_caption
from ..pictures.generate import GenerateConfig, Job, generate
from ..pictures.sampling import encode_pictures, encode_prompts
from ..pictures.sheet import contact_sheet
from ..progress import OnPhase, OnWarning, silent
from ..storage.cache_folder import content_key
from ..storage.files import make_folder, read_json, write_file, write_text
from ..training.callbacks import Callbacks, StepReport
from ..training.job import train
from ..training.likeness import NEUTRAL_PROMPTS, picture_change
from ..training.methods import METHODS, peak_rate
from ..training.samples import SAMPLE_BATCH
from .timing import peak_memory

PICTURES = 8
"""The number of pictures of the person, and of the class, with seeds 1, 2, ..."""
SETTINGS = ("left view", "front view", "right view")
"""The settings added to prompts to measure adherence: whether pictures show them."""
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
    """The seconds of the steps: processor time on a CPU, where other work doesn't count, else elapsed time."""
    file_bytes: int
    adherence: float
    """The share, 0 to 1, of pictures with a setting in the prompt that the base model classifies as that setting."""
    leakage: float
    """The increase, over the base model, of the cosine of class pictures to the person."""
    drift: float
    """The mean absolute change of pictures of NEUTRAL_PROMPTS from the base model's, in grey levels, 0 to 255."""
    memory: int
    """The peak memory of training in bytes: the allocator's on a GPU, the growth of the process on a CPU."""


@dataclass(frozen=True)
class Comparison:
    """Everything that determines the results of a comparison, apart from the people.

    Raises BadConfig for unknown methods, rates of methods that aren't compared, and invalid numbers.
    """

    base: Base
    methods: tuple[str, ...]
    config: TrainConfig
    """The settings of every method, apart from `method` and the learning rate."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """The learning rates of methods (for textual inversion, the rate of its vectors).

    Other methods use the learning rate of the settings times the method's factor."""
    held_out: int = 2
    settings: tuple[str, ...] = SETTINGS

    def __post_init__(self) -> None:
        if unknown := [name for name in (*self.methods, *self.rates) if name not in METHODS]:
            raise BadConfig(f"method {unknown[0]!r}: choose one of {', '.join(METHODS)}")
        if twice := [name for name in self.methods if self.methods.count(name) > 1]:
            raise BadConfig(f"method {twice[0]!r} is given twice; give each method once")
        if absent := [name for name in self.rates if name not in self.methods]:
            raise BadConfig(
                f"rate of {absent[0]!r}: this method is not compared; the methods are {', '.join(self.methods)}"
            )
        if self.held_out < 1:
            raise BadConfig(
                f"held_out = {self.held_out}: must be at least 1, since likeness is measured to held-out photos"
            )
        if len(self.settings) < 2:
            raise BadConfig(f"scenes {list(self.settings)}: give two or more")
        for method in self.methods:
            self.config_of(method)  # Raises for an invalid rate before training starts.

    def config_of(self, method: str) -> TrainConfig:
        # The photos have been checked once, for all methods.
        config, rate = replace(self.config, method=method, check_photos=False), self.rates.get(method)
        finds_rate = config.optimizer == "prodigy"
        if METHODS[method].makes == "embedding" and not finds_rate:
            return config if rate is None else replace(config, embedding_lr=rate)
        if rate is None and config.learning_rate is not None and not finds_rate:
            rate = config.learning_rate * METHODS[method].rate_factor
        return config if rate is None else replace(config, learning_rate=rate)

    @property
    def identity(self) -> dict[str, str]:
        """The settings and the base model as texts; results with an equal identity can be compared."""
        common = replace(self.config, method="lora")
        settings = {
            **asdict(common), "learning_rate": peak_rate(common),
            "rates": dict(self.rates), "held_out": self.held_out, "settings": self.settings,
        }  # fmt: skip
        return {"settings": json.dumps(settings, sort_keys=True), "base": self.base.identity}


def compare(
    people: Mapping[str, Sequence[Photo]],
    comparison: Comparison,
    output: Path,
    faces: FaceNetwork,
    *,
    device: torch.device | None = None,
    on_phase: OnPhase | None = None,
    on_warning: OnWarning = silent,
) -> list[MethodResult]:
    """Train and measure all methods, and return a MethodResult for each person and method, the base model included.

    Each person's photos are checked once, if the settings say so; `on_warning` is told of those left out. Results of the same
    comparison that `output` already has are not made again. It gets compare.json, a report for each person, and for each
    method its files and a row of pictures.
    """
    device = usable_device(device)
    make_folder(output)
    results, methods = [], ("base", *comparison.methods)
    for number, (person, photos) in enumerate(people.items()):
        report = output / f"{person}.json"
        identity = {**comparison.identity, "photos": content_key(*(photo.fingerprint for photo in photos))}
        found = {result.method: result for result in known_results(report, identity)}
        missing = [method for method in methods if method not in found]
        judge = MethodTrial(comparison, photos, faces, device, on_warning) if missing else None
        for method in missing:
            assert judge
            found[method], pictures = judge.result(person, method, output)
            row = contact_sheet([(f"{method}: likeness {found[method].likeness:.2f}", pictures)], tile=112)
            write_file(output / f"{person}-{method}.png", lambda file, row=row: row.save(file, "PNG"))
            write_results(report, identity, list(found.values()))
            if on_phase:
                done = number * len(methods) + len(found.keys() & set(methods))
                on_phase("comparing", done, len(people) * len(methods))
        results += [found[method] for method in methods]
    write_results(output / REPORT, comparison.identity, results)
    return results


REPORT = "compare.json"


def write_results(path: Path, identity: Mapping[str, str], results: Sequence[MethodResult]) -> None:
    """Write the results with the identity of their comparison."""
    described = {**identity, "results": [asdict(result) for result in results]}
    write_text(path, json.dumps(described, indent=1) + "\n")


def known_results(path: Path, identity: Mapping[str, str]) -> list[MethodResult]:
    """Read the results of a comparison with this identity from a file; empty if the file doesn't exist."""
    try:
        found = read_json(path)
        same = all(found[name] == value for name, value in identity.items())
        results = [MethodResult(**result) for result in found["results"]] if same else []
        return results if all(map(_is_sound, results)) else []
    except (BadFile, KeyError, TypeError, OverflowError):
        return []


def _is_sound(result: MethodResult) -> bool:
    """Return whether a result from a file has texts and finite numbers in the right fields."""
    values = asdict(result)
    texts = [values.pop(name) for name in ("person", "method")]
    return all(isinstance(text, str) for text in texts) and all(map(math.isfinite, values.values()))


class MethodTrial:
    """Trains methods on one person, and measures them with held-out photos and the base model."""

    def __init__(
        self,
        comparison: Comparison,
        photos: Sequence[Photo],
        faces: FaceNetwork,
        device: torch.device,
        on_warning: OnWarning,
    ):
        config = comparison.config
        limits = Thresholds.for_resolution(config.resolution or comparison.base.resolution, faces.name)
        ready = make_ready(
            photos, faces, limits, check=config.check_photos, hold_out=comparison.held_out, on_warning=on_warning
        )
        training = [item.photo for item in ready.training]
        self.comparison: Comparison = comparison
        self.faces: FaceNetwork = faces
        self.training: Sequence[Photo] = training
        self.device: torch.device = device
        centre = mean_face(ready.vectors(ready.held_out))
        assert centre is not None, "held-out photos show a face"
        self._person = centre
        self._subject = default_caption(config.trigger_word, config.class_word)
        self._class = class_caption(config.class_word)
        dataset = prepare(
            training, resolution=config.resolution or comparison.base.resolution,
            size_multiple=comparison.base.size_multiple, trigger=config.trigger_word, class_word=config.class_word,
            upscale=config.upscale,
        )  # fmt: skip
        self._size = max(dataset.bucket_counts().items(), key=lambda bucket: bucket[1])[0]
        self._before = self._pictures(comparison.base, [])

    def result(self, person: str, method: str, output: Path) -> tuple[MethodResult, list[Image.Image]]:
        """Return the result of a method, or of "base", and its pictures of the person."""
        if method == "base":
            measured = self._measured(self._before)
            result = MethodResult(person, method, 0.0, 0, seconds=0.0, file_bytes=0, memory=0, **measured)
            return result, self._before[0]
        base, config = self.comparison.base, self.comparison.config_of(method)
        path, marks = output / f"{person}-{method}.safetensors", []
        clock = time.process_time if self.device.type == "cpu" else time.monotonic

        def on_step(report: StepReport) -> None:
            marks.append(clock())

        used_before = peak_memory(lambda: None, self.device) or 0
        work = partial(
            train, self.training, base, config, output=path, restart=True, device=self.device,
            callbacks=Callbacks(on_step=on_step),
        )  # fmt: skip
        used = peak_memory(work, self.device)
        # Measure from the end of the first step, which also warms up.
        seconds = (marks[-1] - marks[0]) * len(marks) / max(1, len(marks) - 1)
        file = LoraFile.read(path) if METHODS[method].makes != "checkpoint" else None
        trained = base if file else load_base(path)
        pictures = self._pictures(trained, [(file, 1.0)] if file else [])
        result = MethodResult(
            person, method, peak_rate(config), len(marks), seconds=round(seconds, 1),
            file_bytes=path.stat().st_size, memory=max(0, (used or 0) - used_before), **self._measured(pictures),
        )  # fmt: skip
        return result, pictures[0]

    def _pictures(self, base: Base, files: Sequence[tuple[LoraFile, float]]) -> list[list[Image.Image]]:
        """Return the pictures of the person, of the class, of the neutral prompts, and of the person in each setting."""
        config, prompts = self.comparison.config, [self._subject, self._class, *NEUTRAL_PROMPTS]
        counts = [PICTURES, PICTURES, *[1] * len(NEUTRAL_PROMPTS)]
        prompts += [f"{self._subject}, {setting}" for setting in self.comparison.settings]
        counts += [PICTURES // 2] * len(self.comparison.settings)
        guidance = base.guidance if config.sample_guidance is None else config.sample_guidance
        jobs = [
            Job(prompt, seed, size=self._size, steps=config.sample_steps, guidance=guidance)
            for prompt, count in zip(prompts, counts, strict=True)
            for seed in range(1, count + 1)
        ]
        options = GenerateConfig(batch_size=SAMPLE_BATCH, precision=config.precision)
        drawn = iter([picture.image for picture in generate(base, files, jobs, options, device=self.device)])
        person, of_class = (list(islice(drawn, PICTURES)) for _ in range(2))
        return [person, of_class, list(islice(drawn, len(NEUTRAL_PROMPTS))), list(drawn)]

    def _measured(self, pictures: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
        person, of_class, neutral, in_settings = pictures
        changes = [picture_change(a, b) for a, b in zip(self._before[2], neutral, strict=True)]
        measured = {
            "likeness": self._alike(person),
            "adherence": self._adherence(in_settings),
            "leakage": self._alike(of_class) - self._alike(self._before[1]),
            "drift": float(np.mean(changes)),
        }
        return {name: round(value, 4) for name, value in measured.items()}

    def _alike(self, images: Sequence[Image.Image]) -> float:
        return float(np.nan_to_num(likeness(embed_images(self.faces, images), self._person[None])[:, 0]).mean())

    def _adherence(self, images: Sequence[Image.Image]) -> float:
        """Return the share of the pictures, ordered by setting, that the base model classifies as their setting.

        A noisy picture is predicted best with the prompt that describes it (diffusion classifier, arXiv:2303.16203).
        """
        base, config, settings = self.comparison.base, self.comparison.config, self.comparison.settings
        device, dtype = device_and_dtype(config.precision, self.device, base.family.overflows_in_fp16)
        latents = encode_pictures(base, base.load("vae", device, torch.float32), images)
        encoders = base.load_text_encoders(device, torch.float32)
        texts = encode_prompts(base, encoders, [f"{self._class}, {setting}" for setting in settings], config.clip_skip)
        denoiser, schedule = base.load("denoiser", device, dtype), base.schedule().to(device)
        generator = torch.Generator(device).manual_seed(config.seed)
        errors = torch.zeros(len(settings), len(images))
        shape = base.family.image_conditioning(self._size, (0, 0), self._size)
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for _ in range(DRAWS):
                noise = torch.randn(latents.shape, generator=generator, device=device)
                timesteps = schedule.draw_timesteps(latents, config, generator)
                noisy = schedule.add_noise(latents, noise, timesteps)
                target = schedule.target(latents, noise, timesteps)
                for row, text in enumerate(texts):
                    whole = {
                        name: value.to(device).expand(len(images), *value.shape[1:])
                        for name, value in (text | shape).items()
                    }
                    prediction = base.family.predict(denoiser, noisy.to(dtype), timesteps, whole).float()
                    errors[row] += ((prediction - target) ** 2).mean(dim=(1, 2, 3)).cpu()
        asked = torch.arange(len(images)) // (PICTURES // 2)
        return float((errors.argmin(dim=0) == asked).float().mean())


# --- what is shown ---

_COLUMNS: dict[str, tuple[str, Callable[[MethodResult], float], str]] = {
    "likeness": ("to held-out photos", lambda r: r.likeness, "{:.2f}"),
    "time": ("seconds", lambda r: r.seconds, "{:.0f}"),
    "file": ("MB", lambda r: r.file_bytes / 1e6, "{:.3f}"),
    "adherence": ("share of settings", lambda r: r.adherence, "{:.2f}"),
    "leakage": ("into the class", lambda r: r.leakage, "{:.2f}"),
    "drift": ("grey levels", lambda r: r.drift, "{:.1f}"),
    "memory": ("MB", lambda r: r.memory / 1e6, "{:.0f}"),
}
"""The unit, the value and the number format of each column, by its title."""


def summary_rows(results: Sequence[MethodResult]) -> list[tuple[str, ...]]:
    """Return the header, and a row for each method with the mean and the standard deviation over the people."""
    rows: list[tuple[str, ...]] = [
        ("method", "people", *(f"{name} ({unit})" for name, (unit, _, _) in _COLUMNS.items()))
    ]
    for method in dict.fromkeys(result.method for result in results):
        cells: list[str] = [method, str(sum(result.method == method for result in results))]
        for _, value, form in _COLUMNS.values():
            found = [value(result) for result in results if result.method == method]
            cells.append(f"{form.format(np.mean(found))} ± {form.format(np.std(found))}")
        rows.append(tuple(cells))
    return rows
