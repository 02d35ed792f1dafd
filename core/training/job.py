"""A training job: everything that a LoRA depends on, as one value with one key."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch

from ..config import TrainConfig
from ..device import why_no_gpu
from ..errors import BadConfig, BadPhoto, LoraMisfit, MissingPackage
from ..faces import FaceNetwork, faces_if_installed, load_faces, network_key
from ..lora.file import LoraFile, fit
from ..lora.hashes import model_hash
from ..lora.names import word_of
from ..models.base import Base
from ..models.clip import load_tokenizer
from ..photos import Dataset, Photo, Ready, Region, Thresholds, make_ready, prepare, trigger_hint, usual_hold_out
from ..photos.agreement import Agreement, check_agreed
from ..photos.crops import about_small_faces, suggests_crops
from ..progress import OnWarning, silent
from ..storage.cache_folder import content_key
from .identity import settings_of_the_file
from .likeness import LikenessWatch, faces_of
from .methods import METHODS
from .recipes import ENOUGH
from .training_adapter import TrainingAdapter

TRAINING_VERSION = "3"
"""A part of every job's key. Raise it when the same inputs would train differently."""
DEFAULT_NETWORK = "sface"
"""The face network of keys, and of thresholds, if none is used."""


@dataclass(frozen=True)
class TrainingJob:
    """What a LoRA, or what another method makes, is trained from. Its photos have been checked; build it with `of`."""

    ready: Ready
    """The photos of the person: which to train on, and which to hold out."""
    base: Base
    config: TrainConfig
    class_photos: Sequence[Photo] = ()
    """The class images for prior preservation. If empty, `config.class_images` pictures are drawn."""
    start: LoraFile | None = None
    """The LoRA to continue from."""
    adapter: TrainingAdapter | None = None
    """A LoRA that is active in training steps only, which undoes a base model's distillation to a few steps."""
    held_out: Sequence[Photo] = ()
    """Photos to measure likeness to. If empty, it is measured to those of `ready` that are held out."""
    faces: FaceNetwork | None = None
    """The network that measures likeness if `ready` was made without one (default: YuNet and SFace)."""
    judge: FaceNetwork | None = None
    """A second face network, which measures the same pictures but selects nothing."""
    agreement: Agreement = field(default=Agreement(), repr=False)
    """What the person has agreed to, as the `person.toml` among the photos says."""

    @classmethod
    def of(
        cls,
        photos: Sequence[Photo] | Ready,
        base: Base,
        config: TrainConfig,
        *,
        class_photos: Sequence[Photo] = (),
        start: LoraFile | None = None,
        adapter: TrainingAdapter | None = None,
        held_out: Sequence[Photo] = (),
        drawn_photos: Sequence[Photo] = (),
        faces: FaceNetwork | None = None,
        judge: FaceNetwork | None = None,
        on_warning: OnWarning = silent,
    ) -> "TrainingJob":
        """Check the settings, the starting LoRA and the photos, and return the job of those that can be used.

        Only the photos that are used affect the training and the key, so a set without rejected photos has the same key with
        and without a check. Settings that depend on likeness are turned off when no photo could be held out. If `face_crops`
        is None, the size of the faces decides, and `on_warning` is told when it turns them on. Raises BadConfig
        for settings that don't suit the base model or contradict the photos, and if the person doesn't agree or no longer does.
        Raises LoraMisfit for a LoRA that doesn't fit, and BadPhoto without enough photos.
        """
        check_base_options(base, config, adapter is not None)
        if config.class_images and class_photos:
            raise BadConfig(
                "class_images and class_photos are both given. Use class_images to draw class images, or class_photos to read "
                "them"
            )
        if held_out and not config.sample_every:
            raise BadConfig("held_out photos are only used to measure the likeness of samples. Set sample_every")
        if start is not None:
            fitting(start, base)
        ready = ready_for(photos, base, config, held_out, faces, on_warning, drawn=drawn_photos)
        if config.hold_out and not held_out:
            without = {} if ready.held_out else {"stop_early": False}
            config = replace(config, hold_out=min(config.hold_out, len(ready.held_out)), **without)
        if config.face_crops is None:
            side = config.resolution or base.resolution
            config = replace(config, face_crops=suggests_crops(ready.training, side))
            if about := about_small_faces(ready.training, side):
                on_warning(about)
        agreement = check_agreed(*{photo.folder for photo in ready.photos if photo.folder})
        return cls(ready, base, config, class_photos, start, adapter, held_out, faces, judge, agreement)

    @cached_property
    def key(self) -> str:
        """A hash that is equal when the same tensors would be trained, whatever the files are called."""
        settings = json.dumps(settings_of_the_file(self.config), sort_keys=True)
        groups = (self.ready.photos, self.class_photos, self.held_out)
        photos = [[photo.fingerprint for photo in group] for group in groups]
        start = model_hash(self.start.tensors) if self.start else None
        adapter, judge = self.adapter and self.adapter.digest, self.judge and network_key(self.judge)
        network = self.ready.network or self.faces
        faces = network_key(network) if network else DEFAULT_NETWORK
        # A speed LoRA changes the pictures that measure likeness. A LoRA that was chosen by others is as good.
        trained = (settings, photos, len(self.ready.drawn), start, self.base.trained_identity, adapter)
        return content_key("lora", TRAINING_VERSION, *trained, faces, judge)

    @property
    def makes(self) -> str:
        """What the method makes: "lora", "embedding" or "checkpoint"."""
        return METHODS[self.config.method].makes

    def files_read(self) -> set[Path]:
        """The files of the base model and of the LoRA to continue from, which the run must leave in place."""
        names = [*(file.path for file in self.base.files), *([self.start.name] if self.start else [])]
        return {Path(name).resolve() for name in names}

    def likeness_watch(self) -> LikenessWatch | None:
        """Build the watch that measures likeness to the held-out photos. Returns None without such photos."""
        ready, held_out = self.ready, self.held_out or [item.photo for item in self.ready.held_out]
        if not held_out:
            return None
        network = ready.network or self.faces or load_faces()
        training, second = [item.photo for item in ready.training], None
        if self.judge:
            known, seen = (faces_of(self.judge, group) for group in (training, held_out))
            second = LikenessWatch(self.judge, known, seen, self.config)
        known = ready.vectors(ready.training) if ready.network else faces_of(network, training)
        seen = faces_of(network, held_out) if self.held_out else ready.vectors(ready.held_out)
        return LikenessWatch(network, known, seen, self.config, second)


def ready_for(
    photos: Sequence[Photo] | Ready,
    base: Base,
    config: TrainConfig,
    held_out: Sequence[Photo] = (),
    faces: FaceNetwork | None = None,
    on_warning: OnWarning = silent,
    *,
    to_rank: bool = False,
    drawn: Sequence[Photo] = (),
) -> Ready:
    """Check the photos and hold some out, as the settings ask, before training on the base model.

    A Ready is returned unchanged. If `held_out` photos are given, no others are held out. `faces` (default: YuNet and SFace)
    finds faces if a setting needs them, or with `to_rank` for ranking pictures. `drawn` pictures of the person are trained on
    too, but never held out. Raises BadPhoto without photos, or with too few to use or hold out, and BadConfig for `drawn`
    pictures beside a Ready.
    """
    if isinstance(photos, Ready):
        if drawn:
            raise BadConfig("drawn photos were given beside photos that are already checked. Give them to make_ready")
        return photos
    if not photos:
        raise BadPhoto("no photos were given")
    if faces is None and (held_out or config.hold_out or config.face_crops or config.face_masks):
        faces = load_faces()
    elif faces is None and (config.check_photos or to_rank):
        faces = faces_if_installed(on_warning)
    by_itself = not held_out and config.hold_out == usual_hold_out(len(photos))  # as a recipe does
    return make_ready(
        photos,
        faces,
        Thresholds.for_resolution(config.resolution or base.resolution, faces.name if faces else DEFAULT_NETWORK),
        check=config.check_photos,
        hold_out=0 if held_out else config.hold_out,
        at_least=ENOUGH if by_itself else 0,
        drawn=drawn,
        on_warning=on_warning,
    )


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


def _undone(base: Base) -> str:
    """Explain, as the end of a sentence, what to do about training directly on a distilled base model."""
    usual = base.family.training_adapter
    return (
        ", and training on it undoes that. Train on the undistilled model, or use a training adapter (training_adapter"
        + (f"; the usual one is {usual}" if usual else "")
        + "). If one is already merged into the model, or it isn't distilled, set allow_distilled"
    )


def _named_distilled(base: Base, config: TrainConfig, adapted: bool) -> bool:
    """Whether only the base model's name tells that training would undo its distillation."""
    return base.family.is_named_distilled(base.name) and not (adapted or config.allow_distilled)


def hints(base: Base, config: TrainConfig, adapted: bool, device: torch.device) -> Iterator[str]:
    """Yield warnings about the trigger word, the base model, the precision and the device to give before training."""
    if of_trigger := trigger_hint(config.trigger_word, load_tokenizer()):
        yield of_trigger
    if base.family.predicts_noise and _named_distilled(base, config, adapted):
        yield f"{base.name}: judging by its name, was distilled to a few steps{_undone(base)}"
    if config.precision == "fp16" and base.family.overflows_in_fp16:
        yield f"precision fp16: values of {base.family.title} overflow in it. Use auto, bf16 or fp32"
    if base.is_large and (reason := why_no_gpu(device)):
        yield f"{base.family.title} is trained on the processor, which takes hours or days: {reason}"


def check_base_options(base: Base, config: TrainConfig, adapted: bool = False) -> None:
    """Raise BadConfig for settings that the base model doesn't allow. `adapted` says that a training adapter is used."""
    family = base.family
    kind, others = "not a rectified flow", ("timestep_sampling", "timestep_shift")
    if not family.predicts_noise:
        kind = "a rectified flow"
        others = ("prediction_type", "zero_terminal_snr", "min_snr_gamma", "debiased", "clip_skip")
    if wrong := [name for name in others if getattr(config, name) != getattr(TrainConfig, name)]:
        raise BadConfig(f"{', '.join(wrong)}: {family.title} is {kind} and does not have this setting. Leave it out")
    package = METHODS[config.method].package
    if package and find_spec(package) is None:
        raise MissingPackage(f"method {config.method!r} needs a package. Install it: pip install {package}")
    if config.clip_skip > 1 and not family.has_clip_skip:
        raise BadConfig(
            f"clip_skip = {config.clip_skip}: {family.title} does not let you choose the layer. Leave it at 1"
        )
    if family.needs_adapter and not (config.allow_distilled or adapted):
        raise BadConfig(
            f"{base.name}: LoRAs of {family.title} tend to collapse without a training adapter (training_adapter; the usual "
            f"one is {family.training_adapter}). To train without one, set allow_distilled"
        )
    if base.is_distilled and not (config.allow_distilled or adapted):
        raise BadConfig(f"{base.name}: was distilled to a few steps{_undone(base)}")
    if not family.predicts_noise and _named_distilled(base, config, adapted):
        raise BadConfig(f"{base.name}: judging by its name, was distilled to a few steps{_undone(base)}")
    if config.text_encoder_lr and (family.text_encoder_targets is None or base.caption_encoder):
        raise BadConfig(f"text_encoder_lr: the text encoders of {family.title} cannot be trained here. Leave it at 0")
    multiple = base.size_multiple
    for name, sides in (("resolution", (config.resolution,)), ("more_resolutions", config.more_resolutions)):
        if small := [side for side in sides if side is not None and side < 2 * multiple]:
            raise BadConfig(f"{name} = {small[0]}: {base.name} needs at least {2 * multiple}")


def fitting(start: LoraFile, base: Base) -> LoraFile:
    """Return a LoRA to continue from as the base model loads it. Raises LoraMisfit when it does not fit, or has words."""
    shapes = base.module_shapes()
    start = start.of_loaded(shapes, base.family.unused)
    if words := ", ".join(dict.fromkeys(word_of(start, key) for key in start.embedding_keys)):
        raise LoraMisfit(
            f"{start.name}: has vectors of {words}, which training cannot continue and would lose. Convert it to diffusers' "
            "names, which leaves them out, or choose another LoRA"
        )
    fit(start, base.family.name, shapes).check(start.name)
    return start
