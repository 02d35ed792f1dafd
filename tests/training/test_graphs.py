"""core/training/graphs.py: passes by graphs train what plain ones do, on a CPU bit for bit, and are a choice that can fail."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from core.config import TrainConfig
from core.models.memory_plan import PLANS, MemoryPlan
from core.training.callbacks import Callbacks
from core.training.graphs import why_no_graphs
from core.training.loop import train_lora
from core.training.methods.lycoris import LycorisAdapter
from core.training.step import Run
from core.training.training_adapter import TrainingAdapter
from tests.tooling import SMALL_FLOWS, UNETS, encoded_cache, encoded_image, mostly_slow, random_lora, small_flow_base
from tests.training.graph_tape import Tape, taped_graphs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = TrainConfig(rank=2, steps=4, learning_rate=1e-2, precision="fp32", batch_size=1)
EVERYTHING = replace(CONFIG, prior_prediction=0.5, class_images=1, accumulation=2, ema_decay=0.9, caption_dropout=0.3)


def cached(base, *sizes: tuple[int, int], masked: bool = False):
    """Photos of these sizes in latents."""
    images = []
    for number, size in enumerate(sizes):
        shape = (base.latent_shape.channels, *size)
        mask = torch.rand(1, *size, generator=torch.Generator().manual_seed(number)) if masked else None
        images.append(
            replace(encoded_image(base, f"{number}.png", "a photo of sks person", number, shape=shape), mask=mask)
        )
    return encoded_cache(base, images)


def with_class_picture(cache):
    return replace(cache, images=(*cache.images, replace(cache.images[0], is_class=True, name="class.png")))


@pytest.fixture(scope="module")
def base():
    return small_flow_base("flux1")


@pytest.fixture(scope="module")
def cache(base):
    return cached(base, (8, 8), (8, 12))


def trained(cache, base, config: TrainConfig, **more: Any) -> tuple[Run, list[str], list[Tape]]:
    """A run after its steps by graphs, what it has warned of, and the graphs."""
    warnings: list[str] = []
    with taped_graphs() as tapes:
        run = Run(cache, base, replace(config, cuda_graphs=True), CPU, on_warning=warnings.append, **more)
        _without_draws(run)
        for _ in range(config.steps):
            run.update(run.accumulate_within_memory(warnings.append))
    return run, warnings, tapes


def _without_draws(run: Run) -> None:
    """Has peft's layers draw no number on the CPU to be dropped by, which a tape could not tell from one of the device."""
    if isinstance(run.adapter, LycorisAdapter):
        for layer in run.adapter.layers.values():
            layer.eval()


def check_as_without(run: Run, cache, base, config: TrainConfig, **more: Any) -> None:
    """The same steps without graphs come to the same numbers."""
    plain = Run(cache, base, config, CPU, **more)
    for _ in range(config.steps):
        plain.train_step()
    assert torch.equal(run.loss, plain.loss)
    for name, parameter in plain.parameters.items():
        assert torch.equal(run.parameters[name], parameter), name
    assert all(torch.equal(value, (run.average or {})[name]) for name, value in (plain.average or {}).items())


@pytest.mark.parametrize("family", mostly_slow([*SMALL_FLOWS], "flux1"))
def test_each_family_trains_by_graphs_what_it_trains_without(family):
    base = small_flow_base(family)
    cache = with_class_picture(cached(base, (8, 8), (8, 12), masked=True))
    run, warnings, tapes = trained(cache, base, EVERYTHING)
    assert not warnings and sum(tape.replays for tape in tapes) >= 2 * EVERYTHING.steps * EVERYTHING.accumulation
    check_as_without(run, cache, base, EVERYTHING)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("family", [*UNETS, "zimage"])
def test_each_method_trains_by_graphs_what_it_trains_without(family, method, bases):
    """In 16 bits, with autocast but for lora, and with blocks recomputed."""
    base = bases[family] if family in UNETS else small_flow_base(family)
    cache = with_class_picture(cached(base, (8, 8), (8, 12)))
    config = replace(EVERYTHING, method=method, precision="bf16")
    run, warnings, _ = trained(cache, base, config, plan=PLANS[2])
    assert not warnings
    check_as_without(run, cache, base, config, plan=PLANS[2])


def test_a_training_adapter_is_in_the_graphs(base, cache):
    adapter = TrainingAdapter.open(random_lora(base), base)
    run, warnings, _ = trained(cache, base, CONFIG, training_adapter=adapter)
    assert not warnings
    check_as_without(run, cache, base, CONFIG, training_adapter=adapter)


def test_a_shape_that_has_been_compared_is_captured_once_more_when_another_one_has_come(base, cache):
    """Since its memory was given back for the other's pass as it is."""
    _, _, tapes = trained(cache, base, replace(CONFIG, steps=8))
    assert len(tapes) == 3 and sum(tape.replays for tape in tapes) == 8


WITHOUT = "cuda_graphs: not possible here ({}); the training goes on without"


def fail_in_capture(monkeypatch, error: Exception) -> None:
    """Has what is captured fail."""
    make = Run._make

    def make_or_fail(run: Run, inputs: Any) -> torch.Tensor:
        if run.graphs and run.graphs.capturing:
            raise error
        return make(run, inputs)

    monkeypatch.setattr(Run, "_make", make_or_fail)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nand more"),
         "operation not permitted when stream is capturing"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 bytes"), "out of memory"),
    ],
)  # fmt: skip
def test_where_a_pass_cannot_be_captured_the_training_goes_on_without(error, reason, base, cache, monkeypatch):
    fail_in_capture(monkeypatch, error)
    run, warnings, _ = trained(cache, base, EVERYTHING)
    assert warnings == [WITHOUT.format(reason)] and run.graphs is None
    monkeypatch.undo()
    check_as_without(run, cache, base, EVERYTHING)


@pytest.mark.parametrize("number", [0, 1])
def test_a_graph_that_computes_something_else_is_not_used(number, base, cache, monkeypatch):
    """The first of a run, or that of another shape, when gradients of a pass before are there already."""
    made = []
    replay = Tape.replay

    def replay_or_not(tape: Tape) -> None:
        if tape not in made:
            made.append(tape)
        if tape is not made[min(number, len(made) - 1)]:
            replay(tape)

    monkeypatch.setattr(Tape, "replay", replay_or_not)
    run, warnings, _ = trained(cache, base, EVERYTHING)
    assert warnings == [WITHOUT.format("a pass differs by more than 2% from what it is without")]
    check_as_without(run, cache, base, EVERYTHING)


def test_a_graph_that_moves_a_gradient_is_not_used(base, cache, monkeypatch):
    make = Run._make

    def make_elsewhere(run: Run, inputs: Any) -> torch.Tensor:
        loss = make(run, inputs)
        if run.graphs and run.graphs.capturing:
            parameter = next(iter(run.parameters.values()))
            parameter.grad = torch.zeros_like(parameter)
        return loss

    monkeypatch.setattr(Run, "_make", make_elsewhere)
    run, warnings, _ = trained(cache, base, CONFIG)
    assert warnings == [WITHOUT.format("a gradient is not where it was")]
    check_as_without(run, cache, base, CONFIG)


def test_a_pass_that_overflows_is_not_compared(base, cache, monkeypatch):
    """In float16 the first passes may, until the scale of the loss is found."""
    make, passes = Run._make, []

    def make_or_overflow(run: Run, inputs: Any) -> torch.Tensor:
        loss = make(run, inputs)
        passes.append(inputs)
        if len(passes) == 1:
            next(iter(run.parameters.values())).grad.fill_(torch.inf)  # pyright: ignore
        return loss

    monkeypatch.setattr(Run, "_make", make_or_overflow)
    with taped_graphs() as tapes:
        run = Run(cached(base, (8, 8)), base, replace(CONFIG, cuda_graphs=True), CPU)
        run.accumulate()
        assert not tapes and not torch.isfinite(next(iter(run.parameters.values())).grad).all()  # pyright: ignore
        run.accumulate()
        assert len(tapes) == 1 and run.graphs


def test_out_of_memory_in_a_pass_leads_to_the_next_plan_by_graphs(base, cache, monkeypatch):
    predict = Run._predict

    def fail_or_predict(run: Run, noisy_latents: torch.Tensor, *inputs: Any) -> torch.Tensor:
        if noisy_latents.shape[3] == 12 and not run.memory.plan.recompute:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(run, noisy_latents, *inputs)

    monkeypatch.setattr(Run, "_predict", fail_or_predict)
    run, warnings, tapes = trained(cache, base, CONFIG)
    assert len(warnings) == 1 and warnings[0].endswith(f"done again with {PLANS[1]}")
    assert run.graphs and tapes[-1].replays
    monkeypatch.undo()
    check_as_without(run, cache, base, CONFIG)


def test_a_plan_that_brings_blocks_in_ends_the_graphs(base, cache):
    warnings: list[str] = []
    with taped_graphs():
        run = Run(cache, base, replace(CONFIG, cuda_graphs=True), CPU, on_warning=warnings.append)
        run.train_step()
        run.plans = (PLANS[0], MemoryPlan(1.0, "full", 1.0))
        run._save_memory("a step", lambda _: None)
    assert run.graphs is None and warnings == [WITHOUT.format("the memory plan brings blocks in one by one")]


@pytest.mark.parametrize(
    ("settings", "plan", "reason"),
    [
        ({"dropout": 0.1}, PLANS[0], "dropout draws other numbers each time"),
        ({"text_encoder_lr": 1e-4}, PLANS[0], "text encoders are trained"),
        ({"method": "pivotal"}, PLANS[0], "text encoders are trained"),
        ({"method": "oft"}, PLANS[0], "method 'oft' has no passes that can be captured"),
        ({"method": "dreambooth"}, PLANS[0], "method 'dreambooth' has no passes that can be captured"),
        ({}, PLANS[-1], "the memory plan brings blocks in one by one"),
        ({}, PLANS[2], None),
    ],
)
def test_graphs_are_only_for_what_they_can_be_right_for(settings, plan, reason):
    assert why_no_graphs(CUDA, TrainConfig(**settings), plan) == reason


def test_captions_of_different_lengths_in_a_batch_end_the_graphs(monkeypatch):
    base = small_flow_base("qwen-image")
    cache = cached(base, (8, 8), (8, 8))
    run, warnings, _ = trained(cache, base, replace(CONFIG, batch_size=2))
    assert not warnings
    inputs = next(run.passes(0))
    mask = inputs.conditioning["context_mask"].clone()
    mask[0, -1] = 0
    padded = replace(inputs, conditioning={**inputs.conditioning, "context_mask": mask})
    assert padded.is_padded() and not inputs.is_padded()
    monkeypatch.setattr(Run, "passes", lambda run, number: iter([padded if number == 1 else inputs]))
    _, warnings, _ = trained(cache, base, replace(CONFIG, batch_size=2))
    assert warnings == [WITHOUT.format("captions of different lengths are padded in a batch")]


def test_without_a_gpu_one_line_says_so(base, cache):
    warnings: list[str] = []
    config = replace(CONFIG, steps=1, cuda_graphs=True)
    lora = train_lora(cache, base, config, device=CPU, callbacks=Callbacks(on_warning=warnings.append))
    assert lora.modules()  # pyright: ignore
    assert warnings == [WITHOUT.format("they are for a CUDA GPU")]


def test_a_training_is_cancelled_between_two_passes_and_not_in_a_capture(base, cache, monkeypatch):
    asked: list[bool] = []
    with taped_graphs():
        run = Run(
            cache, base, replace(CONFIG, cuda_graphs=True), CPU, check_cancelled=lambda: asked.append(capturing())
        )

        def capturing() -> bool:
            return run.graphs is not None and run.graphs.capturing

        for _ in range(4):
            run.train_step()
        assert asked and not any(asked)
        asked.clear()
        run.train_step()
        assert len(asked) == 1
