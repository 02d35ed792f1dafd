"""Train a LoRA file from a folder of photos and a base model, from start to finish."""

import math
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..config import OutputSettings, TrainConfig
from ..device import PRECISIONS, deterministic_if, release_memory, usable_device, why_no_gpu
from ..errors import BadConfig, BadFile, BadPhoto, FaceLoraError, LoraMisfit, MissingPackage
from ..faces import FaceNetwork, faces_if_installed, load_faces
from ..lora.file import LoraFile, fit
from ..lora.names import word_of
from ..models.base import Base
from ..models.clip import load_tokenizer
from ..models.opening import load_base
from ..photos import (
    Dataset,
    Photo,
    PhotoLike,
    Ready,
    Region,
    Thresholds,
    as_photo,
    check_agreed,
    face_regions,
    make_ready,
    prepare,
    read_photos,
    trigger_hint,
    with_masks,
)
from ..progress import READING, OnWarning, silent
from ..storage.drawn import save_png
from ..storage.files import check_output, check_writable, make_folder, remove_leftovers, set_aside
from ..storage.locks import locked
from ..storage.safetensors_file import SafetensorsFile, check_metadata
from .callbacks import LOADING, NO_CALLBACKS, Callbacks
from .encode import LatentCache, encode
from .likeness import LikenessWatch, faces_of
from .loop import train_lora
from .methods import METHODS, files_beside, trains_text
from .methods.method import Trained
from .recipes import ENOUGH, MEASURED, recipe_config
from .samples import Samples, build_draw_shots, make_class_images, sample_shots, sample_size
from .training_adapter import TrainingAdapter


@contextmanager
def _same_warning_filters() -> Iterator[None]:
    """Restore the program's warning filters after the context: libraries that are imported in it add their own."""
    with warnings.catch_warnings():
        yield


@_same_warning_filters()
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
    faces: FaceNetwork | None = None,
    judge: FaceNetwork | None = None,
    resume: bool = False,
    restart: bool = False,
    strict: bool = False,
    device: torch.device | str | None = None,
    metadata: Mapping[str, str] | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
) -> Trained:
    """Train a LoRA, write it to `output` (a `.safetensors` path) if that is given, and return it.

    `photos` is a folder, a list of Photos, PIL images or arrays (uint8, (height, width, 3) in RGB), or a Ready from
    `ready_for`. `class_photos`, for prior preservation, and `held_out` are a folder or a list too. Without a `config`, the
    recipe `balanced` is used: see `core.training.recipe_config`. With `output`, which is replaced if it exists, the state is
    kept beside it until the run ends. If a state exists, `resume=True` continues from it and `restart=True` replaces it.
    Otherwise it is an error. Every `save_every` steps a numbered LoRA is saved beside the output. Samples are saved in
    `<name>-samples`. Callbacks can take over both.

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
    output = None if output is None else Path(output)
    given = photos if isinstance(photos, Ready) else _read(photos, strict, callbacks.on_warning)
    held_out = _read(held_out, strict, callbacks.on_warning, "held_out")
    if config is None:
        base = base if isinstance(base, Base) else load_base(base)
        config = _usual_config(base, given, held_out, callbacks.on_warning)
    if not isinstance(config, TrainConfig):
        raise BadConfig(f"config is a {type(config).__name__}: expected a TrainConfig, such as recipe_config returns")
    check_metadata(metadata or {})
    place = nullcontext() if output is None else _place(output, config, state_is_wanted=resume or restart)
    with place, deterministic_if(config.deterministic):
        base = _checked_base(base, config, output, training_adapter is not None)
        _check_pictures_asked_for(config, class_photos is not None, bool(held_out))
        start = _checked_start(continue_from, base)
        read = _files_read(base, start, output, config)
        adapter = None if training_adapter is None else TrainingAdapter.open(training_adapter, base)
        base = base.as_distilled() if adapter else base
        device = usable_device(device)
        for hint in hints(base, config, adapter is not None, device):
            callbacks.on_warning(hint)
        ready = ready_for(given, base, config, held_out, faces, callbacks.on_warning)
        config = config if held_out else settled(config, ready)
        watch = _watch(ready, held_out, faces, judge, config)
        base.compute_hashes(callbacks.progress(READING))
        class_photos = _read_or_make_class_photos(class_photos, base, config, device, strict, callbacks)
        cache, samples = _prepared(ready, watch, class_photos, base, config, device, callbacks)
        if output is not None and not resume:
            _set_earlier_aside(output, read)
        lora = train_lora(
            cache, base, config, device=device, continue_from=start, training_adapter=adapter, samples=samples,
            state_path=None if output is None else state_path(output),
            resume=resume,
            extra_metadata=None if output is None else {"ss_output_name": output.stem},
            callbacks=callbacks if output is None else _writing_beside(callbacks, output, config),
        )  # fmt: skip
        release_memory()  # for whatever needs it next: drawing, another person, ComfyUI's next node
        if metadata:
            lora = lora.with_metadata({**lora.metadata, **metadata})
        return lora if output is None else _written(lora, base, config, output)


def _usual_config(
    base: Base, photos: Ready | Sequence[Photo], held_out: Sequence[Photo], on_warning: OnWarning
) -> TrainConfig:
    """Return the default settings: those of the recipe `balanced`."""
    count = len(photos.used if isinstance(photos, Ready) else photos)
    return recipe_config("balanced", base, count, {"hold_out": len(held_out)} if held_out else {}, on_warning)


_WOULD_REPLACE = "which would replace it. Move it, or choose another output"


@contextmanager
def _place(output: Path, config: TrainConfig, state_is_wanted: bool) -> Iterator[None]:
    """Keep other runs from writing the output and the files beside it while the context is open.

    Deletes temporary files of a killed run. Raises BadFile for an output that cannot be written, InUse while another run
    writes it, and BadConfig for a leftover state.
    """
    check_output(output)
    check_writable(state_path(output))
    with locked(output):
        delete_leftovers(output)
        if not state_is_wanted and state_path(output).exists():
            raise BadConfig(
                f"{state_path(output)}: the state of an unfinished run, which a new run would replace. Continue it with "
                "resume, start over with restart, or choose another output"
            )
        if other := foreign_checkpoint(output, config):
            raise BadFile(f"{other}: has the name of an intermediate LoRA of save_every, {_WOULD_REPLACE}")
        for addition in METHODS[config.method].beside:
            if other := _foreign(output, f"-{addition}"):
                raise BadFile(
                    f"{other}: has the name of the {addition} that the method {config.method} writes, {_WOULD_REPLACE}"
                )
        yield


def _checked_base(
    base: Base | str | os.PathLike[str] | Mapping[str, Tensor], config: TrainConfig, output: Path | None, adapted: bool
) -> Base:
    """Load the base model if needed. Raises an error when the settings don't suit it or the output would replace its file."""
    if not isinstance(base, Base):
        base = load_base(base, prediction_type=config.prediction_type, zero_terminal_snr=config.zero_terminal_snr)
    for file in base.files:
        if output is not None and output.exists() and output.samefile(file.path):
            raise BadFile(f"{output}: is a file of the base model, which the LoRA would replace. Choose another output")
    check_base_options(base, config, adapted)
    return base


def _check_pictures_asked_for(config: TrainConfig, class_photos: bool, held_out: bool) -> None:
    """Raise BadConfig when the settings contradict the given class photos or held-out photos."""
    if config.class_images and class_photos:
        raise BadConfig(
            "class_images and class_photos are both given. Use class_images to draw class images, or class_photos to read them"
        )
    if held_out and not config.sample_every:
        raise BadConfig("held_out photos are only used to measure the likeness of samples. Set sample_every")


def _checked_start(start: LoraFile | str | os.PathLike[str] | None, base: Base) -> LoraFile | None:
    """Read the LoRA to continue from, if needed. Raises LoraMisfit when it does not fit the base model, or has words."""
    if start is None:
        return None
    shapes = base.module_shapes()
    start = (start if isinstance(start, LoraFile) else LoraFile.read(start)).of_loaded(shapes, base.family.unused)
    if words := ", ".join(dict.fromkeys(word_of(start, key) for key in start.embedding_keys)):
        raise LoraMisfit(
            f"{start.name}: has vectors of {words}, which training cannot continue and would lose. Convert it to diffusers' "
            "names, which leaves them out, or choose another LoRA"
        )
    fit(start, base.family.name, shapes).check(start.name)
    return start


def _read(
    photos: str | os.PathLike[str] | Sequence[PhotoLike], strict: bool, on_warning: OnWarning, name: str = "photos"
) -> list[Photo]:
    """Return the photos as a list. If `photos` is a folder, they are read from it. `name` is the argument's, for messages."""
    if isinstance(photos, str | os.PathLike):
        check_agreed(photos)
        return read_photos(Path(photos), strict=strict, drawn=name == "class_photos", on_warning=on_warning)
    return [as_photo(photo, f"{name}[{number}]") for number, photo in enumerate(photos)]


def _read_or_make_class_photos(
    class_photos: str | os.PathLike[str] | Sequence[PhotoLike] | None,
    base: Base,
    config: TrainConfig,
    device: torch.device,
    strict: bool,
    callbacks: Callbacks,
) -> list[Photo]:
    """Draw class images with the base model if the settings ask for them. Otherwise return the given ones, possibly none."""
    if config.class_images:
        return make_class_images(
            base, config.class_word, config.class_images, resolution=config.resolution, device=device,
            on_progress=callbacks.progress("class images"),
        )  # fmt: skip
    return [] if class_photos is None else _read(class_photos, strict, callbacks.on_warning, "class_photos")


def ready_for(
    photos: Sequence[Photo] | Ready,
    base: Base,
    config: TrainConfig,
    held_out: Sequence[Photo] = (),
    faces: FaceNetwork | None = None,
    on_warning: OnWarning = silent,
    *,
    to_rank: bool = False,
) -> Ready:
    """Check the photos and hold some out, as the settings ask, before training on the base model.

    A Ready is returned unchanged. If `held_out` photos are given, no others are held out. `faces` (default: YuNet and SFace)
    finds faces if a setting needs them, or with `to_rank` for ranking pictures. Raises BadPhoto without photos, or with
    too few to use or hold out.
    """
    if isinstance(photos, Ready):
        return photos
    if not photos:
        raise BadPhoto("no photos were given")
    if faces is None and (held_out or config.hold_out or config.face_crops or config.face_masks):
        faces = load_faces()
    elif faces is None and (config.check_photos or to_rank):
        faces = faces_if_installed(on_warning)
    # As a recipe does from this number of photos.
    by_itself = config.hold_out == MEASURED["hold_out"] and len(photos) >= ENOUGH
    return make_ready(
        photos,
        faces,
        Thresholds.for_resolution(config.resolution or base.resolution, faces.name if faces else "sface"),
        check=config.check_photos,
        hold_out=0 if held_out else config.hold_out,
        at_least=ENOUGH if by_itself else 0,
        on_warning=on_warning,
    )


def settled(config: TrainConfig, ready: Ready) -> TrainConfig:
    """Adjust the settings to these photos: turn off what depends on likeness when none could be held out."""
    if not config.hold_out or ready.held_out:
        return config
    return replace(config, hold_out=0, stop_early=False, merge_best=0)


def _watch(
    ready: Ready, held_out: Sequence[Photo], faces: FaceNetwork | None, judge: FaceNetwork | None, config: TrainConfig
) -> LikenessWatch | None:
    """Build the watch that measures likeness to the held-out photos. Returns None without such photos."""
    out = held_out or [item.photo for item in ready.held_out]
    if not out:
        return None
    network = ready.network or faces or load_faces()
    training = [item.photo for item in ready.training]
    second = LikenessWatch(judge, faces_of(judge, training), faces_of(judge, out), config) if judge else None
    known = ready.vectors(ready.training) if ready.network else faces_of(network, training)
    seen = faces_of(network, out) if held_out else ready.vectors(ready.held_out)
    return LikenessWatch(network, known, seen, config, second)


def dataset_of(
    photos: Sequence[Photo],
    base: Base,
    config: TrainConfig,
    class_photos: Sequence[Photo] = (),
    regions: Callable[[Photo], list[Region]] | None = None,
) -> Dataset:
    """Crop and caption the photos, or the given regions of them, as the settings ask."""
    return prepare(
        photos,
        resolution=config.resolution or base.resolution,
        size_multiple=base.size_multiple,
        trigger=config.trigger_word,
        class_word=config.class_word,
        upscale=config.upscale,
        flip=config.flip,
        class_photos=class_photos,
        regions=regions,
        more_resolutions=config.more_resolutions,
    )


def _prepared(
    ready: Ready,
    watch: LikenessWatch | None,
    class_photos: Sequence[Photo],
    base: Base,
    config: TrainConfig,
    device: torch.device,
    callbacks: Callbacks,
) -> tuple[LatentCache, Samples | None]:
    """Encode the photos and captions, and prepare the samples to draw during training (None if not wanted)."""
    photos, regions, report = [item.photo for item in ready.training], None, ready.report
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
    callbacks.on_phase(LOADING, 0, 0)
    if not shots:
        return cache, None
    # Samples take the size of the bucket with the most photos of the person. If several tie, the largest is used.
    of_person = replace(dataset, images=tuple(image for image in dataset.images if not image.is_class))
    size = max(of_person.bucket_counts().items(), key=lambda bucket: (bucket[1], math.prod(bucket[0])))[0]
    size = sample_size(base, size)
    draw = build_draw_shots(base, config, cache.prompts, device, size, callbacks.progress("samples"))
    dtype = base.device_and_dtype(config.precision, device)[1]
    settings = (config.sample_steps, config.sample_guidance, config.clip_skip, config.method, trains_text(config))
    drawn_as = f"{size} {settings} {device.type} {dtype} {base.few_steps}"
    return cache, Samples(draw, shots, watch, drawn_as)


def _writing_beside(callbacks: Callbacks, output: Path, config: OutputSettings) -> Callbacks:
    """Replace missing callbacks with ones that write intermediate LoRAs and samples beside the output."""

    def save(step: int, lora: Trained) -> None:
        lora.save(checkpoint_path(output, step), PRECISIONS[config.save_precision])

    def save_samples(step: int, images: list[Image.Image]) -> None:
        folder = make_folder(_samples_folder(output))
        for index, image in enumerate(images):
            save_png(folder / f"step{step:06d}-{index}.png", image)

    return replace(callbacks, on_save=callbacks.on_save or save, on_sample=callbacks.on_sample or save_samples)


def _written(lora: Trained, base: Base, config: TrainConfig, output: Path) -> Trained:
    """Write the LoRA and the files that belong beside it, delete the state, and return the LoRA under its file's name."""
    for addition, other in files_beside(lora, base, config).items():
        other.save(output.with_name(f"{output.stem}-{addition}{output.suffix}"), PRECISIONS[config.save_precision])
    lora.save(output, PRECISIONS[config.save_precision])
    state_path(output).unlink(missing_ok=True)
    return replace(lora, name=str(output))


def state_path(output: str | os.PathLike[str]) -> Path:
    """Return the path for the state of an unfinished run: `NAME.state.safetensors` beside the output."""
    output = Path(output)
    return output.with_name(f"{output.stem}.state.safetensors")


def delete_leftovers(output: Path) -> None:
    """Delete temporary files of a killed run for this output and the files beside it. Requires the output's lock."""
    names = rf"{re.escape(output.stem)}(\.state|-embedding|-lora|-step\d{{6,}})?{re.escape(output.suffix)}"
    remove_leftovers(output.parent, names)
    if (samples := _samples_folder(output)).is_dir():
        remove_leftovers(samples, _SAMPLE)


def checkpoint_path(output: Path, step: int) -> Path:
    """Return the path of the intermediate LoRA after that step."""
    return output.with_name(f"{output.stem}-step{step:06d}{output.suffix}")


def foreign_checkpoint(output: Path, config: OutputSettings) -> Path | None:
    """Find a file with the name of an intermediate LoRA that is not from a run with this output. None if there isn't one."""
    return _foreign(output, r"-step\d{6,}") if config.save_every else None


def _foreign(output: Path, addition: str) -> Path | None:
    """Find a file named like the output plus `addition` (a regular expression) that is not from a run with this output."""
    return next((path for path, is_ours in _named_like(output, addition) if not is_ours), None)


def _named_like(output: Path, addition: str) -> list[tuple[Path, bool]]:
    """Return the files named like the output plus `addition`, each with whether it is from a run with this output."""
    pattern = re.compile(rf"{re.escape(output.stem)}{addition}{re.escape(output.suffix)}")
    found = [path for path in output.parent.iterdir() if pattern.fullmatch(path.name)]
    return [(path, metadata_of(path).get("ss_output_name") == output.stem) for path in found]


def _files_read(base: Base, start: LoraFile | None, output: Path | None, config: TrainConfig) -> set[Path]:
    """Return the files that a run reads. Raises BadFile when one of its intermediate LoRAs would replace one of them."""
    read = {Path(name).resolve() for name in [*(file.path for file in base.files), *([start.name] if start else [])]}
    steps = range(config.save_every, config.steps + 1, config.save_every) if config.save_every else ()
    for path, _ in _named_like(output, r"-step\d{6,}") if output else ():
        if path.resolve() in read and int(path.stem.rpartition("-step")[2]) in steps:
            raise BadFile(f"{path}: has the name of an intermediate LoRA of save_every, {_WOULD_REPLACE}")
    return read


def _set_earlier_aside(output: Path, read: Collection[Path]) -> None:
    """Move the intermediate LoRAs and samples of an earlier run with this output into folders `earlier` beside them.

    The files of `read` stay: those of the base model, and the LoRA to continue from.
    """
    loras = [path for path, is_ours in _named_like(output, r"-step\d{6,}") if is_ours]
    samples = [path for path in _samples_folder(output).glob("step*.png") if re.fullmatch(_SAMPLE, path.name)]
    for path in [*loras, *samples]:
        if path.resolve() not in read:
            set_aside(path)
    state_path(output).unlink(missing_ok=True)  # Otherwise `resume` would continue it if this run is killed.


def metadata_of(path: Path) -> Mapping[str, str]:
    """Return the metadata of a safetensors file. Empty if it cannot be read."""
    with suppress(FaceLoraError):
        return SafetensorsFile.open(path).metadata
    return {}


_SAMPLE = r"step\d{6,}-\d+\.png"
"""The names of samples in their folder, as a regular expression."""


def _samples_folder(output: Path) -> Path:
    return output.with_name(f"{output.stem}-samples")


_FULL_SIZE = 100_000_000
"""A denoiser with this many weights or more trains for hours on a processor."""
_OF_NOISE = ("prediction_type", "zero_terminal_snr", "min_snr_gamma", "debiased", "clip_skip")
"""The settings that apply only to models with a noise schedule, such as Stable Diffusion."""
_OF_FLOWS = ("timestep_sampling", "timestep_shift")
"""The settings that apply only to rectified flows."""


def _undone(base: Base) -> str:
    """Explain, as the end of a sentence, what to do about training directly on a distilled base model."""
    usual = base.family.training_adapter
    return (
        ", and training on it undoes that. Train on the undistilled model, or use a training adapter (training_adapter"
        + (f"; the usual one is {usual}" if usual else "")
        + "). If one is already merged into the model, set allow_distilled"
    )


def hints(base: Base, config: TrainConfig, adapted: bool, device: torch.device) -> Iterator[str]:
    """Yield warnings about the trigger word, the base model, the precision and the device to give before training."""
    if of_trigger := trigger_hint(config.trigger_word, load_tokenizer()):
        yield of_trigger
    if base.family.is_named_distilled(base.name) and not (adapted or config.allow_distilled):
        yield f"{base.name}: judging by its name, was distilled to a few steps{_undone(base)}"
    if config.precision == "fp16" and base.family.overflows_in_fp16:
        yield f"precision fp16: values of {base.family.title} overflow in it. Use auto, bf16 or fp32"
    reason = why_no_gpu(device)
    if reason and base.weight_bytes("denoiser", torch.int8, as_stored=False) >= _FULL_SIZE:
        yield f"{base.family.title} is trained on the processor, which takes hours or days: {reason}"


def check_base_options(base: Base, config: TrainConfig, adapted: bool = False) -> None:
    """Raise BadConfig for settings that don't apply to the base model, or that it does not allow.

    `adapted` means that a training adapter is used.
    """
    family = base.family
    others = _OF_FLOWS if family.predicts_noise else _OF_NOISE
    if wrong := [name for name in others if getattr(config, name) != getattr(TrainConfig, name)]:
        kind = "not a rectified flow" if family.predicts_noise else "a rectified flow"
        raise BadConfig(f"{', '.join(wrong)}: {family.title} is {kind} and does not have this setting. Leave it out")
    package = METHODS[config.method].package
    if package and find_spec(package) is None:
        raise MissingPackage(f"method {config.method!r} needs a package. Install it: pip install {package}")
    if config.clip_skip > 1 and not family.has_clip_skip:
        raise BadConfig(
            f"clip_skip = {config.clip_skip}: {family.title} does not let you choose the layer. Leave it at 1"
        )
    if base.is_distilled and not (config.allow_distilled or adapted):
        raise BadConfig(f"{base.name}: was distilled to a few steps{_undone(base)}")
    if config.text_encoder_lr and (family.text_encoder_targets is None or base.caption_encoder):
        raise BadConfig(f"text_encoder_lr: the text encoders of {family.title} cannot be trained here. Leave it at 0")
    multiple = base.size_multiple
    for name, sides in (("resolution", (config.resolution,)), ("more_resolutions", config.more_resolutions)):
        if small := [side for side in sides if side is not None and side < 2 * multiple]:
            raise BadConfig(f"{name} = {small[0]}: {base.name} needs at least {2 * multiple}")
