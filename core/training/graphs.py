"""CUDA graphs of the passes of a step, so that the host asks a GPU for a pass by one launch instead of by thousands.

What a pass asks for, from the prediction to the gradients that it adds, is captured once for each shape of its inputs, and
with it the addresses that it reads and writes. So a graph has inputs of its own, into which those of each pass are copied, and
it adds to gradients that stay where they are. Everything random, and everything that the host decides, is outside of it.

The graphs share one pool of memory, in which nothing has to outlast a pass. It is given back for a pass of a new shape, which
is first made as it is and compared, for a sample, and for another memory plan, so that none of these needs more memory than
without graphs; a shape that has been compared is then captured anew when it comes again.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..device import is_out_of_memory, release_memory
from ..models.memory_plan import MemoryPlan
from ..models.spec import Conditioning
from .methods import METHODS, trains_text

TOLERANCE = 0.02
"""How far the loss and the gradient of a graph may be from those of the same pass without, as a share of their size.

A GPU adds up in another order each time, so even two equal passes in 16 bits differ by some thousandths."""


@dataclass(frozen=True, eq=False)
class Pass:
    """What the loss of one forward pass is computed from."""

    kind: Literal["pictures", "class pictures", "prior"]
    """Whether the loss is that on photos, on class pictures, or that of prior prediction."""
    latents: Tensor
    noise: Tensor
    noisy_latents: Tensor
    timesteps: Tensor
    conditioning: Conditioning
    masks: Tensor | None = None
    frozen_conditioning: Conditioning | None = None
    """What the frozen model makes of the captions, where that is another one: in prior prediction with trained text."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors on the device by name. (A `context_mask` is on the CPU, where it tells lengths of texts.)"""
        found = {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}
        return found | {name: value for name, value in self.conditioning.items() if name != "context_mask"}

    def shape(self) -> Hashable:
        """A key that is equal for passes of which one graph can serve."""
        return self.kind, tuple((name, value.shape, value.dtype) for name, value in self.tensors().items())

    def is_padded(self) -> bool:
        """Whether texts of different lengths are padded, so that the shapes do not tell how long they are."""
        mask = self.conditioning.get("context_mask")
        return mask is not None and not bool(mask.all())

    def copy(self) -> "Pass":
        """A pass with tensors of its own."""
        copies: dict[str, Any] = {name: value.clone() for name, value in self.tensors().items()}
        own = {name: copies[name] for name in copies if name not in self.conditioning}
        return replace(self, **own, conditioning={n: copies.get(n, value) for n, value in self.conditioning.items()})


class NotCaptured(Exception):
    """A pass cannot be made by a graph, for the reason that is its message."""


def why_no_graphs(device: torch.device, config: TrainConfig, plan: MemoryPlan) -> str | None:
    """The reason why passes of a run with these settings and this memory plan cannot be captured; None if they can."""
    reasons = {
        "they are for a CUDA GPU": device.type != "cuda",
        f"method {config.method!r} has no passes that can be captured": not METHODS[config.method].is_captured,
        "text encoders are trained": trains_text(config),
        "dropout draws other numbers each time": config.dropout > 0,
        "the memory plan brings blocks in one by one": plan.offload > 0,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


@dataclass(frozen=True)
class _Captured:
    """A graph, and the memory that it reads and writes beside the weights."""

    graph: torch.cuda.CUDAGraph
    inputs: Pass
    loss: Tensor
    gradients: Mapping[nn.Parameter, Tensor]

    def replay(self, inputs: Pass) -> Tensor:
        """The loss of a pass, in memory that the next pass overwrites."""
        torch._foreach_copy_(list(self.inputs.tensors().values()), list(inputs.tensors().values()))
        self.graph.replay()
        return self.loss


class PassGraphs:
    """Passes by graphs, one for each shape. A pass of a new shape is also made as it is, and compared."""

    def __init__(self, make: Callable[[Pass], Tensor], parameters: Iterable[nn.Parameter], device: torch.device):
        """Takes what makes a pass as it is: it returns the loss and adds its gradients to those of the parameters."""
        self.capturing: bool = False
        """Whether operations are being captured, so that nothing else may happen."""
        self._make, self._parameters, self._device = make, tuple(parameters), device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._graphs: dict[Hashable, _Captured] = {}
        self._alike: set[Hashable] = set()
        """The shapes that have been compared."""

    def make(self, inputs: Pass) -> Tensor:
        """The loss of a pass, with its gradients added to those of the parameters. Raises NotCaptured, after which the
        gradients are of no use."""
        if inputs.is_padded():
            raise NotCaptured("captions of different lengths are padded in a batch")
        shape = inputs.shape()
        if shape not in self._alike:
            return self._make_and_compare(inputs)
        if shape not in self._graphs:
            self._graphs[shape] = self._captured(inputs)
        return self._graphs[shape].replay(inputs)

    def clear_gradients(self) -> None:
        """Sets the gradients to 0 where they are."""
        if gradients := list(self._gradients().values()):
            torch._foreach_zero_(gradients)

    def release(self) -> None:
        """Gives the memory of all graphs back."""
        if self._pool is not None:
            self._graphs.clear()
            self._pool = None  # which is gone with its last graph
            release_memory()

    def _make_and_compare(self, inputs: Pass) -> Tensor:
        self.release()
        before = self._gradients()
        self._set_gradients({})
        # As torch advises, on the stream of the capture, which has its workspaces then.
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            loss = self._make(inputs)
        here.wait_stream(self._stream)
        plain = self._gradients()
        sums = {parameter: torch.zeros_like(gradient) for parameter, gradient in plain.items()} | before
        self._set_gradients(sums)
        found, expected = [sums[parameter] for parameter in plain], list(plain.values())
        size = _norm(expected)
        if not bool(size.isfinite()):  # as in float16 until the scale of the loss is found
            torch._foreach_add_(found, expected)
            return loss
        torch._foreach_add_(expected, found)
        captured = self._captured(inputs)
        replayed = captured.replay(inputs)
        torch._foreach_sub_(expected, found)
        alike = (_norm(expected) <= TOLERANCE * size) & ((replayed - loss).abs() <= TOLERANCE * loss.abs())
        if not bool(alike):
            raise NotCaptured(f"a pass differs by more than {TOLERANCE:.0%} from what it is without")
        self._alike.add(inputs.shape())
        self._graphs[inputs.shape()] = captured
        return replayed

    def _captured(self, inputs: Pass) -> _Captured:
        gradients, static, loss = self._gradients(), inputs.copy(), torch.zeros((), device=self._device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        failed = None
        self.capturing = True
        try:
            # The stream as it is, since torch.cuda.graph does not leave its own where the end of a capture fails.
            # "thread_local": other threads of the process, such as those of ComfyUI's server, may go on as they like.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, self._pool, self._stream, "thread_local"),
            ):
                loss.copy_(self._make(static))
        except Exception as error:  # of several classes, by torch, CUDA and the driver
            cause = error.__context__ or error  # where the end of the capture has failed too, what failed in it
            failed = "out of memory" if is_out_of_memory(cause) else str(cause).strip().partition("\n")[0]
            del cause
        finally:
            self.capturing = False
        # Outside the except clause, so that the error no longer keeps the pass's activations alive.
        if failed is None and any(parameter.grad is not gradients.get(parameter) for parameter in self._parameters):
            failed = "a gradient is not where it was"
        if failed is not None:
            raise NotCaptured(failed)
        return _Captured(graph, static, loss, gradients)

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        return {parameter: parameter.grad for parameter in self._parameters if parameter.grad is not None}

    def _set_gradients(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        for parameter in self._parameters:
            parameter.grad = gradients.get(parameter)


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors))).norm()
