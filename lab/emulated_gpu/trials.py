"""What is tried on the fake device. Each function runs in a process of its own, and returns plain values."""

from lab.emulated_gpu.fake_cuda import DEVICE, Card, Copy, OutOfMemoryForm, fake_cuda  # isort: skip  # before torch

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import core.models.memory_plan as memory_plan
import core.models.quantised_layers as quantised_layers
from core.config import TrainConfig
from core.device import device_and_dtype, stay_within_free_memory
from core.errors import FaceLoraError, OutOfMemory
from core.models import Base, load_base
from core.models.memory_plan import PLANS, MemoryPlan, MemorySaver
from core.models.quantised import dequantise_fp8
from core.models.quantised_layers import InEightBits, linear, times, times_scale
from core.models.spec import Component
from core.pictures.generate import GenerateConfig, PictureJob, generate
from core.pictures.sampling import decode_latents, encode_pictures, load_vae, sample_latents
from core.training.callbacks import Callbacks, StepReport
from core.training.drawing import Drawing
from core.training.inputs import TrainingInputs
from core.training.loop import accumulate_within_memory
from core.training.memory_prediction import predicted_memory
from core.training.step import Run
from core.training.store import train
from core.training.training_adapter import TrainingAdapter
from lab.gpu.running import measure
from lab.gpu.session import Session
from tests.models.quantised_weights import quantised_and_full_base
from tests.operation_count import count_operations
from tests.tooling import collect_garbage_seldom, encoded_cache, encoded_image, random_lora, small_flow_base

PLAIN = MemoryPlan()
SHORT = {"steps": 2, "batch_size": 1, "check_photos": False, "resolution": 64}
"""Settings of a short training."""


def begin() -> None:
    """What the process does first."""
    quantised_layers.SMALLEST = 1  # so that the small networks have weights in 8 bits
    collect_garbage_seldom()


@dataclass(frozen=True)
class Case:
    """A step to try."""

    family: str
    checkpoint: Path | None = None
    """The file of a UNet's family."""
    plan: MemoryPlan = PLAIN
    capability: tuple[int, int] = (9, 0)
    size: float = 80
    """The card's memory in GiB."""
    latents: int = 16
    """The side of the latents."""
    settings: Mapping[str, Any] | None = None
    denoiser: Mapping[str, Any] | None = None
    """Settings of the denoiser's config that are to be others."""
    adapted: bool = False
    """Whether it is trained on with a training adapter, or drawn with a LoRA, on all of its layers."""
    form: str = ""
    """The form in which the weights of its blocks are stored, of tests.models.quantised_weights.FORMS."""

    def base(self) -> Base:
        if self.form:
            return quantised_and_full_base(self.form, self.family)[0]
        return load_base(self.checkpoint) if self.checkpoint else small_flow_base(self.family, **(self.denoiser or {}))

    def config(self) -> TrainConfig:
        return TrainConfig(**{"rank": 4, "batch_size": 2, **(self.settings or {})})


@dataclass(frozen=True)
class Step:
    """What a step asked of the card."""

    dtypes: frozenset[torch.dtype]
    """Those of the operands of products."""
    copies: tuple[Copy, ...]
    launches: int
    peak: int
    predicted: int
    early: int
    """Tensors that were freed while a stream may still have read them."""
    pinned: int
    """Bytes of page-locked memory."""
    home: int
    """Bytes of the weights that stay in the computer's memory."""


def cached(base: Base, case: Case):
    shape = (base.latent_shape.channels, case.latents, case.latents)
    kinds = (False, False, True, True) if case.config().class_images else (False, False)
    return encoded_cache(
        base,
        [
            encoded_image(base, f"{n}.png", "a photo of sks person", n, is_class, shape)
            for n, is_class in enumerate(kinds)
        ],
    )


def step(case: Case) -> Step:
    """What the second step of a run asks for, when the adapter and its optimizer are there."""
    with fake_cuda(case.size, case.capability) as card:
        base, config = case.base(), case.config()
        cache = cached(base, case)
        dtype = device_and_dtype(config.precision, DEVICE)[1]
        adapter = TrainingAdapter.open(random_lora(base), base) if case.adapted else None
        predicted = predicted_memory(TrainingInputs(cache, base, config, DEVICE, dtype, adapter=adapter), case.plan)
        before = card.live
        run = Run(TrainingInputs.on(DEVICE, cache, base, config, adapter=adapter), plan=case.plan)
        run.train_step()
        card.watch()
        run.train_step()
        dtypes, copies, launches = frozenset(card.product_dtypes()), tuple(card.copies), card.launches
        run.check_finite()
        home = sum(parameter.nbytes for parameter in run.model.memory.offload.parameters())
        return Step(dtypes, copies, launches, card.peak - before, predicted, card.early, card.pinned, home)


def memory_left_to_a_sample(case: Case) -> tuple[int, int]:
    """Bytes that the last step held and that are free when a sample is drawn, and the bytes of the parameters."""
    with fake_cuda(case.size, case.capability) as card:
        base = case.base()
        run = Run(TrainingInputs.on(DEVICE, cached(base, case), base, case.config()))
        run.train_step()
        after_step, drawing = card.live, []
        Drawing(run).draw(lambda *_: drawing.append(card.live) or [], [], lambda _: None)
        return after_step - drawing[0], sum(parameter.nbytes for parameter in run.parameters.values())


def memory_to_quantise_weights(case: Case) -> tuple[int, int]:
    """The bytes that a change to frozen weights in 8 bits needs between two steps, and those of the largest in float32."""
    with fake_cuda(case.size, case.capability) as card:
        base = case.base()
        run = Run(TrainingInputs.on(DEVICE, cached(base, case), base, case.config()))
        run.train_step()
        largest = max(4 * parameter.numel() for parameter in run.model.memory.resident())
        before = card.peak = card.live
        run.model.adopt(case.plan)
        return card.peak - before, largest


def products_of_columns() -> Mapping[torch.dtype, int]:
    """How many products in 8 bits there are for a forward and a backward pass, with factors whose columns are together."""
    with fake_cuda(capability=(8, 9)) as card:
        for dtype, dequantise in ((torch.int8, times_scale), (torch.float8_e4m3fn, dequantise_fp8)):
            parts = torch.empty(96, 64, dtype=dtype, device=DEVICE), torch.ones(96, 1, device=DEVICE)
            for product, side in ((linear, 64), (times, 96)):
                product(
                    torch.empty(1, side, 40, dtype=torch.bfloat16, device=DEVICE).mT, InEightBits(dequantise), parts
                )
        return Counter({dtypes[0]: count for (name, dtypes), count in card.products.items()})


def operations(case: Case) -> tuple[int, int]:
    """The operations of a step of a run on the card, and on a CPU."""

    def started(device: torch.device) -> Run:
        base = case.base()
        run = Run(TrainingInputs.on(device, cached(base, case), base, case.config()))
        run.train_step()
        return run

    with fake_cuda(case.size, case.capability) as card:
        run = started(DEVICE)
        card.watch()
        run.train_step()
        launches = card.launches
    return launches, count_operations(started(torch.device("cpu")).train_step)


def loaded_as_bf16(stored: torch.dtype) -> tuple[float, float]:
    """The bytes copied to the card for each number of a denoiser in that dtype, and those that are converted before."""
    base = small_flow_base("flux1")
    tensors = {name: tensor.to(stored) for name, tensor in base.components["denoiser"].tensors.items()}
    base = replace(base, components={"denoiser": replace(base.components["denoiser"], tensors=tensors)})
    numbers = sum(tensor.numel() for tensor in tensors.values())
    with fake_cuda() as card:
        base.load("denoiser", DEVICE, torch.bfloat16)
        return sum(copy.size for copy in card.copies) / numbers, card.converted / numbers


@dataclass(frozen=True)
class Drawn:
    """What drawing asked of the card."""

    sizes: tuple[tuple[int, int], ...]
    operations: frozenset[tuple[str, tuple[torch.dtype, ...]]]
    peak: int
    offload: float
    offloaded: tuple[Copy, ...]
    """The copies of offloaded weights to the card."""


def norms_and_products(work: Callable[[], object]) -> frozenset[tuple[str, tuple[torch.dtype, ...]]]:
    """The products and the norms that `work` asks for, with the dtypes of their operands."""
    found = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if any(word in name for word in ("mm", "convolution", "attention", "norm", "rsqrt")):
                found.add((name, tuple(leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))))
            return func(*args, **(kwargs or {}))

    with Watch():
        work()
    return frozenset(found)


def training_and_drawing(case: Case) -> tuple[frozenset, frozenset]:
    """The norms and products of a prediction in a training's step, and of one in drawing a sample."""
    with fake_cuda(case.size, case.capability):
        base, config = case.base(), case.config()
        cache = cached(base, case)
        run = Run(TrainingInputs.on(DEVICE, cache, base, config))
        generator = torch.Generator(DEVICE)
        image = run.examples.images[0]
        with torch.no_grad(), run.model.fast():
            trained = norms_and_products(
                lambda: run.loss_of(run.examples.picture_pass([image], [image.caption], generator))
            )
        text = run.examples.text[image.caption]
        side = case.latents * base.latent_shape.pixels

        def draw() -> None:
            sample_latents(
                base, run.model.denoiser, [text], [text], device=DEVICE, dtype=run.model.dtype, seeds=[1], size=(side, side),
                steps=1, guidance=1.0,
            )  # fmt: skip

        return trained, norms_and_products(draw)


def generated(case: Case, jobs: int = 2, room: float = memory_plan.WEIGHTS_IN_DRAWING) -> Drawn:
    """What `generate` asks for, where the weights may fill `room` of the free memory."""
    with fake_cuda(case.size, case.capability) as card, patch.object(memory_plan, "WEIGHTS_IN_DRAWING", room):
        base = case.base()
        loaded: list[MemorySaver] = []
        adopt = MemorySaver.adopt
        with patch.object(MemorySaver, "adopt", lambda saver, plan: (loaded.append(saver), adopt(saver, plan))[1]):
            wanted = [PictureJob("a photo", seed, size=(64, 64), steps=2) for seed in range(jobs)]
            changed = r"transformer_blocks\..+" if case.form else ".*"
            loras = [(random_lora(base, changed), 1.0)] if case.form or case.adapted else []
            pictures = list(generate(base, loras, wanted, GenerateConfig(batch_size=jobs)))
        dtypes = frozenset((name, dtypes) for name, dtypes in card.products)
        places = {copy.place for copy in card.copies if copy.place.startswith("models/memory_plan.py")}
        copies = tuple(copy for copy in card.copies if copy.place in places - {"models/memory_plan.py:adopt"})
        return Drawn(tuple(p.image.size for p in pictures), dtypes, card.peak, loaded[-1].plan.offload, copies)


@dataclass(frozen=True)
class Whole:
    """What a training from photos to a file came to."""

    error: str
    """The class and the message of the error that ended it, "" without one."""
    warnings: tuple[str, ...]
    steps: int
    allocations: int
    sampled: int


def whole_training(
    case: Case, photos: Path, output: Path, fails_at: int | None = None, form: OutOfMemoryForm = "allocator"
) -> Whole:
    """A training with samples, on a card whose allocation of that number fails."""
    warnings: list[str] = []
    done: list[int] = []
    sampled: list[int] = []
    with fake_cuda(case.size, case.capability) as card:
        card.fails_at, card.form = fails_at, form
        callbacks = Callbacks(
            on_warning=warnings.append,
            on_step=lambda report: done.append(report.step),
            on_sample=lambda step, images: sampled.append(len(images)),
        )
        error = ""
        try:
            train(photos, case.base(), case.config(), output=output, device=DEVICE, callbacks=callbacks)
        except FaceLoraError as raised:
            error = f"{type(raised).__name__}: {raised}"
        return Whole(error, tuple(warnings), len(done), card.allocations, sum(sampled))


def out_of_memory_in_steps(
    case: Case, shares: Sequence[float], forms: Sequence[OutOfMemoryForm]
) -> list[tuple[str, str]]:
    """The plan that a run goes over to where an allocation fails in its first step, and the error, for several allocations.

    They are those after these shares of all allocations of a step. Each time a run begins anew with the fastest plan.
    """
    found = []
    with fake_cuda(case.size, case.capability) as card:
        base, config = case.base(), case.config()
        cache = cached(base, case)
        run = Run(TrainingInputs.on(DEVICE, cache, base, config))
        run.train_step()
        card.watch()
        run.accumulate()
        allocations = card.allocations
        for number, share in enumerate(shares):
            run = Run(TrainingInputs.on(DEVICE, cache, base, config))
            card.watch()
            card.fails_at, card.form = 1 + int(share * (allocations - 1)), forms[number % len(forms)]
            error = ""
            try:
                accumulate_within_memory(run, lambda _: None)
            except OutOfMemory as raised:
                error = str(raised)
            card.fails_at = None
            found.append((str(run.model.memory.plan), error))
    return found


def base_with_t5(stored: torch.dtype = torch.float32) -> Base:
    """A base model with a T5 whose matrices are in that dtype."""
    config = {
        "vocab_size": 32, "d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 12, "num_heads": 4,
        "relative_attention_num_buckets": 8, "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    base = small_flow_base("flux1")
    with torch.device("meta"):
        shapes = base.family.build("text_encoder_2", config).state_dict()
    tensors = {
        name: torch.zeros(tensor.shape, dtype=stored if ".layer." in name and tensor.ndim == 2 else torch.float32)
        for name, tensor in shapes.items()
    }
    components = {**base.components, "text_encoder_2": Component(config, tensors)}
    family = replace(base.family, text_encoders={"text_encoder_2": "t5xxl"})
    return replace(base, family=family, components=components, caption_encoder=None)


def encoded(size: float, stored: torch.dtype = torch.float32) -> tuple[str, tuple[int, ...], int, int]:
    """Of a T5 with matrices in that dtype on a card of that size: where its states are, their shape, and the bytes of the
    peak and of all that is stored.
    """
    base = base_with_t5(stored)
    tensors = base.components["text_encoder_2"].tensors
    with fake_cuda(size) as card, patch("core.models.base.LARGE_ENCODER", 0):
        encoder = base.load_text_encoders(DEVICE, torch.float32)["text_encoder_2"]
        with torch.no_grad():
            states = encoder(torch.zeros(1, 16, dtype=torch.long, device=DEVICE)).last_hidden_state
        return states.device.type, tuple(states.shape), card.peak, sum(tensors[name].nbytes for name in tensors)


def through_the_vae(case: Case, size: float) -> tuple[tuple[int, int], tuple[int, ...], bool, int]:
    """On a card of that many GiB, of `case.latents` a side: the size of the picture that they decode to, the shape of the
    latents that this picture is encoded to, whether the VAE has worked on tiles, and the peak in bytes.
    """
    base = case.base()
    with fake_cuda(size) as card:
        vae = load_vae(base, DEVICE, torch.float32)
        latents = torch.zeros(1, base.latent_shape.channels, case.latents, case.latents, device=DEVICE)
        (picture,) = decode_latents(base, vae, latents)
        encoded = encode_pictures(base, vae, [picture])
        return picture.size, tuple(encoded.shape), vae.use_tiling, card.peak  # pyright: ignore


def without_pinned_memory() -> Step:
    """A step of a run whose weights come one by one from memory that cannot be page-locked."""
    with patch.object(Card, "most_pinned", 0):
        return step(Case("flux1", plan=PLANS[-1]))


def dtypes_of(family: str, capability: tuple[int, int]) -> tuple[torch.dtype, torch.dtype]:
    """The dtype that the family is computed in on a card, and that of its VAE when pictures are drawn."""
    base = small_flow_base(family)
    with fake_cuda(capability=capability):
        device, dtype = base.device_and_dtype()
        return dtype, next(load_vae(base, device, dtype).parameters()).dtype


def share_on_windows(size: float, used: float) -> float | None:
    """The share of the card's memory that a command bounds itself to, in GiB, where `used` GiB are another program's."""
    with (
        fake_cuda(size) as card,
        patch.object(sys, "platform", "win32"),
        patch("torch.cuda.memory_reserved", lambda _: 0),
    ):
        other = torch.empty(int(used * 2**30), dtype=torch.uint8, device=DEVICE)
        stay_within_free_memory(DEVICE)
        del other
        return card.share


def resumed(photos: Path, folder: Path) -> tuple[int, list[int]]:
    """The step at which a training was interrupted, and the steps of its resumption."""
    case = Case("flux1", settings={"steps": 4, "check_photos": False, "resolution": 64, "batch_size": 1})
    steps: list[int] = []

    def stop(report: StepReport) -> None:
        if report.step == 2:
            raise FaceLoraError("stopped")

    with fake_cuda():
        place = {"output": folder / "me.safetensors", "device": DEVICE}
        with suppress(FaceLoraError):
            train(photos, case.base(), case.config(), callbacks=Callbacks(on_step=stop), **place)
        after = Callbacks(on_step=lambda report: steps.append(report.step))
        train(photos, case.base(), case.config(), resume=True, callbacks=after, **place)
    return 2, steps


def measured_on_a_gpu(command: str, folder: Path) -> dict[str, Any]:
    """The tables of a rehearsal of a command of lab/gpu/."""
    stages = import_module(f"lab.gpu.{command}").STAGES

    def elsewhere(*_: object) -> Iterator[dict[str, Any]]:
        yield {}  # another process has no fake card

    with fake_cuda(), patch(f"lab.gpu.{command}.elsewhere", elsewhere, create=True):
        return measure(Session(DEVICE, torch.bfloat16, folder, small=True), command, stages)["stages"]
