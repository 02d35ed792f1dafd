"""A base model's networks with an adapter on them: where their weights are, and how they compute."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..device import keeps_quantised_weights
from ..errors import OutOfMemory
from ..models.base import Base
from ..models.compiled import CompiledBlocks, why_not_compiled
from ..models.frozen_layers import FrozenLayers
from ..models.memory_plan import MemoryPlan, MemorySaver, blocks_of, plans_for
from ..models.products import choose_products
from ..models.spec import Conditioning, FamilySpec, on_device, placed, stack_conditioning
from ..progress import OnWarning
from .inputs import TrainingInputs
from .methods import METHODS, attach, trains_text
from .methods.method import Adapter
from .training_adapter import AttachedAdapter

CheckCancelled = Callable[[], None]
"""A function that is called many times in each step, and raises to cancel."""


def memory_plans(config: TrainConfig, base: Base, device: torch.device) -> tuple[MemoryPlan, ...]:
    """Return the memory plans for training on the base model with these settings, from the fastest to the smallest.

    When products in 8 bits are asked for, the weights have 8 bits in all plans. Apple's GPUs compute in the computer's memory,
    so bringing blocks in saves nothing.
    """
    frozen, stored = METHODS[config.method].freezes_weights, keeps_stored(config, device) and base.is_quantised
    plans = plans_for(config.gradient_checkpointing, frozen, stored)
    if frozen and not stored and config.eight_bit_products == "on":
        plans = tuple(plan for plan in plans if plan.weights == "8 bits")
    return tuple(plan for plan in plans if not plan.offload) if device.type == "mps" else plans


def keeps_stored(config: TrainConfig, device: torch.device) -> bool:
    """Return whether quantised weights stay as they are stored: frozen ones on a device that can compute with them."""
    return METHODS[config.method].freezes_weights and keeps_quantised_weights(device)


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


class AdaptedModel:
    """The denoiser, and the text encoders if they are trained, with the adapter on them, under a memory plan."""

    def __init__(
        self, inputs: TrainingInputs, plan: MemoryPlan | None = None, check_cancelled: CheckCancelled | None = None
    ):
        base, config = inputs.base, inputs.config
        self._inputs = inputs
        self.base: Base = base
        self.config: TrainConfig = config
        self.family: FamilySpec = base.family
        self.device: torch.device = inputs.device
        self.dtype: torch.dtype = inputs.dtype
        self.plans: tuple[MemoryPlan, ...] = memory_plans(config, base, self.device)
        plan = plan or self.plans[0]
        # Weights that the plan offloads or quantises need not fit on the device in full, so they are loaded on the CPU.
        place = torch.device("cpu") if plan.offload or plan.weights != "full" else self.device
        self.denoiser: nn.Module = base.load("denoiser", place, self.dtype, keeps_stored(config, self.device))
        self.encoders: dict[str, nn.Module] = {}
        if trains_text(config):
            self.encoders = base.load_text_encoders(self.device, self.dtype, as_stored=False)
        self.adapter: Adapter = attach({"denoiser": self.denoiser, **self.encoders}, base.family, config, inputs.start)
        self.training_adapter: AttachedAdapter | None = None
        if inputs.adapter:
            self.training_adapter = AttachedAdapter(inputs.adapter.changes, self.denoiser, self.device, self.dtype)
        self.set_training(True)
        if check_cancelled:
            _check_often(blocks_of(self.denoiser), check_cancelled)
        self.why_not_compiled: str | None = why_not_compiled(self.device) if config.compile else None
        """Why blocks are not compiled although the settings ask for it, or None."""
        compiled = config.compile and not self.why_not_compiled
        self.memory: MemorySaver = MemorySaver(self.denoiser, self.device, config.dropout > 0, compiled)
        self.memory.adopt(plan)
        self.in_eight_bits: bool = self._choose_products()
        """Whether products with frozen weights are computed in 8 bits."""
        self.fast_layers: CompiledBlocks | FrozenLayers | None = (
            CompiledBlocks(blocks_of(self.denoiser)) if compiled else self._frozen_layers()
        )

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the denoiser's prediction, (B, C, H, W)."""
        with self._autocast():
            return self.family.predict(self.denoiser, noisy_latents.to(self.dtype), timesteps, conditioning)

    def encode_text(self, captions: Sequence[str], chunks: int) -> Conditioning:
        """Return the conditioning of the captions by the trained text encoders."""
        with self._autocast():
            return self.family.encode_text(self.encoders, captions, self.config.clip_skip, chunks)

    @contextlib.contextmanager
    def fast(self) -> Iterator[None]:
        """Speed up the passes of a step: blocks run in their fast form, and the adapter is cast once for all passes."""
        with (
            self.fast_layers.in_use() if self.fast_layers else contextlib.nullcontext(),
            self.adapter.cast_once(self.dtype),
        ):
            yield

    def adopt(self, plan: MemoryPlan) -> None:
        """Switch to a memory plan between two steps. Weights that are already in 8 bits stay that way."""
        for parameter in self.adapter.parameters().values():
            parameter.grad = None
        compiled = isinstance(self.fast_layers, CompiledBlocks)
        if not compiled:
            self.fast_layers = None  # It would keep the layers that the plan replaces.
        quantises = plan.weights != self.memory.plan.weights
        self.memory.adopt(plan)
        if quantises:
            self.in_eight_bits = self._choose_products()
        if not compiled:
            self.fast_layers = self._frozen_layers()

    def set_training(self, training: bool) -> None:
        """Switch dropout on or off. Older versions of diffusers also recompute activations in training mode only."""
        for network in (self.denoiser, *self.encoders.values()):
            network.train(training)

    @contextlib.contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Put these values into the adapter, and turn dropout off, within the context."""
        replaced = {name: one for name, one in self.adapter.parameters().items() if one is not values[name]}
        before = {name: parameter.detach().clone() for name, parameter in replaced.items()}
        self.set_training(False)
        try:
            self.put({name: values[name] for name in before})
            yield
        finally:
            self.put(before)
            self.set_training(True)

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Copy these values into the adapter's parameters of the same names."""
        parameters = self.adapter.parameters()
        for name, value in values.items():
            parameters[name].copy_(value)

    def _choose_products(self) -> bool:
        wanted = self.config.eight_bit_products
        # A choice by time could differ when the run is resumed.
        wanted = "off" if wanted == "auto" and self.config.deterministic else wanted
        return choose_products(self.denoiser, wanted, self.device, self.dtype, self._predict_largest)

    def _predict_largest(self) -> None:
        """Make the frozen model's prediction for a batch of the run's largest picture. Only its shapes matter."""
        cache, count = self._inputs.cache, self.config.batch_size
        image = max(cache.images, key=lambda image: image.mean.numel())
        captions, timesteps = [image.caption] * count, torch.full((count,), 500.0, device=self.device)
        with torch.no_grad(), self.adapter.disabled():  # Layers of an adapter don't call the frozen ones.
            if self.encoders:
                text = self.encode_text(captions, cache.chunks)
            else:
                texts = stack_conditioning([cache.text[caption] for caption in captions])
                text = placed(texts, self.device, self.dtype)
            conditioning = text | on_device(stack_conditioning([image.conditioning] * count), self.device)
            self.predict(torch.stack([image.mean] * count).to(self.device), timesteps, conditioning)

    def _frozen_layers(self) -> FrozenLayers:
        # With offloading, transformed kernels would stay on the device while the weights don't. A selective recomputation must
        # repeat the operations of the forward pass, and kernels are transformed only once.
        plan, networks = self.memory.plan, nn.ModuleList([self.denoiser, *self.encoders.values()])
        return FrozenLayers(networks, self.device, convolutions=not (plan.offload or plan.selective))

    def _autocast(self):
        # On a GPU, autocast gives norms float32 outputs, and each later layer would cast and keep its own copy of them.
        if self.dtype == torch.float32 or METHODS[self.config.method].keeps_dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def _check_often(blocks: Iterable[nn.Module], check_cancelled: CheckCancelled) -> None:
    """Add hooks that call `check_cancelled` at every block, forward and backward."""

    def check(*_: object) -> None:
        check_cancelled()

    def check_backward_too(module: nn.Module, inputs: object, output: object) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(check)

    for block in blocks:
        block.register_forward_pre_hook(check)
        block.register_forward_hook(check_backward_too)
