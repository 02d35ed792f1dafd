"""Weights that are stored in few bits stay so through a training, which computes with the numbers that they stand for."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import core.pictures.drawing_model as drawing_model
from core.config import TrainConfig
from core.errors import UnmatchedKeys
from core.lora.apply import apply
from core.lora.modules import LoraModule
from core.models import load_base
from core.models.memory_plan import PLANS, MemoryCount, MemoryPlan
from core.models.quantised_layers import QuantisedConv2d, QuantisedLayer, QuantisedLinear
from core.pictures.generate import PictureJob, generate
from core.storage.stored import quantised_in
from core.training.adapted_model import memory_plans
from core.training.inputs import TrainingInputs
from core.training.loop import train_lora
from core.training.memory_prediction import predicted_memory
from core.training.metadata import WEIGHTS_KEY
from core.training.step import Run
from tests.models.quantised_weights import FORMS, MATRICES, quantised_and_full_base
from tests.tooling import SMALL_FLOWS, cache_of, mostly_slow, nothing_fits, random_lora

CPU = torch.device("cpu")
CONFIG = TrainConfig(rank=4, learning_rate=1e-3, steps=2, precision="bf16", prior_prediction=0.5)


def step(run: Run) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The loss of the next step, the adapter's gradients, and the most bytes that were in use beside what was there."""
    with MemoryCount(CPU) as count:
        for tensor in run.model.denoiser.parameters():
            count.leave_out(tensor)
        loss = run.accumulate()
    gradients = {name: parameter.grad for name, parameter in run.parameters.items() if parameter.grad is not None}
    assert len(gradients) > 0.8 * len(run.parameters)  # the last block of some families makes nothing of the text
    return loss, gradients, count.peak


def assert_trains_as_wide(form: str, config: TrainConfig, plan: MemoryPlan = PLANS[0], family: str = "flux1") -> None:
    narrow, wide = quantised_and_full_base(form, family)
    cache = cache_of(wide, 2)
    runs = [Run(TrainingInputs.on(CPU, cache, base, config), plan=plan) for base in (narrow, wide)]
    for run in runs:
        for name, parameter in run.parameters.items():
            if name.endswith(".up"):  # zeros, behind which the others have no gradient
                parameter.data.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).reshape(parameter.shape))
    (loss, gradients, peak), (wide_loss, wide_gradients, wide_peak) = map(step, runs)
    assert loss.isfinite() and gradients.keys() == wide_gradients.keys()
    if form.startswith("convrot"):  # whose inputs are rotated instead of their weights
        found, wanted = (
            torch.cat([each[name].flatten() for name in gradients]) for each in (gradients, wide_gradients)
        )
        assert abs(loss - wide_loss) < 0.001 * wide_loss and (found - wanted).norm() < 0.02 * wanted.norm()
    else:
        assert torch.equal(loss, wide_loss)
        assert all(torch.equal(gradient, wide_gradients[name]) for name, gradient in gradients.items())
    layers = [layer for layer in runs[0].model.denoiser.modules() if isinstance(layer, QuantisedLinear)]
    widths = sorted(layer.in_features * layer.out_features * 4 for layer in layers)
    tensors = wide.components["denoiser"].tensors
    assert len(layers) == sum(
        name.endswith(".weight") and tensor.ndim == 2 and bool(re.search(MATRICES, name))
        for name, tensor in tensors.items()
    )
    assert sum(layer.quantised.nbytes for layer in layers) < 0.3 * sum(widths)
    # Of all dequantised weights only those that are being used are there: in float32 on the way, and in two other dtypes.
    assert peak - wide_peak < 3 * widths[-1] < 0.6 * sum(widths)


@pytest.mark.parametrize("form", FORMS)
def test_a_training_on_quantised_weights_is_bit_for_bit_that_on_wide_ones(form):
    assert_trains_as_wide(form, CONFIG)


def test_selective_recomputation_dequantises_no_weight_again():
    base, counts, calls = quantised_and_full_base("scaled fp8")[0], [], []
    for plan in (MemoryPlan(), MemoryPlan(selective=True)):
        run = Run(TrainingInputs.on(CPU, cache_of(base, 1), base, CONFIG), plan=plan)
        for layer in run.model.denoiser.modules():
            if isinstance(layer, QuantisedLayer):
                layer._dequantise = lambda *given, own=layer._dequantise: calls.append(1) or own(*given)
        run.train_step()
        counts.append(len(calls))
    assert counts[0] > 0 and counts[1] == 2 * counts[0]


@pytest.mark.parametrize("plan", [MemoryPlan(1.0), MemoryPlan(1.0, offload=1.0)], ids=str)
def test_memory_plans_compute_the_same_on_quantised_weights(plan):
    assert_trains_as_wide("scaled fp8", replace(CONFIG, precision="fp32"), plan)


@pytest.mark.parametrize("family", mostly_slow([family for family in SMALL_FLOWS if family != "flux1"], "zimage"))
def test_families_compute_the_same_on_quantised_weights(family):
    assert_trains_as_wide("scaled fp8", CONFIG, family=family)


@pytest.mark.parametrize("method", mostly_slow(("dora", "loha", "lokr", "oft"), "lokr"))
def test_methods_compute_the_same_on_quantised_weights(method):
    assert_trains_as_wide("nvfp4", replace(CONFIG, method=method), family="qwen-image")


def test_quantised_weights_are_rounded_no_further_and_need_less_memory(monkeypatch):
    narrow, wide = quantised_and_full_base("scaled fp8")
    cache, plans = cache_of(wide, 2), memory_plans(CONFIG, narrow, CPU)
    assert plans == tuple(replace(plan, weights="full") for plan in PLANS[4:])
    assert {plan.weights for plan in plans} == {"full"} and memory_plans(CONFIG, wide, CPU) == PLANS
    for base in (narrow, wide):  # Apple's GPUs have no fp8, and no memory of their own
        assert memory_plans(CONFIG, base, torch.device("mps")) == PLANS[:8]
    saved = wide.weight_bytes("denoiser", torch.bfloat16) - narrow.weight_bytes(
        "denoiser", torch.bfloat16, as_stored=True
    )
    needs = [
        predicted_memory(TrainingInputs(cache, base, CONFIG, CPU, torch.bfloat16), plans[0]) for base in (narrow, wide)
    ]
    largest = max(tensor.nbytes for tensor in wide.components["denoiser"].tensors.values())
    assert needs[0] <= needs[1] - saved + 2 * largest < needs[1]
    nothing_fits(monkeypatch)
    lora = train_lora(cache, narrow, replace(CONFIG, memory_limit=0.001), device=CPU)
    assert WEIGHTS_KEY not in lora.metadata


@pytest.mark.parametrize("form", FORMS)
def test_what_is_stored_of_quantised_weights_is_known_without_reading_it(form):
    base, _ = quantised_and_full_base(form)
    tensors = base.components["denoiser"].tensors
    narrow = {name: weight for name in tensors if (weight := quantised_in(tensors, name))}
    known = {name: weight for name in tensors if (weight := quantised_in(tensors, name, read=False))}
    assert narrow and narrow.keys() == known.keys()
    for name, weight in narrow.items():
        assert all(part.is_meta for part in known[name].parts) and known[name].shape == weight.shape
        layouts = ([(part.dtype, part.shape) for part in each.parts] for each in (weight, known[name]))
        assert next(layouts) == next(layouts), name


def test_dreambooth_trains_what_quantised_weights_stand_for(small_sd15):
    wide = load_base(small_sd15)
    denoiser = wide.components["denoiser"]
    fp8 = {name: denoiser.tensors[name].to(torch.float8_e4m3fn) for name in denoiser.tensors}
    narrow = replace(wide, components={**wide.components, "denoiser": replace(denoiser, tensors=fp8)})
    cache = cache_of(wide)
    config = replace(CONFIG, method="dreambooth", precision="fp32", prior_prediction=0)
    run = Run(TrainingInputs.on(CPU, cache, narrow, config))
    assert run.accumulate().isfinite() and memory_plans(config, narrow, CPU) == memory_plans(config, wide, CPU)
    assert not any(isinstance(layer, QuantisedLayer) for layer in run.model.denoiser.modules())
    lora = Run(TrainingInputs.on(CPU, cache, narrow, CONFIG))
    kinds = {type(layer) for layer in lora.model.denoiser.modules() if isinstance(layer, QuantisedLayer)}
    assert kinds == {QuantisedLinear, QuantisedConv2d} and lora.accumulate().isfinite()


def test_pictures_of_quantised_weights_with_loras_are_those_of_wide_ones(monkeypatch):
    narrow, wide = quantised_and_full_base("scaled fp8")
    loras = [(random_lora(wide, r"transformer_blocks\..+", seed=seed), 0.5) for seed in (1, 2)]
    layers: list[list[QuantisedLayer]] = []
    load = drawing_model.load_denoiser

    def loaded(*arguments):
        denoiser, memory = load(*arguments)
        layers.append([layer for layer in denoiser.modules() if isinstance(layer, QuantisedLayer)])
        return denoiser, memory

    monkeypatch.setattr(drawing_model, "load_denoiser", loaded)
    jobs = [PictureJob("a photo of sks", seed=1, size=(64, 64), steps=2)]

    def draw(base, loras):
        return [np.array(picture.image, np.int16) for picture in generate(base, loras, jobs, device=CPU)]

    (drawn,), (expected,), (plain,) = draw(narrow, loras), draw(wide, loras), draw(wide, [])
    assert abs(drawn - expected).max() <= 1 < abs(plain - expected).max()
    assert layers[0] and not layers[1]
    (plain_again,) = draw(narrow, [])
    assert abs(plain_again - plain).max() <= 1


def test_a_lora_on_a_quantised_linear_layer_is_multiplied_beside_its_weight(monkeypatch):
    narrow, _ = quantised_and_full_base("scaled fp8")
    denoiser = narrow.load("denoiser", CPU, torch.float32, as_stored=True)
    layer = denoiser.get_submodule("transformer_blocks.0.attn.to_q")
    assert isinstance(layer, QuantisedLinear)
    for seed in (1, 2):
        apply(random_lora(narrow, r"transformer_blocks\..+", seed=seed), {"family": "flux1", "denoiser": denoiser}, 0.5)
    x = torch.randn(2, 5, 128)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    monkeypatch.setattr(LoraModule, "delta", None)  # a matrix as large as the weight, at each call
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_a_lora_on_quantised_weights_is_taken_off_again_and_other_kinds_are_refused():
    narrow, _ = quantised_and_full_base("nvfp4")
    denoiser = narrow.load("denoiser", CPU, torch.float32, as_stored=True)
    target = {"family": "flux1", "denoiser": denoiser}
    layer = denoiser.get_submodule("transformer_blocks.0.attn.to_q")
    assert isinstance(layer, QuantisedLinear)
    before, lora = layer.weight, random_lora(narrow, r"transformer_blocks\..+")
    change = dict(lora.changes())["denoiser", "transformer_blocks.0.attn.to_q"]
    applied = apply(lora, target, 0.5)
    torch.testing.assert_close(layer.weight, before + 0.5 * change)
    applied.swap()
    assert torch.equal(layer.weight, before)
    applied.swap()
    applied.remove()
    assert torch.equal(layer.weight, before) and not layer.changes
    with pytest.raises(UnmatchedKeys, match=r"quantised or in fp8, so only a plain LoRA"):
        applied.add(("denoiser", "transformer_blocks.0.attn.to_q"), "weight", change)
