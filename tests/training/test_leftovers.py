"""A run that is over is gone at once. Python's garbage collector does not know of a GPU's memory, and comes late."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

import core.models.quantised_layers as quantised_layers
from core.config import TrainConfig
from core.device import release_memory
from core.models.memory_plan import PLANS
from core.pictures.drawing_model import load_denoiser
from core.training.inputs import TrainingInputs
from core.training.methods import METHODS
from core.training.step import Run
from core.training.training_adapter import TrainingAdapter
from tests.tooling import SMALL_FLOWS, UNETS, cache_of, mostly_slow, random_lora, small_flow_base

CPU = torch.device("cpu")
CONFIG = TrainConfig(rank=2, batch_size=1, precision="fp32")


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def left_of(base, config=CONFIG, plan=PLANS[0], adapted=False, end=lambda: None) -> list[str]:
    """The modules and parameters of a denoiser that are there after two steps, the end of its run, and `end`."""
    cache = cache_of(base)
    adapter = TrainingAdapter.open(random_lora(base), base) if adapted else None
    run = Run(TrainingInputs.on(CPU, cache, base, config, adapter=adapter), check_cancelled=lambda: None, plan=plan)
    run.train_step()
    run.train_step()
    seen = [
        *((name, weakref.ref(module)) for name, module in run.model.denoiser.named_modules()),
        *((name, weakref.ref(parameter)) for name, parameter in run.model.denoiser.named_parameters()),
    ]
    del run, cache, adapter
    end()
    return [name for name, reference in seen if reference() is not None]


def base_of(family: str, bases):
    return bases[family] if family in UNETS else small_flow_base(family)


@pytest.mark.parametrize("plan", [PLANS[0], PLANS[1], PLANS[-1]], ids=["fastest", "selective", "smallest"])
@pytest.mark.parametrize("family", mostly_slow([*UNETS, *SMALL_FLOWS], "sd15", "flux1"))
def test_nothing_of_a_run_is_left(family, plan, bases, no_collector, monkeypatch):
    monkeypatch.setattr(quantised_layers, "SMALLEST", 1)
    left = left_of(base_of(family, bases), plan=plan)
    assert left == (["pos_embed"] if family == "qwen-image" else [])  # which a cache of diffusers keeps


@pytest.mark.parametrize("method", [name for name in METHODS if name != "textual-inversion"])
def test_nothing_is_left_of_a_run_by_any_method(method, bases, no_collector):
    assert left_of(bases["sd15"], replace(CONFIG, method=method)) == []


def test_nothing_is_left_of_a_run_with_a_training_adapter(bases, no_collector):
    assert left_of(bases["sd15"], adapted=True) == []


@pytest.mark.slow
def test_nothing_is_left_of_a_compiled_run(no_collector):
    """What torch keeps of tracing the blocks goes with `release_memory`, which ends a training."""
    assert left_of(small_flow_base("flux1"), replace(CONFIG, compile=True), end=release_memory) == []


@pytest.mark.parametrize("family", mostly_slow([*UNETS, *SMALL_FLOWS], "flux1"))
def test_nothing_of_a_denoiser_that_has_drawn_is_left(family, bases, no_collector):
    base = base_of(family, bases)
    denoiser, memory = load_denoiser(base, CPU, torch.float32)
    memory.adopt(replace(memory.plan, offload=1))
    left = [weakref.ref(parameter) for parameter in denoiser.parameters()]
    del denoiser, memory
    assert not any(reference() is not None for reference in left)
