"""Count the memory of blocks that are alike only once.

A large network has many blocks of few kinds, and executing a step on torch's fake tensors is slow. So only the first block of
each kind is executed. The others are replaced by stand-ins: modules with few tensors that take the same memory. Each call of a
block creates tensors of the measured sizes. So everything around the blocks (recomputation, offloading, the optimizer) works
and is counted as in a real step.
"""

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import BoundArguments, signature
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .memory_plan import MemoryCount, allocated, blocks_of
from .selective import KeepingMode, is_kept


class StandIn(nn.Module):
    """A stand-in for a block that is like another one."""

    def __init__(self, like: nn.Module):
        super().__init__()
        # The tuple hides it from torch, which would otherwise treat it as a submodule.
        self.like: tuple[nn.Module] = (like,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.like[0], name)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return those of the other block, by which blocks are ordered."""
        return self.like[0].parameters(recurse)


def put_stand_ins(network: nn.Module, marks: Callable[[str], object]) -> None:
    """Replace all but the first of each kind of block by stand-ins.

    `marks` returns, for a module's path, whatever may make it differ from others later.
    """
    paths = {module: path for path, module in network.named_modules()}
    firsts: dict[object, nn.Module] = {}
    for block in blocks_of(network):
        kind = tuple((marks(paths[module]), _structure(path, module)) for path, module in block.named_modules())
        first = firsts.setdefault(kind, block)
        if first is not block:
            network.set_submodule(paths[block], StandIn(first))


class AlikeBlocks:
    """The blocks of a network. Those without stand-ins are executed once."""

    def __init__(self, network: nn.Module, copies: Mapping[tuple[nn.Parameter, ...], Tensor]):
        """`copies` are the tensors that passes use instead of some of the trained parameters."""
        self.count: MemoryCount
        self.copied: list[nn.Parameter] = []
        """The parameters of stand-ins that must be copied in the same way."""
        self.trained: list[nn.Parameter] = []
        """All trained parameters of stand-ins."""
        self._copies = copies
        self._kinds: dict[object, _Kind] = {}
        self._way = ""
        self._leaves: dict[nn.Module, list[Tensor]] = {}
        self._staying: dict[nn.Module, Tensor] = {}
        self._stand_ins: list[StandIn] = []
        for block in blocks_of(network):
            like = block
            if isinstance(block, StandIn):
                like = block.like[0]
                self._stand_ins.append(block)
                self._train(block)
            block.forward = partial(self._forward, block, like, type(like).forward.__get__(like))
        self.fill()

    def _train(self, block: StandIn) -> None:
        """Give a stand-in as many trainable numbers as the other block has, with and without a copy."""
        copied = {parameter for stack in self._copies for parameter in stack}
        trained = [parameter for parameter in block.like[0].parameters() if parameter.requires_grad]
        for name, some in (("plain", set(trained) - copied), ("copied", set(trained) & copied)):
            if some:
                parameter = nn.Parameter(trained[0].new_empty(sum(map(torch.numel, some))))
                block.register_parameter(name, parameter)
                self.trained.append(parameter)
                if name == "copied":
                    self.copied.append(parameter)

    def fill(self) -> None:
        """Give the stand-ins frozen weights of the size that the other blocks' have now."""
        self._kinds.clear()
        for block in self._stand_ins:
            sizes: Counter[tuple[torch.dtype, torch.device]] = Counter()
            for parameter in block.like[0].parameters():
                if not parameter.requires_grad:
                    sizes[parameter.dtype, parameter.device] += allocated(parameter.nbytes, parameter.device)
            for name in [name for name, parameter in block.named_parameters() if not parameter.requires_grad]:
                del block._parameters[name]
            for number, ((dtype, device), size) in enumerate(sizes.items()):
                weights = torch.empty(size // dtype.itemsize, dtype=dtype, device=device)
                block.register_parameter(f"weights_{number}", nn.Parameter(weights, requires_grad=False))

    def begin(self, count: MemoryCount, way: str = "") -> None:
        """Begin to count steps. Blocks are executed once for each `way` in which they compute."""
        self.count, self._way = count, way
        self._staying.clear()

    def _forward(
        self, block: nn.Module, like: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        call = signature(forward).bind(*args, **kwargs)  # an argument may be passed by position or by name
        call.apply_defaults()
        given, spec = tree_flatten(call.arguments)
        key = like, self._way, torch.is_grad_enabled(), str(spec), tuple(map(_outline, given))
        if key not in self._kinds:
            self._kinds[key] = self._measured(forward, call, self._leaves_of(like))
            self._staying[like] = torch.empty(0)
        kind = self._kinds[key]
        if block not in self._staying:
            self._staying[block] = torch.empty(kind.stays, dtype=torch.uint8, device=self.count.device)
        tensors = [value for value in given if isinstance(value, Tensor)]
        outputs = iter(_Block.apply(self.count, kind, *tensors, *self._leaves_of(block)))
        with self.count.known(kind.forward):
            pass  # counted on top of what is kept, which is nothing if the block is recomputed
        results = [next(outputs) if isinstance(value, _Layout) else value for value in kind.results]
        return tree_unflatten(results, kind.spec)

    def _leaves_of(self, block: nn.Module) -> list[Tensor]:
        """Return the tensors in a block that get gradients: its trained parameters, or their copies."""
        if block not in self._leaves:
            trained = dict.fromkeys(p for p in nn.Module.parameters(block) if p.requires_grad)
            copies = {stack: copy for stack, copy in self._copies.items() if stack[0] in trained}
            copied = {parameter for stack in copies for parameter in stack}
            self._leaves[block] = [*(parameter for parameter in trained if parameter not in copied), *copies.values()]
        return self._leaves[block]

    def _measured(self, forward: Callable[..., Any], call: BoundArguments, leaves: Sequence[Tensor]) -> "_Kind":
        """Measure a call of a block in a forward and a backward pass."""
        count = self.count
        given, spec = tree_flatten(call.arguments)
        layouts = [_Layout.of(value) for value in given if isinstance(value, Tensor)]
        kind = _Kind(layouts, [None] * len(layouts))

        packed: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        products = _Products(count)

        def pack(tensor: Tensor) -> Tensor:
            kind.again = count.peak - start
            kind.again_beside_products = products.peak_again - start
            packed[_address(tensor)] = kept = tensor.detach()
            return kept

        unpacked_at: list[int] = []

        def unpack(tensor: Tensor) -> Tensor:
            unpacked_at.append(count.live)
            return tensor

        with count.known(0), saved_tensors_hooks(pack, unpack), _without_cached_casts():
            before = count.live
            root = torch.empty(0, requires_grad=True)
            inputs = _Inputs.apply(kind, root)
            replaced = iter(inputs)
            given = [next(replaced) if isinstance(value, Tensor) else value for value in given]
            call.arguments = tree_unflatten(given, spec)
            start = count.live
            count.peak = start
            with products:
                results, kind.spec = tree_flatten(forward(*call.args, **call.kwargs))
            kind.forward = count.peak - count.live
            outputs = [value for value in results if isinstance(value, Tensor)]
            kind.results = [_Layout.of(value) if isinstance(value, Tensor) else value for value in results]
            end = _Outputs.apply(count, kind, *outputs)
            places = [list(map(_address, tensors)) for tensors in (inputs, outputs)]
            sizes = {_address(tensor): tensor.untyped_storage().nbytes() for tensor in (*inputs, *outputs)}
            del inputs, replaced, given, results, outputs
            call.arguments.clear()
            alive = {place: allocated(size, count.device) for place, size in sizes.items() if count.counts(place)}
            kind.kept_inputs, kind.kept_outputs = ([n for n, at in enumerate(some) if at in alive] for some in places)
            # Inputs without a gradient, such as rotary embeddings, are shared with other blocks and so outlive the pass.
            shared = [
                packed.get(place) for place, layout in zip(places[0], layouts, strict=True) if not layout.requires_grad
            ]
            kind.kept = count.live - before - sum(alive.values())
            kind.products, kind.kept_products = products.bytes_beside(sizes)
            kind.again -= count.live - before - sum(alive.get(place, 0) for place in set(places[0]))
            if end.requires_grad:
                torch.autograd.grad(end, [root, *leaves], torch.empty_like(end), allow_unused=True)
                # A recomputation begins when the first of the kept tensors is needed. The gradients computed until then are
                # also in memory. On a GPU, a separate thread computes gradients. It releases the last ones only when it gets
                # another task.
                other = torch.empty(0, device=count.device, requires_grad=True)
                torch.autograd.grad(other.clone(), [other], torch.empty_like(other))
                kind.backward += max(count.peak, kind.again + (unpacked_at or [0])[0])
            del end, shared
            kind.stays = count.live - before
            kind.kept -= kind.stays
            _, products_stay = products.bytes_beside(())
            kind.products -= products_stay
            kind.kept_products -= products_stay
        return kind


class _Layout(NamedTuple):
    """Everything about a tensor except its numbers."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "_Layout":
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)

    def made(self) -> Tensor:
        span = 1 + sum((length - 1) * step for length, step in zip(self.size, self.stride, strict=True))
        if span > math.prod(self.size):  # the tensor is part of a larger one, whose other parts are created too
            return torch.empty(self.size, dtype=self.dtype, device=self.device)
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


@dataclass
class _Kind:
    """What a block does with given inputs. Sizes are in bytes."""

    inputs: list[_Layout]
    gradients: list[_Layout | None]
    """The gradients of the inputs in the backward pass."""
    results: list[Any] = field(default_factory=list)
    """What the block returns, with layouts instead of tensors."""
    spec: Any = None
    """How the results are nested."""
    forward: int = 0
    """The peak in the forward pass, beyond what is in use after it."""
    again: int = 0
    """The same until the last tensor is kept for the backward pass, where a recomputation ends."""
    again_beside_products: int = 0
    """The peak of a selective recomputation beyond what is in use before it, which includes what was kept and not yet taken."""
    backward: int = 0
    """The peak in the backward pass and a recomputation, beyond what is in use before it."""
    kept: int = 0
    """What is kept for the backward pass, not counting inputs and outputs."""
    products: int = 0
    """What selective checkpointing keeps, not counting inputs and outputs."""
    kept_products: int = 0
    """The part of `kept` that is in `products`."""
    kept_inputs: list[int] = field(default_factory=list)
    kept_outputs: list[int] = field(default_factory=list)
    stays: int = 0
    """What the first call creates and no pass frees."""

    @property
    def outputs(self) -> list[_Layout]:
        return [value for value in self.results if isinstance(value, _Layout)]


class _Inputs(torch.autograd.Function):
    """New tensors like a block's inputs. Only the block refers to them."""

    @staticmethod
    def forward(ctx: Any, kind: _Kind, _: Tensor) -> tuple[Tensor, ...]:
        ctx.kind = kind
        return _made(ctx, kind.inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.kind.gradients = [None if gradient is None else _Layout.of(gradient) for gradient in gradients]
        return None, None


class _Outputs(torch.autograd.Function):
    """What follows a block. It gives all outputs their gradients at once, and then the block's backward pass begins."""

    @staticmethod
    def forward(ctx: Any, count: MemoryCount, kind: _Kind, *outputs: Tensor) -> Tensor:
        ctx.count, ctx.kind = count, kind
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        gradients = [layout.made() if layout.requires_grad else None for layout in ctx.kind.outputs]
        ctx.count.peak = ctx.count.live
        ctx.kind.backward = -ctx.count.live
        return None, None, *gradients


class _Block(torch.autograd.Function):
    """Allocate and free what a block would. The arguments are the inputs and the trained tensors."""

    @staticmethod
    def forward(ctx: Any, count: MemoryCount, kind: _Kind, *tensors: Tensor) -> tuple[Tensor, ...]:
        before = count.live
        with count.known(0):
            outputs = _made(ctx, kind.outputs)
            kept = torch.empty(kind.kept - kind.kept_products, dtype=torch.uint8, device=count.device)
            products = [_product(size, count) for size in (kind.kept_products, kind.products - kind.kept_products)]
        # A forward pass within a backward pass is a recomputation. If products aren't executed, all of what was kept is there
        # from the beginning.
        if torch._C._current_graph_task_id() != -1 and not products[0][1]:
            count.peak = max(count.peak, before + kind.again_beside_products)
        ctx.count, ctx.kind = count, kind
        ctx.leaves = [_Layout.of(leaf) for leaf in tensors[len(kind.inputs) :]]
        ctx.save_for_backward(
            kept, products[0][0], *(tensors[n] for n in kind.kept_inputs), *(outputs[n] for n in kind.kept_outputs)
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        kept = ctx.saved_tensors  # recomputes the block now, if it is to be recomputed
        with ctx.count.known(ctx.kind.backward):
            gradients = [layout and layout.made() for layout in (*ctx.kind.gradients, *ctx.leaves)]
        del kept
        return None, None, *gradients


def _product(size: int, count: MemoryCount) -> tuple[Tensor, bool]:
    """Allocate bytes by a product. Also return whether it was executed: a selective recomputation has kept it."""
    before, one = count.products, torch.empty(1, 1, dtype=torch.uint8, device=count.device)
    product = one.expand(max(size, 1), 1) @ one
    return product if size else one.new_empty(0), count.products > before


class _Products(KeepingMode):
    """Counts what selective checkpointing keeps of the operations in this context."""

    def __init__(self, count: MemoryCount):
        super().__init__()
        self.peak_again: int = count.live
        """The peak in a selective recomputation, not counting what was kept until it is taken. Then it may be freed."""
        self._count = count
        self._size = 0
        self._alive: WeakValueDictionary[int, torch.UntypedStorage] = WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_kept(func, args):
            self.keep(result)
        self.peak_again = max(self.peak_again, self._count.live - self._size)
        return result

    def keep(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self._count.device.type:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive[storage._cdata] = storage
                    self._size += allocated(storage.nbytes(), self._count.device)

    def bytes_beside(self, others: Container[int]) -> tuple[int, int]:
        """Return how many bytes it has counted and how many of them are in use, both without storages at these places."""
        alive = {place: allocated(one.nbytes(), self._count.device) for place, one in self._alive.items()}
        left_out = sum(size for place, size in alive.items() if place in others)
        return self._size - left_out, sum(alive.values()) - left_out


def _made(ctx: Any, layouts: Iterable[_Layout]) -> tuple[Tensor, ...]:
    """Create the outputs of an autograd function, with these layouts."""
    made = tuple(layout.made() for layout in layouts)
    ctx.mark_non_differentiable(*(t for t, layout in zip(made, layouts, strict=True) if not layout.requires_grad))
    ctx.set_materialize_grads(False)
    return made


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Keep autocast from caching cast weights in this context, since they would outlive a block's pass."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _structure(path: str, module: nn.Module) -> object:
    """Return a key for a module in a block. Modules with equal keys behave equally on inputs of the same layout."""
    values = {**vars(module), **module._parameters, **module._buffers}
    numbers = ("_id", "_idx", "_index")  # of blocks that store their own position in the network
    return path, type(module), *((n, _outline(value)) for n, value in values.items() if not n.endswith(numbers))


def _outline(value: Any) -> object:
    if isinstance(value, Tensor):
        return _Layout.of(value)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    if isinstance(value, tuple):
        return tuple(map(_outline, value))
    return type(value), len(value) if isinstance(value, dict | list | set) else 0
