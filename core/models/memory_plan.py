"""Memory plans: how a training step saves memory, and how much memory and arithmetic it will need."""

import math
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..device import free_memory, until_it_fits
from .quantised_layers import quantise_weights
from .selective import checkpointed

RESERVE = 0.9
"""The share of the free memory that a plan may fill. The allocator cannot use all of it, and kernels need workspace."""

LARGEST_SLAB, SMALLEST_SLAB = 2**30, 2**22
"""The bytes of the largest and the smallest slab of page-locked memory, powers of two."""

LEFT_FREE = 4 * 2**30
"""The bytes of the computer's memory left to other programs, since the system cannot swap out page-locked memory."""

CUDA_GRAIN = 512
"""CUDA's allocator rounds each tensor up to a multiple of this many bytes."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a training run saves memory."""

    recompute: float = 0.0
    """The share of the blocks whose activations are recomputed in the backward pass instead of being kept, 0 to 1.

    Blocks with the fewest weights come first: their activations are the largest for the arithmetic that they cost.
    """
    weights: Literal["full", "8 bits"] = "full"
    """The storage of the denoiser's frozen weights: in the precision of the run, or in 8 bits (quantised_layers.py).

    Weights that are quantised in the model's own file are kept that way, and only support "full".
    """
    offload: float = 0.0
    """The share of the blocks whose frozen weights stay in the computer's memory, 0 to 1.

    Their weights are copied to the device one block ahead. These blocks are spread evenly among the others, so that each is
    copied while a block on the device works. In training they must be recomputed, selectively or not, since the backward pass
    would otherwise keep their weights on the device.
    """
    selective: bool = False
    """Whether the other blocks keep only what their products and attention return, and recompute the rest (selective.py)."""

    def __str__(self) -> str:
        share = SHARES.get(self.recompute, f"{self.recompute:.0%}")
        if self.selective:
            share = f"{share} of the blocks and cheap operations" if self.recompute else "cheap operations"
        parts = [f"{share} recomputed"]
        if self.weights == "8 bits":
            parts.append("frozen weights in 8 bits")
        if self.offload:
            some = f"{SHARES.get(self.offload, f'{self.offload:.0%}')} of the "
            parts.append(f"{some if self.offload < 1 else ''}blocks brought in one by one")
        return ", ".join(parts)

    def saves_as_much_as(self, other: "MemoryPlan") -> bool:
        """Return whether this plan saves at least as much memory as another one in each way."""
        quantised = self.weights == "8 bits" or other.weights == "full"
        keeps_less = self.selective or self.recompute == 1 or not other.selective
        return quantised and keeps_less and self.recompute >= other.recompute and self.offload >= other.offload


SHARES = {0.0: "nothing", 0.25: "a quarter", 0.5: "half", 0.75: "three quarters", 1.0: "everything"}
"""The names of the shares of the blocks."""
_RECOMPUTING = (MemoryPlan(), MemoryPlan(selective=True), MemoryPlan(0.5, selective=True), MemoryPlan(1.0))
_QUANTISED = tuple(replace(plan, weights="8 bits") for plan in _RECOMPUTING)
PLANS = (
    *_RECOMPUTING,
    *_QUANTISED,
    *(replace(plan, offload=share) for plan, share in zip(_QUANTISED[1:], (0.75, 0.75, 1.0), strict=True)),
)
"""The plans from the fastest to the smallest, but full weights come first, since only these don't change the results.

Blocks are brought in when recomputing everything is not enough, and only as many as must be (`first_that_fits`). The first of
these plans recompute less again: copies take no time as long as the device computes for longer.
"""

WEIGHTS_IN_DRAWING = 0.7
"""The largest size of the denoiser's weights when pictures are drawn, as a share of the free memory.

The rest is for activations, for the blocks currently on the device, and for the VAE.
"""


def plans_for(
    gradient_checkpointing: Literal["auto", "on", "off"], frozen: bool = True, quantised: bool = False
) -> tuple[MemoryPlan, ...]:
    """Return the plans that the setting allows, in the order of `PLANS`. Without `frozen` weights they only recompute.

    Weights that are `quantised` in the model's file are not rounded further, so none of their plans changes the results.
    """
    plans = [plan for plan in PLANS if frozen or (plan.weights, plan.offload) == ("full", 0)]
    if quantised:
        plans = list(dict.fromkeys(replace(plan, weights="full") for plan in plans))
    if gradient_checkpointing == "auto":
        return tuple(plans)
    wanted = 1.0 if gradient_checkpointing == "on" else 0.0
    return tuple(plan for plan in plans if plan.recompute == wanted and not plan.selective)


def first_that_fits(
    plans: Sequence[MemoryPlan],
    fits: Callable[[MemoryPlan], bool],
    locks: Callable[[MemoryPlan], bool] = lambda plan: True,
) -> MemoryPlan:
    """Return the first plan that fits, bringing in as few sixteenths of the blocks as it can; the last plan if none fits.

    `locks` is whether the computer has enough memory for the blocks that are brought in. If it has too little for each plan
    that fits, the last of these is returned, which brings in the fewest.
    """
    found = plans[-1]
    for plan in filter(fits, plans):
        shares = [replace(plan, offload=part / 16) for part in range(1, int(16 * plan.offload))]
        at = bisect_left(shares, True, key=fits)
        found = [*shares, plan][at]
        if locks(found):
            break
    return found


def drawing_plan(weights: int, free: int | None) -> MemoryPlan:
    """Return the fastest plan for drawing pictures. None of these plans changes the pictures.

    `weights` is the size of the denoiser's weights and `free` the device's free memory, in bytes. None means unlimited.
    """
    if free is None or weights <= WEIGHTS_IN_DRAWING * free:
        return MemoryPlan()
    return MemoryPlan(offload=1 - WEIGHTS_IN_DRAWING * free / weights)


# --- applying a plan ---


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """Return the blocks of a diffusers network that can be recomputed: the innermost ones in its lists of modules.

    Down- and upsamplers are in such lists too, but diffusers never recomputes them, nor the first layer of a UNet's middle.
    """

    def is_middle(owner: Any) -> bool:  # It alone has one residual layer more than attentions.
        return 0 < len(getattr(owner, "attentions", ())) < len(owner.resnets)

    blocks = {
        block: None
        for owner in denoiser.modules()
        if hasattr(owner, "gradient_checkpointing")
        for name, named in owner.named_children()
        for children in (named.values() if isinstance(named, nn.ModuleDict) else [named])
        if isinstance(children, nn.ModuleList) and not name.endswith("samplers")
        for block in (children[1:] if name == "resnets" and is_middle(owner) else children)
    }
    return [block for block in blocks if not any(inner in blocks for inner in block.modules() if inner is not block)]


class MemorySaver:
    """Applies a memory plan to a denoiser, and a smaller one between two steps when memory runs out."""

    def __init__(self, denoiser: nn.Module, device: torch.device, draws: bool = False, compiled: bool = False):
        """`draws` is whether the denoiser's blocks draw random numbers.

        Blocks that are `compiled` are not recomputed selectively: torch has decided what they keep. If some are brought in,
        all recompute everything.
        """
        self.plan: MemoryPlan = MemoryPlan()
        self._denoiser, self._device, self._draws, self._compiled = denoiser, device, draws, compiled
        self._blocks = blocks_of(denoiser)
        self.offload: BlockOffload = BlockOffload(device)

    def adopt(self, plan: MemoryPlan) -> None:
        """Switch to a plan. Weights that are already in 8 bits stay that way."""
        by_size = sorted(self._blocks, key=lambda block: sum(map(torch.numel, block.parameters())))
        selective = plan.selective and not self._compiled
        count = int((1.0 if plan.offload and not selective else plan.recompute) * len(by_size))
        # Not a method: the denoiser and this object would refer to each other, and outlive the run.
        run = partial(_run_block, weakref.WeakSet(by_size[:count]), selective, self._draws)
        for module in self._denoiser.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = count > 0 or selective  # pyright: ignore
                module._gradient_checkpointing_func = run  # pyright: ignore
        if plan.weights == "8 bits":
            quantise_weights(self._denoiser, self._device)
        away = math.ceil(plan.offload * len(self._blocks))
        self.offload.take([self._blocks[at * len(self._blocks) // away] for at in range(away)])
        for tensor in self.resident():
            if tensor.device != self._device:
                tensor.data = tensor.data.to(self._device)
        self.plan = plan

    def resident(self) -> list[Tensor]:
        """Return the tensors of the denoiser that stay on the device between two steps."""
        at_home = set(self.offload.parameters())
        return [t for t in [*self._denoiser.parameters(), *self._denoiser.buffers()] if t not in at_home]


def _run_block(recomputed: Collection[nn.Module], selective: bool, draws: bool, block: Any, *inputs: Any) -> Any:
    """Run a block, recomputing it if it is in `recomputed`. diffusers calls this for every block that can be recomputed."""
    if block in recomputed or selective:
        return checkpointed(block, inputs, selective=block not in recomputed, draws=draws)
    return block(*inputs)


_Slot = tuple[weakref.ref[nn.Module], str]
"""A module, and the name of one of its parameters."""
_Block = weakref.ref[nn.Module] | None


class BlockOffload:
    """Keeps the frozen weights of blocks in the computer's memory, and on the device only while their block runs.

    While a block runs, the weights of the next one are copied, in the order of the last pass. The blocks must also be
    recomputed, selectively or not, since the backward pass would otherwise keep their weights on the device.

    The host could start copying many blocks before the device needs them. So it waits until the device is done with the last
    block but one, and at most three blocks are on the device. It also holds on to the weights until then. Memory that one
    stream has freed could otherwise be filled by the next copy while another stream still reads it.

    The blocks' hooks refer to this object, so it refers to the blocks weakly.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self.store: PinnedStore = PinnedStore(device)
        self._home: weakref.WeakKeyDictionary[nn.Module, dict[_Slot, nn.Parameter]] = weakref.WeakKeyDictionary()
        self._hooks: weakref.WeakKeyDictionary[nn.Module, tuple[RemovableHandle, ...]] = weakref.WeakKeyDictionary()
        self._coming: tuple[_Block, list[Tensor], list[torch.UntypedStorage]] | None = None
        """The next block, the copies of its weights, and what they were copied from."""
        self._present: list[Tensor] = []
        self._leaving: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()
        self._visited: tuple[_Block, _Block] = (None, None)
        self._following: dict[tuple[_Block, _Block], weakref.ref[nn.Module]] = {}

    def take(self, blocks: Sequence[nn.Module]) -> None:
        """Offload these blocks and no others. The weights of the others stay where they are."""
        if blocks and self._stream is None and self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
        self._following.clear()
        self._coming, self._visited = None, (None, None)
        self._let_go(keep=0)
        for block in [block for block in self._home if block not in blocks]:
            del self._home[block]
            for hook in self._hooks.pop(block):
                hook.remove()
        new = [block for block in blocks if block not in self._home]
        for block in new:
            self._home[block] = {
                (weakref.ref(module), name): parameter
                for module in block.modules()
                for name, parameter in module._parameters.items()
                if parameter is not None and not parameter.requires_grad
            }
        self.store.take([parameter for block in new for parameter in self._home[block].values()])
        for block in new:
            self._hooks[block] = (
                block.register_forward_pre_hook(self._bring),
                block.register_forward_hook(lambda block, *_: _put(self._home[block]), always_call=True),
            )

    def renew(self) -> None:
        """Take over weights that were changed, as an applied LoRA does. Those that were replaced are page-locked."""
        self._coming = None
        if self._stream:
            self.store.take([parameter for parameter in self.parameters() if not parameter.is_pinned()])

    @property
    def pageable(self) -> int:
        """The bytes of weights that a GPU copies from memory that is not page-locked."""
        return self.store.pageable if self._device.type == "cuda" else 0

    def parameters(self) -> Iterable[nn.Parameter]:
        for parameters in self._home.values():
            yield from parameters.values()

    def _start(self, block: nn.Module) -> list[Tensor]:
        with torch.cuda.stream(self._stream) if self._stream else torch.no_grad():
            return [p.to(self._device, non_blocking=True, copy=True) for p in self._home[block].values()]

    def _let_go(self, keep: int) -> None:
        """Wait until the device is done with all but the last `keep` of the blocks that have run, and free these."""
        if self._stream:
            # When the next block begins, all work on the last one has been queued, including its backward pass.
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._leaving.append((event, self._present))
        self._present = []
        while len(self._leaving) > keep:
            self._leaving[0][0].synchronize()
            self._leaving.popleft()  # drops the last reference to them

    def _bring(self, block: nn.Module, _: object) -> None:
        self._let_go(keep=1)
        tensors = self._present = self._brought(block) or self._start(block)
        if self._stream:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        parameters = (nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
        _put(dict(zip(self._home[block], parameters, strict=True)))
        # The next block depends on the previous one, since the backward pass goes through the blocks in reverse.
        self._following[self._visited] = weakref.ref(block)
        self._visited = (self._visited[1], weakref.ref(block))
        following = self._following.get(self._visited)
        next_one = following and following()
        self._coming = (following, self._start(next_one), self._at_home(next_one)) if next_one is not None else None

    def _at_home(self, block: nn.Module) -> list[torch.UntypedStorage]:
        return [parameter.untyped_storage() for parameter in self._home[block].values()]

    def _brought(self, block: nn.Module) -> list[Tensor] | None:
        """Return the copies that were made ahead. None if another block was expected, or weights were replaced since."""
        if self._coming is None or self._coming[0] != weakref.ref(block):
            return None
        _, tensors, sources = self._coming
        unchanged = [now._cdata == then._cdata for now, then in zip(self._at_home(block), sources, strict=True)]
        return tensors if all(unchanged) else None


def _put(parameters: Mapping[_Slot, nn.Parameter]) -> None:
    for (reference, name), parameter in parameters.items():
        if (module := reference()) is not None:
            module._parameters[name] = parameter


class PinnedStore:
    """Page-locked memory of the computer for weights, which a GPU can copy while it works.

    torch rounds each page-locked piece up to a power of two: for FLUX.1's tensors, from 11 to 17 GiB. So many tensors share
    one slab, whose size is a power of two. If the system doesn't provide more of it, or less than LEFT_FREE would be left, the
    rest stays in ordinary memory.
    """

    def __init__(self, device: torch.device):
        self.pins: bool = device.type == "cuda"
        self._slab = torch.empty(0, dtype=torch.uint8)
        """The unused rest of the slab that is being filled."""
        self.pageable: int = 0
        """The bytes of weights in ordinary memory. Copies from it are slower, and the host waits for them."""

    def take(self, parameters: Sequence[nn.Parameter]) -> None:
        """Move the values of parameters into this memory."""
        left = sum(_aligned(parameter.nbytes) for parameter in parameters)
        for parameter in parameters:
            place = self._place(_aligned(parameter.nbytes), left) if self.pins else None
            left -= _aligned(parameter.nbytes)
            if place is None:
                parameter.data = parameter.data.cpu()
                self.pageable += parameter.nbytes
            else:
                values = place[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
                parameter.data = values.copy_(parameter.data)

    def _place(self, size: int, left: int) -> Tensor | None:
        """Allocate bytes for a tensor. `left` is what this and later tensors still need. None if the memory is used up."""
        if self._slab.nbytes < size:
            slab = max(min(LARGEST_SLAB, 1 << left.bit_length() - 1), SMALLEST_SLAB, 1 << (size - 1).bit_length())
            try:  # twice, since torch keeps slabs that were given back, and the system counts them as used
                self._slab = until_it_fits(partial(_page_locked, slab), (int,))
            except (torch.OutOfMemoryError, MemoryError, RuntimeError):  # the class varies by system and driver
                self.pins = False
                return None
        place, self._slab = self._slab[:size], self._slab[size:]
        return place


def _page_locked(size: int) -> Tensor:
    if size > lockable_memory():
        raise MemoryError
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def lockable_memory() -> float:
    """Return how many bytes of the computer's free memory may be page-locked."""
    room = free_memory(torch.device("cpu"))
    return math.inf if room is None else room - LEFT_FREE


def _aligned(size: int) -> int:
    """Return the bytes that a tensor of `size` bytes takes in a slab, so that a tensor of any dtype can follow."""
    return -(-size // 64) * 64


# --- predicting how much memory and arithmetic is needed ---


class MemoryCount(TorchDispatchMode):
    """Counts the bytes of all tensors created in this context on a device, while they are alive.

    `peak` is the largest sum so far. CUDA's allocator rounds each tensor up.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.live: int = 0
        self.peak: int = 0
        self.products: int = 0
        """The number of matrix products so far."""
        self.device: torch.device = device
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # called for fake tensors, and half of all calls
            return args[0].fake_device
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.products += func is torch.ops.aten.mm.default
        for tensor in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                self._count(tensor.untyped_storage())
        return result

    def leave_out(self, tensor: Tensor) -> None:
        """Ignore an existing tensor when an operation returns it."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            weakref.finalize(storage, self._seen.discard, storage._cdata)

    def counts(self, place: int) -> bool:
        """Return whether the storage with that address (its `_cdata`) is alive and counted."""
        return place in self._seen

    @contextmanager
    def known(self, most: int) -> Iterator[None]:
        """Set this context's peak to `most` bytes above what is alive at its beginning, whatever is created in it."""
        peak = max(self.peak, self.live + most)
        try:
            yield
        finally:
            self.peak = peak

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, allocated(storage.nbytes(), self.device)
        if place in self._seen:
            return
        self._seen.add(place)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self._seen.discard(place)
            self.live -= size

        weakref.finalize(storage, gone)


def allocated(size: int, device: torch.device) -> int:
    """Return the bytes that a device's allocator takes for a tensor of `size` bytes."""
    return -(-size // CUDA_GRAIN) * CUDA_GRAIN if device.type == "cuda" else size


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that the tensors take on their devices. Memory shared by several tensors counts once."""
    storages = {t.untyped_storage()._cdata: (t.untyped_storage().nbytes(), t.device) for t in tensors}
    return sum(allocated(*storage) for storage in storages.values())
