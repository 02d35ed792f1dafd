"""Run one person's job, from photos to a ranked gallery: check, train, draw, improve faces, rank.

Every stage saves its results, and reuses those that it or an earlier call has saved. A job that was killed and is called again
with the same arguments makes the same files. It only repeats the last steps since a saved state.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..config import TrainConfig
from ..errors import BadConfig
from ..faces import LIKENESS
from ..lora.file import LoraFile
from ..models.base import Base
from ..photos import Photo, Ready, SetReport
from ..pictures.gallery import SAME_PERSON
from ..pictures.generate import GenerateConfig, PictureJob
from ..pictures.headshot import Headshot
from ..pictures.headshots import make_headshots, set_others_aside
from ..pictures.style_pack import StylePack, Subject, check_count
from ..progress import PICTURES, silent
from ..storage.cache_folder import content_key
from ..training.callbacks import NO_CALLBACKS, Callbacks
from ..training.job import TrainingJob, ready_for
from ..training.store import LoraFolders, find_or_train
from ..training.trained_file import TrainedFile
from ..training.training_adapter import TrainingAdapter
from .ledger import Ledger, basis


@dataclass(frozen=True)
class Order:
    """What to make from one person's photos on a base model."""

    name: str
    """The name of the LoRA's file, without its ending."""
    config: TrainConfig
    """The training settings. With `check_photos`, photos that the report rejects are not used."""
    pack: StylePack
    count: int = 20
    """The number of pictures."""
    seed: int = 1
    """The seed of the first picture; the next pictures count up."""
    size: tuple[int, int] | None = None
    """Width and height of the pictures in pixels; None derives them from each style and the base model."""
    training_adapter: TrainingAdapter | None = None
    """An adapter that is applied in the training steps only."""
    drawn_on: Base | None = None
    """Another base model of the same family to draw on, such as one distilled to a few steps. None draws on the trained one."""
    agreed: bool = False
    """Whether the user has confirmed that the person has agreed, which the LoRA's metadata then state."""

    def __post_init__(self) -> None:
        check_count(self.count)

    def on(self, base: Base) -> Base:
        """Return the base model as used for training, and for drawing unless there is another one for that."""
        return base.as_distilled() if self.training_adapter else base

    def key(self, photos: Sequence[str] | int, base: Base, drawn: Sequence[str] | int = ()) -> str:
        """Return a hash that is equal when the same LoRA would be trained and the same pictures drawn.

        `photos` are the photos' fingerprints, or only their number, and `drawn` those of drawn pictures to train on.
        """
        others = [self.training_adapter.digest] if self.training_adapter else []
        others += [self.drawn_on.identity] if self.drawn_on else []
        others += [f"drawn: {drawn}"] if drawn else []
        return content_key("studio", repr(self.config), self.jobs(base), photos, base.identity, *others)

    def jobs(self, base: Base) -> list[PictureJob]:
        """Return the pictures to draw, in rounds over the styles of the pack."""
        base, subject = self.drawn_on or self.on(base), Subject(self.config.trigger_word, self.config.class_word)
        prompts = self.pack.prompts(subject, base.family.name, self.count, self.seed, resolution=base.resolution)
        jobs = [PictureJob.from_style(prompt).on(base) for prompt in prompts]
        return [replace(job, size=self.size or job.size) for job in jobs]


@dataclass(frozen=True)
class Outcome:
    """The result of an order."""

    report: SetReport
    """The report on the photos."""
    trained: TrainedFile
    shots: Sequence[Headshot]
    """The pictures, most alike first where likeness could be measured."""
    advice: tuple[str, ...]
    """Sentences on how to improve if no picture is like the person; else empty."""
    measure: str = LIKENESS
    """What the pictures' likeness is called: TO_TRAINED_ON if no photo was held out."""


def check_drawn_on(other: Base, base: Base) -> None:
    """Raise BadConfig or BadFile if `other` can't draw with a LoRA that is trained on `base`."""
    if other.family is not base.family:
        raise BadConfig(
            f"{other.name} is {other.family.title}. "
            f"Pictures can only be drawn on {base.family.title}, the family of {base.name}"
        )
    other.require("denoiser", "vae", *other.text_encoders)
    shapes = base.module_shapes()
    if any(shapes.get(module, shape) != shape for module, shape in other.module_shapes().items()):
        raise BadConfig(f"{other.name} is larger or smaller than {base.name}, so a LoRA of one does not fit the other")


def ready_photos(
    photos: Sequence[Photo],
    base: Base,
    config: TrainConfig,
    callbacks: Callbacks = NO_CALLBACKS,
    drawn: Sequence[Photo] = (),
) -> Ready:
    """Check the photos once for the whole job. Raises BadPhoto if too few can be used, unless `check_photos` is off.

    `drawn` pictures of the person are trained on too, but pictures aren't compared with them.
    `callbacks.on_warning` is told which photos will be left out, and if face networks aren't installed.
    """
    return ready_for(photos, base, config, on_warning=callbacks.on_warning, to_rank=True, drawn=drawn)


def train_and_draw(
    ready: Ready,
    base: Base,
    order: Order,
    folder: str | os.PathLike[str],
    *,
    device: torch.device | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
) -> Outcome:
    """Draw pictures of the person with a LoRA trained on checked photos, into `folder`.

    `ready` comes from `ready_photos`. A LoRA that is already trained is reused; interrupted training and drawing continue.
    Another LoRA of that name, and pictures that aren't in the order, move into the folder `earlier`, and move back when they
    are ordered again. Without the face networks, pictures aren't ranked, and small faces aren't redrawn. Each callback may
    raise to cancel. Errors are subclasses of FaceLoraError.
    """
    base, folder = order.on(base), Path(folder)
    drawn_on, jobs = order.drawn_on or base, order.jobs(base)
    if order.drawn_on:
        check_drawn_on(drawn_on, base)
    warn = callbacks.on_warning
    job = TrainingJob.of(ready, base, order.config, adapter=order.training_adapter, on_warning=warn)
    destination = LoraFolders(order.name, [folder], sets_aside=True, agreed=order.agreed)
    trained = find_or_train(job, destination, device=device, callbacks=callbacks)
    callbacks.on_phase(PICTURES, 0, len(jobs))  # Training has ended, though no picture is drawn yet.
    reference = ready.reference()
    shots = make_headshots(
        drawn_on,
        [(LoraFile.read(trained.path), 1.0)],
        jobs,
        folder,
        GenerateConfig(clip_skip=order.config.clip_skip, precision=order.config.precision),
        reference=reference,
        device=device,
        on_progress=callbacks.on_phase,
        check_cancelled=callbacks.check_cancelled or silent,
    )
    set_others_aside(shots, folder, trained.path.stem)
    measure = reference.measure if reference else LIKENESS
    return Outcome(ready.report, trained, shots, _advice(ready.report, order, shots, measure), measure)


def ledger_of(ready: Ready, base: Base, order: Order, device: torch.device | None = None) -> Ledger:
    """Return the work of `train_and_draw` with the same arguments, done from scratch."""
    job = TrainingJob.of(ready, base, order.config, adapter=order.training_adapter)
    shared = basis(ready.photos, base, job.config, device, order.training_adapter)
    return shared.ledger(ready.photos, job.config, order.jobs(base), redraws_faces=ready.network is not None)


def _advice(report: SetReport, order: Order, shots: Sequence[Headshot], measure: str) -> tuple[str, ...]:
    """Return how to improve, if likeness was measured and no picture was like the person."""
    if report.network is None or any(shot.kept for shot in shots):
        return ()
    best = shots[0].likeness  # The pictures are ranked.
    seen = "none shows a face" if best is None else f"the best {measure} is {best:.2f}"
    steps = order.config.steps
    return (
        f"No picture is like the person: {seen}, and the same person needs {SAME_PERSON:.2f} or more.",
        *([f"Add photos: {', '.join(report.wishes)}."] if report.wishes else []),
        f"Train for more than {steps} steps."
        if order.config.hold_out or len(report.usable) < report.thresholds.photos_measured
        else f"Train for more than {steps} steps, or use the recipe best, which keeps the step with the best likeness.",
    )
