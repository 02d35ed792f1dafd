"""core/models/compiled.py: compiled blocks train like plain ones, and are a choice that can fail."""

import threading
from dataclasses import replace
from functools import partial

import pytest
import torch

from core.config import TrainConfig
from core.models.compiled import CompiledBlocks
from core.training.callbacks import Callbacks
from core.training.inputs import TrainingInputs
from core.training.loop import train_lora
from core.training.step import Run
from tests.models.quantised_weights import quantised_and_full_base
from tests.tooling import encoded_cache, encoded_image, small_flow_base

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    rank=2, steps=20, learning_rate=1e-3, precision="fp32", gradient_checkpointing="off", prior_prediction=0.5
)


@pytest.fixture(scope="module")
def base():
    return small_flow_base("flux1")


@pytest.fixture(scope="module")
def cache(base):
    shape = (base.latent_shape.channels, 8, 12)
    return encoded_cache(base, [encoded_image(base, "0.png", "a photo of sks person", 0, shape=shape)])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["", "scaled fp8"])
def test_compiled_blocks_train_as_plain_ones_do(base, cache, form):
    base = quantised_and_full_base(form)[0] if form else base
    plain = Run(TrainingInputs.on(CPU, cache, base, CONFIG))
    compiled = Run(TrainingInputs.on(CPU, cache, base, replace(CONFIG, compile=True)), check_cancelled=lambda: None)
    assert compiled.model.why_not_compiled is None and compiled.model.fast_layers
    torch._dynamo.utils.counters.clear()
    for _ in range(CONFIG.steps):
        plain.train_step()
        compiled.train_step()
        torch.testing.assert_close(compiled.loss, plain.loss, rtol=1e-4, atol=0)
    # Compiled, a scaled weight need not be rounded to bf16 before it is used; the losses above say that no more differs.
    for name, parameter in plain.parameters.items() if not form else ():
        torch.testing.assert_close(compiled.parameters[name], parameter, rtol=1e-3, atol=1e-4)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["frames"]["ok"] == counters["frames"]["total"]


@pytest.mark.slow
def test_photos_of_many_shapes_are_compiled_a_few_times(base, monkeypatch):
    """The first shape for its own size, the second for sizes that vary. (Without a code generator, which takes minutes.)"""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    shapes = [(8, 8), (8, 12), (12, 8), (8, 16), (16, 8), (12, 16)]
    images = [
        encoded_image(
            base, f"{number}.png", "a photo of sks person", number, shape=(base.latent_shape.channels, *shape)
        )
        for number, shape in enumerate(shapes)
    ]
    run = Run(TrainingInputs.on(CPU, encoded_cache(base, images), base, replace(CONFIG, compile=True)))
    torch._dynamo.utils.counters.clear()
    for _ in range(12):
        run.train_step()
    # Two kinds of blocks, with the adapter on and off, for a fixed and for varying sizes: 9 graphs for these and for 11 shapes.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 12


def test_the_thread_of_the_backward_pass_compiles_as_many_forms(monkeypatch):
    """Autograd's thread on a GPU recomputes blocks. From torch 2.12 on, it doesn't see settings of another thread."""
    built = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda graph, _: built.append(1) or graph))

    class Block(torch.nn.Module):
        def forward(self, x, form):
            return x + len(form)

    block = Block()
    with CompiledBlocks([block]).in_use():
        thread = threading.Thread(target=lambda: [block(torch.ones(1), "x" * size) for size in range(1, 13)])
        thread.start()
        thread.join()
    assert len(built) == 12  # torch's own limit is 8


def test_pictures_are_drawn_with_the_blocks_as_they_are():
    """Their shapes and precision differ from those of the steps: compiling for them would take longer than it saves."""
    seen = []

    class Block(torch.nn.Module):
        def forward(self, x):
            seen.append(torch.compiler.is_compiling())
            return x

    block = Block()
    CompiledBlocks([block])
    block(torch.ones(1, 2))
    assert seen == [False]


def test_where_nothing_can_be_compiled_the_training_goes_on_without(base, cache, monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    warnings = []
    config = replace(CONFIG, steps=1, compile=True)
    lora = train_lora(cache, base, config, device=CPU, callbacks=Callbacks(on_warning=warnings.append))
    assert lora.modules()  # pyright: ignore
    assert warnings == ["compile: not possible here (no C++ compiler found). Training continues without it"]
