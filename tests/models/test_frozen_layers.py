"""core/models/frozen_layers.py: what a CPU computes in less time is what torch computes, and only where weights are frozen."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.config import TrainConfig
from core.models import frozen_layers, load_base
from core.models.frozen_layers import FrozenLayers
from core.models.memory_plan import MemoryPlan
from core.training.inputs import TrainingInputs
from core.training.memory_prediction import predicted_memory
from core.training.step import Run
from tests.tooling import encoded_cache, encoded_image, started_run

CPU = torch.device("cpu")


def _layer(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **options}).requires_grad_(False)


def _computes_itself(layer: nn.Module, device: torch.device = CPU) -> bool:
    with FrozenLayers(layer, device).in_use():
        return "forward" in vars(layer)


@pytest.mark.parametrize(
    ("channels", "options", "shape", "name"),
    [
        ((256, 300), {}, (1, 16, 16), "_Winograd"),
        ((300, 256), {"bias": False}, (2, 20, 14), "_Winograd"),
        ((256, 256), {}, (1, 64, 66), "_Winograd"),
        ((256, 256), {}, (1, 2, 1030), "_Winograd"),
        ((1280, 1280), {}, (1, 4, 6), "_Product"),
        ((1280, 1280), {"bias": False, "stride": 2}, (3, 6, 4), "_Product"),
        ((1280, 1280), {"padding": 0}, (2, 6, 5), "_Product"),
    ],
)
def test_outputs_and_gradients_are_torchs_up_to_rounding(channels, options, shape, name, monkeypatch):
    """Beside float64, they are no more than four times as far off as torch's own in float32."""
    layer, calls = _layer(*channels, **options), []
    function = getattr(frozen_layers, name)
    monkeypatch.setattr(function, "apply", lambda *inputs, apply=function.apply: calls.append(1) or apply(*inputs))
    x = torch.randn(shape[0], layer.in_channels, *shape[1:], requires_grad=True)
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    exact = nn.functional.conv2d(x.double(), weight, bias, layer.stride, layer.padding)
    gradient = torch.randn(exact.shape)
    plain = layer(x)
    with FrozenLayers(layer, CPU).in_use():
        ours = layer(x)
    assert calls == [1]
    (exact_back,) = torch.autograd.grad(exact, x, gradient.double())
    for mine, torchs, true in (
        (ours, plain, exact),
        (*(torch.autograd.grad(output, x, gradient)[0] for output in (ours, plain)), exact_back),
    ):
        assert mine.shape == true.shape
        assert _error(mine, true) < 4 * _error(torchs, true)


def _error(found, true) -> float:
    return ((found - true).square().mean() / true.square().mean()).sqrt().item()


def test_only_frozen_layers_that_gain_are_taken_and_only_within_the_context():
    large, wide = _layer(1280, 1280), _layer(256, 256)
    assert _computes_itself(large) and _computes_itself(wide)
    assert "forward" not in vars(large) and "forward" not in vars(wide)
    others = [
        _layer(64, 256), _layer(256, 256, stride=2), _layer(256, 256, groups=2), _layer(256, 256, dilation=2),
        _layer(256, 256, padding_mode="circular"), _layer(256, 256).requires_grad_(True), nn.Linear(256, 256),
    ]  # fmt: skip
    assert not any(_computes_itself(layer) for layer in others)
    assert not _computes_itself(large, torch.device("cuda"))


@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_linear_layer_computes_as_torchs_where_another_library_is_faster(bias, monkeypatch):
    monkeypatch.setattr(frozen_layers, "has_faster_products", lambda: True)
    layer, x = nn.Linear(24, 40, bias=bias).requires_grad_(False), torch.randn(2, 7, 24, requires_grad=True)
    plain = layer(x)
    with FrozenLayers(layer, CPU).in_use():
        ours = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain)
    gradient = torch.randn_like(plain)
    torch.testing.assert_close(*(torch.autograd.grad(output, x, gradient)[0] for output in (ours, plain)))
    assert _computes_itself(layer) and not _computes_itself(layer.requires_grad_(True))
    monkeypatch.setattr(frozen_layers, "has_faster_products", lambda: False)
    assert not _computes_itself(layer.requires_grad_(False))


@pytest.mark.parametrize(
    ("channels", "dtype", "size"),
    [
        (256, torch.float32, (14, 14)), (256, torch.float32, (17, 18)), (256, torch.bfloat16, (16, 16)),
        (1280, torch.float32, (16, 17)), (1280, torch.bfloat16, (8, 9)),
    ],
)  # fmt: skip
def test_what_gains_nothing_by_its_size_or_dtype_is_left_to_torch(channels, dtype, size, monkeypatch):
    monkeypatch.setattr(frozen_layers._Winograd, "apply", None)
    monkeypatch.setattr(frozen_layers._Product, "apply", None)
    layer = _layer(channels, channels).to(dtype)
    x = torch.randn(1, channels, *size, dtype=dtype)
    with FrozenLayers(layer, CPU).in_use():
        ours = layer(x)
    torch.testing.assert_close(ours, layer(x))


def test_a_large_weight_in_16_bits_is_one_product_too():
    layer = _layer(1280, 1280).bfloat16()
    x = torch.randn(1, 1280, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    with FrozenLayers(layer, CPU).in_use():
        ours = layer(x)
    plain = layer(x)
    assert ours.dtype == plain.dtype and "_Product" in str(ours.grad_fn.next_functions)
    ours_back, plain_back = (torch.autograd.grad(output.sum(), x)[0] for output in (ours, plain))
    assert _error(ours, plain) < 0.01 and _error(ours_back, plain_back) < 0.01


def test_in_inference_mode_and_with_recomputation_they_compute_the_same():
    layer = _layer(256, 256)
    x = torch.randn(1, 256, 16, 16, requires_grad=True)
    frozen = FrozenLayers(layer, CPU)
    with frozen.in_use():
        plain = layer(x)
        again = checkpoint(layer, x, use_reentrant=False)
        torch.testing.assert_close(*(torch.autograd.grad(output.sum(), x)[0] for output in (again, plain)))
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), plain)


def test_a_failure_leaves_the_network_as_it_was():
    layer = _layer(256, 256)
    with pytest.raises(RuntimeError), FrozenLayers(layer, CPU).in_use():
        layer(torch.zeros(1, 1, 16, 16))
    assert "forward" not in vars(layer)


def test_a_step_has_the_same_gradients_with_them(small_sd15, monkeypatch):
    """In a small SD1.5, where LoRAs are on the convolutions too."""
    base = load_base(small_sd15)
    cache = encoded_cache(base, [encoded_image(base, "0.png", "a photo of sks person", 0)])
    config = TrainConfig(rank=2, learning_rate=1e-3, targets="transformer+conv", precision="fp32")
    plain = started_run(cache, base, config)
    calls = set()
    for name, value in {"_LEAST_CHANNELS": 1, "_LEAST_POSITIONS": 65, "_LARGE_WEIGHT": 30_000}.items():
        monkeypatch.setattr(frozen_layers, name, value)
    for name in ("_Winograd", "_Product"):
        function = getattr(frozen_layers, name)
        monkeypatch.setattr(
            function, "apply", lambda *inputs, name=name, apply=function.apply: calls.add(name) or apply(*inputs)
        )
    ours = started_run(cache, base, config)
    torch.testing.assert_close(ours.accumulate(), plain.accumulate(), rtol=1e-5, atol=0)
    assert calls == {"_Winograd", "_Product"}
    assert _error(_gradient(ours), _gradient(plain)) < 1e-5
    assert predicted_memory(TrainingInputs(cache, base, config, CPU, torch.float32), MemoryPlan()) > 0
    while not ours.model.memory.plan.offload:  # whose kernels would stay beside weights that are brought in
        ours.model.adopt(ours.model.plans[ours.model.plans.index(ours.model.memory.plan) + 1])
        layers = ours.model.fast_layers
        assert isinstance(layers, FrozenLayers) and layers._forwards.keys() <= set(ours.model.denoiser.modules())
    assert isinstance(ours.model.fast_layers, FrozenLayers) and not ours.model.fast_layers.keeps_kernels


def _gradient(run: Run) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in run.parameters.values() if parameter.grad is not None])
