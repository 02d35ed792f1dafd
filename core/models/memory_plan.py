"""Memory plans: ways in which a training step needs less memory, and the counting of how much it will need."""

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from .eight_bit import narrow_weights

RESERVE = 0.9
"""The share of the free memory that a plan may fill. The allocator cannot use all of it, and kernels need workspace."""

OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0, "prodigy": 16}
"""The bytes of state that each optimizer keeps for a trained number. Adafactor keeps only a row and a column of each matrix."""


@dataclass(frozen=True)
class MemoryPlan:
    """The ways in which a run saves memory."""

    recompute: Literal["nothing", "half", "everything"] = "nothing"
    """The blocks whose activations are recomputed in the backward pass instead of being kept.

    "half" means those with the fewest weights, whose activations are the largest for the arithmetic that they cost."""
    weights: Literal["full", "8 bits"] = "full"
    """The storage of the denoiser's frozen weights: in the precision of the run, or in 8 bits (core/models/eight_bit.py)."""
    offload: Literal["nothing", "half", "everything"] = "nothing"
    """The blocks whose frozen weights stay in the computer's memory, and are copied to the device one block ahead.

    "half" means every other block, so that each is copied while a block that is on the device works."""

    def __str__(self) -> str:
        parts = [f"{self.recompute} recomputed"]
        if self.weights == "8 bits":
            parts.append("frozen weights in 8 bits")
        if self.offload != "nothing":
            parts.append(f"{'every other block' if self.offload == 'half' else 'blocks'} brought in one by one")
        return ", ".join(parts)


PLANS = (
    MemoryPlan(),
    MemoryPlan("half"),
    MemoryPlan("everything"),
    MemoryPlan("everything", "8 bits"),
    MemoryPlan("everything", "8 bits", "half"),
    MemoryPlan("everything", "8 bits", "everything"),
)
"""The plans from the fastest to the smallest. Only 8 bits change the results."""

DRAWING_PLANS = {MemoryPlan(): 0.7, MemoryPlan(offload="half"): 1.3, MemoryPlan(offload="everything"): math.inf}
"""The plans by which pictures are drawn, from the fastest to the smallest, none of which changes the pictures. By each: how
large all weights of the denoiser may be, as a share of the free memory; the rest is for activations and the VAE."""


def plans_for(gradient_checkpointing: Literal["auto", "on", "off"], frozen: bool = True) -> tuple[MemoryPlan, ...]:
    """The plans that the setting allows, from the fastest to the smallest. Without `frozen` weights they only recompute."""
    plans = [plan for plan in PLANS if frozen or (plan.weights, plan.offload) == ("full", "nothing")]
    if gradient_checkpointing == "auto":
        return tuple(plans)
    wanted = "everything" if gradient_checkpointing == "on" else "nothing"
    return tuple(plan for plan in plans if plan.recompute == wanted)


# --- carrying a plan out ---


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks of a diffusers network that can be recomputed: the innermost ones in its lists of modules.

    Down- and upsamplers are in such lists too, but diffusers never recomputes them.
    """
    blocks = {
        block: None
        for owner in denoiser.modules()
        if hasattr(owner, "gradient_checkpointing")
        for name, children in owner.named_children()
        if isinstance(children, nn.ModuleList) and not name.endswith("samplers")
        for block in children
    }
    return [block for block in blocks if not any(inner in blocks for inner in block.modules() if inner is not block)]


class MemorySaver:
    """Applies a memory plan to a denoiser, and a smaller one between two steps when memory runs out."""

    def __init__(self, denoiser: nn.Module, device: torch.device):
        self.plan = MemoryPlan()
        self._denoiser, self._device = denoiser, device
        self._blocks = blocks_of(denoiser)
        self._recomputed: set[nn.Module] = set()
        self._offload = BlockOffload(device)

    def adopt(self, plan: MemoryPlan) -> None:
        """Changes to a plan that saves at least as much memory as the current one."""
        by_size = sorted(self._blocks, key=lambda block: sum(p.numel() for p in block.parameters()))
        count = {"nothing": 0, "half": len(by_size) // 2, "everything": len(by_size)}[plan.recompute]
        self._recomputed = set(by_size[:count])
        for module in self._denoiser.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = count > 0  # pyright: ignore
                module._gradient_checkpointing_func = self._run  # pyright: ignore
        if plan.weights == "8 bits":
            narrow_weights(self._denoiser)
        self._offload.take({"nothing": [], "half": self._blocks[::2], "everything": self._blocks}[plan.offload])
        for tensor in self.resident():
            if tensor.device != self._device:
                tensor.data = tensor.data.to(self._device)
        self.plan = plan

    def resident(self) -> list[Tensor]:
        """The tensors of the denoiser that stay on the device between two steps."""
        at_home = set(self._offload.parameters())
        return [t for t in [*self._denoiser.parameters(), *self._denoiser.buffers()] if t not in at_home]

    def _run(self, block: Any, *inputs: Any) -> Any:
        """Runs a block, with recomputation if the plan says so. diffusers calls every block that can be recomputed by it."""
        if block in self._recomputed:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class BlockOffload:
    """Keeps the frozen weights of blocks in the computer's memory, and on the device only while their block runs.

    While a block runs, the weights of the next one are copied, in the order of the last pass. The blocks must also be
    recomputed, since the backward pass would otherwise keep their weights on the device.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._home: dict[nn.Module, dict[tuple[nn.Module, str], nn.Parameter]] = {}
        self._coming: tuple[nn.Module, list[Tensor]] | None = None
        self._visited: tuple[nn.Module | None, nn.Module | None] = (None, None)
        self._following: dict[tuple[nn.Module | None, nn.Module | None], nn.Module] = {}

    def take(self, blocks: Sequence[nn.Module]) -> None:
        """Starts to offload those of the blocks that are not offloaded yet."""
        if blocks and self._stream is None and self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
        self._following.clear()
        self._coming, self._visited = None, (None, None)
        for block in blocks:
            if block in self._home:
                continue
            self._home[block] = {
                (module, name): parameter
                for module in block.modules()
                for name, parameter in module._parameters.items()
                if parameter is not None and not parameter.requires_grad
            }
            for parameter in self._home[block].values():
                stored = parameter.data.cpu()
                parameter.data = stored.pin_memory() if self._device.type == "cuda" else stored
            block.register_forward_pre_hook(self._bring)
            block.register_forward_hook(self._take_away, always_call=True)

    def parameters(self) -> Iterable[nn.Parameter]:
        for parameters in self._home.values():
            yield from parameters.values()

    def _start(self, block: nn.Module) -> list[Tensor]:
        with torch.cuda.stream(self._stream) if self._stream else torch.no_grad():
            return [p.detach().to(self._device, non_blocking=True, copy=True) for p in self._home[block].values()]

    def _bring(self, block: nn.Module, _: object) -> None:
        tensors = self._coming[1] if self._coming and self._coming[0] is block else self._start(block)
        if self._stream:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in tensors:
                tensor.record_stream(current)
        for (module, name), tensor in zip(self._home[block], tensors, strict=True):
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        # The next block depends on the block before, since the backward pass goes through the blocks in reverse.
        self._following[self._visited] = block
        self._visited = (self._visited[1], block)
        following = self._following.get(self._visited)
        self._coming = (following, self._start(following)) if following else None

    def _take_away(self, block: nn.Module, *_: object) -> None:
        for (module, name), parameter in self._home[block].items():
            module._parameters[name] = parameter


# --- finding out what it needs ---


class MemoryCount(TorchDispatchMode):
    """A context that counts the bytes of all tensors made in it while they are alive; `peak` is the most at a time."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def leave_out(self, tensor: Tensor) -> None:
        """Does not count a tensor, made before, when an operation returns it."""
        self._seen.add(tensor.untyped_storage()._cdata)

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._seen:
            return
        self._seen.add(place)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self._seen.discard(place)
            self.live -= size

        weakref.finalize(storage, gone)


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the tensors, where memory that several share counts once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
