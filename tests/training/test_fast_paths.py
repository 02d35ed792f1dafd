"""Every fast path trains what the plain one does."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from core.config import TrainConfig
from core.models.base import Base, load_base
from core.training.methods.lora import LoraAdapter
from core.training.methods.lora_layer import LoraLayer
from core.training.methods.method import Adapter
from core.training.step import Run
from tests.tooling import UNETS, assert_trained_alike, encoded_cache, encoded_image, mostly_slow

CPU = torch.device("cpu")
STEPS = 10
CONFIG = TrainConfig(rank=4, learning_rate=1e-3, batch_size=2, precision="fp32", gradient_checkpointing="off")
Path = Callable[[Base], Run]


def cache_of(base: Base, side: int = 16):
    shape = (4, side, side)
    images = [encoded_image(base, f"{seed}.png", "a photo of sks person", seed, shape=shape) for seed in range(4)]
    return encoded_cache(base, images)


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
        return after_steps(Run(cache_of(base), base, CONFIG, CPU))


def after_steps(run: Run, steps: int = STEPS) -> Run:
    for _ in range(steps):
        run.train_step()
    return run


def assert_runs_alike(run: Run, plain: Run) -> None:
    assert run.loss.item() == pytest.approx(plain.loss.item(), rel=1e-4)
    assert all(parameter.norm() > 0 for parameter in plain.parameters.values())
    assert_trained_alike(run.parameters, plain.parameters)


def test_the_fused_layer(base, plain):
    assert_runs_alike(after_steps(Run(cache_of(base), base, CONFIG, CPU)), plain)


@pytest.mark.slow
def test_matrices_cast_once_a_step(base, monkeypatch):
    """In half precision, with two passes a step, one of them with the adapter off: tensor for tensor the same.

    What is cast for a step is gone in the next one: three show it, and a CPU is slow in half precision.
    """
    config = replace(CONFIG, precision="bf16", prior_prediction=1.0, accumulation=2, batch_size=1)
    once = after_steps(Run(cache_of(base, 8), base, config, CPU), 3)
    layers = [module for module in once.denoiser.modules() if isinstance(module, LoraLayer)]
    assert all(layer.cast is None for layer in layers)
    with once.fast():
        assert all(layer.cast and torch.equal(layer.cast[1], layer.up.bfloat16()) for layer in layers)
    monkeypatch.setattr(LoraAdapter, "cast_once", Adapter.cast_once)
    each_time = after_steps(Run(cache_of(base, 8), base, config, CPU), 3)
    assert all(torch.equal(once.parameters[name], value) for name, value in each_time.parameters.items())


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
    run = Run(cache_of(base), base, CONFIG, CPU)
    run.train_step()
    with Waits() as waits:
        run.train_step()
        assert waits.found == []
        float(run.loss)
    assert len(waits.found) == 1
