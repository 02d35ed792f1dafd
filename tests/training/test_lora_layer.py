"""core/training/methods/lora_layer.py: the fused layer computes what the plain formula does, and keeps less for it."""

import weakref
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.training.methods.lora_layer import LoraLayer, SharedInput
from tests.operation_count import OperationCount


def layer_of(base_layer: nn.Module, **options) -> LoraLayer:
    layer = LoraLayer(base_layer.requires_grad_(False), 4, 2.0, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in (layer.down, layer.up):
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


def plainly(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    """The layer with its change multiplied out into one weight."""
    base: nn.Linear = layer.base_layer  # pyright: ignore
    bias = None if base.bias is None else base.bias.float()
    return F.linear(x, base.weight.float() + layer.scale * layer.up @ layer.down, bias)


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 16), (2, 3, 5, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_the_changed_weight(shape, bias):
    layer = layer_of(nn.Linear(16, 8, bias=bias))
    x = torch.randn(shape, requires_grad=True)
    weights = torch.randn(*shape[:-1], 8)
    results = []
    for forward in (layer, lambda x: plainly(layer, x)):
        output = forward(x)
        gradients = torch.autograd.grad((output * weights).sum(), (x, layer.down, layer.up))
        results.append((output.detach(), *gradients))
    assert len(results[0]) == 4
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_in_bf16_the_adapter_still_learns_in_float32():
    layer = layer_of(nn.Linear(16, 8).to(torch.bfloat16))
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    output = layer(x)
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert layer.down.grad is not None and layer.down.grad.dtype == torch.float32
    torch.testing.assert_close(output.float(), plainly(layer, x.float()), rtol=0.05, atol=0.05)


def test_the_convolution_is_that_of_the_changed_weight():
    base = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    layer = layer_of(base)
    x = torch.randn(2, 3, 9, 9)
    change = torch.einsum("or,rihw->oihw", layer.up[:, :, 0, 0], layer.down) * layer.scale
    expected = F.conv2d(x, base.weight + change, base.bias, stride=2, padding=1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_dropout_only_drops_the_input_of_the_change():
    layer = layer_of(nn.Linear(16, 8), dropout=0.5)
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer.eval()(x), plainly(layer, x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.up.data.zero_()
    assert torch.equal(layer(x), layer.base_layer(x))


def layers_of_one_input(ranks: Sequence[int], one_down: bool = False) -> list[LoraLayer]:
    layers = []
    for number, rank in enumerate(ranks):
        layer = LoraLayer(nn.Linear(16, 8 + number).requires_grad_(False), rank, 2.0 + number)
        for parameter in (layer.down, layer.up):
            parameter.data.normal_(std=0.3)
        layers.append(layer)
    shared = SharedInput(layers)
    for layer in layers:
        layer.together = shared
        layer.down = layers[0].down if one_down else layer.down
    return layers


@pytest.mark.parametrize(("ranks", "one_down"), [((4, 4, 4), False), ((4, 2), False), ((4, 4, 4), True)])
def test_layers_with_one_input_compute_what_each_does_alone(ranks, one_down):
    layers = layers_of_one_input(ranks, one_down)
    x = torch.randn(2, 5, 16, requires_grad=True)
    parameters = list(dict.fromkeys(p for layer in layers for p in (layer.down, layer.up)))
    weights = [torch.randn(2, 5, 8 + number) for number in range(len(ranks))]
    results = []
    for forward in (LoraLayer.forward, plainly):
        outputs = [forward(layer, x) for layer in layers]
        loss = torch.cat([(output * weight).flatten() for output, weight in zip(outputs, weights, strict=True)]).sum()
        results.append([*outputs, *torch.autograd.grad(loss, (x, *parameters))])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_layers_of_one_group_that_get_other_inputs_after_all_compute_with_these():
    layers = layers_of_one_input((4, 4))
    first, second = torch.randn(2, 3, 16)
    for layer, x in (
        (layers[0], first),
        (layers[1], second),
        (layers[1], first),
        (layers[0], first),
        (layers[0], second),
    ):
        torch.testing.assert_close(layer(x), plainly(layer, x), rtol=1e-4, atol=1e-5)


def test_the_outputs_for_one_input_are_computed_once_and_not_kept():
    layers = layers_of_one_input((4, 4, 4))
    x = torch.randn(3, 16)
    with OperationCount() as first:
        kept = weakref.ref(layers[0](x))
    with OperationCount() as others:
        outputs = [layer(x) for layer in layers[1:]]
    assert first.count == 1 + 1 + 2 * 3  # A below each other, their product, and for each layer its own and its change
    assert others.count == 0
    assert kept() is None and len(outputs) == 2
    outputs = weakref.ref(x)
    del x
    assert outputs() is None


def kept_bytes(forward, x) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside parameters and its input."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(x)
    kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def test_it_keeps_no_copy_of_its_input_in_16_bit_where_peft_keeps_one_in_32():
    from peft import LoraConfig, inject_adapter_in_model

    def frozen():
        return nn.Sequential(nn.Linear(512, 512)).to(torch.bfloat16).requires_grad_(False)

    x = torch.randn(1000, 512, dtype=torch.bfloat16, requires_grad=True)
    ours = layer_of(frozen()[0])
    theirs = inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"]), frozen())
    for name, parameter in theirs.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    weight = 512 * 512 * 2
    assert kept_bytes(ours, x) < weight + 0.1 * x.nbytes
    assert kept_bytes(theirs, x) > weight + 1.9 * x.nbytes


def test_under_autocast_a_float32_input_is_worked_on_in_half_precision():
    """CUDA's autocast has norms hand on float32 to layers whose weights are in 16 bit."""
    layer = layer_of(nn.Linear(16, 8).to(torch.bfloat16))
    x = torch.randn(5, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == layer.down.grad.dtype == torch.float32  # pyright: ignore
    torch.testing.assert_close(output.float(), plainly(layer, x), rtol=0.05, atol=0.05)
