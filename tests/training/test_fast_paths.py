"""Every fast path trains what the plain one does."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from core.config import TrainConfig
from core.models import Base, load_base
from core.training.drawing import Drawing
from core.training.inputs import TrainingInputs
from core.training.methods.lora import LoraAdapter
from core.training.methods.lora_layer import LoraLayer, SharedInput
from core.training.methods.method import Adapter
from core.training.step import Run
from tests.operation_count import count_operations
from tests.tooling import (
    SMALL_FLOWS,
    UNETS,
    assert_trained_alike,
    cache_of,
    mostly_slow,
    small_flow_base,
)

CPU = torch.device("cpu")
STEPS = 10
CONFIG = TrainConfig(rank=4, learning_rate=1e-3, batch_size=2, precision="fp32", gradient_checkpointing="off")
Path = Callable[[Base], Run]


def plain_forward(layer: LoraLayer, x: Tensor) -> Tensor:
    """LoRA as it is written down."""
    linear = F.linear if layer.up.ndim == 2 else F.conv2d
    return layer.base_layer(x) + layer.scale * linear(linear(x, layer.down), layer.up)


@pytest.fixture(scope="module", params=mostly_slow(UNETS, "sd15"))
def base(request, small_sd15, small_sdxl) -> Base:
    return load_base({"sd15": small_sd15, "sdxl": small_sdxl}[request.param])


@pytest.fixture(scope="module")
def plain(base) -> Run:
    """After STEPS steps without anything fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraLayer, "forward", plain_forward)
        return after_steps(Run(TrainingInputs.on(CPU, cache_of(base, 4), base, CONFIG)))


def after_steps(run: Run, steps: int = STEPS) -> Run:
    for _ in range(steps):
        run.train_step()
    return run


def assert_runs_alike(run: Run, plain: Run) -> None:
    assert run.loss.item() == pytest.approx(plain.loss.item(), rel=1e-4)
    assert all(parameter.norm() > 0 for parameter in plain.parameters.values())
    assert_trained_alike(run.parameters, plain.parameters)


def test_the_fused_layer(base, plain):
    assert_runs_alike(after_steps(Run(TrainingInputs.on(CPU, cache_of(base, 4), base, CONFIG))), plain)


@pytest.fixture(scope="module")
def flow() -> Base:
    """A network without convolutions, which a CPU computes fast in half precision. Some of its layers share an A."""
    return small_flow_base("flux1")


IN_BF16 = replace(CONFIG, precision="bf16", batch_size=1, accumulation=2)


def test_gradients_of_the_copies_in_half_precision_are_those_of_each_pass(flow, monkeypatch):
    """Tensor for tensor, summed up over two passes in float32."""
    once = Run(TrainingInputs.on(CPU, cache_of(flow, 4), flow, IN_BF16))
    once.accumulate()
    monkeypatch.setattr(LoraAdapter, "cast_once", Adapter.cast_once)
    each_time = Run(TrainingInputs.on(CPU, cache_of(flow, 4), flow, IN_BF16))
    each_time.accumulate()
    assert each_time.parameters
    for name, parameter in each_time.parameters.items():
        gradient = once.parameters[name].grad
        assert gradient is not None and gradient.dtype == torch.float32
        assert parameter.grad is not None and torch.equal(gradient, parameter.grad)


def test_an_interrupted_pass_leaves_nothing_for_the_next(flow):
    whole = Run(TrainingInputs.on(CPU, cache_of(flow, 4), flow, IN_BF16))
    whole.accumulate()
    calls = 0

    def cancel_once() -> None:
        nonlocal calls
        calls += 1
        if calls == 6:  # in the backward pass
            raise KeyboardInterrupt

    run = Run(TrainingInputs.on(CPU, cache_of(flow, 4), flow, IN_BF16), check_cancelled=cancel_once)
    with pytest.raises(KeyboardInterrupt):
        run.accumulate()
    run.accumulate()
    for name, parameter in whole.parameters.items():
        gradient = run.parameters[name].grad
        assert gradient is not None and parameter.grad is not None and torch.equal(gradient, parameter.grad)


def test_a_sample_is_drawn_with_matrices_that_are_cast_once(flow, monkeypatch):
    run = Run(TrainingInputs.on(CPU, cache_of(flow, 4), flow, IN_BF16))
    run.train_step()
    images, drawn, counts = run.examples.images[:1], [], []
    conditioning = run.examples.conditioning(images, [images[0].caption])

    def draw(*_: object) -> list[Image.Image]:
        def passes() -> None:
            for timestep in (900.0, 500.0):
                drawn.append(run.model.predict(images[0].mean[None], torch.tensor([timestep]), conditioning))

        with torch.no_grad():
            counts.append(count_operations(passes))
        return []

    Drawing(run).draw(draw, [], pytest.fail)
    monkeypatch.setattr(LoraAdapter, "cast_once", Adapter.cast_once)
    Drawing(run).draw(draw, [], pytest.fail)
    assert torch.equal(torch.stack(drawn[:2]), torch.stack(drawn[2:]))
    layers = [module for module in run.model.denoiser.modules() if isinstance(module, LoraLayer)]
    inputs = {layer.together for layer in layers}
    assert counts[1] - counts[0] >= 2 * (
        len(layers) + len(inputs)
    )  # in each pass every B, and at least one A of an input


def test_a_layer_asks_for_eight_operations_at_most(flow, monkeypatch):
    """Two products for its own weight, two for the change, and four for their gradients; the cast is for all layers."""
    run = Run(TrainingInputs.on(CPU, cache_of(flow, 4), flow, replace(IN_BF16, accumulation=1)))
    run.accumulate()
    with_adapter = count_operations(run.accumulate)
    layers = [module for module in run.model.denoiser.modules() if isinstance(module, LoraLayer)]

    def frozen(layer: LoraLayer, x: Tensor) -> Tensor:
        output = layer.base_layer(x)
        return output if output.requires_grad else output.requires_grad_()

    monkeypatch.setattr(LoraLayer, "forward", frozen)
    assert 4 * len(layers) < with_adapter - count_operations(run.accumulate) <= 6 * len(layers)


@pytest.mark.parametrize("family", mostly_slow((*UNETS, *SMALL_FLOWS), "sd15", "flux1"))
def test_layers_that_work_together_are_given_one_input(family, small_sd15, small_sdxl, monkeypatch):
    """Otherwise each of them would compute the outputs of all."""
    checkpoint = {"sd15": small_sd15, "sdxl": small_sdxl}.get(family)
    base = load_base(checkpoint) if checkpoint else small_flow_base(family)
    run = Run(TrainingInputs.on(CPU, cache_of(base, 4), base, replace(CONFIG, batch_size=1)))
    computed: list[SharedInput] = []
    outputs = SharedInput.outputs
    monkeypatch.setattr(SharedInput, "outputs", lambda shared, x: (computed.append(shared), outputs(shared, x))[1])
    run.accumulate()
    layers = [
        module for module in run.model.denoiser.modules() if isinstance(module, LoraLayer) and module.down.ndim == 2
    ]
    assert len(computed) == len({layer.together for layer in layers}) < 0.8 * len(layers)
    assert set(computed) == {layer.together for layer in layers}


class Waits(TorchDispatchMode):
    """The operations within it for which a GPU's host would have to wait."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(base):
    run = Run(TrainingInputs.on(CPU, cache_of(base, 4), base, CONFIG))
    run.train_step()
    with Waits() as waits:
        run.train_step()
        assert waits.found == []
        float(run.loss)
    assert len(waits.found) == 1
