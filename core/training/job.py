"""The whole job: a folder of photos and a base model in, a LoRA file out."""

import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..config import TrainConfig
from ..device import PRECISIONS, device_and_dtype
from ..errors import BadConfig, BadFile, BadPhoto
from ..faces import FaceNetwork, load_faces
from ..lora.file import LoraFile, fit
from ..models.base import Base, load_base
from ..models.clip import load_tokenizer
from ..photos import Photo, Thresholds, check_photos, face_regions, prepare, read_photos, trigger_hint, with_masks
from ..photos.report import REJECT
from ..storage.files import check_writable, make_folder, remove_leftovers, write_file
from .encode import encode
from .likeness import LikenessWatch, hold_out
from .loop import OnStep, Samples, train_lora
from .methods import files_beside
from .methods.method import Trained
from .samples import make_class_images, sample_shots, training_sampler
from .step import CheckCancelled

OnPhase = Callable[[str, int, int], None]
"""(what is being done, done, total) while photos and captions are encoded and class images made."""


def train(
    photos: str | os.PathLike[str] | Sequence[Photo],
    base: Base | str | os.PathLike[str] | Mapping[str, Tensor],
    config: TrainConfig | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    class_photos: str | os.PathLike[str] | Sequence[Photo] | None = None,
    continue_from: LoraFile | str | os.PathLike[str] | None = None,
    held_out: Sequence[Photo] = (),
    faces: FaceNetwork | None = None,
    resume: bool = False,
    restart: bool = False,
    strict: bool = False,
    device: torch.device | None = None,
    on_step: OnStep | None = None,
    on_phase: OnPhase | None = None,
    on_sample: Callable[[int, list[Image.Image]], None] | None = None,
    on_warning: Callable[[str], None] = lambda message: None,
    check_cancelled: CheckCancelled | None = None,
) -> Trained:
    """The trained LoRA; also written to `output` (a `.safetensors` path) when one is given.

    `photos` is a folder, or photos already read; `class_photos` likewise, for prior preservation. With `output`, the state
    from which `resume=True` goes on is kept beside it until the run is done (where one is left, only `restart=True` begins
    anew), every `save_every` steps a numbered LoRA is written beside it, and samples go into the folder `<name>-samples`
    (unless `on_sample` takes them).
    Likeness is measured to the `held_out` photos, or to `config.hold_out` of `photos`, by `faces` (default: YuNet, SFace);
    what was measured is in the metadata under `core.training.likeness.LIKENESS_KEY`.
    Every callback may raise to cancel; `check_cancelled` is called many times a step. `on_step` raises StopAndKeep to end
    now with what has been learned. Errors are subclasses of FaceLoraError.
    """
    config = config or TrainConfig()
    output = None if output is None else Path(output)
    if output is not None:
        check_output(output)
        check_writable(state_path(output))
        _delete_leftovers(output)
        if not resume and not restart and state_path(output).exists():
            raise BadConfig(
                f"{state_path(output)}: is the state of an unfinished run, which a new one would replace; go on with "
                "--resume, begin anew with --restart, or choose another output"
            )
    if config.class_images and class_photos is not None:
        raise BadConfig("class_images and class_photos are both given; class images are either made or read")
    if not isinstance(base, Base):
        base = load_base(base, prediction_type=config.prediction_type, zero_terminal_snr=config.zero_terminal_snr)
    for file in base.files:
        if output is not None and output.exists() and output.samefile(file.path):
            raise BadFile(f"{output}: is a file of the base model, which the LoRA would replace; choose another output")
    check_base_options(base, config)
    if continue_from is not None and not isinstance(continue_from, LoraFile):
        continue_from = LoraFile.read(continue_from)
    if continue_from is not None:
        fit(continue_from, base.family.name, base.module_shapes()).check(continue_from.name)
    photos = _read(photos, strict, on_warning)
    if not photos:
        raise BadPhoto("no photos were given")
    if held_out and not config.sample_every:
        raise BadConfig("held_out photos are for measuring likeness at samples: set sample_every")
    if hint := trigger_hint(config.trigger_word, load_tokenizer()):
        on_warning(hint)
    if hint := distilled_hint(base, config):
        on_warning(hint)
    device, _ = device_and_dtype(config, device)
    if held_out or config.hold_out or config.check_photos or config.face_crops or config.face_masks:
        faces = faces or load_faces()

    def progress(phase: str) -> Callable[[int, int], None] | None:
        return partial(on_phase, phase) if on_phase else None

    if config.class_images:
        class_list = make_class_images(
            base, config.class_word, config.class_images, resolution=config.resolution, device=device,
            on_progress=progress("class images"),
        )  # fmt: skip
    else:
        class_list = [] if class_photos is None else _read(class_photos, strict, on_warning)
    resolution = config.resolution or base.resolution
    regions = None
    if config.check_photos or config.face_crops or config.face_masks:
        assert faces is not None
        report = check_photos(photos, faces, Thresholds.for_resolution(resolution, faces.name))
        if config.check_photos:
            for item in report.photos:
                if item.verdict == REJECT:
                    on_warning(f"{item.photo.name} is left out: {' '.join(f.sentence for f in item.findings)}")
            photos = [item.photo for item in report.photos if item.verdict != REJECT]
            if not photos:
                raise BadPhoto("the photo report rejects every photo; `facelora check` shows why")
        if config.face_crops:
            regions = face_regions(report, resolution, config.trigger_word, config.class_word)
        if config.face_masks:
            photos = with_masks(photos, report, background=0.0)  # the loss gives it background_weight
    if config.hold_out and not held_out:
        assert faces is not None
        photos, held_out = hold_out(photos, config.hold_out, faces)
    watch = None
    if held_out:
        assert faces is not None
        watch = LikenessWatch(faces, photos, held_out, config)
    dataset = prepare(
        photos,
        resolution=resolution,
        size_multiple=base.size_multiple,
        trigger=config.trigger_word,
        class_word=config.class_word,
        upscale=config.upscale,
        flip=config.flip,
        class_photos=class_list,
        regions=regions,
    )
    for warning in dataset.warnings:
        on_warning(warning)
    shots = sample_shots(config) if config.sample_every else []
    prompts = [prompt for prompt, _ in [*shots, *(watch.shots if watch else [])]]
    cache = encode(
        dataset, base, config, device=device, extra_prompts=prompts, on_progress=progress("encoding"),
    )  # fmt: skip
    # Samples have the shape that most of the person's photos are trained at.
    of_person = replace(dataset, images=tuple(image for image in dataset.images if not image.is_class))
    size = max(of_person.bucket_counts().items(), key=lambda bucket: bucket[1])[0]
    sampler = training_sampler(base, config, cache.prompts, device, size, progress("samples"))
    samples = Samples(sampler, shots, watch) if shots else None

    def save(step: int, lora: Trained) -> None:
        assert output is not None
        lora.save(output.with_name(f"{output.stem}-step{step:06d}{output.suffix}"), PRECISIONS[config.save_precision])

    def save_samples(step: int, images: list[Image.Image]) -> None:
        assert output is not None
        folder = make_folder(output.with_name(f"{output.stem}-samples"))
        for index, image in enumerate(images):
            write_file(folder / f"step{step:06d}-{index}.png", partial(image.save, format="PNG"))

    lora = train_lora(
        cache,
        base,
        config,
        device=device,
        continue_from=continue_from,
        state_path=None if output is None else state_path(output),
        resume=resume,
        extra_metadata=None if output is None else {"ss_output_name": output.stem},
        samples=samples,
        on_step=on_step,
        on_save=save if output is not None else None,
        on_sample=on_sample or (save_samples if output is not None else None),
        on_warning=on_warning,
        check_cancelled=check_cancelled,
    )
    if output is not None:
        for addition, other in files_beside(lora, base, config).items():
            other.save(output.with_name(f"{output.stem}-{addition}{output.suffix}"), PRECISIONS[config.save_precision])
        lora.save(output, PRECISIONS[config.save_precision])
        state_path(output).unlink(missing_ok=True)
    return lora


def state_path(output: Path) -> Path:
    """Where the state of an unfinished run is kept."""
    return output.with_name(f"{output.stem}.state.safetensors")


def check_output(path: Path) -> None:
    """BadFile, before hours are spent, when no LoRA can be written there."""
    if path.suffix != ".safetensors":
        raise BadFile(f"{path}: the output's name must end in .safetensors")
    check_writable(path)


def _delete_leftovers(output: Path) -> None:
    """Deletes what a run that was killed while writing has left of this output or its state."""
    for path in (output, state_path(output)):
        remove_leftovers(output.parent, glob.escape(path.name))


_OF_NOISE = ("prediction_type", "zero_terminal_snr", "min_snr_gamma", "debiased", "clip_skip")
"""Settings of models that predict noise or velocity on SD's schedule."""
_OF_FLOWS = ("timestep_sampling", "timestep_shift")
"""Settings of rectified flows."""


_UNDONE = (
    ", and training on it undoes that: train on the undistilled model, or merge a training adapter into it first and set "
    "allow_distilled"
)


def distilled_hint(base: Base, config: TrainConfig) -> str | None:
    """A sentence, when the base's name alone says that it was distilled to a few steps; else None."""
    if config.allow_distilled or not re.search(base.family.distilled_names, base.name, re.IGNORECASE):
        return None
    return f"{base.name}: by its name was distilled to a few steps{_UNDONE}"


def check_base_options(base: Base, config: TrainConfig) -> None:
    """BadConfig for settings that the base model's family does not have."""
    family, default = base.family, TrainConfig()
    others = _OF_FLOWS if family.predicts_noise else _OF_NOISE
    if wrong := [name for name in others if getattr(config, name) != getattr(default, name)]:
        kind = "no rectified flow" if family.predicts_noise else "a rectified flow"
        raise BadConfig(f"{', '.join(wrong)}: {family.title} is {kind} and has no such setting; leave it out")
    if config.clip_skip > 1 and not family.has_clip_skip:
        raise BadConfig(f"clip_skip = {config.clip_skip}: {family.title} has no choice of layers; leave it at 1")
    if base.is_distilled and not config.allow_distilled:
        raise BadConfig(f"{base.name}: was distilled to a few steps{_UNDONE}")
    if config.text_encoder_lr and (family.text_encoder_targets is None or base.caption_encoder):
        raise BadConfig(f"text_encoder_lr: the text encoders of {family.title} cannot be trained here; leave it at 0")
    multiple = base.size_multiple
    if config.resolution is not None and config.resolution < 2 * multiple:
        raise BadConfig(f"resolution = {config.resolution}: {base.name} needs at least {2 * multiple}")


def _read(
    photos: str | os.PathLike[str] | Sequence[Photo], strict: bool, on_warning: Callable[[str], None]
) -> list[Photo]:
    if isinstance(photos, str | os.PathLike):
        return read_photos(Path(photos), strict=strict, on_warning=on_warning)
    return list(photos)
