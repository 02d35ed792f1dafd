"""A store of trained LoRAs, so that nothing is trained twice and an interrupted training run is resumed.

The key of a job is in the metadata of what it made, so the file can be found among others. It is also the name of the run's
folder in the cache folder.
"""

import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import TrainConfig, known_settings
from ..device import PRECISIONS
from ..errors import BadConfig, FaceLoraError, InUse
from ..faces import FaceNetwork
from ..lora.file import KEY, LoraFile
from ..lora.metadata import agreement_metadata
from ..models.base import Base
from ..models.opening import load_base
from ..photos import Photo, PhotoLike, Ready, as_photo, check_agreed, keep_agreement, read_photos
from ..progress import READING, OnWarning, silent
from ..storage.cache_folder import made_folder
from ..storage.files import EARLIER, RESERVED, check_writable, remove_leftovers, set_aside, writing
from ..storage.locks import locked
from ..storage.plain_values import is_text
from ..storage.safetensors_file import SafetensorsFile, check_metadata, copy_with_metadata
from .callbacks import NO_CALLBACKS, Callbacks, StepReport
from .job import TrainingJob
from .methods import METHODS
from .methods.method import Checkpoint, Trained
from .recipes import recipe_config
from .run_files import RunFiles, metadata_of
from .run_job import run_job
from .trained_file import Curve, RunFolder, TrainedFile, has_key, with_tensors
from .training_adapter import TrainingAdapter

LOSS_INTERVAL = 0.5
"""Seconds between two reads of the loss. Each read waits for the device."""
SAVE_INTERVAL = 10.0
"""Seconds between two saves of the history. If the process is killed, later entries are lost."""
_MOST_NAME = 200
"""The most bytes in the name of a LoRA. File systems allow 255, which its temporary files and intermediate LoRAs need."""


@dataclass(frozen=True)
class OutputFile:
    """One path for a trained file, with the state, intermediate LoRAs and samples beside it."""

    path: Path
    resume: bool = False
    """Whether to continue from the state of an unfinished run, if there is one."""
    restart: bool = False
    """Whether to train again what has been trained, and to replace the state of an unfinished run."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata to add to the file."""


@dataclass(frozen=True)
class LoraFolders:
    """The first of some folders for a trained LoRA, while unfinished runs are in the cache folder.

    A file in or below the folders that has the tensors that the job made earlier is copied under the name. The intermediate
    LoRAs of `save_every` are written beside it.
    """

    name: str
    """The name of the file in the first folder, without the suffix, with `/` between folders."""
    folders: Sequence[Path]
    sets_aside: bool = False
    """Whether the file always has this name, and a file of another job with the name is set aside."""
    agreed: bool = False
    """Whether the user has confirmed that the photos are of a real person who has agreed. The file's metadata then state it."""


Destination = OutputFile | LoraFolders
"""Where a job's file is written. A file of the job that is there is used unchanged. If another job made the file:

- at an OutputFile, it is replaced.
- in LoraFolders, it stays, as does one that another run is about to write. The new file is called NAME-2 and so on.
- in LoraFolders with `sets_aside`, it and its intermediate LoRAs are moved into the folder `earlier` as soon as the new LoRA is
  trained. If its job is asked for again, it is moved back, without its intermediate LoRAs.
"""


def lora_path(name: str) -> str:
    """Return the name of a LoRA that a user typed, NAME or FOLDER/NAME, without the ending `.safetensors`.

    Raises BadConfig for a name that leads out of the folder or that some operating system does not allow.
    """
    parts = re.split(r"[\\/]", name.removesuffix(".safetensors"))
    if any(len(part.encode("utf-8", "replace")) > _MOST_NAME for part in parts):
        raise BadConfig(f"name {name[:40]!r}...: give at most {_MOST_NAME} letters, fewer if they are not Latin")
    wrong = re.findall(r'[<>:"|?*\x00-\x1f]', name) or [
        part for part in parts if RESERVED.fullmatch(part) or part[:1] == "."
    ]
    if wrong or not all(map(str.strip, parts)) or not is_text(name):
        why = f", without {wrong[0]!r}, which not every system allows" if wrong else ""
        raise BadConfig(f"name {name!r}: give a file name, or FOLDER/NAME below the folder of LoRAs{why}")
    return "/".join(parts)


def check_makes_lora(config: TrainConfig) -> None:
    """Raise BadConfig if the method makes an embedding or a checkpoint, which have no place in LoraFolders."""
    if (made := METHODS[config.method].makes) != "lora":
        raise BadConfig(f"method = {config.method!r} doesn't make a LoRA (but: {made}). Use the command facelora train")


def train(
    photos: str | os.PathLike[str] | Sequence[PhotoLike] | Ready,
    base: Base | str | os.PathLike[str] | Mapping[str, Tensor],
    config: TrainConfig | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    class_photos: str | os.PathLike[str] | Sequence[PhotoLike] | None = None,
    continue_from: LoraFile | str | os.PathLike[str] | None = None,
    training_adapter: TrainingAdapter | LoraFile | str | os.PathLike[str] | None = None,
    held_out: str | os.PathLike[str] | Sequence[PhotoLike] = (),
    drawn_photos: str | os.PathLike[str] | Sequence[PhotoLike] | None = None,
    faces: FaceNetwork | None = None,
    judge: FaceNetwork | None = None,
    resume: bool = False,
    restart: bool = False,
    strict: bool = False,
    device: torch.device | str | None = None,
    metadata: Mapping[str, str] | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
    **settings: Any,
) -> Trained:
    """Train a LoRA, write it to `output` (a `.safetensors` path) if that is given, and return it.

    `photos` is a folder, a list of paths, Photos, PIL images or arrays (uint8, (height, width, 3) in RGB), or a Ready from
    `ready_for`. `class_photos`, for prior preservation, `held_out` and `drawn_photos` are a folder or a list too. Drawn photos
    are pictures of the person from a program. Without a `config`, the recipe `balanced` is used: see
    `core.training.recipe_config`. Other keywords are settings that replace those of it or `config`, such as `steps=300`.

    With `output`, the result is read from that file. If the file was trained from the same photos, settings and base model,
    nothing is trained, except with `restart=True`. Any other file is replaced. The state is kept beside the output until the
    run ends. If a state exists, `resume=True` continues from it and `restart=True` replaces it. Otherwise it is an error. Every
    `save_every` steps a numbered LoRA is saved beside the output. Samples are saved in `<name>-samples`. Callbacks can take
    over both.

    A `training_adapter` is a LoRA that undoes a base model's distillation to a few steps. It is active in training steps only.
    Samples and class images are drawn without it, and without guidance.

    Likeness to the `held_out` photos, or to `config.hold_out` of `photos`, is measured by `faces` (default: YuNet and SFace).
    It decides which intermediate LoRA is kept. A `judge` measures the same pictures but selects nothing. The measurements are
    in the metadata under `core.training.likeness.LIKENESS_KEY`. `metadata` is added to that of the result, but not to that of
    intermediate LoRAs.

    Every callback may raise to cancel; `check_cancelled` is called many times a step. Raising StopAndKeep from `on_step` ends
    the training run and keeps what has been learned. Errors are subclasses of FaceLoraError. InUse means that another run has
    the same output.
    """
    check_metadata(metadata or {})
    _check_types(config, callbacks)
    warn = callbacks.on_warning
    given = photos if isinstance(photos, Ready) else _read(photos, strict, warn)
    out = _read(held_out, strict, warn, "held_out")
    settings = known_settings(settings)
    config = config and replace(config, **settings)
    if not isinstance(base, Base):
        wanted = config or TrainConfig(**settings)
        base = load_base(base, prediction_type=wanted.prediction_type, zero_terminal_snr=wanted.zero_terminal_snr)
    if output is not None:
        RunFiles(Path(output)).check(base)
    if config is None:
        count = len(given.used if isinstance(given, Ready) else given)
        config = recipe_config("balanced", base, count, {"hold_out": len(out), **settings} if out else settings, warn)
    if continue_from is not None and not isinstance(continue_from, LoraFile):
        continue_from = LoraFile.read(continue_from)
    job = TrainingJob.of(
        given,
        base,
        config,
        class_photos=() if class_photos is None else _read(class_photos, strict, warn, "class_photos"),
        start=continue_from,
        adapter=None if training_adapter is None else TrainingAdapter.open(training_adapter, base),
        held_out=out,
        drawn_photos=() if drawn_photos is None else _read(drawn_photos, strict, warn, "drawn_photos"),
        faces=faces,
        judge=judge,
        on_warning=warn,
    )
    if output is None:
        return run_job(job, device=device, metadata=metadata, callbacks=callbacks)
    destination = OutputFile(Path(output), resume, restart, metadata or {})
    return _read_result(job, find_or_train(job, destination, device=device, callbacks=callbacks).path)


def _read_result(job: TrainingJob, path: Path) -> Trained:
    if job.makes != "checkpoint":
        return LoraFile.read(path)
    file = SafetensorsFile.open(path)
    return Checkpoint(job.base.family.name, dict(file.metadata), file, str(path))


def _check_types(config: object, callbacks: object) -> None:
    if config is not None and not isinstance(config, TrainConfig):
        raise BadConfig(f"config is a {type(config).__name__}: expected a TrainConfig, such as recipe_config returns")
    if not isinstance(callbacks, Callbacks):
        given = type(callbacks).__name__
        raise BadConfig(f"callbacks is a {given}: expected Callbacks, such as Callbacks(on_step=function)")


def _read(
    photos: str | os.PathLike[str] | Sequence[PhotoLike], strict: bool, on_warning: OnWarning, name: str = "photos"
) -> list[Photo]:
    """Return the photos as a list. If `photos` is a folder, they are read from it. `name` is the argument's, for messages."""
    if isinstance(photos, str | os.PathLike):
        check_agreed(photos)
        return read_photos(
            Path(photos), strict=strict, drawn=name in ("class_photos", "drawn_photos"), on_warning=on_warning
        )
    check_agreed(*{Path(photo).parent for photo in photos if isinstance(photo, str | os.PathLike)})
    return [as_photo(photo, f"{name}[{number}]") for number, photo in enumerate(photos)]


def is_trained(job: TrainingJob, destination: Destination) -> bool:
    """Whether `find_or_train` would find there what a run of this job has trained."""
    if isinstance(destination, OutputFile):
        return not destination.restart and has_key(destination.path, job.key, job.makes)
    run = RunFolder.of(job.key)
    return run.path.is_dir() and _trained_before(run, destination.folders) is not None


def find_or_train(
    job: TrainingJob,
    destination: Destination,
    *,
    device: torch.device | str | None = None,
    on_history: Callable[[Curve], None] = silent,
    on_point: Callable[[StepReport], None] = silent,
    callbacks: Callbacks = NO_CALLBACKS,
) -> TrainedFile:
    """Find at the destination what the job makes, or train it. This is the one answer to whether something has been trained.

    An exception from a callback cancels: the run is kept, and the next call continues it (at an OutputFile, with `resume`).
    StopAndKeep from `on_step` ends the training run, and its file counts as the job's. Errors are subclasses of FaceLoraError.
    InUse means that another run is training the same job, or writing the same file.

    At LoraFolders, samples are always kept in the run's folder, and before training, `on_history` is called with the losses of
    steps from earlier calls. `on_point` is called with each step whose loss is added to them: the last one, those after which
    likeness was measured, and at most two others per second. A loss that is not finite is left out.
    """
    if isinstance(destination, LoraFolders):
        check_makes_lora(job.config)
    job.base.compute_hashes(callbacks.progress(READING))
    if isinstance(destination, OutputFile):
        return _in_file(job, destination, device, callbacks)
    run = RunFolder(made_folder("runs", job.key))
    with locked(run.files.output):
        remove_leftovers(run.path, ".*")
        on_history(run.history())
        with (_own_path if destination.sets_aside else _free_path)(destination, job) as (path, found):
            until = keep_agreement(path, job.agreement).agreed_until
            agreed = agreement_metadata(destination.agreed, until)
            if not found:
                before = _trained_before(run, destination.folders)
                found = before is not None
                lora = before or _kept_while_running(job, run, device, on_point, callbacks)
                if destination.sets_aside:
                    _set_lora_aside(path)
                    # It may have been read from a file now moved.
                    lora = _trained_before(run, destination.folders) or lora
                metadata = lora.metadata | {KEY: job.key, "ss_output_name": path.stem} | agreed
                lora.with_metadata(metadata).save(path, PRECISIONS[job.config.save_precision])
                del before, lora  # Windows can't delete a file that is still open
                _clear(run.files, path, job.key, agreed)
        run.set_made(LoraFile.read(path))
    return TrainedFile(path, run, found)


def _in_file(
    job: TrainingJob, destination: OutputFile, device: torch.device | str | None, callbacks: Callbacks
) -> TrainedFile:
    files, found = RunFiles(destination.path), is_trained(job, destination)
    until = keep_agreement(destination.path, job.agreement).agreed_until
    metadata = {**destination.metadata, KEY: job.key, **agreement_metadata(until is not None, until)}
    if not found:
        with files.held(job, destination.resume, destination.restart):
            run_job(job, files, resume=destination.resume, device=device, metadata=metadata, callbacks=callbacks)
    elif (known := metadata_of(destination.path)) != {**known, **metadata}:
        copy_with_metadata(SafetensorsFile.open(destination.path), destination.path, {**known, **metadata})
    return TrainedFile(destination.path, RunFolder.of(job.key), found)


def _kept_while_running(
    job: TrainingJob,
    run: RunFolder,
    device: torch.device | str | None,
    on_point: Callable[[StepReport], None],
    callbacks: Callbacks,
) -> Trained:
    """Train the job. The result is also saved in the run's folder, with its history and samples."""

    def sample(step: int, images: list[Image.Image]) -> None:
        run.add_samples(step, images)
        if callbacks.on_sample:
            callbacks.on_sample(step, images)

    kept = replace(
        callbacks,
        on_step=_recorded(run, on_point, callbacks.on_step),
        on_sample=sample,
        on_measured=partial(run.add_measured, dtype=PRECISIONS[job.config.save_precision]),
    )
    try:
        with run.files.held(job, resume=True):
            return run_job(job, run.files, resume=True, device=device, callbacks=kept)
    finally:
        run.save_history()


def _recorded(
    run: RunFolder, on_point: Callable[[StepReport], None], on_step: Callable[[StepReport], None]
) -> Callable[[StepReport], None]:
    """Return a callback that adds to the history of the run, and then calls `on_step`."""
    read = saved = -math.inf

    def step(report: StepReport) -> None:
        nonlocal read, saved
        now = time.monotonic()
        if report.measured or now - read > LOSS_INTERVAL or report.step == report.steps:
            read = now
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
    if found := with_tensors(run.made(), folders):
        return found
    with suppress(FaceLoraError):
        # It was not written into the LoRA folder, for example because the disk was full.
        return LoraFile.read(run.files.output)
    return None


def _clear(files: RunFiles, path: Path, key: str, agreed: Mapping[str, str]) -> None:
    """Delete the output of a run, which is now the LoRA at `path`, and move its intermediate LoRAs beside that.

    The job's key with their step is added to their metadata, and `agreed`.
    """
    files.output.unlink(missing_ok=True)
    files.beside("embedding").unlink(missing_ok=True)
    for one in files.intermediate():
        file = SafetensorsFile.open(one)
        step = one.stem.removeprefix(files.output.stem)
        metadata = {**file.metadata, KEY: key + step, "ss_output_name": path.stem, **agreed}
        copy_with_metadata(file, path.with_name(path.stem + step + one.suffix), metadata)
        one.unlink()


@contextmanager
def _free_path(destination: LoraFolders, job: TrainingJob) -> Iterator[tuple[Path, bool]]:
    """Choose the first path of NAME, NAME-2, ... that is free or has a LoRA with the key. Yields it and whether it exists.

    A free path is locked within the context, so that no other run takes it.
    """
    for number in itertools.count(1):
        path = destination.folders[0] / f"{destination.name}{f'-{number}' if number > 1 else ''}.safetensors"
        if os.path.exists(path):  # Path.exists fails for a name that is too long
            if not has_key(path, job.key):
                continue
            yield path, True
            return
        check_writable(path)
        with ExitStack() as held:
            try:
                held.enter_context(locked(path))
            except InUse:
                continue
            if not path.exists() and not RunFiles(path).foreign(job.config):
                RunFiles(path).delete_leftovers()
                yield path, False
                return


@contextmanager
def _own_path(destination: LoraFolders, job: TrainingJob) -> Iterator[tuple[Path, bool]]:
    """Yield the path of NAME, and whether it has a LoRA with the key. One found in `earlier` is moved back first.

    Without one, the path is locked within the context, whatever file it has.
    """
    path = destination.folders[0] / f"{destination.name}.safetensors"
    if has_key(path, job.key):
        yield path, True
        return
    check_writable(path)
    with locked(path):
        RunFiles(path).delete_leftovers()
        earlier = next(
            (file for file in sorted((path.parent / EARLIER).glob("*.safetensors")) if has_key(file, job.key)), None
        )
        if earlier:
            _set_lora_aside(path)
            with writing(path):
                earlier.rename(path)
        yield path, earlier is not None


def _set_lora_aside(path: Path) -> None:
    """Move the LoRA at the path and its intermediate LoRAs, if they exist, into the folder `earlier` beside it."""
    set_aside(path)  # under this name, which some disks treat as another spelling of the file's name
    with writing(path.parent):
        for file in RunFiles(path).intermediate():
            set_aside(file)
