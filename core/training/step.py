"""A training run and its steps, which are the same for every family and method."""

import contextlib
import hashlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..device import until_it_fits
from ..errors import OutOfMemory, TrainingDiverged
from ..lora.file import LoraFile
from ..models.base import Base
from ..models.compiled import CompiledBlocks, why_not_compiled
from ..models.frozen_layers import FrozenLayers
from ..models.memory_plan import MemoryPlan, MemorySaver, blocks_of, plans_for
from ..models.objective import Schedule, draw_noise, sample_losses
from ..models.products import choose_products
from ..models.spec import Conditioning, FamilySpec, placed, stack_conditioning
from ..progress import OnWarning
from .encode import Batches, EncodedImage, LatentCache
from .methods import METHODS, attach, peak_rate, trains_text
from .methods.method import Adapter
from .optimizer import build_optimizer, learning_rate_factor
from .state import RunState, pack_optimizer, unpack_optimizer
from .training_adapter import AttachedAdapter, TrainingAdapter

SMOOTHING = 0.98
"""The decay of the running mean of the loss."""
CheckCancelled = Callable[[], None]
"""A function that is called many times in each step, and raises to cancel."""


def memory_plans(config: TrainConfig, base: Base) -> tuple[MemoryPlan, ...]:
    """Return the memory plans for training on the base model with these settings, from the fastest to the smallest.

    When products in 8 bits are asked for, the weights have 8 bits in all plans.
    """
    frozen = METHODS[config.method].freezes_weights
    plans = plans_for(config.gradient_checkpointing, frozen, narrow=frozen and base.is_narrow)
    if frozen and not base.is_narrow and config.eight_bit_products == "on":
        return tuple(plan for plan in plans if plan.weights == "8 bits")
    return plans


def smaller_plans(
    plans: Sequence[MemoryPlan],
    plan: MemoryPlan,
    adopt: Callable[[MemoryPlan], object],
    what: str,
    advice: str,
    on_warning: OnWarning,
) -> Iterator[Callable[[], object]]:
    """Yield the adoption of each plan that is smaller than `plan`, from the largest to the smallest.

    `on_warning` is told that `what` does not fit. Raises OutOfMemory with the advice after the last plan.
    """
    for smaller in plans:
        if smaller != plan and smaller.saves_as_much_as(plan):
            plan = smaller
            on_warning(f"out of memory: {what} does not fit. Trying again with {plan}")
            yield partial(adopt, plan)
    raise OutOfMemory(f"{what} does not fit into the device's memory ({plan}). {advice}")


@dataclass(frozen=True, eq=False)
class Pass:
    """The inputs of one forward pass."""

    kind: Literal["pictures", "class pictures", "prior"]
    """What the loss is computed on: photos, class pictures, or prior prediction."""
    latents: Tensor
    noise: Tensor
    noisy_latents: Tensor
    timesteps: Tensor
    conditioning: Conditioning
    masks: Tensor | None = None
    frozen_conditioning: Conditioning | None = None
    """The frozen model's conditioning if it differs, which happens in prior prediction with trained text encoders."""


class Run:
    """A training run between two steps: the networks, the adapter, the optimizer and the schedules."""

    def __init__(
        self,
        cache: LatentCache,
        base: Base,
        config: TrainConfig,
        device: torch.device | None = None,
        continue_from: LoraFile | None = None,
        check_cancelled: CheckCancelled | None = None,
        plan: MemoryPlan | None = None,
        training_adapter: TrainingAdapter | None = None,
    ):
        self.config = config
        self.family: FamilySpec = base.family
        self.device: torch.device
        self.dtype: torch.dtype
        self.device, self.dtype = base.device_and_dtype(config.precision, device)
        self.plans: tuple[MemoryPlan, ...] = memory_plans(config, base)
        plan = plan or self.plans[0]
        # Weights that the plan offloads or narrows need not fit on the device in full, so they are loaded on the CPU.
        place = torch.device("cpu") if plan.offload or plan.weights != "full" else self.device
        frozen = METHODS[config.method].freezes_weights
        self.denoiser: nn.Module = base.load("denoiser", place, self.dtype, as_stored=frozen)
        self.encoders: dict[str, nn.Module] = {}
        if trains_text(config):
            self.encoders = base.load_text_encoders(self.device, self.dtype, as_stored=False)
        self.adapter: Adapter = attach({"denoiser": self.denoiser, **self.encoders}, base.family, config, continue_from)
        self.training_adapter: AttachedAdapter | None = (
            AttachedAdapter(training_adapter, self.denoiser, self.device, self.dtype) if training_adapter else None
        )
        self._set_training(True)
        if check_cancelled:
            _check_often(self.denoiser, check_cancelled, blocks_of(self.denoiser) if config.compile else ())
        self.why_not_compiled: str | None = why_not_compiled(self.device) if config.compile else None
        """Why blocks are not compiled although the settings ask for it, or None."""
        compiled = config.compile and not self.why_not_compiled
        self.memory: MemorySaver = MemorySaver(self.denoiser, self.device, config.dropout > 0, compiled)
        self.memory.adopt(plan)
        self.in_eight_bits: bool = self._choose_products()
        """Whether products with frozen weights are computed in 8 bits."""
        self.compiled: CompiledBlocks | None = CompiledBlocks(blocks_of(self.denoiser)) if compiled else None
        self.frozen_layers: FrozenLayers | None = self._frozen_layers()
        self.parameters: dict[str, nn.Parameter] = self.adapter.parameters()
        self.average: dict[str, Tensor] | None = (
            {name: value.detach().clone() for name, value in self.parameters.items()} if config.ema_decay else None
        )
        self.optimizer: torch.optim.Optimizer = build_optimizer(self.adapter, config)
        self.scaler: torch.amp.GradScaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.schedule: Schedule = base.schedule().to(self.device)
        images = [_to_device(image, self.device) for image in cache.images]
        self.images: list[EncodedImage] = [image for image in images if not image.is_class]
        self.class_images: list[EncodedImage] = [image for image in images if image.is_class]
        self.text: dict[str, Conditioning] = {
            caption: placed(conditioning, self.device, self.dtype) for caption, conditioning in cache.text.items()
        }
        self.chunks: int = cache.chunks
        self.batches: Batches = Batches(self.images, config.batch_size, config.seed)
        self.class_batches: Batches | None = (
            Batches(self.class_images, config.batch_size, config.seed + 1) if self.class_images else None
        )
        self.step: int = 0
        self.narrowed_after: int | None = None
        """The number of completed steps when the frozen weights were narrowed to 8 bits. None if they never were."""
        self.loss: Tensor = torch.zeros((), device=self.device)
        self.first_bad_step: Tensor = torch.full((), -1, device=self.device)

    def train_step(self) -> None:
        """Perform one optimizer step, without waiting for the device."""
        self.update(self.accumulate())

    def accumulate(self) -> Tensor:
        """Return the next step's loss, a scalar, and accumulate its gradients. An interruption leaves the run between steps."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        with self.fast():
            for number in range(self.step * config.accumulation, (self.step + 1) * config.accumulation):
                for inputs in self.passes(number):
                    loss = self.loss_of(inputs) / config.accumulation
                    self.scaler.scale(loss).backward()
                    self.adapter.take_gradients()
                    total += loss.detach()
        return total

    def _choose_products(self) -> bool:
        wanted = self.config.eight_bit_products
        # A choice by time could differ when the run is resumed.
        wanted = "off" if wanted == "auto" and self.config.deterministic else wanted
        return choose_products(self.denoiser, wanted, self.device, self.dtype)

    def _frozen_layers(self) -> FrozenLayers | None:
        if self.compiled:
            return None
        # With offloading, transformed kernels would stay on the device while the weights don't. A selective recomputation must
        # repeat the operations of the forward pass, and kernels are transformed only once.
        plan, networks = self.memory.plan, nn.ModuleList([self.denoiser, *self.encoders.values()])
        return FrozenLayers(networks, self.device, convolutions=not (plan.offload or plan.selective))

    @contextlib.contextmanager
    def fast(self) -> Iterator[None]:
        """Speed up the passes of a step: blocks run in their fast form, and the adapter is cast once for all passes."""
        blocks = self.compiled or self.frozen_layers
        with blocks.in_use() if blocks else contextlib.nullcontext(), self.adapter.cast_once(self.dtype):
            yield

    def accumulate_within_memory(self, on_warning: OnWarning) -> Tensor:
        """Return the loss of `accumulate`, using smaller memory plans until it fits. Raises OutOfMemory when none does."""
        what, advice = f"step {self.step + 1}", "Use batch_size 1, a lower resolution, or gradient_checkpointing auto"
        return until_it_fits(
            self.accumulate, smaller_plans(self.plans, self.memory.plan, self.adopt, what, advice, on_warning)
        )

    def adopt(self, plan: MemoryPlan) -> None:
        """Switch to a memory plan between two steps. Weights that are already in 8 bits stay that way."""
        self.optimizer.zero_grad(set_to_none=True)
        self.frozen_layers = None  # It would keep the layers that the plan replaces.
        narrows = plan.weights != self.memory.plan.weights
        self.memory.adopt(plan)
        if narrows:
            self.in_eight_bits = self._choose_products()
        self.frozen_layers = self._frozen_layers()

    def update(self, loss: Tensor) -> None:
        """Update the adapter with the accumulated gradients of that loss, and count the step."""
        config = self.config
        if self.narrowed_after is None and self.memory.plan.weights != "full":
            self.narrowed_after = self.step
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
            # The decay rises from 0.1, so that the average soon forgets the untrained adapter.
            decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
            values = [parameter.detach() for parameter in self.parameters.values()]
            torch._foreach_lerp_(list(self.average.values()), values, 1 - decay)
        bad = ~torch.isfinite(loss) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(bad, self.step, self.first_bad_step)
        # The running mean starts at the first loss and not at 0.
        self.loss = loss if self.step == 0 else SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        self.step += 1

    def passes(self, number: int) -> Iterator[Pass]:
        """Yield the inputs of each loss in forward pass `number`, one by one so that only one graph is in memory."""
        config = self.config
        generator = self._generator("noise", number)
        pictures = [self.images[index] for index in self.batches.at(number)]
        if random.Random(f"{config.seed}/prior/{number}").random() < config.prior_prediction:
            yield self._prior_pass(pictures, self._generator("prior", number))
        dropped = random.Random(f"{config.seed}/dropout/{number}")
        captions = ["" if dropped.random() < config.caption_dropout else picture.caption for picture in pictures]
        yield self.picture_pass(pictures, captions, generator)
        if self.class_batches:
            pictures = [self.class_images[index] for index in self.class_batches.at(number)]
            captions = [picture.caption for picture in pictures]
            yield replace(
                self.picture_pass(pictures, captions, self._generator("class", number)), kind="class pictures"
            )

    def picture_pass(
        self, pictures: Sequence[EncodedImage], captions: Sequence[str], generator: torch.Generator
    ) -> Pass:
        """Build a pass on pictures of one latent shape."""
        masks = None
        if any(picture.mask is not None for picture in pictures):
            masks = torch.stack([torch.ones_like(p.mean[:1]) if p.mask is None else p.mask for p in pictures])
        return Pass("pictures", *self._noised(pictures, generator), self._conditioning(pictures, captions), masks)

    def _prior_pass(self, pictures: Sequence[EncodedImage], generator: torch.Generator) -> Pass:
        """Build a pass of prior prediction. Both models see the same noisy training pictures."""
        noised = self._noised(pictures, generator)
        captions = [picture.class_caption for picture in pictures]
        frozen = None
        if self.encoders:
            with torch.no_grad(), self.adapter.disabled():
                frozen = self._conditioning(pictures, captions)
        return Pass("prior", *noised, self._conditioning(pictures, captions), frozen_conditioning=frozen)

    def loss_of(self, inputs: Pass) -> Tensor:
        """Return the weighted loss of a pass, a scalar."""
        if inputs.kind == "prior":
            return self.config.prior_loss_weight * self._prior_prediction_loss(inputs)
        prediction = self._predict(inputs.noisy_latents, inputs.timesteps, inputs.conditioning)
        target = self.schedule.target(inputs.latents, inputs.noise, inputs.timesteps)
        losses = sample_losses(prediction, target, inputs.masks, self.config)
        loss = (losses * self.schedule.loss_weights(inputs.timesteps, self.config)).mean()
        return loss if inputs.kind == "pictures" else self.config.prior_loss_weight * loss

    def _prior_prediction_loss(self, inputs: Pass) -> Tensor:
        """Return the loss between the adapted and the frozen model's predictions for the class caption, a scalar.

        Both see the same noisy training pictures, so that prior preservation needs no class images. This is learning without
        forgetting (arXiv:1606.09282), which ai-toolkit calls differential output preservation. A training adapter is part of
        both models.
        """
        frozen = inputs.frozen_conditioning or inputs.conditioning
        with torch.no_grad(), self.adapter.disabled():
            target = self._predict(inputs.noisy_latents, inputs.timesteps, frozen)
        prediction = self._predict(inputs.noisy_latents, inputs.timesteps, inputs.conditioning)
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
        # On a GPU, autocast gives norms float32 outputs, and each later layer would cast and keep its own copy of them.
        if self.dtype == torch.float32 or METHODS[self.config.method].keeps_dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        seed = hashlib.sha256(f"{self.config.seed}/{purpose}/{number}".encode()).digest()
        if self.config.dropout:
            torch.manual_seed(int.from_bytes(seed[8:15], "big"))
        return torch.Generator(self.device).manual_seed(int.from_bytes(seed[:7], "big"))

    def _set_training(self, training: bool) -> None:
        """Switch dropout on or off. Older versions of diffusers also recompute activations in training mode only."""
        for network in (self.denoiser, *self.encoders.values()):
            network.train(training)

    @contextlib.contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Put these values into the adapter, and turn dropout off, within the context."""
        before = (
            None if values is self.parameters else {name: p.detach().clone() for name, p in self.parameters.items()}
        )
        self._set_training(False)
        try:
            if before is not None:
                self._put(values)
            yield
        finally:
            if before is not None:
                self._put(before)
            self._set_training(True)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def check_finite(self) -> None:
        """Raise TrainingDiverged if the loss of any step so far, or the current adapter, isn't finite. Waits for the device."""
        step = int(self.first_bad_step)
        if step < 0:
            values = [parameter.detach() for parameter in self.parameters.values()]
            if torch.stack(torch._foreach_norm(values)).isfinite().all():
                return
            step = self.step - 1
        names = sorted({self.images[i].name for n in range(self.config.accumulation)
                        for i in self.batches.at(step * self.config.accumulation + n)})  # fmt: skip
        advice = "Lower the learning rate"
        if int(self.first_bad_step) == 0:
            advice = "Nothing was trained yet, so the base model's file may be damaged: download it again"
        advice += ", or use precision bf16" if self.dtype == torch.float16 else ""
        raise TrainingDiverged(
            f"the training became NaN or infinite in step {step + 1} on {', '.join(names)} at learning rate "
            f"{peak_rate(self.config) * learning_rate_factor(step, self.config):g}. {advice}"
        )

    def trained(self) -> Mapping[str, Tensor]:
        """Return the values to save: the running average if there is one, else the parameters."""
        return self.parameters if self.average is None else self.average

    def state(
        self,
        identity: Mapping[str, str],
        more_tensors: Mapping[str, Tensor],
        likeness: Sequence[Mapping[str, Any]],
    ) -> RunState:
        """Return the current state of the run, with `more_tensors` and the measured likeness."""
        tensors = {f"adapter.{name}": value.detach().cpu() for name, value in self.parameters.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value.cpu() for name, value in self.average.items()}
        tensors["loss"] = self.loss.cpu()
        optimizer_tensors, scalars = pack_optimizer(self.optimizer)
        return RunState(
            self.step, identity, {**tensors, **optimizer_tensors, **more_tensors},
            scalars | {
                "scaler": self.scaler.state_dict(), "likeness": list(likeness), "narrowed_after": self.narrowed_after,
            },
        )  # fmt: skip

    @torch.no_grad()
    def restore(self, state: RunState) -> None:
        """Restore the run to a state that `state` returned."""
        self._put({name: state.tensors[f"adapter.{name}"] for name in self.parameters})
        for name, value in (self.average or {}).items():
            value.copy_(state.tensors[f"average.{name}"])
        unpack_optimizer(self.optimizer, state.tensors, state.scalars)
        self.scaler.load_state_dict(state.scalars["scaler"])
        self.loss = state.tensors["loss"].to(self.device)
        self.step = state.step
        self.narrowed_after = state.scalars["narrowed_after"]
        plan = self.memory.plan
        if self.narrowed_after is not None and plan.weights == "full":  # now there is more memory than before
            self.adopt(next(one for one in self.plans if one.weights == "8 bits" and one.saves_as_much_as(plan)))


def _check_often(network: nn.Module, check_cancelled: CheckCancelled, whole: Collection[nn.Module]) -> None:
    """Add hooks that call `check_cancelled` at every block, forward and backward, but not inside blocks in `whole`."""

    def check(*_: object) -> None:
        check_cancelled()

    def check_backward_too(module: nn.Module, inputs: object, output: object) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(check)

    within = {inner for block in whole for inner in block.modules() if inner is not block}
    for blocks in network.modules():
        if isinstance(blocks, nn.ModuleList) and blocks not in within:
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
