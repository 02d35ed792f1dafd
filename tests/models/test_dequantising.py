"""What dequantising a weight costs a GPU, and that its bits are ComfyUI's."""

import math

import gguf
import numpy as np
import pytest
import torch

from core.models.quantised import dequantised
from core.models.quantised_layers import Rotated, linear
from core.storage.gguf_file import quantised_gguf
from core.storage.stored import QuantisedTensor, quantised_in
from tests.models.quantised_weights import FORMS, stored
from tests.operation_count import OperationCount

ROWS, COLUMNS, BF16 = 256, 1024, torch.bfloat16
COSTS = {
    "fp8": (1, 3.1), "scaled fp8": (3, 7.1), "fp8 by rows": (3, 7.1), "int8": (1, 3.1), "convrot": (2, 3.1),
    "convrot_w4a4": (6, 8.1), "mxfp8": (4, 7.4), "nvfp4": (5, 11.1), "Q8_0": (3, 3.6), "Q4_0": (6, 7.6),
    "Q4_1": (7, 6.1), "Q5_0": (10, 13.8), "Q5_1": (11, 12.2), "Q4_K": (22, 6.6), "Q5_K": (26, 12.8), "Q6_K": (11, 14.1),
}  # fmt: skip
"""The most operations, and bytes for each number of the weight, by the form that it is stored in."""


def weight_in(form: str) -> QuantisedTensor:
    """A weight with numbers of every kind in that form."""
    generator = torch.Generator().manual_seed(1)
    if form in FORMS:
        parts = stored("layer", torch.randn(ROWS, COLUMNS, generator=generator), form)
        for name, tensor in parts.items():
            if form in ("mxfp8", "nvfp4") and tensor.dtype.itemsize == 1 and "comfy" not in name:
                every = torch.randint(0, 256, tensor.shape, generator=generator, dtype=torch.uint8)
                parts[name] = every.view(tensor.dtype)
        weight = quantised_in(dequantised(parts, form), "layer.weight")
    else:
        numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
        data = np.random.default_rng(1).integers(0, 256, (ROWS, COLUMNS // numbers * size), np.uint8)
        weight = quantised_gguf(torch.from_numpy(data), form, (ROWS, COLUMNS))
    assert weight
    return weight


@pytest.mark.parametrize("form", COSTS)
def test_a_weight_is_dequantised_in_few_operations_that_move_few_bytes(form):
    weight, x = weight_in(form), torch.ones(1, COLUMNS, dtype=BF16)
    linear(x, weight.dequantise, weight.parts)  # makes constants
    with OperationCount() as spent:
        linear(x, weight.dequantise, weight.parts)
    for_numbers = spent.bytes / (ROWS * COLUMNS) - BF16.itemsize  # without what the product reads
    operations, most = COSTS[form]
    assert spent.count - 2 <= operations and for_numbers < most


def expected(form: str, weight: QuantisedTensor) -> torch.Tensor:
    """What ComfyUI makes of a weight: numbers times scales, rounded to bf16 where it does that."""
    numbers, *scales = weight.parts
    if form == "int8":
        return (numbers.float() * scales[0]).bfloat16()
    if form == "mxfp8":
        powers = (scales[0].int() << 23).view(torch.float32).repeat_interleave(32, dim=1)
        return (numbers.float() * powers).bfloat16()
    of_code = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=BF16)
    codes = torch.stack([numbers >> 4, numbers & 15], dim=-1).flatten(1).long()
    return of_code[codes] * (scales[1].bfloat16() * scales[0].bfloat16()).repeat_interleave(16, dim=1)


@pytest.mark.parametrize("form", ["int8", "mxfp8", "nvfp4"])
def test_dequantised_weights_are_comfyuis_bit_for_bit(form):
    weight = weight_in(form)
    wanted, found = expected(form, weight), weight.dequantised(BF16)
    assert torch.equal(found.isnan(), wanted.isnan())
    numbers = ~wanted.isnan()
    assert torch.equal(found[numbers].view(torch.int16), wanted[numbers].view(torch.int16))


@pytest.mark.parametrize("form", ["convrot", "convrot_w4a4"])
def test_rotating_the_input_differs_from_rotating_the_weight_back_by_rounding_alone(form):
    weight = weight_in(form)
    assert isinstance(weight.dequantise, Rotated)
    x = torch.randn(64, COLUMNS, generator=torch.Generator().manual_seed(2)).to(BF16)
    exact = x.double() @ rotated_back(weight, weight.dequantise.size).T

    def distance(product: torch.Tensor) -> float:
        return float((product.double() - exact).norm() / exact.norm())

    ours = distance(linear(x, weight.dequantise, weight.parts))
    assert ours < 0.0045 and ours < 1.4 * distance(x @ weight.dequantised(BF16).T)


def rotated_back(weight: QuantisedTensor, size: int) -> torch.Tensor:
    assert isinstance(weight.dequantise, Rotated)
    numbers = weight.dequantise.dequantise(weight.parts, torch.float32).double()
    of_four = torch.ones(4, 4).double() - 2 * torch.eye(4).flip(0)
    matrix = of_four
    while len(matrix) < size:
        matrix = torch.kron(matrix, of_four)
    return (numbers.unflatten(1, (-1, size)) @ matrix / math.sqrt(size)).flatten(1)
