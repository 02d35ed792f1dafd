"""Run a training job from its photos to its LoRA."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..device import deterministic_if, release_memory, released_memory, usable_device
from ..errors import FaceLoraError
from ..lora import MOVEMENT_KEY, LoraFile, doubt_of_movement, format_movement, movement_of
from ..lora.metadata import agreement_metadata
from ..models.base import Base
from ..photos import Photo, face_regions, with_masks
from ..progress import LOADING, READING, SAMPLES
from .callbacks import NO_CALLBACKS, Callbacks
from .encode import LatentCache, encode
from .job import TrainingJob, dataset_of, fitting, hints
from .loop import train_lora
from .methods import trains_text
from .methods.method import Trained
from .run_files import RunFiles
from .samples import Samples, build_draw_shots, make_class_images, sample_shots, sample_size, sampling_steps


def run_job(
    job: TrainingJob,
    files: RunFiles | None = None,
    *,
    resume: bool = False,
    device: torch.device | str | None = None,
    metadata: Mapping[str, str] | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
) -> Trained:
    """Train the job, and return the result, with `metadata` added. With `files`, which the caller holds, it is written too.

    The state is kept in `files` until the run ends, and `resume` continues from it if it exists.
    """
    if job.adapter:
        job = replace(job, base=job.base.as_distilled())
    base, config, until = job.base, job.config, job.agreement.agreed_until
    stated = agreement_metadata(until is not None, until)
    # Memory is released for whatever needs it next: drawing, another person, ComfyUI's next node. Libraries that are imported
    # here add warning filters, which must not stay.
    with warnings.catch_warnings(), deterministic_if(config.deterministic), released_memory():
        device = usable_device(device)
        for hint in hints(base, config, job.adapter is not None, device):
            callbacks.on_warning(hint)
        base.compute_hashes(callbacks.progress(READING))
        class_photos = job.class_photos
        if config.class_images:
            class_photos = make_class_images(
                base, config.class_word, config.class_images, resolution=config.resolution, device=device,
                on_progress=callbacks.progress("class images"),
            )  # fmt: skip
        cache, samples = _prepared(job, class_photos, device, callbacks)
        if files and not resume:
            files.set_earlier_aside(job.files_read())
        lora = train_lora(
            cache, base, config, device=device, continue_from=fitting(job.start, base) if job.start else None,
            training_adapter=job.adapter, samples=samples, state_path=files and files.state, resume=resume,
            extra_metadata=stated | ({"ss_output_name": files.output.stem} if files else {}),
            callbacks=files.written_by(callbacks, config) if files else callbacks,
        )  # fmt: skip
    if isinstance(lora, LoraFile) and (movement := _movement(lora, base, callbacks)):
        metadata = {MOVEMENT_KEY: json.dumps(movement)} | dict(metadata or {})
        if base.is_large and (doubt := doubt_of_movement(movement)):
            callbacks.on_warning(f"the LoRA moves {format_movement(movement)}. That is {doubt}")
    if metadata:
        lora = lora.with_metadata({**lora.metadata, **metadata})
    if files:
        files.write(lora, job)
        lora = replace(lora, name=str(files.output))
    return lora


def _movement(lora: LoraFile, base: Base, callbacks: Callbacks) -> dict[str, Any] | None:
    try:
        return movement_of(lora, base)
    except (FaceLoraError, OSError) as problem:  # The base model's file may be gone. The LoRA must not be lost with it.
        callbacks.on_warning(f"how far the LoRA moves the weights is not known: {problem}")
        return None


def _prepared(
    job: TrainingJob, class_photos: Sequence[Photo], device: torch.device, callbacks: Callbacks
) -> tuple[LatentCache, Samples | None]:
    """Encode the photos and captions, and prepare the samples to draw during training (None if not wanted)."""
    ready, base, config, watch = job.ready, job.base, job.config, job.likeness_watch()
    photos, regions, report = ready.to_train_on, None, ready.report
    if config.face_crops:
        regions = face_regions(report, config.resolution or base.resolution, config.trigger_word, config.class_word)
    if config.face_masks:
        photos = with_masks(photos, report, background=0.0)  # the loss replaces 0 by background_weight
    dataset = dataset_of(photos, base, config, class_photos, regions)
    for warning in dataset.warnings:
        callbacks.on_warning(warning)
    shots = sample_shots(config) if config.sample_every else []
    prompts = [prompt for prompt, _ in [*shots, *(watch.shots if watch else [])]]
    cache = encode(
        dataset, base, config, device=device, extra_prompts=prompts, on_progress=callbacks.progress("encoding")
    )
    release_memory()  # A large text encoder's page-locked memory, which the denoiser may need.
    callbacks.on_phase(LOADING, 0, 0)
    if not shots:
        return cache, None
    # Samples take the size of the bucket with the most photos of the person. If several tie, the largest is used.
    of_person = replace(dataset, images=tuple(image for image in dataset.images if not image.is_class))
    size = max(of_person.bucket_counts().items(), key=lambda bucket: (bucket[1], math.prod(bucket[0])))[0]
    size = sample_size(base, size)
    draw = build_draw_shots(base, config, cache.prompts, device, size, callbacks.progress(SAMPLES))
    dtype = base.device_and_dtype(config.precision, device)[1]
    settings = (
        sampling_steps(base, config),
        config.sample_guidance,
        config.clip_skip,
        config.method,
        trains_text(config),
    )
    drawn_as = f"{size} {settings} {device.type} {dtype} {base.few_steps}"
    return cache, Samples(draw, shots, watch, drawn_as)
