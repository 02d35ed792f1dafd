"""A store of trained LoRAs, so that nothing is trained twice and an interrupted training run is resumed.

The key of a job is a hash of everything that its LoRA depends on. It is in the LoRA's metadata, so the file can be found among
others. It is also the name of the run's folder in the cache folder.
"""

import itertools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..config import TrainConfig
from ..device import PRECISIONS
from ..errors import BadConfig, BadFile, FaceLoraError, InUse
from ..lora.file import KEY, LoraFile
from ..lora.hashes import model_hash
from ..lora.names import AGREED, SUBJECT_KEY
from ..models.base import Base
from ..photos import Photo, Ready
from ..photos.reading import DAMAGED
from ..pictures.sheet import contact_sheet
from ..progress import READING, OnWarning, silent
from ..storage.cache_folder import cache_folder, content_key, made_folder
from ..storage.drawn import save_png
from ..storage.files import (
    EARLIER,
    RESERVED,
    check_writable,
    read_json,
    remove_leftovers,
    set_aside,
    write_text,
    writing,
)
from ..storage.locks import locked
from ..storage.safetensors_file import SafetensorsFile, copy_with_metadata
from .callbacks import NO_CALLBACKS, Callbacks, StepReport
from .identity import settings_of_the_file
from .job import checkpoint_path, delete_leftovers, foreign_checkpoint, metadata_of, ready_for, settled, train
from .likeness import LIKENESS_KEY
from .methods import METHODS
from .methods.method import Trained
from .training_adapter import TrainingAdapter

MODEL_HASH = "sshs_model_hash"
"""The key of the tensors' hash in a saved LoRA's metadata."""
TRAINING_VERSION = "2"
"""A part of every job's key. Raise it when the same inputs would train differently."""
LOOK_INTERVAL = 0.5
"""Seconds between two reads of the loss. Each read waits for the device."""
SAVE_INTERVAL = 10.0
"""Seconds between two saves of the history. If the process is killed, later entries are lost."""

_OUTPUT = "lora.safetensors"
"""The name of the LoRA in the run's folder."""

Curve = list[tuple[int, float]]
"""A list of (step, value), in the order of the steps."""


def lora_path(name: str) -> str:
    """The name of a LoRA that a user typed, NAME or FOLDER/NAME, without the ending `.safetensors`.

    Raises BadConfig for a name that leads out of the folder or that some operating system does not allow.
    """
    parts = re.split(r"[\\/]", name.removesuffix(".safetensors"))
    if any(part.strip() in ("", ".", "..") or RESERVED.fullmatch(part) for part in parts) or re.search(
        r'[<>:"|?*\x00-\x1f]', name
    ):
        raise BadConfig(f"name {name!r}: give a file name, or FOLDER/NAME below the folder of LoRAs")
    return "/".join(parts)


@dataclass(frozen=True)
class TrainingJob:
    """A LoRA, or what another method makes, to be trained. The base model is not part of it."""

    name: str
    """The name of its file within the LoRA folder, without the suffix, with `/` between folders."""
    config: TrainConfig
    photos: Sequence[Photo] | Ready
    class_photos: Sequence[Photo] = ()
    """The class images for prior preservation. If empty, `config.class_images` pictures are drawn."""
    continue_from: LoraFile | None = None
    training_adapter: TrainingAdapter | None = None
    agreed: bool = False
    """Whether the user has confirmed that the photos are of a real person who has agreed. The file's metadata then state it."""

    @property
    def used(self) -> Sequence[Photo]:
        """The photos of the job. After the check, rejected photos are not included."""
        return self.photos.photos if isinstance(self.photos, Ready) else self.photos

    def key(self, base: Base) -> str:
        """Return a hash that is equal when the same tensors would be trained, whatever the files are called."""
        settings = settings_of_the_file(self.config)
        photos = [[photo.fingerprint for photo in group] for group in (self.used, self.class_photos)]
        start = model_hash(self.continue_from.tensors) if self.continue_from else None
        adapter = [self.training_adapter.digest] if self.training_adapter else []
        written = json.dumps(settings, sort_keys=True)
        return content_key("lora", TRAINING_VERSION, written, photos, start, base.identity, *adapter)

    def looked_at(self, base: Base, on_warning: OnWarning = silent) -> "TrainingJob":
        """Check the photos once, as `ready_for` does, and return the job with the result.

        Only the photos that are used affect the training and the key. So a set without rejected photos has the same key with
        and without a check.
        """
        ready = ready_for(self.photos, base, self.config, on_warning=on_warning)
        return replace(self, photos=ready, config=settled(self.config, ready))

    def check_makes_lora(self) -> None:
        """Raise BadConfig if the method makes an embedding or a checkpoint instead of a LoRA."""
        if (made := METHODS[self.config.method].makes) != "lora":
            raise BadConfig(
                f"method = {self.config.method!r} doesn't make a LoRA (but: {made}). Use the command facelora train"
            )


@dataclass
class RunFolder:
    """The folder of a run, with its loss history, its samples and, while it is unfinished, its state."""

    path: Path
    """The path of the folder, which exists."""
    _history: Curve = field(default_factory=list)

    def __post_init__(self) -> None:
        # It may be missing or damaged, which doesn't matter: it is only displayed.
        with suppress(BadFile, TypeError, ValueError, OverflowError):
            self._history = [(int(step), float(loss)) for step, loss in read_json(self.path / "history.json")]

    @property
    def output(self) -> Path:
        """The path of the LoRA that the run writes, with its intermediate LoRAs and its state beside it."""
        return self.path / _OUTPUT

    def history(self) -> Curve:
        """Return the history of the smoothed loss."""
        return list(self._history)

    def add(self, step: int, loss: float) -> None:
        """Add a step to the history, and drop this and later steps that a killed process had recorded."""
        while self._history and self._history[-1][0] >= step:
            self._history.pop()
        self._history.append((step, loss))

    def save_history(self) -> None:
        """Write the history into the folder, where RunFolder reads it."""
        write_text(self.path / "history.json", json.dumps(self._history))

    def made(self) -> str | None:
        """Return the hash of the tensors of the LoRA that the run made, or None if it is unfinished."""
        file = self.path / "made.txt"
        return file.read_text("utf-8", errors="replace") if file.exists() else None

    def set_made(self, lora: LoraFile) -> None:
        """Record the hash of the LoRA that the run made, from its metadata. A file rewritten by a tool may lack it."""
        write_text(self.path / "made.txt", lora.metadata.get(MODEL_HASH, ""))

    def add_samples(self, step: int, images: Sequence[Image.Image]) -> None:
        """Write the samples of a step into the folder, replacing earlier ones."""
        for index, image in enumerate(images):
            save_png(self.path / f"sample-{step:06d}-{index}.png", image)

    def samples(self) -> dict[int, list[Image.Image]]:
        """Read the samples of each step, by step, in order."""
        found: dict[int, list[Image.Image]] = {}
        for file in sorted(self.path.glob("sample-*.png")):
            with suppress(*DAMAGED), Image.open(file) as image:
                found.setdefault(int(file.stem.split("-")[1]), []).append(image.convert("RGB"))
        return found

    def samples_until(self, step: int) -> tuple[int, list[Image.Image]] | None:
        """Read the samples that were drawn last up to this step, with their step. None if there aren't any."""
        drawn = [(at, images) for at, images in self.samples().items() if at <= step]
        return max(drawn, default=None, key=itemgetter(0))

    def add_measured(self, step: int, lora: Trained, dtype: torch.dtype) -> None:
        """Write a measured intermediate LoRA that is not the run's result into the folder."""
        lora.save(self.path / f"measured-{step:06d}.safetensors", dtype)

    def measured(self) -> dict[int, Path]:
        """Find the files that `add_measured` wrote, by step."""
        return {int(file.stem.split("-")[1]): file for file in self.path.glob("measured-*.safetensors")}

    def sample_sheet(self) -> Image.Image:
        """Draw a sheet with a row of samples for each step. Without samples, it contains a sentence that says so."""
        rows = [(f"step {step}", images) for step, images in self.samples().items()]
        return contact_sheet(rows, tile=256, title="" if rows else "no samples were drawn")


@dataclass(frozen=True)
class TrainedFile:
    """A trained LoRA in the LoRA folder, and the folder of the run that made it."""

    path: Path
    run: RunFolder
    found: bool
    """Whether it had been trained before, so that no step was needed now."""

    def likenesses(self) -> Curve:
        """Return the likeness measured during its training, empty if it wasn't measured."""
        return [(point["step"], point["likeness"]) for point in self._curve()["points"]]

    def kept_step(self) -> int:
        """The step that the file is of."""
        kept = self._kept()
        return kept["step"] if kept else int(LoraFile.read(self.path).metadata.get("ss_steps", 0))

    def kept_samples(self) -> tuple[int, list[Image.Image]] | None:
        """The step and the samples that were drawn with the file, else last before its step; None where there are none."""
        return self.run.samples_until(self.kept_step())

    def leakage(self) -> float | None:
        """Return how much the class came to look like the person during training, or None if it wasn't measured."""
        kept = self._kept()
        return kept["leakage"] if kept else None

    def checkpoints(self) -> dict[int, Path]:
        """Return the files of the measured intermediate LoRAs, by step, with this one. Empty if none was measured."""
        kept = self._kept()
        return dict(sorted({**self.run.measured(), kept["step"]: self.path}.items())) if kept else {}

    def take_checkpoint(self, step: int) -> Path:
        """Return the path of a measured step's LoRA: NAME-stepNNNNNN beside this one. It is written if it doesn't exist yet.

        A different file of that name is kept, and -2 and so on is added. Raises BadConfig for a step not in `checkpoints`.
        """
        files = self.checkpoints()
        if step not in files:
            there = ", ".join(map(str, files)) or "none"
            raise BadConfig(
                f"checkpoint = {step}: {self.path.stem} has no intermediate LoRA of this step. Choose one of: {there}"
            )
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

    def _kept(self) -> dict[str, Any] | None:
        """Return the measurement of this file, or None if it wasn't measured."""
        curve = self._curve()
        return curve["points"][curve["kept"]] if curve["points"] else None

    def _curve(self) -> dict[str, Any]:
        """Read the measurements from its metadata. Without any, the list of points is empty."""
        return json.loads(LoraFile.read(self.path).metadata.get(LIKENESS_KEY, '{"points": []}'))


def drawn_sample(lora: LoraFile) -> Image.Image | None:
    """Return the sample drawn with the LoRA during training, or else the last one before its step. None if it was deleted."""
    match = re.fullmatch(r"([0-9a-f]{64})(-step\d+)?", lora.metadata.get(KEY, ""))
    if match is None or not (folder := cache_folder() / "runs" / match[1]).is_dir():
        return None
    drawn = RunFolder(folder).samples_until(int(lora.metadata.get("ss_steps", 0)))
    return drawn[1][0] if drawn else None


def is_trained(job: TrainingJob, base: Base, folders: Sequence[Path]) -> bool:
    """Whether `find_or_train` would find what the run of this job, whose photos have been looked at, has trained."""
    folder = cache_folder() / "runs" / job.key(base)
    return folder.is_dir() and _trained_before(RunFolder(folder), folders) is not None


def find_or_train(
    job: TrainingJob,
    base: Base,
    folders: Sequence[str | os.PathLike[str]],
    *,
    own_name: bool = False,
    device: torch.device | None = None,
    on_history: Callable[[Curve], None] = lambda history: None,
    on_point: Callable[[StepReport], None] = lambda report: None,
    callbacks: Callbacks = NO_CALLBACKS,
) -> TrainedFile:
    """Find the LoRA of the job, or train it. Returns it as a file in the first of the folders.

    A file with the job's name and key is used unchanged. A file in or below the folders that has the tensors this job made
    earlier is copied under the job's name. No other file is replaced: if the name is taken, or another run is about to write
    it, the new file is called NAME-2 and so on. The intermediate LoRAs of `save_every` are written beside it.

    With `own_name` the file always has the job's name. As soon as the new LoRA is trained, an existing file with that name and
    its intermediate LoRAs are moved into the folder `earlier`. A LoRA of the job that is in there is moved back, without its
    intermediate LoRAs.

    An exception from a callback cancels: the run is kept, and the next call continues it. StopAndKeep from `on_step` ends the
    training run, and its file counts as the job's. Before training, `on_history` is called with the losses of steps from
    earlier calls. `on_point` is called with each step whose loss is added to them: the last one, those after which likeness
    was measured, and at most two others per second. A loss that is not finite is left out. Samples are always kept in the
    run's folder. Errors are subclasses of FaceLoraError. InUse means that another run is training the same job.
    """
    folders = [Path(folder) for folder in folders]
    job.check_makes_lora()
    job = job.looked_at(base, callbacks.on_warning)
    base.compute_hashes(callbacks.progress(READING))
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
                    lora = _trained_before(run, folders) or lora  # it may have been read from a file that has now moved
                said = {SUBJECT_KEY: AGREED} if job.agreed else {}
                metadata = lora.metadata | {KEY: key, "ss_output_name": path.stem} | said
                lora.with_metadata(metadata).save(path, PRECISIONS[job.config.save_precision])
                del before, lora  # Windows can't delete a file that is still open
                _clear(run.output, path, said)
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
    """Train the job. The result is also saved in the run's folder, with its history and samples."""

    def sample(step: int, images: list[Image.Image]) -> None:
        run.add_samples(step, images)
        if callbacks.on_sample:
            callbacks.on_sample(step, images)

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
                callbacks,
                on_step=_recorded(run, on_point, callbacks.on_step),
                on_sample=sample,
                on_measured=partial(run.add_measured, dtype=PRECISIONS[job.config.save_precision]),
            ),
        )
    finally:
        run.save_history()


def _recorded(
    run: RunFolder, on_point: Callable[[StepReport], None], on_step: Callable[[StepReport], None]
) -> Callable[[StepReport], None]:
    """Return a callback that adds to the history of the run, and then calls `on_step`."""
    looked = saved = -math.inf

    def step(report: StepReport) -> None:
        nonlocal looked, saved
        now = time.monotonic()
        if report.measured or now - looked > LOOK_INTERVAL or report.step == report.steps:
            looked = now
            if math.isfinite(report.loss):  # else the run soon raises TrainingDiverged; a page cannot read NaN in JSON
                run.add(report.step, report.loss)
                on_point(report)
        if now - saved > SAVE_INTERVAL:
            saved = now
            run.save_history()
        on_step(report)

    return step


def _trained_before(run: RunFolder, folders: Sequence[Path]) -> LoraFile | None:
    """Find the LoRA that the run trained in an earlier call: in the folders under any name, or in its own folder. Else None."""
    if found := _with_tensors(run.made(), folders):
        return found
    with suppress(FaceLoraError):
        return LoraFile.read(run.output)  # not written into the LoRA folder, for example because the disk was full
    return None


def _clear(output: Path, path: Path, said: Mapping[str, str]) -> None:
    """Delete the output of a run, which is now the LoRA at `path`, and move its intermediate LoRAs beside that.

    `said` is added to their metadata.
    """
    output.unlink(missing_ok=True)
    output.with_name(f"{output.stem}-embedding{output.suffix}").unlink(missing_ok=True)
    for checkpoint in output.parent.glob(f"{output.stem}-step*.safetensors"):
        file = SafetensorsFile.open(checkpoint)
        target = path.with_name(path.stem + checkpoint.name.removeprefix(output.stem))
        copy_with_metadata(file, target, {**file.metadata, "ss_output_name": path.stem, **said})
        checkpoint.unlink()


@contextmanager
def _place(folder: Path, job: TrainingJob, key: str) -> Iterator[tuple[Path, bool]]:
    """Choose the first path of NAME, NAME-2, ... that is free or has a LoRA with the key. Yields it and whether it exists.

    A free path is locked within the context, so that no other run takes it.
    """
    for number in itertools.count(1):
        path = folder / f"{job.name}{f'-{number}' if number > 1 else ''}.safetensors"
        if os.path.exists(path):  # Path.exists fails for a name that is too long
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
    """Yield the path of NAME, and whether it has a LoRA with the key. One found in `earlier` is moved back first.

    Without one, the path is locked within the context, whatever file it has.
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
    """Move the LoRA at the path and its intermediate LoRAs, if they exist, into the folder `earlier` beside it."""
    set_aside(path)  # under this name, which some disks treat as another spelling of the file's name
    names = re.compile(rf"{re.escape(path.stem)}-step\d{{6,}}{re.escape(path.suffix)}")
    with writing(path.parent):
        for file in [file for file in path.parent.iterdir() if names.fullmatch(file.name)]:
            set_aside(file)


def has_key(path: Path, key: str, makes: str = "lora") -> bool:
    """Return whether the path has a file with the key of a job (`TrainingJob.key`) in its metadata. `Method.makes` is its type.

    The tensors of a LoRA or an embedding must match the hash in the metadata, if there is one. They must also have one dtype,
    as they were written, because the hash covers only their bytes. A checkpoint has no hash.
    """
    if makes == "checkpoint":
        return metadata_of(path).get(KEY) == key
    try:
        lora = LoraFile.read(path)
        lora.check()
        if lora.metadata.get(KEY) != key or len({tensor.dtype for tensor in lora.tensors.values()}) > 1:
            return False
        # A tool that rewrote the file may have left out the hash.
        return lora.metadata.get(MODEL_HASH, lora.model_hash) == lora.model_hash
    except FaceLoraError:
        return False


def files_of(key: str, folders: Sequence[Path]) -> list[Path]:
    """The files that a job has made, by its key, in and below the folders: the LoRA, and its steps beside it."""
    found = {path: metadata_of(path) for path in _files(folders)}
    mine = [path for path, metadata in found.items() if metadata.get(KEY, "").startswith(key)]
    names = {(path.parent, path.stem) for path in mine}
    steps = [
        path
        for path, metadata in found.items()
        if path not in mine
        and re.search(r"-step\d{6,}$", path.stem)
        and (path.parent, metadata.get("ss_output_name")) in names
    ]
    return mine + steps


def forget_run(key: str) -> None:
    """Deletes the run's folder of a job, by its key: its state, samples, history and measured steps."""
    shutil.rmtree(cache_folder() / "runs" / key, ignore_errors=True)


def _with_tensors(made: str | None, folders: Sequence[Path]) -> LoraFile | None:
    """Return the first LoRA in the folders whose tensors have that hash, under any name."""
    found = (path for path in _files(folders) if _has_tensors(path, made)) if made else ()
    return next(map(LoraFile.read, found), None)


def _has_tensors(path: Path, made: str) -> bool:
    """Return whether the file is a LoRA whose tensors have that hash. It is only read if its metadata has the hash too."""
    with suppress(FaceLoraError):
        return SafetensorsFile.open(path).metadata.get(MODEL_HASH) == made and LoraFile.read(path).model_hash == made
    return False


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    """Yield the files in and below the folders that may be LoRAs. Links to folders are followed, as in ComfyUI."""
    for folder in folders:
        for parent, below, names in os.walk(folder, followlinks=True):
            below.sort()
            yield from (Path(parent, name) for name in sorted(names) if name.endswith((".safetensors", ".sft")))
