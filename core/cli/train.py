"""The command `train`, which trains a LoRA."""

import json
import math
import os
import signal
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from .. import lora, models, photos, pictures, studio, training  # Their modules load only when a name is used.
from ..config import RecipeName, TrainConfig, config_from
from ..errors import BadConfig, BadFile, FaceLoraError
from ..progress import READING
from ..storage.cache_folder import cache_folder, content_key, made_folder
from ..storage.files import write_text
from . import shared_options
from .common import BarProgress, JsonProgress, Progress, base_from
from .computing import device_from, show_work
from .options import OneOf, Options, argument, below, option, settings
from .settings import schedule_from, settings_from
from .values import InputName, InputPath, LoraOutput

UNFINISHED = OneOf()


@dataclass(frozen=True)
class TrainOptions(Options):
    usage: ClassVar[str | None] = (
        "%(prog)s PHOTOS --base BASE --output FILE.safetensors [OPTIONS] (--help-all lists them)"
    )
    first: ClassVar[Collection[str]] = (
        "--base", "--output", "--recipe", "--trigger", "--class-word", "--steps", "--rank", "--learning-rate", "--method",
        "--resolution", "--memory-limit", "--dry-run", "--resume", "--restart",
    )  # fmt: skip
    photos: InputPath = argument("Folder of photos (jpg, png, webp, heic, ...)", "PHOTOS")
    base: InputName = shared_options.BASE
    parts: shared_options.BaseParts = below()
    output: LoraOutput = option("LoRA to write")
    class_photos: InputPath | None = option("Photos of the class, for prior preservation", "DIR")
    drawn_photos: InputPath | None = shared_options.DRAWN_PHOTOS
    continue_from: InputPath | None = option("LoRA to continue from", "FILE")
    training_adapter: InputPath | None = shared_options.TRAINING_ADAPTER
    speed_lora: InputPath | None = shared_options.SPEED_LORA
    config: InputPath | None = option("File with settings. Options override it", "FILE.toml")
    recipe: Literal["none", RecipeName] = option(
        "Preset for a quick, normal or thorough training run. Options and the config file override it. none uses the "
        "defaults listed below (default: balanced)",
        default="balanced",
    )
    resume: bool = option("Continue from the saved state of the same training run, if there is one", one_of=UNFINISHED)
    restart: bool = option("Start again, and replace any saved state or LoRA", one_of=UNFINISHED)
    strict: bool = option("Fail on a photo that cannot be read, instead of skipping it")
    sidecars: bool = shared_options.SIDECARS
    face_network: str | None = option(shared_options.FACE_NETWORK_HELP, "NAME|FILE.onnx")
    judge: str | None = shared_options.JUDGE
    dry_run: bool = shared_options.DRY_RUN
    device: str | None = shared_options.DEVICE
    json: bool = option("Print one JSON object per report instead of a progress bar")
    given: dict[str, Any] = settings()


def run(options: TrainOptions) -> None:
    from ..faces import load_faces

    photos.check_agreed(options.photos, *filter(None, [options.class_photos, options.drawn_photos]))
    given = settings_from(options.config, options.given)
    base = base_from(options.base, options.parts, schedule_from(given))
    if options.speed_lora:
        base = pictures.with_speed_lora(base, options.speed_lora)
    stop = StopOnSignal("continue with --resume")
    progress = JsonProgress() if options.json else BarProgress()
    read = photos.read_photos(
        options.photos, strict=options.strict, apart=options.drawn_photos, on_warning=progress.warning
    )
    if options.recipe == "none":
        config = config_from(given)
    else:
        config = training.recipe_config(options.recipe, base, len(read), given, progress.warning)
    makes = training.METHODS[config.method].makes
    if "learning_rate" in given and makes == "embedding" and not config.finds_rate:
        progress.warning(f"learning_rate only affects a denoiser; for the vectors of {config.method}, set embedding_lr")
    uses_faces = config.hold_out or config.check_photos or config.face_crops or config.face_masks
    if options.face_network and not uses_faces:
        raise BadConfig("--face-network has no effect with --no-check-photos: leave it out")
    if options.judge and not config.hold_out:
        raise BadConfig("--judge requires held-out photos: set --hold-out")
    if options.sidecars and makes != "lora":
        raise BadConfig(f"--sidecars: method {config.method!r} doesn't make a LoRA (but: {makes}). Leave it out")
    faces = load_faces(options.face_network) if options.face_network else None
    judge = load_faces(options.judge) if options.judge else None
    class_photos, drawn_photos = (
        drawn_from(folder, progress, options.strict) for folder in (options.class_photos, options.drawn_photos)
    )
    start = lora.LoraFile.read(options.continue_from) if options.continue_from else None
    job = training.TrainingJob.of(
        read, base, config, class_photos=class_photos, drawn_photos=drawn_photos, start=start, faces=faces, judge=judge,
        adapter=training_adapter_from(options.training_adapter, base), on_warning=progress.warning,
    )  # fmt: skip
    if options.dry_run:
        return _show_work(options, job)
    callbacks = shown(progress, stop)
    place = training.OutputFile(options.output, options.resume, options.restart)
    with stop, progress:
        base.compute_hashes(callbacks.progress(READING))
        mark = None if training.is_trained(job, place) else _check_nothing_is_replaced(options, job.key)
        made = studio.timed_training(job, place, device=device_from(options.device), callbacks=callbacks)
        if mark and os.path.exists(mark):
            mark.unlink()
    _end(options, config, made.found)


def _end(options: TrainOptions, config: TrainConfig, found: bool) -> None:
    from ..training.run_files import metadata_of

    if options.sidecars:
        lora.write_sidecars(options.output)
    size, metadata = options.output.stat().st_size, metadata_of(options.output)
    makes = training.METHODS[config.method].makes
    trigger = metadata["modelspec.trigger_phrase"]
    if options.json:
        print(json.dumps({"output": str(options.output), "bytes": size, "trigger_phrase": trigger, "found": found}))
    else:
        if found:
            print("already trained from the same photos and settings; use --restart to train it again")
        kind = f"rank {config.rank}" if makes == "lora" else makes
        print(f"{options.output}  ({size / 1e6:.1f} MB, {kind}); use it in a prompt: a photo of {trigger}")
        if lora.MOVEMENT_KEY in metadata:
            print(f"it moves {lora.format_movement(json.loads(metadata[lora.MOVEMENT_KEY]))}")
        if training.LIKENESS_KEY in metadata:
            print(format_likeness(json.loads(metadata[training.LIKENESS_KEY])))
        else:
            print("likeness was not measured, since no photo was held out")


def _show_work(options: TrainOptions, job: "training.TrainingJob") -> None:
    device, used = device_from(options.device), job.ready.photos
    shared = studio.basis(used, job.base, job.config, device, job.adapter)
    ledger = shared.ledger(used, job.config, class_photos=len(job.class_photos))
    seconds = ledger.seconds(studio.speed_of(job.base, device, job.config.precision))
    show_work(ledger, seconds, options.json, job.config, len(job.ready.to_train_on))


def drawn_from(folder: Path | None, progress: Progress, strict: bool = False) -> "Sequence[photos.Photo]":
    """Return the pictures of a folder, which a program may have drawn; none without a folder."""
    return photos.read_photos(folder, strict=strict, drawn=True, on_warning=progress.warning) if folder else ()


def training_adapter_from(path: Path | None, base: "models.Base") -> "training.TrainingAdapter | None":
    return training.TrainingAdapter.open(path, base) if path else None


def _check_nothing_is_replaced(options: TrainOptions, key: str) -> Path | None:
    """Raise BadConfig if the output exists, unless the user has asked to replace it. Returns the mark that they have.

    The mark lets `--resume` continue with the same job and the same file if the run ends before its first state. It is None
    without an output, and missing if it can't be written.
    """
    if not os.path.isfile(options.output):
        return None
    about, place = options.output.stat(), os.path.abspath(options.output)
    mark = cache_folder() / "restarts" / content_key("restart", place, about.st_size, about.st_mtime_ns, key)
    state = training.RunFiles(options.output).state
    goes_on = options.resume and (state.exists() or os.path.exists(mark))
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
    if measured.get("speed_lora"):
        rows.append("drawn with a speed LoRA: compare only with likeness measured the same way")
    judge = measured.get("judge")
    if judge:
        rows.append(f"judged by {judge['network']}, which selects nothing (the photos: {judge['photos']:.2f})")
    rows.append(
        "      step  likeness  of photos  copying  copy-paste  leakage  drift" + ("  judged  leakage" if judge else "")
    )
    for index, point in enumerate(measured["points"]):
        judged = point.get("judged")
        share = f"{point['likeness'] / measured['photos']:.0%}" if measured["photos"] > 0 else "-"
        rows.append(
            f"{point['step']:>10}  {point['likeness']:8.2f}  {share:>9}  {point['copying']:7.2f}"
            f"  {point.get('copy_paste', math.nan):10.2f}  {point['leakage']:7.2f}  {point['drift']:5.1f}"
            + (f"  {judged['likeness']:6.2f}  {judged['leakage']:7.2f}" if judged else "")
            + ("  <- kept" if index == measured["kept"] else "")
        )
    rows.append("of photos: likeness as a share of the photos' own; copy-paste: MultiID-Bench's measure of copying")
    rows.append("copying: photos are memorised; leakage: everybody becomes the person; drift: other pictures change")
    return "\n".join(rows)


class Cancelled(FaceLoraError):
    """Raised when the user has stopped the command with a signal."""


class StopOnSignal:
    """Make Ctrl-C and SIGTERM only take effect at `check` within the context. A second signal stops at once."""

    def __init__(self, advice: str | None) -> None:
        """Take what the user can do after a stop, for the message; None raises KeyboardInterrupt instead."""
        self._advice, self._is_asked = advice, False

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        if self._is_asked:
            raise KeyboardInterrupt
        self._is_asked = True

    def check(self, where: str = "") -> None:
        """Stop if that was asked for. `where` is the place in words, such as " after step 2 of 10"."""
        if self._is_asked:
            raise Cancelled(f"stopped{where}; {self._advice}") if self._advice else KeyboardInterrupt


def shown(progress: Progress, stop: StopOnSignal, within_steps: bool = False) -> "training.Callbacks":
    """Return callbacks that show progress and check for a stop, at phases and steps or also within steps."""

    def on_step(report: "training.StepReport") -> None:
        progress.step(report)
        stop.check(f" after step {report.step} of {report.steps}")

    def on_phase(phase: str, done: int, total: int) -> None:
        progress.phase(phase, done, total)
        stop.check()

    return training.Callbacks(
        on_step=on_step, on_phase=on_phase, on_warning=progress.warning,
        check_cancelled=stop.check if within_steps else None,
    )  # fmt: skip
