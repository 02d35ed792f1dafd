"""Products with 8-bit weights in 8 bits: their errors, what may use them, and when they are used."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import core.training.adapted_model as adapted_model
from core.config import TrainConfig
from core.models import products, quantised_layers
from core.models.memory_plan import MemoryPlan
from core.models.products import choose_products, has_int8_products
from core.models.quantised import dequantise_fp8
from core.models.quantised_layers import (
    FEWEST_ROWS,
    InEightBits,
    QuantisedLinear,
    linear,
    make_quantised,
    times,
    times_scale,
    to_int8,
)
from core.storage.stored import QuantisedTensor, as_stored
from core.training.callbacks import Callbacks
from core.training.inputs import TrainingInputs
from core.training.loop import train_lora
from core.training.metadata import PRODUCTS_KEY, WEIGHTS_KEY
from core.training.step import Run
from tests.models.quantised_weights import FORMS, quantised_and_full_base
from tests.tooling import SMALL_FLOWS, cache_of, mostly_slow

CPU, BF16 = torch.device("cpu"), torch.bfloat16
CONFIG = TrainConfig(rank=4, learning_rate=1e-3, precision="bf16", eight_bit_products="on")


def _int8_sums_overflow() -> bool:
    """Return whether torch's products of int8 are wrong on this processor, as without VNNI. They are then not used."""
    x = torch.randint(-127, 128, (32, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    return not torch.equal(torch._int_mm(x, x.t().contiguous()).double(), x.double() @ x.double().t())


pytestmark = pytest.mark.skipif(_int8_sums_overflow(), reason="this processor's products of int8 overflow")


def weights() -> dict[str, tuple]:
    """A weight (96, 64) in each form: how it is dequantised, and its parts."""
    wide = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)) / 8
    rows = wide.abs().amax(1, keepdim=True) / 448
    fp8 = torch.float8_e4m3fn
    return {
        "int8": (times_scale, to_int8(wide).parts),
        "fp8 with a scale for each row": (dequantise_fp8, ((wide / rows).to(fp8), rows)),
        "fp8 with one scale": (dequantise_fp8, ((wide / rows.max()).to(fp8), rows.max())),
        "fp8": (as_stored, (wide.to(fp8),)),
    }


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("form", weights())
def test_products_are_as_near_as_rounding_one_factor_allows(form, dtype):
    dequantise, parts = weights()[form]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 40, 64, generator=generator).to(dtype)
    gradient = torch.randn(2, 40, 96, generator=generator).to(dtype)
    bias, wide = torch.randn(96, generator=generator).to(dtype), dequantise(parts, torch.float32).double()
    marked = InEightBits(dequantise)
    # 8 bits of a number as far from the largest as these are: 0.7 %. e4m3 has 3 bits after the first: 2.7 %.
    most = 0.011 if form == "int8" else 0.04
    assert 0.002 < distance(linear(x, marked, parts, bias) - bias, x.double() @ wide.T) < most
    assert 0.002 < distance(times(gradient, marked, parts), gradient.double() @ wide) < most
    total = torch.ones_like(x).flatten(0, 1)
    added = times(gradient.flatten(0, 1), marked, parts, total)
    assert added is total and distance(total - 1, (gradient.double() @ wide).flatten(0, 1)) < most
    assert linear(x, marked, parts).dtype == times(gradient, marked, parts).dtype == dtype
    assert torch.equal(marked(parts, dtype), dequantise(parts, dtype))


@pytest.mark.parametrize("form", weights())
def test_each_row_is_rounded_alone_and_numbers_that_are_not_finite_stay_so(form):
    dequantise, parts = weights()[form]
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(3)).to(BF16)
    x[0], x[1], x[2] = 0, x[1] * 1000, x[2] / 1000
    y, plain = linear(x, InEightBits(dequantise), parts), linear(x, dequantise, parts)
    assert torch.equal(y[0], torch.zeros(96, dtype=BF16))
    assert all(distance(y[row], plain[row]) < 0.06 for row in range(1, 40))
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    y = linear(x, InEightBits(dequantise), parts)
    assert not y[3].isfinite().any() and not y[4].isfinite().any() and torch.equal(y[5:], y[5:].nan_to_num())


def test_results_in_the_range_of_fp16_are_finite_and_gradients_may_be_tiny():
    dequantise, parts = weights()["int8"]
    wide, marked = dequantise(parts, torch.float32).double(), InEightBits(dequantise)
    x = 3000 * torch.randn(40, 64, generator=torch.Generator().manual_seed(2)).half()
    assert distance(linear(x, marked, parts), x.double() @ wide.T) < 0.011
    for size in (1e-10, 1e-20):
        gradient = size * torch.randn(40, 96, generator=torch.Generator().manual_seed(3)).to(BF16)
        assert distance(times(gradient, marked, parts), gradient.double() @ wide) < 0.011


@pytest.mark.parametrize("rows", [17, 77, 2048])
def test_int8_matrices_have_the_layout_that_all_gpus_multiply(rows, monkeypatch):
    seen = []
    multiply = torch._int_mm

    def checked(left, right):
        seen.append((left.is_contiguous(), len(left) % 32, right.stride(0)))
        return multiply(left, right)

    monkeypatch.setattr(torch, "_int_mm", checked)
    dequantise, parts = weights()["int8"]
    assert linear(torch.randn(rows, 64), InEightBits(dequantise), parts).shape == (rows, 96)
    assert times(torch.randn(rows, 96), InEightBits(dequantise), parts).shape == (rows, 64)
    assert seen == [(True, 0, 1)] * 2


def test_products_in_8_bits_are_not_tried_where_they_end_the_process(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert has_int8_products(CPU, BF16)
    monkeypatch.setattr("sys.platform", "win32")
    assert not has_int8_products(CPU, BF16)


def test_fp8_products_on_windows_have_one_scale(monkeypatch):
    """torch builds those with a scale for each row for Linux only."""
    multiply = torch._scaled_mm

    def without_rows(left, right, of_rows, of_columns, **named):
        if of_rows.numel() > 1 or of_columns.numel() > 1:
            raise RuntimeError("Rowwise scaling is not supported")
        return multiply(left, right, of_rows, of_columns, **named)

    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr(torch, "_scaled_mm", without_rows)
    for form, (dequantise, parts) in weights().items():
        weight = QuantisedTensor(parts, dequantise, (96, 64))
        assert products.time_in_eight_bits([(weight, 40)], CPU, BF16) < float("inf"), form


def test_weights_are_not_rounded_for_products_that_the_device_lacks(monkeypatch):
    monkeypatch.setattr(quantised_layers, "SMALLEST", 1)
    monkeypatch.setattr("core.training.loop.has_int8_products", lambda *_: False)
    _, wide = quantised_and_full_base("fp8")
    warnings: list[str] = []
    callbacks = Callbacks(on_warning=warnings.append)
    metadata = train_lora(cache_of(wide), wide, replace(CONFIG, steps=1), device=CPU, callbacks=callbacks).metadata
    assert not metadata.keys() & {PRODUCTS_KEY, WEIGHTS_KEY}
    assert "this device has no products of int8 weights" in warnings[0]


def test_too_few_rows_for_a_gpu_are_multiplied_with_the_dequantised_weight():
    dequantise, parts = weights()["int8"]
    x = torch.randn(FEWEST_ROWS, 64)
    assert torch.equal(linear(x[1:], InEightBits(dequantise), parts), linear(x[1:], dequantise, parts))
    assert not torch.equal(linear(x, InEightBits(dequantise), parts), linear(x, dequantise, parts))


def gradients_of(base, plan: MemoryPlan, config: TrainConfig) -> tuple[float, torch.Tensor]:
    run = Run(TrainingInputs.on(CPU, cache_of(base), base, config), plan=plan)
    for name, parameter in run.parameters.items():
        if name.endswith(".up"):  # zeros, behind which the others have no gradient
            parameter.data.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).reshape(parameter.shape))
    assert run.model.in_eight_bits == (config.eight_bit_products == "on")
    loss = float(run.accumulate())
    return loss, torch.cat([p.grad.flatten() for p in run.parameters.values() if p.grad is not None])


@pytest.mark.parametrize("family", mostly_slow(list(SMALL_FLOWS), "flux1", "zimage"))
def test_gradients_of_each_family_are_near_those_with_dequantised_weights(family, monkeypatch):
    monkeypatch.setattr(quantised_layers, "SMALLEST", 1)
    _, wide = quantised_and_full_base("scaled fp8", family)
    plan = MemoryPlan(1.0, "8 bits")
    (plain_loss, plain), (loss, gradients) = (
        gradients_of(wide, plan, replace(CONFIG, eight_bit_products=choice)) for choice in ("off", "on")
    )
    # Measured: 0.012 to 0.026, Krea 2 0.040; the losses differ by less than 0.0007.
    assert 0.001 < distance(gradients, plain) < 0.08 and abs(loss / plain_loss - 1) < 0.002


@pytest.mark.parametrize("form", FORMS)
def test_only_numbers_times_a_scale_are_multiplied_in_8_bits(form):
    narrow, wide = quantised_and_full_base(form)
    scaled = ("fp8", "scaled fp8", "fp8 by rows", "int8", "convrot")
    config = replace(CONFIG, eight_bit_products="on" if form in scaled else "off")
    (plain_loss, plain), (loss, gradients) = (
        gradients_of(base, MemoryPlan(), settings)
        for base, settings in ((wide, replace(config, eight_bit_products="off")), (narrow, config))
    )
    assert distance(gradients, plain) < 0.08 and abs(loss / plain_loss - 1) < 0.002
    if config.eight_bit_products == "off":
        run = Run(TrainingInputs.on(CPU, cache_of(narrow), narrow, CONFIG))
        assert not run.model.in_eight_bits


def layers_with(weight: QuantisedTensor) -> nn.Sequential:
    network = nn.Sequential(nn.Linear(64, 96), nn.Linear(64, 96))
    for path in ("0", "1"):
        make_quantised(network, path, weight, BF16)
    return network


def marked(network: nn.Sequential) -> list[bool]:
    layers = [layer for layer in network if isinstance(layer, QuantisedLinear)]
    assert len(layers) == len(network)
    return [isinstance(layer.quantised.dequantise, InEightBits) for layer in layers]


@pytest.mark.parametrize(("share", "chosen"), [(0.5, True), (0.89, True), (0.95, False), (1.5, False), (None, False)])
def test_auto_uses_8_bits_only_on_a_gpu_that_is_faster_with_them(share, chosen, monkeypatch):
    timed = []

    def timed_products(weight, dequantise, rows, device, dtype):
        timed.append((*weight.shape, rows))
        if share is None and isinstance(dequantise, InEightBits):
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return share if isinstance(dequantise, InEightBits) else 1.0, (torch.ones(3),)

    monkeypatch.setattr(products, "_timed", timed_products)
    monkeypatch.setattr(QuantisedTensor, "map", lambda weight, function: weight)
    network = layers_with(to_int8(torch.randn(96, 64)))

    def predict() -> None:
        for layer, rows in ((0, 30), (1, 30), (1, 18)):
            network[layer](torch.ones(2, rows // 2, 64))

    def choose(wanted, device, dtype) -> bool:
        return choose_products(network, wanted, torch.device(device), dtype, predict)

    assert choose("auto", "cuda", BF16) == chosen
    # Each shape that the network multiplies, both ways: of two alike products one.
    assert timed == [(96, 64, 30)] if share is None else [(96, 64, rows) for rows in (30, 30, 18, 18)]
    assert marked(network) == [chosen] * 2
    timed.clear()
    assert not choose("auto", "cpu", BF16) and not choose("auto", "cuda", torch.float16)
    assert not choose("off", "cuda", BF16) and not timed
    assert choose("on", "cpu", torch.float32) == (share is not None)
    assert not choose("auto", "cpu", BF16)
    assert not any(marked(network))


def test_products_with_wrong_results_are_not_used_however_fast_they_are(monkeypatch):
    multiply = torch._int_mm
    assert has_int8_products(CPU, BF16)
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: multiply(left, right).roll(1, 0))
    assert not has_int8_products(CPU, BF16)


def test_a_deterministic_training_does_not_choose_by_time(monkeypatch):
    asked = []
    monkeypatch.setattr(adapted_model, "choose_products", lambda network, wanted, *_: asked.append(wanted) or False)
    _, wide = quantised_and_full_base("fp8")
    for config in (
        TrainConfig(),
        TrainConfig(deterministic=True),
        TrainConfig(deterministic=True, eight_bit_products="on"),
    ):
        Run(TrainingInputs.on(CPU, cache_of(wide), wide, config))
    assert asked == ["auto", "off", "on"]


def test_a_training_with_products_in_8_bits_says_so_in_its_file(monkeypatch):
    monkeypatch.setattr(quantised_layers, "SMALLEST", 1)
    narrow, wide = quantised_and_full_base("fp8")
    config = replace(CONFIG, steps=2)
    for base in (narrow, wide):
        metadata = train_lora(cache_of(base), base, config, device=CPU).metadata
        assert metadata[PRODUCTS_KEY] == "8 bits"
        assert (WEIGHTS_KEY in metadata) == (base is wide)  # rounded because products in 8 bits were asked for
    by_default = train_lora(cache_of(wide), wide, replace(config, eight_bit_products="auto"), device=CPU).metadata
    assert not by_default.keys() & {PRODUCTS_KEY, WEIGHTS_KEY}


@pytest.mark.parametrize("possible", [True, False])
def test_a_training_that_cannot_multiply_in_8_bits_as_wanted_says_so(possible, monkeypatch):
    if not possible:  # as on GPUs before capability 8.9, which have no products with fp8 weights
        monkeypatch.setattr(adapted_model, "choose_products", lambda *_: False)
    base, _ = quantised_and_full_base("fp8")
    warnings: list[str] = []
    train_lora(
        cache_of(base), base, replace(CONFIG, steps=1), device=CPU, callbacks=Callbacks(on_warning=warnings.append)
    )
    said = [warning for warning in warnings if warning.startswith("eight_bit_products: not possible here")]
    assert len(said) == (not possible)
