"""The command `train`, which trains a LoRA."""

import argparse
import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..config import TrainConfig, config_from
from ..errors import BadConfig, BadFile, FaceLoraError
from ..faces import load_faces
from ..lora.file import LoraFile
from ..lora.sidecars import write_sidecars
from ..models.base import Base
from ..photos import check_agreed, read_photos
from ..progress import READING
from ..storage.cache_folder import cache_folder, content_key, made_folder
from ..storage.files import write_text
from ..studio import basis, device_rate
from ..training import (
    LIKENESS_KEY,
    METHODS,
    Callbacks,
    OutputFile,
    StepReport,
    TrainingAdapter,
    TrainingJob,
    find_or_train,
    is_trained,
    recipe_config,
)
from ..training.run_files import RunFiles, metadata_of
from .common import BarProgress, JsonProgress, Progress, base_from
from .computing import device_from, show_work
from .settings import schedule_from, settings_from


class Cancelled(FaceLoraError):
    """Raised when the user has stopped the command with a signal."""


def run_train(options: argparse.Namespace) -> None:
    check_agreed(options.photos, *filter(None, [options.class_photos]))
    given = settings_from(options)
    base = base_from(options, **schedule_from(given))
    stop = StopOnSignal()
    progress = JsonProgress() if options.json else BarProgress()
    photos = read_photos(options.photos, strict=options.strict, on_warning=progress.warning)
    config = (
        config_from(given)
        if options.recipe == "none"
        else recipe_config(options.recipe, base, len(photos), given, progress.warning)
    )

    def check_stop(where: str) -> None:
        if stop.asked:
            raise Cancelled(f"stopped{where}; continue with --resume")

    makes = METHODS[config.method].makes
    if "learning_rate" in given and makes == "embedding" and config.optimizer != "prodigy":
        progress.warning(f"learning_rate only affects a denoiser; for the vectors of {config.method}, set embedding_lr")
    looks = config.hold_out or config.check_photos or config.face_crops or config.face_masks
    if options.face_network and not looks:
        raise BadConfig("--face-network has no effect with --no-check-photos: leave it out")
    if options.judge and not config.hold_out:
        raise BadConfig("--judge requires held-out photos: set --hold-out")
    if options.sidecars and makes != "lora":
        raise BadConfig(f"--sidecars: method {config.method!r} doesn't make a LoRA (but: {makes}). Leave it out")
    faces = load_faces(options.face_network) if options.face_network else None
    judge = load_faces(options.judge) if options.judge else None
    class_photos = ()
    if options.class_photos:
        class_photos = read_photos(options.class_photos, strict=options.strict, drawn=True, on_warning=progress.warning)
    start = LoraFile.read(options.continue_from) if options.continue_from else None
    job = TrainingJob.of(
        photos, base, config, class_photos=class_photos, start=start, adapter=training_adapter_from(options, base),
        faces=faces, judge=judge, on_warning=progress.warning,
    )  # fmt: skip
    if options.dry_run:
        return _show_work(options, job)
    callbacks = shown(progress, check_stop)
    place = OutputFile(options.output, options.resume, options.restart)
    with stop, progress:
        base.compute_hashes(callbacks.progress(READING))
        mark = None if is_trained(job, place) else _check_nothing_is_replaced(options, job.key)
        made = find_or_train(job, place, device=device_from(options), callbacks=callbacks)
        if mark and os.path.exists(mark):
            mark.unlink()
    _end(options, config, made.found)


def _end(options: argparse.Namespace, config: TrainConfig, found: bool) -> None:
    """Write the files beside the output, and print what was made."""
    if options.sidecars:
        write_sidecars(options.output)
    size, metadata, makes = options.output.stat().st_size, metadata_of(options.output), METHODS[config.method].makes
    trigger = metadata["modelspec.trigger_phrase"]
    if options.json:
        print(json.dumps({"output": str(options.output), "bytes": size, "trigger_phrase": trigger, "found": found}))
    else:
        if found:
            print("already trained from the same photos and settings; use --restart to train it again")
        kind = f"rank {config.rank}" if makes == "lora" else makes
        print(f"{options.output}  ({size / 1e6:.1f} MB, {kind}); use it in a prompt: a photo of {trigger}")
        if LIKENESS_KEY in metadata:
            print(format_likeness(json.loads(metadata[LIKENESS_KEY])))


def _show_work(options: argparse.Namespace, job: TrainingJob) -> None:
    """Print the work of a job."""
    device, photos = device_from(options), job.ready.photos
    ledger = basis(photos, job.base, job.config, device, job.adapter).ledger(
        photos, job.config, class_photos=len(job.class_photos)
    )
    show_work(ledger, device_rate(job.base, device, job.config.precision), options.json)


def training_adapter_from(options: argparse.Namespace, base: Base) -> TrainingAdapter | None:
    return TrainingAdapter.open(options.training_adapter, base) if options.training_adapter else None


def _check_nothing_is_replaced(options: argparse.Namespace, key: str) -> Path | None:
    """Raise BadConfig if the output exists, unless the user has asked to replace it. Returns the mark that they have.

    The mark lets `--resume` continue with the same job and the same file if the run ends before its first state. It is None
    without an output, and missing if it can't be written.
    """
    if not os.path.isfile(options.output):
        return None
    about, place = options.output.stat(), os.path.abspath(options.output)
    mark = cache_folder() / "restarts" / content_key("restart", place, about.st_size, about.st_mtime_ns, key)
    goes_on = options.resume and (RunFiles(options.output).state.exists() or os.path.exists(mark))
    if not (options.restart or goes_on):
        raise BadConfig(
            f"{options.output}: this file already exists; replace it with --restart, or choose another output"
        )
    with suppress(BadFile):
        made_folder("restarts")
        write_text(mark, "")
    return mark


def format_likeness(measured: dict[str, Any]) -> str:
    """Format the likeness curve in a LoRA's metadata (`LIKENESS_KEY`) as a table."""
    rows = [
        f"likeness to held-out photos ({measured['network']}; the training photos themselves: {measured['photos']:.2f})"
    ]
    judge = measured.get("judge")
    if judge:
        rows.append(f"judged by {judge['network']}, which selects nothing (the photos: {judge['photos']:.2f})")
    rows.append("      step  likeness  copying  leakage  drift" + ("  judged  leakage" if judge else ""))
    for index, point in enumerate(measured["points"]):
        name = "+".join(map(str, point["merged"])) or str(point["step"])
        judged = point.get("judged")
        rows.append(
            f"{name:>10}  {point['likeness']:8.2f}  {point['copying']:7.2f}  {point['leakage']:7.2f}  {point['drift']:5.1f}"
            + (f"  {judged['likeness']:6.2f}  {judged['leakage']:7.2f}" if judged else "")
            + ("  <- kept" if index == measured["kept"] else "")
        )
    return "\n".join(rows)


def shown(progress: Progress, check_stop: Callable[[str], None]) -> Callbacks:
    """Return callbacks that show progress and check for a stop. Samples are part of training, whose bar stays.

    `check_stop` is called with the words for a finished step, such as " after step 2 of 10", else with an empty text.
    """

    def on_step(report: StepReport) -> None:
        progress.step(report)
        check_stop(f" after step {report.step} of {report.steps}")

    def on_phase(phase: str, done: int, total: int) -> None:
        if phase != "samples":
            progress.phase(phase, done, total)
        check_stop("")

    return Callbacks(on_step=on_step, on_phase=on_phase, on_warning=progress.warning)


class StopOnSignal:
    """Make Ctrl-C and SIGTERM only set `asked` within the context, to stop between two steps. A second signal stops at once."""

    asked: bool = False

    def __enter__(self) -> "StopOnSignal":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
