"""The training loop: one run of one adapter on one base model, the same for every family."""

import contextlib
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from .adapters import Adapter
from .base import Base
from .cache import EncodedImage, LatentCache
from .checkpoint import RunState, pack_optimizer, read_state, unpack_optimizer
from .config import TrainConfig, settings_of_the_steps
from .errors import BadConfig, MissingPackage, OutOfMemory, TrainingDiverged
from .families.spec import Conditioning, stack_conditioning
from .likeness import LikenessPoint, LikenessWatch, Selection
from .lora_file import LoraFile, model_hash
from .memory_plan import (
    RESERVE,
    MemoryCount,
    MemoryPlan,
    MemorySaver,
    free_memory,
    is_out_of_memory,
    next_plan,
    plans_for,
    unique_bytes,
)
from .methods import attach, trains_text
from .objective import draw_noise, sample_losses
from .training_metadata import training_metadata

CHECK_EVERY = 10
"""Steps between looks at whether the loss is still finite; each look waits for the device."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMOOTHING = 0.98
"""Decay of the running mean of the loss."""


@dataclass(frozen=True)
class StepReport:
    """What a callback learns after each optimizer step."""

    step: int
    """Steps done, 1 to `steps`."""
    steps: int
    learning_rate: float
    seconds_per_step: float
    seconds_left: float
    memory: int
    """Peak memory of the device in bytes; 0 on a CPU."""
    likeness: LikenessPoint | None
    """What was measured last, where photos are held out."""
    _loss: Tensor = field(repr=False)

    @property
    def loss(self) -> float:
        """The smoothed loss. Looking at it waits for the device: look when you show it, not at every step."""
        return float(self._loss)


OnStep = Callable[[StepReport], None]
CheckCancelled = Callable[[], None]
"""Is called many times in each step, and cancels by raising."""
OnSave = Callable[[int, LoraFile], None]
Shot = tuple[str, int]
"""Prompt and seed of a picture."""
Sampler = Callable[[nn.Module, Mapping[str, nn.Module], Sequence[Shot]], list[Image.Image]]
"""(denoiser, text encoders, shots) -> an image of each shot with the adapter as it is now."""
OnSample = Callable[[int, list[Image.Image]], None]


@dataclass(frozen=True)
class Samples:
    """The pictures that a run makes of its checkpoints."""

    sampler: Sampler
    shots: Sequence[Shot] = ()
    """What `on_sample` is given."""
    watch: LikenessWatch | None = None
    """Measures likeness on shots of its own. What is a shot of both is drawn once."""


class StopAndKeep(Exception):
    """What `on_step` raises to end the run after this step as if it had no more: with the LoRA, and without an error."""


class Batches:
    """Which pictures each forward pass takes: a function of seed and pass number alone, so nothing needs to be saved.

    An epoch is every picture `repeats` times, in batches that never mix shapes. A batch that would be short is filled from
    the start of its bucket.
    """

    def __init__(self, images: Sequence[EncodedImage], batch_size: int, seed: int):
        self.seed = seed
        self.batch_size = batch_size
        self.buckets: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            self.buckets.setdefault(tuple(image.mean.shape), []).extend([index] * image.repeats)
        self.per_epoch = sum(-(-len(indices) // batch_size) for indices in self.buckets.values())
        self._epoch, self._order = -1, []

    def at(self, number: int) -> list[int]:
        """The pictures of the forward pass with that number."""
        epoch, position = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._order[position]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        order = random.Random(f"{self.seed}/{epoch}")
        batches = []
        for indices in self.buckets.values():
            indices = order.sample(indices, len(indices))
            while len(indices) % self.batch_size:
                indices += indices[: self.batch_size - len(indices) % self.batch_size]
            batches += [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        order.shuffle(batches)
        return batches


def device_and_dtype(config: TrainConfig, device: torch.device | None = None) -> tuple[torch.device, torch.dtype]:
    """Where to train and in which precision: CUDA (or another accelerator) and bf16 where there is one, else CPU and fp32."""
    if device is None:
        device = torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if config.precision != "auto":
        return device, PRECISIONS[config.precision]
    if device.type == "cuda":
        # Older cards only emulate bf16, and torch.cuda.is_bf16_supported() says yes to that.
        capable = torch.cuda.get_device_capability(device) >= (8, 0)
        return device, torch.bfloat16 if capable else torch.float16
    return device, torch.float32


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """What the peak learning rate is multiplied by in step 0, 1, ...: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.schedule == "linear":
        return 1 - progress
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


def build_optimizer(adapter: Adapter, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer, with B's learning rate raised by the LoRA+ ratio and the text encoders' their own.

    `peak` in each group is the rate that the schedule scales. MissingPackage names what to install.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in adapter.parameters().items():
        groups.setdefault(adapter.rate(name, config), []).append(parameter)
    described = [{"params": parameters, "lr": rate, "peak": rate} for rate, parameters in groups.items()]
    decay = config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(described, weight_decay=decay, fused=True)
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(described, weight_decay=decay, scale_parameter=False, relative_step=False, warmup_init=False)
    try:
        if config.optimizer == "prodigy":
            from prodigyopt import Prodigy

            return Prodigy(
                described, weight_decay=decay, safeguard_warmup=True, use_bias_correction=True,  # pyright: ignore
            )  # fmt: skip
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        package = {"prodigy": "prodigyopt", "adamw8bit": "bitsandbytes"}[config.optimizer]
        raise MissingPackage(f"optimizer {config.optimizer!r} needs a package: pip install {package}") from None
    return AdamW8bit(described, weight_decay=decay)


class Run:
    """A training run between two steps: the networks, the adapter, the optimizer, and how one step is made."""

    def __init__(
        self,
        cache: LatentCache,
        base: Base,
        config: TrainConfig,
        device: torch.device | None = None,
        continue_from: LoraFile | None = None,
        check_cancelled: CheckCancelled | None = None,
        plan: MemoryPlan | None = None,
    ):
        self.config = config
        self.family = base.family
        self.device, self.dtype = device_and_dtype(config, device)
        plan = plan or plans_for(config.gradient_checkpointing)[0]
        # What a plan leaves in the computer's memory, or makes smaller, never has to fit the device.
        place = torch.device("cpu") if plan.offload or plan.weights != "full" else self.device
        self.denoiser = base.load("denoiser", place, self.dtype)
        self.encoders: dict[str, nn.Module] = {}
        if trains_text(config):
            self.encoders = base.load_text_encoders(self.device, self.dtype)
        self.adapter = attach({"denoiser": self.denoiser, **self.encoders}, base.family, config, continue_from)
        self._set_training(True)
        if check_cancelled:
            _check_often(self.denoiser, check_cancelled)
        self.memory = MemorySaver(self.denoiser, self.device)
        self.memory.adopt(plan)
        self.parameters = self.adapter.parameters()
        self.average = (
            {name: value.detach().clone() for name, value in self.parameters.items()} if config.ema_decay else None
        )
        self.optimizer = build_optimizer(self.adapter, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.schedule = base.schedule().to(self.device)
        self.images = [_to_device(image, self.device) for image in cache.images if not image.is_class]
        self.class_images = [_to_device(image, self.device) for image in cache.images if image.is_class]
        self.text = {
            caption: {name: value.to(self.device) for name, value in conditioning.items()}
            for caption, conditioning in cache.text.items()
        }
        self.chunks = cache.chunks
        self.batches = Batches(self.images, config.batch_size, config.seed)
        self.class_batches = (
            Batches(self.class_images, config.batch_size, config.seed + 1) if self.class_images else None
        )
        self.step = 0
        self.loss = torch.zeros((), device=self.device)
        self.first_bad_step = torch.full((), -1, device=self.device)

    def train_step(self) -> None:
        """One optimizer step. Nothing in it waits for the device."""
        self.update(self.accumulate())

    def accumulate(self) -> Tensor:
        """The loss of the next step, its gradients accumulated. Interrupted, it leaves the run as it was between two steps."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for number in range(self.step * config.accumulation, (self.step + 1) * config.accumulation):
            for loss in self._losses(number):
                self.scaler.scale(loss / config.accumulation).backward()
                total += loss.detach() / config.accumulation
        return total

    def accumulate_within_memory(self, on_warning: Callable[[str], None]) -> Tensor:
        """The same, with smaller and smaller memory plans until the step fits. OutOfMemory when not even the smallest does."""
        while True:
            try:
                return self.accumulate()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # Out of the except clause, where the error no longer holds on to the step's activations.
            self.optimizer.zero_grad(set_to_none=True)
            plan = next_plan(self.memory.plan, self.config.gradient_checkpointing)
            if plan is None:
                raise OutOfMemory(
                    f"step {self.step + 1} does not fit the memory of the device ({self.memory.plan}); "
                    "use batch_size 1, a lower resolution, or gradient_checkpointing auto"
                )
            on_warning(f"out of memory in step {self.step + 1}: done again with {plan}")
            self.memory.adopt(plan)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def update(self, loss: Tensor) -> None:
        """Moves the adapter along the accumulated gradients of that loss, and goes on to the next step."""
        config = self.config
        rate = learning_rate_factor(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        if config.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.adapter.constrain()
        if self.average is not None:
            # Rising from 0.1, so that the average soon forgets the untrained adapter.
            decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
            values = [parameter.detach() for parameter in self.parameters.values()]
            torch._foreach_lerp_(list(self.average.values()), values, 1 - decay)
        bad = ~torch.isfinite(loss) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(bad, self.step, self.first_bad_step)
        # The mean starts at the first loss, so that it does not have to climb from 0.
        self.loss = loss if self.step == 0 else SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        self.step += 1

    def _losses(self, number: int):
        """The losses that forward pass `number` is made of, one after the other, so that one graph is alive at a time."""
        config = self.config
        generator = self._generator("noise", number)
        pictures = [self.images[index] for index in self.batches.at(number)]
        if (
            config.prior_prediction
            and random.Random(f"{config.seed}/prior/{number}").random() < config.prior_prediction
        ):
            yield config.prior_loss_weight * self.prior_prediction_loss(pictures, self._generator("prior", number))
        dropped = random.Random(f"{config.seed}/dropout/{number}")
        captions = ["" if dropped.random() < config.caption_dropout else picture.caption for picture in pictures]
        yield self.picture_loss(pictures, captions, generator)
        if self.class_batches:
            pictures = [self.class_images[index] for index in self.class_batches.at(number)]
            captions = [picture.caption for picture in pictures]
            yield config.prior_loss_weight * self.picture_loss(pictures, captions, self._generator("class", number))

    def picture_loss(
        self, pictures: Sequence[EncodedImage], captions: Sequence[str], generator: torch.Generator
    ) -> Tensor:
        """The weighted loss on pictures of one shape, a scalar: the denoising objective of the base model."""
        latents, noise, noisy_latents, timesteps = self._noised(pictures, generator)
        prediction = self._predict(noisy_latents, timesteps, self._conditioning(pictures, captions))
        target = self.schedule.target(latents, noise, timesteps)
        masks = None
        if any(picture.mask is not None for picture in pictures):
            masks = torch.stack([torch.ones_like(p.mean[:1]) if p.mask is None else p.mask for p in pictures])
        losses = sample_losses(prediction, target, masks, self.config)
        return (losses * self.schedule.loss_weights(timesteps, self.config)).mean()

    def prior_prediction_loss(self, pictures: Sequence[EncodedImage], generator: torch.Generator) -> Tensor:
        """How far the prediction for the class caption has moved from the frozen model's, a scalar.

        The frozen model is the teacher on the same noisy pictures: no class images are needed (the idea is learning
        without forgetting, arXiv:1606.09282; ai-toolkit calls it differential output preservation).
        """
        _, _, noisy_latents, timesteps = self._noised(pictures, generator)
        captions = [picture.class_caption for picture in pictures]
        with torch.no_grad(), self.adapter.disabled():
            target = self._predict(noisy_latents, timesteps, self._conditioning(pictures, captions))
        prediction = self._predict(noisy_latents, timesteps, self._conditioning(pictures, captions))
        return sample_losses(prediction, target, None, self.config).mean()

    def _noised(
        self, pictures: Sequence[EncodedImage], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean = torch.stack([picture.mean for picture in pictures])
        deviation = torch.stack([picture.deviation for picture in pictures])
        latents = mean + deviation * torch.randn(mean.shape, generator=generator, device=self.device)
        noise, input_noise = draw_noise(latents, self.config, generator)
        timesteps = self.schedule.draw_timesteps(latents, self.config, generator)
        return latents, noise, self.schedule.add_noise(latents, input_noise, timesteps), timesteps

    def _predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        with self._autocast():
            return self.family.predict(self.denoiser, noisy_latents.to(self.dtype), timesteps, conditioning)

    def _conditioning(self, pictures: Sequence[EncodedImage], captions: Sequence[str]) -> Conditioning:
        if self.encoders:
            with self._autocast():
                text = self.family.encode_text(self.encoders, captions, self.config.clip_skip, self.chunks)
        else:
            text = stack_conditioning([self.text[caption] for caption in captions])
        return text | stack_conditioning([picture.conditioning for picture in pictures])

    def _autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        seed = hashlib.sha256(f"{self.config.seed}/{purpose}/{number}".encode()).digest()
        if self.config.dropout:
            torch.manual_seed(int.from_bytes(seed[8:15], "big"))
        return torch.Generator(self.device).manual_seed(int.from_bytes(seed[:7], "big"))

    def _set_training(self, training: bool) -> None:
        """Dropout on or off. (Older versions of diffusers also recompute activations in training mode only.)"""
        for network in (self.denoiser, *self.encoders.values()):
            network.train(training)

    def sample(
        self, sampler: Sampler, shots: Sequence[Shot], values: Mapping[str, Tensor] | None = None
    ) -> list[Image.Image]:
        """Images with the adapter as it would be saved now, or with other `values` in it."""
        before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._set_training(False)
        self._put(self.trained() if values is None else values)
        try:
            return sampler(self.denoiser, self.encoders, shots)
        finally:
            self._put(before)
            self._set_training(True)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def check_finite(self) -> None:
        """Waits for the device; TrainingDiverged if the loss of any step so far, or the adapter now, is not finite."""
        step = int(self.first_bad_step)
        if step < 0:
            values = [parameter.detach() for parameter in self.parameters.values()]
            if torch.stack(torch._foreach_norm(values)).isfinite().all():
                return
            step = self.step - 1
        names = sorted({self.images[i].name for n in range(self.config.accumulation)
                        for i in self.batches.at(step * self.config.accumulation + n)})  # fmt: skip
        advice = (
            "lower the learning rate" if self.dtype != torch.float16 else "lower the learning rate, or precision bf16"
        )
        raise TrainingDiverged(
            f"the training became NaN or infinite in step {step + 1} on {', '.join(names)} at learning rate "
            f"{self.config.learning_rate * learning_rate_factor(step, self.config):g}; {advice}"
        )

    def trained(self) -> Mapping[str, Tensor]:
        """The values that are saved: the running average where there is one, else the parameters."""
        return self.parameters if self.average is None else self.average

    def state(self, identity: Mapping[str, str], selection: Selection | None = None) -> RunState:
        tensors = {f"adapter.{name}": value.detach().cpu() for name, value in self.parameters.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value.cpu() for name, value in self.average.items()}
        tensors["loss"] = self.loss.cpu()
        optimizer_tensors, scalars = pack_optimizer(self.optimizer)
        candidates, points = selection.pack() if selection else ({}, [])
        return RunState(
            self.step, identity, tensors | optimizer_tensors | candidates,
            scalars | {"scaler": self.scaler.state_dict(), "likeness": points},
        )  # fmt: skip

    @torch.no_grad()
    def restore(self, state: RunState) -> None:
        self._put({name: state.tensors[f"adapter.{name}"] for name in self.parameters})
        for name, value in (self.average or {}).items():
            value.copy_(state.tensors[f"average.{name}"])
        unpack_optimizer(self.optimizer, state.tensors, state.scalars)
        self.scaler.load_state_dict(state.scalars["scaler"])
        self.loss = state.tensors["loss"].to(self.device)
        self.step = state.step


def _check_often(network: nn.Module, check_cancelled: CheckCancelled) -> None:
    """Has `check_cancelled` called at every block of the network, forward and backward."""

    def check(*_: object) -> None:
        check_cancelled()

    def check_backward_too(module: nn.Module, inputs: object, output: object) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(check)

    for blocks in network.modules():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.register_forward_pre_hook(check)
                block.register_forward_hook(check_backward_too)


def _to_device(image: EncodedImage, device: torch.device) -> EncodedImage:
    return replace(
        image,
        mean=image.mean.to(device),
        deviation=image.deviation.to(device),
        mask=None if image.mask is None else image.mask.to(device),
        conditioning={name: value.to(device) for name, value in image.conditioning.items()},
    )


OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0, "prodigy": 16}
"""What each optimizer keeps for a trained number. (Adafactor keeps a row and a column of each matrix.)"""
_PEFT_METHODS = ("loha", "lokr", "oft")


def predicted_memory(cache: LatentCache, base: Base, config: TrainConfig, dtype: torch.dtype, plan: MemoryPlan) -> int:
    """The bytes that a run will have in use at a time, found by going through a step with tensors that hold no numbers.

    peft's layers cannot be built of such tensors: a LoRA of the same rank stands for them.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    cpu = torch.device("cpu")
    trained_text = trains_text(config)
    if config.method in _PEFT_METHODS:
        config = replace(config, method="lora")
    config = replace(config, precision={v: k for k, v in PRECISIONS.items()}[dtype])
    largest = max(cache.images, key=lambda image: image.mean.numel())
    with FakeTensorMode() as mode:
        components = dict(base.components)
        for part in ("denoiser", *(base.family.text_encoders if trained_text else ())):
            with torch.device("meta"):
                state = base.family.build(part, components[part].config).state_dict()
            tensors = {name: torch.empty(tensor.shape, dtype=dtype, device=cpu) for name, tensor in state.items()}
            components[part] = replace(components[part], tensors=tensors)
        image = replace(
            largest,
            mean=mode.from_tensor(largest.mean),
            deviation=mode.from_tensor(largest.deviation),
            mask=None,
            conditioning={name: mode.from_tensor(value) for name, value in largest.conditioning.items()},
            is_class=False,
        )
        text = {
            caption: {name: mode.from_tensor(value) for name, value in conditioning.items()}
            for caption, conditioning in cache.text.items()
        }
        small = replace(cache, images=(image,) * config.batch_size, text=text)
        run = Run(small, replace(base, components=components), config, cpu, plan=plan)
        there = [*run.memory.resident(), *(run.average or {}).values()]
        for encoder in run.encoders.values():
            there += [*encoder.parameters(), *encoder.buffers()]
        with MemoryCount() as count:
            for tensor in [*there, *run.denoiser.parameters()]:
                count.leave_out(tensor)
            run.accumulate()
    trained = sum(parameter.numel() for parameter in run.parameters.values())
    return unique_bytes(there) + trained * OPTIMIZER_BYTES[config.optimizer] + count.peak


def choose_plan(
    cache: LatentCache,
    base: Base,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    on_warning: Callable[[str], None],
) -> MemoryPlan:
    """The fastest plan that fits into `memory_limit`, or else into what is free on a GPU; the smallest when none fits.

    `on_warning` is told when it is not the fastest of all.
    """
    plans = plans_for(config.gradient_checkpointing)
    if config.memory_limit is not None:
        room, whose = int(config.memory_limit * 2**30), "memory_limit"
    elif (free := free_memory(device)) is not None:
        room, whose = int(free * RESERVE), "free"
    else:
        return plans[0]
    needs: list[int] = []
    while not needs or (needs[-1] > room and len(needs) < len(plans)):
        try:
            needs.append(predicted_memory(cache, base, config, dtype, plans[len(needs)]))
        except RuntimeError as error:  # a network whose step depends on the numbers in its tensors
            on_warning(f"memory: cannot be predicted ({str(error).splitlines()[0]}); {plans[0]} until it runs out")
            return plans[0]
    plan = plans[len(needs) - 1]
    if needs[0] > room:
        too_much = ", which may still be too much: lower resolution or batch_size" if needs[-1] > room else ""
        on_warning(
            f"memory: a step would take {needs[0] / 2**30:.1f} GiB, and there are {room / 2**30:.1f} ({whose}); "
            f"with {plan} it takes {needs[-1] / 2**30:.1f}{too_much}"
        )
    return plan


def train_lora(
    cache: LatentCache,
    base: Base,
    config: TrainConfig,
    *,
    device: torch.device | None = None,
    continue_from: LoraFile | None = None,
    state_path: Path | None = None,
    resume: bool = False,
    extra_metadata: Mapping[str, str] | None = None,
    samples: Samples | None = None,
    on_step: OnStep | None = None,
    on_save: OnSave | None = None,
    on_sample: OnSample | None = None,
    on_warning: Callable[[str], None] = lambda message: None,
    check_cancelled: CheckCancelled | None = None,
) -> LoraFile:
    """The trained LoRA, in Kohya naming with complete metadata.

    `on_step` hears of every step and cancels by raising: the state is then saved to `state_path` and the exception goes
    on. When it raises StopAndKeep the run ends there, and the LoRA comes back as if that had been the last step.
    `check_cancelled` cancels in the middle of a step or of a sample, which may take long.
    With `resume` the run goes on from that state, if there is one; on the same machine the result is the same, tensor
    for tensor, as of a run that was never interrupted. Whoever gave `state_path` deletes the state once the LoRA is safe.
    `on_save(step, lora)` is called every `save_every` steps (for the last one too, if another is kept), and
    `on_sample(step, images)` every `sample_every`, with the shots of `samples`.
    With a watch in `samples`, likeness is measured every `sample_every` steps and at the end, the checkpoint that the watch
    chooses is the one that comes back, and the curve is in its metadata.

    A step that does not fit the memory is done again with a smaller memory plan, of which `on_warning` hears.

    TrainingDiverged when the loss is no longer finite; the last saved state is from before.
    """
    device, dtype = device_and_dtype(config, device)
    forked = [device] if device.type == "cuda" else []
    # A ComfyUI node runs in inference mode, in which nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(forked), _explained_memory_error():
        plan = choose_plan(cache, base, config, device, dtype, on_warning)
        run = Run(cache, base, config, device, continue_from, check_cancelled, plan)
        watch = samples.watch if samples else None
        selection = Selection(watch) if watch else None
        network = watch.network.name if watch else None
        identity = {} if state_path is None else run_identity(cache, base, config, dtype, continue_from, network)
        if resume and state_path is not None and state_path.exists():
            state = read_state(state_path, identity)
            if state.step > config.steps:
                raise BadConfig(f"{state_path.name}: is at step {state.step} already, beyond steps = {config.steps}")
            run.restore(state)
            if selection:
                selection.unpack(state.tensors, state.scalars["likeness"])
        if samples and watch:
            with run.adapter.disabled():
                watch.see_base(run.sample(samples.sampler, watch.shots))
        started_at, first_step = time.time(), run.step
        last_state, started = time.monotonic(), time.monotonic()
        thumbnail: Image.Image | None = None

        def lora(values: Mapping[str, Tensor], step: int) -> LoraFile:
            metadata = training_metadata(
                cache, base, config, steps=step, started_at=started_at, precision=dtype,
                gradient_checkpointing=run.memory.plan.recompute != "nothing", thumbnail=thumbnail,
            )  # fmt: skip
            return run.adapter.export(values, base, metadata | dict(extra_metadata or {}))

        def draw(shots: Sequence[Shot], values: Mapping[str, Tensor]) -> dict[Shot, Image.Image]:
            assert samples
            distinct = list(dict.fromkeys(shots))
            return dict(zip(distinct, run.sample(samples.sampler, distinct, values), strict=True))

        def measure(
            drawn: Mapping[Shot, Image.Image], values: Mapping[str, Tensor], merged: tuple[int, ...] = ()
        ) -> None:
            assert selection
            images = [drawn[shot] for shot in selection.watch.shots]
            selection.add(selection.watch.measure(run.step, images, merged), values)

        def save_state() -> None:
            if state_path is not None:
                run.check_finite()
                run.state(identity, selection).save(state_path)

        @contextlib.contextmanager
        def cancelled_with_a_state() -> Iterator[None]:
            try:
                yield
            except StopAndKeep:
                raise
            except BaseException:
                # A cancel, also ComfyUI's and Ctrl-C's, which are no Exceptions.
                save_state()
                raise

        def look() -> None:
            nonlocal thumbnail
            if samples is None:
                return
            measured = selection.watch.shots if selection and not selection.has(run.step) else []
            shown = samples.shots if on_sample else []
            drawn = draw([*measured, *shown], run.trained())
            if on_sample and shown:
                images = [drawn[shot] for shot in shown]
                thumbnail = images[0] if config.thumbnail else None
                on_sample(run.step, images)
            if measured:
                measure(drawn, run.trained())

        def is_time_to_look() -> bool:
            return bool(config.sample_every) and run.step > 0 and run.step % config.sample_every == 0

        with cancelled_with_a_state():
            if is_time_to_look():  # it may have been cancelled just then
                look()
        while run.step < config.steps:
            with cancelled_with_a_state():
                loss = run.accumulate_within_memory(on_warning)
            run.update(loss)
            if run.step % CHECK_EVERY == 0 or run.step == config.steps:
                run.check_finite()
            try:
                with cancelled_with_a_state():
                    if on_save and config.save_every and run.step % config.save_every == 0 and run.step < config.steps:
                        run.check_finite()
                        on_save(run.step, lora(run.trained(), run.step))
                    if is_time_to_look():
                        look()
                    if on_step:
                        on_step(_report(run, first_step, started, selection))
            except StopAndKeep:
                run.check_finite()
                break
            if run.step < config.steps and time.monotonic() - last_state >= config.state_interval:
                save_state()
                last_state = time.monotonic()
            if selection and config.stop_early and selection.watch.enough(selection.points):
                break
        if selection is None:
            return lora(run.trained(), run.step)
        with cancelled_with_a_state():
            if not selection.has(run.step):
                measure(draw(selection.watch.shots, run.trained()), run.trained())
            if config.merge_best and (average := selection.average(config.merge_best)):
                steps, values = average
                measure(draw(selection.watch.shots, values), values, merged=steps)
        kept, values = selection.choose() if config.keep == "best" else (selection.points[-1], run.trained())
        if on_save and config.save_every and (kept.merged or kept.step < run.step):
            on_save(run.step, lora(run.trained(), run.step))
        chosen = lora(values, kept.step)
        return chosen.with_metadata({**chosen.metadata, **selection.metadata(kept)})


@contextlib.contextmanager
def _explained_memory_error() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the device has not enough memory ({str(error).splitlines()[0]}); use batch_size 1 or a lower resolution"
        ) from None


def _report(run: Run, first_step: int, started: float, selection: Selection | None) -> StepReport:
    seconds = (time.monotonic() - started) / (run.step - first_step)
    return StepReport(
        step=run.step,
        steps=run.config.steps,
        learning_rate=run.optimizer.param_groups[0]["lr"],
        seconds_per_step=seconds,
        seconds_left=seconds * (run.config.steps - run.step),
        memory=torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else 0,
        likeness=selection.points[-1] if selection and selection.points else None,
        _loss=run.loss,
    )


def run_identity(
    cache: LatentCache,
    base: Base,
    config: TrainConfig,
    dtype: torch.dtype,
    continue_from: LoraFile | None = None,
    face_network: str | None = None,
) -> dict[str, str]:
    """What decides the result of a run, as text: equal for equal settings, photos and base model.

    `face_network` names what measures likeness, where that is measured.
    """
    settings = settings_of_the_steps(config, measured=face_network is not None)
    if face_network:
        settings["face_network"] = face_network
    settings["precision"] = str(dtype).removeprefix("torch.")
    if config.schedule == "constant":
        del settings["steps"]  # the steps so far are the same, however many follow
    if continue_from is not None:
        settings["continue_from"] = model_hash(continue_from.tensors)
    fingerprint = base.fingerprint("denoiser") + base.prediction_type + str(base.zero_terminal_snr)
    return {"settings": json.dumps(settings, sort_keys=True), "photos": cache.digest, "base model": fingerprint}
