"""One person's job, from photos to a ranked gallery: check, train, draw, improve faces, rank.

Every stage leaves on disk what it has made, and takes from there what it, or an earlier call, has made already. Killed at any
moment and called again with the same, the job makes the same files and does nothing twice but the last steps since a state.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..config import TrainConfig
from ..lora.file import LoraFile
from ..models.base import Base
from ..photos import Photo, Ready, SetReport
from ..pictures.gallery import SAME_PERSON
from ..pictures.generate import Job
from ..pictures.headshot import Headshot
from ..pictures.headshots import make_headshots, set_others_aside
from ..pictures.style_pack import StylePack, Subject, check_count
from ..training.callbacks import NO_CALLBACKS, Callbacks
from ..training.job import ready_for, settled
from ..training.store import TrainedFile, TrainingJob, find_or_train
from ..training.training_adapter import TrainingAdapter
from .ledger import Ledger, basis


@dataclass(frozen=True)
class Order:
    """What is wanted of one person's photos and a base model."""

    name: str
    """Of the LoRA's file, without its ending."""
    config: TrainConfig
    """How it is trained. With `check_photos`, only photos that the report does not reject are."""
    pack: StylePack
    count: int = 20
    """How many pictures."""
    seed: int = 1
    """Of the first picture; the next ones count up."""
    size: tuple[int, int] | None = None
    """Width and height of the pictures in pixels; None: what each style and the base come to."""
    training_adapter: TrainingAdapter | None = None
    """On in the steps of the training alone."""

    def __post_init__(self) -> None:
        check_count(self.count)

    def on(self, base: Base) -> Base:
        """The base model as it is trained on and drawn with."""
        return base.as_distilled() if self.training_adapter else base

    def jobs(self, base: Base) -> list[Job]:
        """The pictures to draw, in rounds over the styles of the pack."""
        base, subject = self.on(base), Subject(self.config.trigger_word, self.config.class_word)
        prompts = self.pack.prompts(subject, base.family.name, self.count, self.seed, resolution=base.resolution)
        return [
            replace(job, size=self.size or job.size) for job in (Job.from_style(prompt).on(base) for prompt in prompts)
        ]


@dataclass(frozen=True)
class Outcome:
    """What has come of an order."""

    report: SetReport
    """On the photos."""
    trained: TrainedFile
    shots: Sequence[Headshot]
    """The pictures, most alike first where likeness could be measured."""
    advice: tuple[str, ...]
    """What would help, in sentences, where no picture is like enough to the person; empty where one is."""


def check(photos: Sequence[Photo], base: Base, config: TrainConfig, callbacks: Callbacks = NO_CALLBACKS) -> Ready:
    """The photos, looked at once for all of the job. BadPhoto where too few can be used, unless `check_photos` is off.

    `callbacks.on_warning` hears of the photos that will be left out, and of face networks that are not installed.
    """
    return ready_for(photos, base, config, on_warning=callbacks.on_warning, to_rank=True)


def make(
    ready: Ready,
    base: Base,
    order: Order,
    folder: Path,
    *,
    device: torch.device | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
) -> Outcome:
    """The pictures of the person on checked photos, in `folder` beside the LoRA that they are drawn with.

    `ready` is what `check` gives. The LoRA is found where it has been trained before, and a training that was interrupted
    goes on; so does the drawing. Another LoRA of that name, and pictures that are not ordered, move into the folder
    `earlier`, and come back when they are. Without the face networks the pictures are not ranked, and no small face is drawn
    again. Each callback may raise to cancel. Errors are subclasses of FaceLoraError.
    """
    base = order.on(base)
    job = TrainingJob(order.name, settled(order.config, ready), ready, training_adapter=order.training_adapter)
    trained = find_or_train(job, base, [folder], own_name=True, device=device, callbacks=callbacks)
    jobs = order.jobs(base)
    callbacks.on_phase("pictures", 0, len(jobs))  # the training has ended, though no picture is drawn yet
    shots = make_headshots(
        base,
        [(LoraFile.read(trained.path), 1.0)],
        jobs,
        folder,
        reference=ready.reference(),
        device=device,
        on_progress=callbacks.on_phase,
    )
    set_others_aside(shots, folder, trained.path.stem)
    return Outcome(ready.report, trained, shots, _advice(ready.report, order, shots))


def ledger_of(ready: Ready, base: Base, order: Order, device: torch.device | None = None) -> Ledger:
    """The work of `make` with the same arguments, where nothing of it has been done yet."""
    photos, config = ready.photos, settled(order.config, ready)
    shared = basis(photos, base, config, device, order.training_adapter)
    return shared.ledger(photos, config, order.jobs(base), redraws_faces=ready.network is not None)


def _advice(report: SetReport, order: Order, shots: Sequence[Headshot]) -> tuple[str, ...]:
    """What would help where likeness was measured and no picture was like enough."""
    if report.network is None or any(shot.kept for shot in shots):
        return ()
    best = shots[0].likeness  # they are ranked
    seen = "none of them shows a face" if best is None else f"the most alike has {best:.2f}"
    steps = order.config.steps
    return (
        f"No picture is the person: {seen}, and the same person has {SAME_PERSON:.2f} and more.",
        *([f"Add photos: {', '.join(report.wishes)}."] if report.wishes else []),
        f"Train longer than these {steps} steps."
        if order.config.hold_out
        else f"Train longer than these {steps} steps, or with the recipe best, which keeps the most alike checkpoint.",
    )
