"""What the table of optimizers states about each one is true of the optimizer that is built."""

import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from core.config import OPTIMIZERS, TrainConfig
from core.doctor import OPTIONAL
from core.errors import BadConfig, MissingPackage
from core.models.memory_plan import MemoryPlan
from core.training.inputs import TrainingInputs
from core.training.metadata import training_metadata
from core.training.methods import peak_rate
from core.training.optimizer import build_optimizer
from tests.test_readme import ROOT
from tests.tooling import started_run

PLAIN = TrainConfig(rank=2, precision="fp32")
SIDE = 256
"""Of a matrix that is large enough for an 8-bit optimizer, which keeps the state of small ones in 32 bits."""


class OneMatrix:
    """An adapter with one parameter."""

    def __init__(self) -> None:
        self.parameter = torch.nn.Parameter(torch.ones(SIDE, SIDE))

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"denoiser.matrix": self.parameter}

    def rate(self, name: str, config: TrainConfig, peak: float) -> float:
        return peak


def built(name: str, weight_decay: float = 0.01) -> tuple[OneMatrix, torch.optim.Optimizer]:
    adapter, config = OneMatrix(), replace(PLAIN, weight_decay=weight_decay)
    try:
        return adapter, build_optimizer(adapter, replace(config, optimizer=name))  # pyright: ignore[reportArgumentType]
    except MissingPackage:
        pytest.skip(f"{OPTIMIZERS[name].package} is not installed")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizers_state_has_the_stated_bytes_for_each_trained_number(name):
    adapter, optimizer = built(name)
    adapter.parameter.grad = torch.ones(SIDE, SIDE)
    optimizer.step()
    state = optimizer.state[adapter.parameter].values()
    size = sum(one.numel() * one.element_size() for one in state if isinstance(one, Tensor))
    # Besides, there are rows and columns, a scale for each block, or tables.
    assert size / SIDE**2 == pytest.approx(OPTIMIZERS[name].state_bytes, abs=0.1)
    assert not torch.equal(adapter.parameter, torch.ones(SIDE, SIDE))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_decoupled(name):
    """Without a gradient, a step of 1e-4 takes that share of half the weight. Coupled, Adam would take it all: 0.9999."""
    adapter, optimizer = built(name, weight_decay=0.5)
    adapter.parameter.grad = torch.zeros(SIDE, SIDE)
    optimizer.step()
    assert 0.99994 < adapter.parameter.mean().item() <= 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_named_in_the_metadata_by_its_class(name, bases, caches):
    _, optimizer = built(name)
    inputs = TrainingInputs.on(torch.device("cpu"), caches["sd15"], bases["sd15"], replace(PLAIN, optimizer=name))
    metadata = training_metadata(
        inputs,
        steps=1,
        started_at=time.time(),
        plan=MemoryPlan(),
        weights_quantised=False,
        products_in_eight_bits=False,
    )
    assert metadata["ss_optimizer"] == f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.package])
def test_a_missing_optimizer_package_is_named_with_the_command(name, bases, caches, monkeypatch):
    package = OPTIMIZERS[name].package or ""
    for module in [module for module in sys.modules if module.split(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackage, match=f"pip install {package}"):
        started_run(caches["sd15"], bases["sd15"], replace(PLAIN, optimizer=name))
    assert OPTIONAL[package] == f"the optimizer {name}"
    assert f'"{package}>=' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_an_optimizer_that_finds_its_rate_has_the_configured_one_as_a_factor(name):
    config = replace(PLAIN, optimizer=name)
    assert (peak_rate(config) == 1.0) == OPTIMIZERS[name].finds_rate
    if OPTIMIZERS[name].finds_rate:
        with pytest.raises(BadConfig, match=f"{name} finds the rate"):
            replace(config, learning_rate=1e-4)
