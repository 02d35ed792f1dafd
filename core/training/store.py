"""A store of trained LoRAs, so that nothing is trained twice and an interrupted training goes on.

The key of a job is a hash of everything that its LoRA depends on. It is in the LoRA's metadata, by which the file is
found among others, and is the name of the run's folder in the cache folder.
"""

import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..config import TrainConfig
from ..device import PRECISIONS
from ..errors import BadConfig, BadFile, FaceLoraError, InUse
from ..lora.file import KEY, LoraFile
from ..lora.hashes import model_hash
from ..models.base import Base
from ..photos import Photo, Ready
from ..photos.reading import DAMAGED
from ..pictures.sheet import contact_sheet
from ..storage.cache_folder import cache_folder, content_key, made_folder
from ..storage.files import (
    EARLIER,
    check_writable,
    read_json,
    remove_leftovers,
    set_aside,
    write_file,
    write_text,
    writing,
)
from ..storage.locks import locked
from ..storage.safetensors_file import SafetensorsFile, copy_with_metadata
from .callbacks import NO_CALLBACKS, Callbacks, StepReport
from .identity import settings_of_the_file
from .job import checkpoint_path, delete_leftovers, foreign_checkpoint, ready_for, settled, train
from .likeness import LIKENESS_KEY
from .methods import METHODS
from .methods.method import Trained
from .training_adapter import TrainingAdapter

MODEL_HASH = "sshs_model_hash"
"""The key in a saved LoRA's metadata of the hash of its tensors."""
TRAINING_VERSION = "2"
"""A part of every job's key. Raise it when the same inputs would train differently."""
LOOK_INTERVAL = 0.5
"""Seconds between two reads of the loss, each of which waits for the device."""
SAVE_INTERVAL = 10.0
"""Seconds between two saves of the history; a killed process loses what came after the last."""

_OUTPUT = "lora.safetensors"
"""The name of the LoRA in the run's folder."""

Curve = list[tuple[int, float]]
"""A list of (step, value) in the order of the steps."""


def lora_path(name: str) -> str:
    """The name of a LoRA that a user typed, NAME or FOLDER/NAME, without the ending `.safetensors`.

    Raises BadConfig for a name that leads out of the folder or that some operating system does not allow.
    """
    parts = re.split(r"[\\/]", name.removesuffix(".safetensors"))
    if any(part.strip() in ("", ".", "..") for part in parts) or re.search(r'[<>:"|?*\x00-\x1f]', name):
        raise BadConfig(f"name {name!r}: give a file name, or FOLDER/NAME below the folder of LoRAs")
    return "/".join(parts)


@dataclass(frozen=True)
class TrainingJob:
    """A LoRA to be trained, apart from the base model."""

    name: str
    """The name of its file below the folder of LoRAs, without the ending, with `/` between folders."""
    config: TrainConfig
    photos: Sequence[Photo] | Ready
    class_photos: Sequence[Photo] = ()
    """The class images for prior preservation; when empty, as many as `config.class_images` says are drawn."""
    continue_from: LoraFile | None = None
    training_adapter: TrainingAdapter | None = None

    def __post_init__(self) -> None:
        if (made := METHODS[self.config.method].makes) != "lora":
            raise BadConfig(
                f"method = {self.config.method!r} makes no LoRA (but: {made}); train it on the command line (facelora train)"
            )

    @property
    def used(self) -> Sequence[Photo]:
        """The photos of the job; once they are looked at, without those that are rejected."""
        return self.photos.photos if isinstance(self.photos, Ready) else self.photos

    def key(self, base: Base) -> str:
        """A hash that is equal when the same tensors would be trained, whatever the names of the files involved."""
        settings = settings_of_the_file(self.config)
        photos = [[photo.fingerprint for photo in group] for group in (self.used, self.class_photos)]
        start = model_hash(self.continue_from.tensors) if self.continue_from else None
        adapter = [self.training_adapter.digest] if self.training_adapter else []
        written = json.dumps(settings, sort_keys=True)
        return content_key("lora", TRAINING_VERSION, written, photos, start, base.identity, *adapter)

    def looked_at(self, base: Base, on_warning: Callable[[str], None] = lambda text: None) -> "TrainingJob":
        """The job with its photos looked at once, as `ready_for` does.

        What is trained depends on the photos that are used alone, and so does the key: that of a good set is as without
        a check.
        """
        ready = ready_for(self.photos, base, self.config, on_warning=on_warning)
        return replace(self, photos=ready, config=settled(self.config, ready))


@dataclass
class RunFolder:
    """The folder of a run, with its loss history, its samples and, while it is unfinished, its state."""

    path: Path
    """The path of the folder, which exists."""
    _history: Curve = field(default_factory=list)

    def __post_init__(self) -> None:
        with suppress(
            BadFile, TypeError, ValueError, OverflowError
        ):  # there is none yet, or it is damaged: it is only shown
            self._history = [(int(step), float(loss)) for step, loss in read_json(self.path / "history.json")]

    @property
    def output(self) -> Path:
        """The path of the LoRA that the run writes, with its checkpoints and its state beside it."""
        return self.path / _OUTPUT

    def history(self) -> Curve:
        """The history of the smoothed loss."""
        return list(self._history)

    def add(self, step: int, loss: float) -> None:
        """Adds a step to the history, and drops that step and later ones from before the process was killed."""
        while self._history and self._history[-1][0] >= step:
            self._history.pop()
        self._history.append((step, loss))

    def save_history(self) -> None:
        """Writes the history into the folder, from which a RunFolder reads it."""
        write_text(self.path / "history.json", json.dumps(self._history))

    def made(self) -> str | None:
        """The hash of the tensors of the LoRA that the run made; None when it is unfinished."""
        file = self.path / "made.txt"
        return file.read_text("utf-8", errors="replace") if file.exists() else None

    def set_made(self, lora: LoraFile) -> None:
        """Notes the hash of the LoRA that the run made, from its metadata; a file rewritten by a tool may lack it."""
        write_text(self.path / "made.txt", lora.metadata.get(MODEL_HASH, ""))

    def add_samples(self, step: int, images: Sequence[Image.Image]) -> None:
        """Writes the samples of a step into the folder, and replaces those that are there."""
        for index, image in enumerate(images):
            write_file(self.path / f"sample-{step:06d}-{index}.png", partial(image.save, format="PNG"))

    def samples(self) -> dict[int, list[Image.Image]]:
        """The samples of each step, by step, in order."""
        found: dict[int, list[Image.Image]] = {}
        for file in sorted(self.path.glob("sample-*.png")):
            with suppress(*DAMAGED), Image.open(file) as image:
                found.setdefault(int(file.stem.split("-")[1]), []).append(image.convert("RGB"))
        return found

    def add_measured(self, step: int, lora: Trained, dtype: torch.dtype) -> None:
        """Writes a measured checkpoint that is not the run's result into the folder."""
        lora.save(self.path / f"measured-{step:06d}.safetensors", dtype)

    def measured(self) -> dict[int, Path]:
        """The files that `add_measured` wrote, by step."""
        return {int(file.stem.split("-")[1]): file for file in self.path.glob("measured-*.safetensors")}

    def sample_sheet(self) -> Image.Image:
        """A sheet with a row of samples for each step, or with a sentence when there are none."""
        rows = [(f"step {step}", images) for step, images in self.samples().items()]
        return contact_sheet(rows, tile=256, title="" if rows else "no samples were drawn")


@dataclass(frozen=True)
class TrainedFile:
    """A trained LoRA in the folder of LoRAs, and the folder of the run that made it."""

    path: Path
    run: RunFolder
    found: bool
    """Whether it had been trained before, so that no step was made now."""

    def likenesses(self) -> Curve:
        """The likeness measured during its training; empty when none was."""
        return [(point["step"], point["likeness"]) for point in self._curve()["points"]]

    def leakage(self) -> float | None:
        """How much the class has come to look like the person, as measured during its training; None when it was not."""
        curve = self._curve()
        return curve["points"][curve["kept"]]["leakage"] if curve["points"] else None

    def checkpoints(self) -> dict[int, Path]:
        """The file of each measured checkpoint that can be chosen, by step: this one of the step that was kept; else empty."""
        curve = self._curve()
        kept = {curve["points"][curve["kept"]]["step"]: self.path} if curve["points"] else {}
        return dict(sorted({**self.run.measured(), **kept}.items())) if kept else {}

    def take_checkpoint(self, step: int) -> Path:
        """The path of the LoRA of a measured step: beside this one, as NAME-stepNNNNNN, where it is written if it is not yet.

        Another file of that name is left, and -2 and so on added. Raises BadConfig for a step that is none of `checkpoints`.
        """
        files = self.checkpoints()
        if step not in files:
            there = ", ".join(map(str, files)) or "none"
            raise BadConfig(f"checkpoint = {step}: no such checkpoint of {self.path.stem} is there (but: {there})")
        if files[step] == self.path:
            return self.path
        file, key = SafetensorsFile.open(files[step]), f"{self.run.path.name}-step{step:06d}"
        first = checkpoint_path(self.path, step)
        numbered = (first.with_stem(f"{first.stem}-{number}") for number in itertools.count(2))
        made = file.metadata[MODEL_HASH]
        path = next(p for p in itertools.chain([first], numbered) if not p.exists() or _has_tensors(p, made))
        if not path.exists():
            copy_with_metadata(file, path, file.metadata | {KEY: key, "ss_output_name": path.stem})
        return path

    def _curve(self) -> dict[str, Any]:
        """The measurements in its metadata; no points when there are none."""
        return json.loads(LoraFile.read(self.path).metadata.get(LIKENESS_KEY, '{"points": []}'))


def drawn_sample(lora: LoraFile) -> Image.Image | None:
    """The sample that its training drew with the LoRA, or last before its step; None where there is none any more."""
    match = re.fullmatch(r"([0-9a-f]{64})(-step\d+)?", lora.metadata.get(KEY, ""))
    if match is None or not (folder := cache_folder() / "runs" / match[1]).is_dir():
        return None
    step = int(lora.metadata.get("ss_steps", 0))
    drawn = [images[0] for at, images in RunFolder(folder).samples().items() if at <= step]
    return drawn[-1] if drawn else None


def find_or_train(
    job: TrainingJob,
    base: Base,
    folders: Sequence[Path],
    *,
    own_name: bool = False,
    device: torch.device | None = None,
    on_history: Callable[[Curve], None] = lambda history: None,
    on_point: Callable[[StepReport], None] = lambda report: None,
    callbacks: Callbacks = NO_CALLBACKS,
) -> TrainedFile:
    """The LoRA of the job as a file in the first of the folders, found if it has been trained before, else trained now.

    A file with the job's name and key is taken as it is. A file anywhere in or below the folders that has the tensors which
    this job made before is copied under the job's name. No other file is replaced: when the name is taken, or another run
    is about to write it, the new file is called NAME-2 and so on. The checkpoints of `save_every` are written beside it.

    With `own_name` the file always has the job's name. What has that name already, and the checkpoints beside it, move into
    the folder `earlier` as soon as the new LoRA is trained; a LoRA of the job that lies there is moved back, without
    its checkpoints.

    An exception from a callback cancels: the run is kept, and the next call goes on from there. StopAndKeep from `on_step`
    ends the training, and its file counts as the job's. Before anything is trained, `on_history` is called with the losses
    of steps made in earlier calls. `on_point` is called with each step whose loss is added to them: the last one, those after
    which likeness was measured, and at most two others a second. Samples are kept in the run's folder in any case. Errors
    are subclasses of FaceLoraError; InUse says that another run is training the same job.
    """
    job = job.looked_at(base, callbacks.on_warning)
    key = job.key(base)
    folder = made_folder("runs", key)
    with locked(folder / _OUTPUT):
        remove_leftovers(folder, ".*")
        run = RunFolder(folder)
        on_history(run.history())
        with (_own_place if own_name else _place)(folders[0], job, key) as (path, found):
            if not found:
                before = _trained_before(run, folders)
                found = before is not None
                lora = before or _train(job, base, run, device, on_point, callbacks)
                if own_name:
                    _set_lora_aside(path)
                    lora = _trained_before(run, folders) or lora  # it may have been read from a file that has moved
                metadata = lora.metadata | {KEY: key, "ss_output_name": path.stem}
                lora.with_metadata(metadata).save(path, PRECISIONS[job.config.save_precision])
                del before, lora  # Windows deletes no file that is still read
                _clear(run.output, path)
        run.set_made(LoraFile.read(path))
    return TrainedFile(path, run, found)


def _train(
    job: TrainingJob,
    base: Base,
    run: RunFolder,
    device: torch.device | None,
    on_point: Callable[[StepReport], None],
    callbacks: Callbacks,
) -> Trained:
    """What is trained, which is in the folder of the run too, with its history and samples."""

    def sample(step: int, images: list[Image.Image]) -> None:
        run.add_samples(step, images)
        if callbacks.on_sample:
            callbacks.on_sample(step, images)

    def measured(step: int, lora: Trained) -> None:
        run.add_measured(step, lora, PRECISIONS[job.config.save_precision])

    try:
        return train(
            job.photos,
            base,
            job.config,
            output=run.output,
            class_photos=job.class_photos or None,
            continue_from=job.continue_from,
            training_adapter=job.training_adapter,
            resume=True,
            device=device,
            callbacks=replace(
                callbacks, on_step=_recorded(run, on_point, callbacks.on_step), on_sample=sample, on_measured=measured
            ),
        )
    finally:
        run.save_history()


def _recorded(
    run: RunFolder, on_point: Callable[[StepReport], None], on_step: Callable[[StepReport], None]
) -> Callable[[StepReport], None]:
    """A callback that adds to the history of the run, and then calls `on_step`."""
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


def _trained_before(run: RunFolder, folders: Sequence[Path]) -> LoraFile | None:
    """The LoRA that the run trained in an earlier call, in the folders under any name or still in its own; None without one."""
    return _with_tensors(run.made(), folders) or _unwritten(run.output)


def _unwritten(output: Path) -> LoraFile | None:
    """The LoRA that the run trained but could not write into the folder of LoRAs, such as for a full disk; else None."""
    with suppress(FaceLoraError):
        return LoraFile.read(output)
    return None


def _clear(output: Path, path: Path) -> None:
    """Deletes the output of a run, which is now in the LoRA at `path`, and moves its checkpoints beside that."""
    output.unlink(missing_ok=True)
    output.with_name(f"{output.stem}-embedding{output.suffix}").unlink(missing_ok=True)
    for checkpoint in output.parent.glob(f"{output.stem}-step*.safetensors"):
        file = SafetensorsFile.open(checkpoint)
        target = path.with_name(path.stem + checkpoint.name.removeprefix(output.stem))
        copy_with_metadata(file, target, file.metadata | {"ss_output_name": path.stem})
        checkpoint.unlink()


@contextmanager
def _place(folder: Path, job: TrainingJob, key: str) -> Iterator[tuple[Path, bool]]:
    """A context with the first path of NAME, NAME-2, ... that is free or has a LoRA with the key, and whether it is there.

    A path that was free is locked within the context, so that no other run takes it.
    """
    for number in itertools.count(1):
        path = folder / f"{job.name}{f'-{number}' if number > 1 else ''}.safetensors"
        if path.exists():
            if not has_key(path, key):
                continue
            yield path, True
            return
        check_writable(path)
        with ExitStack() as held:
            try:
                held.enter_context(locked(path))
            except InUse:
                continue
            if not path.exists() and not foreign_checkpoint(path, job.config):
                delete_leftovers(path)
                yield path, False
                return


@contextmanager
def _own_place(folder: Path, job: TrainingJob, key: str) -> Iterator[tuple[Path, bool]]:
    """A context with the path of NAME, and whether a LoRA with the key is there, or was in `earlier` and is moved back.

    Where none is, the path is locked within the context, whatever is there.
    """
    path = folder / f"{job.name}.safetensors"
    if has_key(path, key):
        yield path, True
        return
    check_writable(path)
    with locked(path):
        delete_leftovers(path)
        earlier = next(
            (file for file in sorted((path.parent / EARLIER).glob("*.safetensors")) if has_key(file, key)), None
        )
        if earlier:
            _set_lora_aside(path)
            with writing(path):
                earlier.rename(path)
        yield path, earlier is not None


def _set_lora_aside(path: Path) -> None:
    """Moves the LoRA at the path and its checkpoints, those that are there, into the folder `earlier` beside it."""
    set_aside(path)  # by that name, which on some disks is another spelling of the file's
    names = re.compile(rf"{re.escape(path.stem)}-step\d{{6,}}{re.escape(path.suffix)}")
    with writing(path.parent):
        for file in [file for file in path.parent.iterdir() if names.fullmatch(file.name)]:
            set_aside(file)


def has_key(path: Path, key: str) -> bool:
    """Whether there is a LoRA at the path that has the key of a job (`TrainingJob.key`) in its metadata.

    Its tensors must be those that were written, as far as the hash in the metadata says, and of one dtype, as they are
    written: the hash is of their bytes alone.
    """
    try:
        lora = LoraFile.read(path)
        lora.check()
        if lora.metadata.get(KEY) != key or len({tensor.dtype for tensor in lora.tensors.values()}) > 1:
            return False
        # A tool that has written the file anew may have left the hash out.
        return lora.metadata.get(MODEL_HASH, lora.model_hash) == lora.model_hash
    except FaceLoraError:
        return False


def _with_tensors(made: str | None, folders: Sequence[Path]) -> LoraFile | None:
    """The first LoRA in the folders whose tensors have that hash, under any name."""
    found = (path for path in _files(folders) if _has_tensors(path, made)) if made else ()
    return next(map(LoraFile.read, found), None)


def _has_tensors(path: Path, made: str) -> bool:
    """Whether the file is a LoRA whose tensors have that hash; only one whose metadata say so is read."""
    with suppress(FaceLoraError):
        return SafetensorsFile.open(path).metadata.get(MODEL_HASH) == made and LoraFile.read(path).model_hash == made
    return False


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    """The files in and below the folders that may be LoRAs. Links to folders are followed, as in ComfyUI."""
    for folder in folders:
        for parent, below, names in os.walk(folder, followlinks=True):
            below.sort()
            yield from (Path(parent, name) for name in sorted(names) if name.endswith((".safetensors", ".sft")))
