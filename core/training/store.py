"""What is trained already is found again: a LoRA by what it was made from, an unfinished run by where it was left.

The key of a job is a hash of everything that its LoRA depends on. It stands in the LoRA's metadata, so that the file is
found in a folder of LoRAs whatever else is there, and it names the folder of the run in the cache folder.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from ..config import TrainConfig
from ..device import PRECISIONS
from ..errors import FaceLoraError
from ..lora.file import LoraFile
from ..lora.hashes import model_hash
from ..models.base import Base
from ..photos import Photo
from ..pictures.sheet import contact_sheet
from ..storage.cache_folder import content_key, made_folder
from ..storage.files import check_writable, make_folder, write_file, write_text
from ..storage.safetensors_file import SafetensorsFile
from .callbacks import NO_CALLBACKS, Callbacks, StepReport
from .identity import settings_of_the_file
from .job import train
from .likeness import LIKENESS_KEY

KEY = "facelora.key"
"""In a LoRA's metadata: what it was made from, as a hash."""
MODEL_HASH = "sshs_model_hash"
"""In the metadata of every saved LoRA: the hash of its tensors."""
TRAINING_VERSION = "2"
"""Part of every key: raised when the same inputs would train differently."""
LOOK_INTERVAL = 0.5
"""Seconds between two looks at the loss, each of which waits for the device."""
SAVE_INTERVAL = 10.0
"""Seconds between two times that the curve is saved, of which a killed process loses the rest."""

Curve = list[tuple[int, float]]
"""(step, value), in order."""


@dataclass(frozen=True)
class TrainingJob:
    """What is to be trained, apart from the base model."""

    name: str
    """Of the file, below the folder of LoRAs and without its ending; `/` stands between folders."""
    config: TrainConfig
    photos: Sequence[Photo]
    class_photos: Sequence[Photo] = ()
    """For prior preservation; none: without, or as the config says."""
    continue_from: LoraFile | None = None

    def key(self, base: Base) -> str:
        """A hash that is equal when the same file would be made, whatever it, the photos and the models are called."""
        settings = settings_of_the_file(self.config)
        photos = [[photo.fingerprint for photo in group] for group in (self.photos, self.class_photos)]
        start = model_hash(self.continue_from.tensors) if self.continue_from else None
        return content_key("lora", TRAINING_VERSION, json.dumps(settings, sort_keys=True), photos, start, base.identity)


@dataclass
class RunFolder:
    """What is kept of a run beside its LoRA: the loss, the samples, and while it is unfinished its state."""

    path: Path
    """Of a folder that is there."""
    _history: Curve = field(default_factory=list)

    def __post_init__(self) -> None:
        file = self.path / "history.json"
        if file.exists():
            self._history = [(int(step), float(loss)) for step, loss in json.loads(file.read_text())]

    @property
    def output(self) -> Path:
        """Where the run writes its LoRA, and its checkpoints and state beside it."""
        return self.path / "lora.safetensors"

    def history(self) -> Curve:
        """The smoothed loss."""
        return list(self._history)

    def add(self, step: int, loss: float) -> None:
        """Continues the history with that step; later ones, from before the process was killed, are forgotten."""
        while self._history and self._history[-1][0] >= step:
            self._history.pop()
        self._history.append((step, loss))

    def save_history(self) -> None:
        """Writes the history into the folder, where the next RunFolder finds it."""
        write_text(self.path / "history.json", json.dumps(self._history))

    def made(self) -> str | None:
        """The hash of the tensors of the LoRA that the run has made, None if it has made none yet."""
        file = self.path / "made.txt"
        return file.read_text("utf-8") if file.exists() else None

    def set_made(self, lora: LoraFile) -> None:
        """Notes which LoRA the run has made, read from its file; one that a tool has written may lack the hash."""
        write_text(self.path / "made.txt", lora.metadata.get(MODEL_HASH, ""))

    def add_samples(self, step: int, images: Sequence[Image.Image]) -> None:
        """Writes the samples of that step into the folder, in place of those that are there."""
        for index, image in enumerate(images):
            write_file(self.path / f"sample-{step:06d}-{index}.png", partial(image.save, format="PNG"))

    def samples(self) -> dict[int, list[Image.Image]]:
        """Step -> its samples, in order."""
        found: dict[int, list[Image.Image]] = {}
        for file in sorted(self.path.glob("sample-*.png")):
            with Image.open(file) as image:
                found.setdefault(int(file.stem.split("-")[1]), []).append(image.convert("RGB"))
        return found

    def sample_sheet(self) -> Image.Image:
        """A picture of all samples, a row for each step; of the words that there are none, where there are none."""
        rows = [(f"step {step}", images) for step, images in self.samples().items()]
        return contact_sheet(rows, tile=256, title="" if rows else "no samples were drawn")


@dataclass(frozen=True)
class TrainedFile:
    """A LoRA in the folder of LoRAs, and what is kept of the run that made it."""

    path: Path
    run: RunFolder
    found: bool
    """Whether it was trained before: no step was made now."""

    def likenesses(self) -> Curve:
        """The likeness that was measured while it was trained; empty where none was."""
        curve = LoraFile.read(self.path).metadata.get(LIKENESS_KEY)
        return [(point["step"], point["likeness"]) for point in json.loads(curve)["points"]] if curve else []


def find_or_train(
    job: TrainingJob,
    base: Base,
    folders: Sequence[Path],
    *,
    device: torch.device | None = None,
    on_history: Callable[[Curve], None] = lambda history: None,
    on_point: Callable[[StepReport], None] = lambda report: None,
    callbacks: Callbacks = NO_CALLBACKS,
) -> TrainedFile:
    """The LoRA of the job as a file in the first of the folders: found when it has been trained before, else trained now.

    A file of the job's name that was made from the same is taken as it is; one with the tensors that the job has made
    before, anywhere in or below the folders, is copied under the job's name. Where other files have the name, the file is
    called NAME-2 and so on: none is written over. The checkpoints of `save_every` are files beside it.

    Raised from a callback, an exception cancels: the run is kept, and the next call goes on from there. StopAndKeep from
    `on_step` ends the training; its file is then the job's. Before anything is trained, `on_history` is given the losses
    of the steps that were made in earlier calls; `on_point` hears of each step whose loss is added to them: of the last, of
    those after which likeness was measured, and of others at most two a second. The samples are kept with the run, whether
    or not `callbacks` take them too. Errors are subclasses of FaceLoraError.
    """
    key = job.key(base)
    run = RunFolder(made_folder("runs", key))
    on_history(run.history())
    path, found = _place(folders[0], job.name, key)
    if not found:
        _check_place(path)
        before = _with_tensors(run.made(), folders) or _unwritten(run.output)
        found = before is not None

        def sample(step: int, images: list[Image.Image]) -> None:
            run.add_samples(step, images)
            if callbacks.on_sample:
                callbacks.on_sample(step, images)

        try:
            lora = before or train(
                job.photos,
                base,
                job.config,
                output=run.output,
                class_photos=job.class_photos or None,
                continue_from=job.continue_from,
                resume=True,
                device=device,
                callbacks=replace(callbacks, on_step=_recorded(run, on_point, callbacks.on_step), on_sample=sample),
            )
        finally:
            run.save_history()
        metadata = lora.metadata | {KEY: key, "ss_output_name": path.stem}
        lora.with_metadata(metadata).save(path, PRECISIONS[job.config.save_precision])
        del before, lora  # Windows deletes no file that is still read
        _clear(run.output, path)
    run.set_made(LoraFile.read(path))
    return TrainedFile(path, run, found)


def _recorded(
    run: RunFolder, on_point: Callable[[StepReport], None], on_step: Callable[[StepReport], None]
) -> Callable[[StepReport], None]:
    """A callback that writes the history of the run, and then calls `on_step`."""
    looked = saved = -math.inf

    def step(report: StepReport) -> None:
        nonlocal looked, saved
        now = time.monotonic()
        if report.measured or now - looked > LOOK_INTERVAL or report.step == report.steps:
            looked = now
            run.add(report.step, report.loss)
            on_point(report)
        if now - saved > SAVE_INTERVAL:
            saved = now
            run.save_history()
        on_step(report)

    return step


def _check_place(path: Path) -> None:
    """Makes the folder of that file. BadFile, before hours are spent, where it cannot be written."""
    make_folder(path.parent)
    check_writable(path)


def _unwritten(output: Path) -> LoraFile | None:
    """What the run has trained, if it then could not be written among the LoRAs: their disk was full, say."""
    with suppress(FaceLoraError):
        return LoraFile.read(output)
    return None


def _clear(output: Path, path: Path) -> None:
    """Deletes what a run has written that is in the LoRA at `path` too, and moves its checkpoints there."""
    output.unlink(missing_ok=True)
    output.with_name(f"{output.stem}-embedding{output.suffix}").unlink(missing_ok=True)
    for checkpoint in output.parent.glob(f"{output.stem}-step*.safetensors"):
        shutil.move(checkpoint, path.with_name(path.stem + checkpoint.name.removeprefix(output.stem)))


def _place(folder: Path, name: str, key: str) -> tuple[Path, bool]:
    """The path of the LoRA, and whether it is there: the first of NAME, NAME-2, ... that is free or has the key."""
    number = 1
    while True:
        path = folder / f"{name}{f'-{number}' if number > 1 else ''}.safetensors"
        if not path.exists():
            return path, False
        if _has_key(path, key):
            return path, True
        number += 1


def _has_key(path: Path, key: str) -> bool:
    """Whether that is a LoRA, made from what the key says."""
    try:
        return LoraFile.read(path).metadata.get(KEY) == key
    except FaceLoraError:
        return False


def _with_tensors(made: str | None, folders: Sequence[Path]) -> LoraFile | None:
    """The first LoRA of the folders whose tensors have that hash, whatever it is called now."""
    for path in _files(folders) if made else ():
        with suppress(FaceLoraError):
            if SafetensorsFile.open(path).metadata.get(MODEL_HASH) == made:
                return LoraFile.read(path)
    return None


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    """The files in and below the folders that may be LoRAs; links to folders are followed, as ComfyUI does."""
    for folder in folders:
        for parent, below, names in os.walk(folder, followlinks=True):
            below.sort()
            yield from (Path(parent, name) for name in sorted(names) if name.endswith((".safetensors", ".sft")))
