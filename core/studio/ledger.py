"""Count the work of a whole job in advance, part by part: from encoding the photos to redrawing faces."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from ..config import TrainConfig
from ..device import free_memory
from ..models.base import Base
from ..models.memory_plan import MemoryPlan, drawing_plan
from ..models.text import blank_caption
from ..photos import Dataset, Photo, bucket_sizes
from ..photos.captions import class_caption, default_caption
from ..photos.dataset import Size
from ..pictures.generate import PictureJob, texts_of
from ..pictures.headshot import FacePass, redrawn_of
from ..pictures.sizes import checked_size, size_near
from ..progress import silent
from ..training.encode import EncodedImage, LatentCache, without_trigger
from ..training.inputs import TrainingInputs
from ..training.job import dataset_of
from ..training.likeness import NEUTRAL_PROMPTS, pictures_per_measurement
from ..training.memory_prediction import choose_plan, predicted_memory
from ..training.methods import trains_text
from ..training.samples import sample_shots, sample_size, sampling_steps
from ..training.training_adapter import TrainingAdapter
from .passes import Passes, tokens_of
from .speed import DRAW, ENCODE, TRAIN, Span, Speed

PHASE_OF = {
    "encoding": ENCODE, "class images": DRAW, "training": TRAIN, "prior prediction": TRAIN, "recomputation": TRAIN,
    "likeness": DRAW, "samples": DRAW, "headshots": DRAW, "face pass": DRAW,
}  # fmt: skip
"""The parts of a job that are counted in operations, with the phase whose speed they have."""
LOADING, LOOKING = "loading", "face networks"
PARTS = (*PHASE_OF, LOADING, LOOKING)
"""The parts of a job, in the order of tables."""


@dataclass(frozen=True)
class Ledger:
    """The most work a job can take. Training that stops early, or a batch with few small faces, takes less."""

    operations: Mapping[str, float]
    """The floating-point operations of each of PHASE_OF. A multiplication with an addition is two."""
    copied: Mapping[str, float]
    """The bytes of blocks that are brought in during the training steps, their prior prediction, and drawing."""
    loaded: float
    """The bytes of weights that are loaded, counting each time."""
    face_detections: int
    """The number of pictures that go through the face networks, counting each time."""
    basis: "Basis"

    @property
    def total(self) -> float:
        return sum(self.operations.values())

    @property
    def memory(self) -> int:
        """The most bytes that training uses at once. To predict them takes a second."""
        return self.basis.memory

    @property
    def plan(self) -> MemoryPlan:
        """The memory plan that training starts with."""
        return self.basis.plan

    @classmethod
    def sum(cls, ledgers: Sequence["Ledger"]) -> "Ledger":
        """Return the work of several jobs, one after the other."""
        return replace(
            max(ledgers, key=lambda one: one.memory),
            operations={part: sum(one.operations[part] for one in ledgers) for part in PHASE_OF},
            copied={part: sum(one.copied.get(part, 0.0) for one in ledgers) for part in PHASE_OF},
            loaded=sum(one.loaded for one in ledgers),
            face_detections=sum(one.face_detections for one in ledgers),
        )

    def seconds(self, speed: Speed) -> dict[str, Span]:
        """Return how long each of PARTS takes, from the least to the most.

        Blocks are copied during computation. The least is the longer of the two, and the most is their sum.
        """
        found: dict[str, Span] = {}
        for part, count in self.operations.items():
            least, most = speed.shares[PHASE_OF[part]]
            slow, fast = speed.copies
            copied = self.copied.get(part, 0.0)
            found[part] = max(count / most / speed.rate, copied / fast), count / least / speed.rate + copied / slow
        slow, fast = speed.loads
        found[LOADING] = self.loaded / fast, self.loaded / slow
        quick, slow = speed.seconds_per_face_detection
        found[LOOKING] = self.face_detections * quick, self.face_detections * slow
        return found

    def done(self, steps: float, faces: float) -> dict[str, float]:
        """Return the operations of the phases TRAIN and DRAW of a job that has drawn all of its pictures.

        `steps` is the share of the steps that it has taken, and `faces` that of the faces that it has redrawn.
        """
        headshots, face_pass = self.operations["headshots"], self.operations["face pass"]
        trained = self.total - headshots - face_pass - self.operations["encoding"]
        return {TRAIN: steps * trained, DRAW: headshots + faces * face_pass}


@dataclass(frozen=True)
class Basis:
    """What jobs of several people on one base model share, if only words differ in their settings."""

    base: Base
    passes: Passes
    inputs: TrainingInputs
    """Those of a step on the largest photo, without values."""
    plan: MemoryPlan
    """The memory plan that training starts with."""
    dtype: torch.dtype
    free: int | None = None
    """The device's free memory for drawing, in bytes; None if everything fits."""

    def ledger(
        self,
        photos: Sequence[Photo],
        config: TrainConfig,
        jobs: Sequence[PictureJob] = (),
        class_photos: int = 0,
        redraws_faces: bool = True,
    ) -> Ledger:
        """Return the work of training on the photos and drawing the jobs from scratch."""
        base, passes, dataset = self.base, self.passes, _dataset(photos, self.base, config)
        counts = dataset.bucket_counts()

        def usual(operations: Callable[[Size], float]) -> float:
            """Return the mean over the photos."""
            return sum(count * operations(size) for size, count in counts.items()) / sum(counts.values())

        classes, side = config.class_images or class_photos, config.resolution or base.resolution
        square = min(bucket_sizes(side, base.size_multiple), key=lambda size: abs(size[0] - size[1]))
        batches = sum(math.ceil(count / config.batch_size) for count in counts.values())
        pictures = config.steps * config.accumulation * sum(counts.values()) / batches
        # With class images, each pass on photos has another pass beside it.
        own, prior = pictures * (2 if classes else 1), pictures * config.prior_prediction
        train = usual(passes.train)
        encoded = sum(passes.encode(image.bucket) for image in dataset.images) + classes * passes.encode(square)
        headshots, faces = _drawn(passes, base, jobs)
        likeness, samples, measured = _while_training(passes, counts, base, config)
        plain = base.sped_up(None)
        operations = {
            "encoding": encoded + passes.caption * len(_texts(dataset, base, config, jobs)),
            "class images": config.class_images * passes.draw(plain, square, plain.steps, plain.guidance),
            "training": own * train,
            "prior prediction": prior * (usual(passes.predict) + train),  # The frozen model predicts the target.
            "recomputation": (own + prior) * usual(partial(passes.recompute, self.plan)),
            "likeness": likeness,
            "samples": samples,
            "headshots": headshots,
            "face pass": faces if redraws_faces else 0.0,
        }
        return Ledger(
            operations,
            self._copied(config, jobs),
            self._loaded(draws=bool(jobs)),
            (len(photos) + measured + 2 * len(jobs)) if redraws_faces else 0,
            self,
        )

    @cached_property
    def memory(self) -> int:
        """The most bytes that training uses at once."""
        return predicted_memory(self.inputs, self.plan)

    def _copied(self, config: TrainConfig, jobs: Sequence[PictureJob]) -> dict[str, float]:
        """Return the bytes of blocks brought in. A pass with gradients brings them in twice."""
        whole = stored = self._weights["denoiser"]
        if self.plan.weights == "8 bits":
            stored //= self.dtype.itemsize
        batches = config.steps * config.accumulation
        trained, drawn = self.plan.offload * stored, drawing_plan(whole, self.free).offload
        steps = sum(job.steps for job in jobs)
        again = _share_redrawn(jobs) * sum(max(1, round(FacePass().denoise * job.steps)) for job in jobs)
        return {
            "training": 2 * batches * trained,
            "prior prediction": 3 * config.prior_prediction * batches * trained,
            "headshots": steps * drawn * whole,
            "face pass": again * drawn * whole,
        }

    def _loaded(self, *, draws: bool) -> float:
        """Return the bytes loaded: all once for the hash, then each network for encoding, for training, and for drawing."""
        all_parts = sum(self._weights.values())
        return 2 * all_parts + (all_parts if draws else 0)

    @cached_property
    def _weights(self) -> dict[str, int]:
        """The bytes of each network's weights."""
        return {part: self.base.weight_bytes(part, self.dtype, as_stored=True) for part in self.base.components}


def basis(
    photos: Sequence[Photo],
    base: Base,
    config: TrainConfig,
    device: torch.device | None = None,
    training_adapter: TrainingAdapter | None = None,
) -> Basis:
    """Return the passes and the memory plan of a training run on such photos. Nothing is computed."""
    base = base.as_distilled() if training_adapter else base
    largest = max((image.bucket for image in _dataset(photos, base, config).images), key=math.prod)
    cache = _empty_cache(base, config, largest)
    inputs = TrainingInputs.on(device, cache, base, config, adapter=training_adapter)
    free = None if inputs.device.type == "cpu" else free_memory(inputs.device)
    passes = Passes.of(base, config, training_adapter)
    return Basis(base, passes, inputs, choose_plan(inputs, silent), inputs.dtype, free)


def _empty_cache(base: Base, config: TrainConfig, size: Size) -> LatentCache:
    """Return a cache of a picture of that size, with all values 0, and of its caption."""
    shape = base.latent_shape
    latent = torch.zeros(shape.channels, size[1] // shape.pixels, size[0] // shape.pixels)
    of_class = class_caption(config.class_word)
    caption = default_caption(config.trigger_word, config.class_word)
    conditioning = base.family.image_conditioning(size, (0, 0), size)
    image = EncodedImage("", latent, latent, None, conditioning, caption, of_class, repeats=1, is_class=False)
    captions = () if trains_text(config) else (caption, of_class, "")
    text = blank_caption(base.family, base.components["denoiser"].config, tokens_of(base))
    return LatentCache((image,), dict.fromkeys(captions, text), chunks=1, digest="")


def _dataset(photos: Sequence[Photo], base: Base, config: TrainConfig) -> Dataset:
    """Return the dataset of the photos. Which ones are held out is unknown until their faces are compared."""
    return dataset_of(photos[config.hold_out :] or photos, base, config)


def _texts(dataset: Dataset, base: Base, config: TrainConfig, jobs: Sequence[PictureJob]) -> set[str]:
    """Return all texts to encode; no training captions if they are encoded again in each step."""
    drawn = {text for job in jobs for text in texts_of(job, base)}
    if trains_text(config):
        return drawn
    captions = {image.caption for image in dataset.images}
    if config.prior_prediction:
        captions |= {without_trigger(caption, config) for caption in captions}
    shown = {prompt for prompt, _ in sample_shots(config)} if config.sample_every else set()
    measured = (
        {class_caption(config.class_word), *NEUTRAL_PROMPTS[: pictures_per_measurement(config)[2]]}
        if config.hold_out
        else set()
    )
    return {"", *captions, *shown, *measured, *drawn}


def _while_training(
    passes: Passes, counts: Mapping[Size, int], base: Base, config: TrainConfig
) -> tuple[float, float, int]:
    """Return the operations of the likeness pictures, those of the samples shown beside them, and the number of the former."""
    if not config.sample_every:
        return 0.0, 0.0, 0
    guidance = base.guidance if config.sample_guidance is None else config.sample_guidance
    size = sample_size(base, max(counts, key=lambda size: (counts[size], math.prod(size))))
    picture = passes.draw(base, size, sampling_steps(base, config), guidance)
    shown = config.steps // config.sample_every * len(sample_shots(config)) * picture
    if not config.hold_out:
        return 0.0, shown, 0
    of_person, of_class, of_nobody = pictures_per_measurement(config)
    measurements = math.ceil(config.steps / config.sample_every)  # Likeness is measured after the last step too.
    # The base model draws those of the class and of nobody once.
    pictures = measurements * of_person + (measurements + 1) * (of_class + of_nobody)
    # The sample with the usual prompt is one of the likeness pictures.
    return pictures * picture, shown if config.sample_prompts else 0.0, pictures


def _drawn(passes: Passes, base: Base, jobs: Sequence[PictureJob]) -> tuple[float, float]:
    """Return the operations of the jobs, and of a face pass on the half of their pictures that can have one."""
    headshots = faces = 0.0
    for job in jobs:
        size = checked_size(base, job.size)
        headshots += passes.draw(base, size, job.steps, job.guidance)
        part = size_near(f"{size[0]}:{size[1]}", base.resolution, base.size_multiple)
        again = max(1, round(FacePass().denoise * job.steps))
        faces += passes.encode(part) + passes.draw(base, part, again, job.guidance)
    return headshots, faces * _share_redrawn(jobs)


def _share_redrawn(jobs: Sequence[PictureJob]) -> float:
    """Return the largest share of the pictures whose faces are redrawn."""
    return redrawn_of(len(jobs)) / max(1, len(jobs))
