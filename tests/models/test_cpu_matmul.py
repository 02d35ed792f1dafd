"""core/models/cpu_matmul.py: oneDNN's products are torch's up to rounding, and don't depend on where factors are in memory."""

import contextvars
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from core.models import cpu_matmul
from core.models.cpu_matmul import add_product, faster_products, linear, matmul
from lab.flops import count_flops

SIZES = [(1, 320, 1280), (2, 128, 128), (3, 128, 32), (5, 64, 64), (77, 24, 8), (8, 77, 320)]
"""Rows, inputs and outputs. MKL's products of the first four depend on the place of a factor on AMD's processors."""


@pytest.fixture(params=["AuthenticAMD", "GenuineIntel"])
def maker(request, monkeypatch):
    """The processor is taken for one of this maker."""
    monkeypatch.setattr(cpu_matmul, "described_processor", lambda: f"vendor_id: {request.param}")
    cpu_matmul._onednn.cache_clear()
    with faster_products():
        yield request.param
    cpu_matmul._onednn.cache_clear()


def _at(place: int, tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that begins `place` numbers behind a multiple of 64 bytes."""
    memory = torch.empty(tensor.numel() + 32)
    first = -memory.data_ptr() // 4 % 16 + place
    return memory[first : first + tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("maker", ["AuthenticAMD"], indirect=True)
def test_products_are_equal_wherever_their_factors_are_in_memory(maker, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, inputs, outputs in SIZES:
            x, weight, gradient = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
            expected, back = linear(_at(0, x), _at(0, weight)), matmul(_at(0, gradient), _at(0, weight))
            for place in range(1, 16):
                assert torch.equal(linear(_at(place, x), _at(place, weight)), expected)
                assert torch.equal(matmul(_at(place, gradient), _at(place, weight)), back)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_products_are_torchs_up_to_rounding(maker, size):
    rows, inputs, outputs = size
    x, weight, bias = torch.randn(2, rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    alike = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5 * inputs**0.5)
    alike(linear(x, weight, bias), F.linear(x, weight, bias))
    alike(linear(x, weight), F.linear(x, weight))
    left, right = torch.randn(rows, inputs), torch.randn(inputs, outputs)
    for transposed in (left, left.t().contiguous().t()):
        alike(matmul(transposed, right), left @ right)
        alike(matmul(transposed, right.t().contiguous().t()), left @ right)
    alike(matmul(x, torch.stack([right, right])), x @ right)
    total = torch.randn(rows, 2 * outputs)[:, :outputs]
    expected = total + 0.5 * left @ right
    assert add_product(total, left, right, alpha=0.5) is total
    alike(total, expected)
    nothing = torch.full((rows, outputs), torch.nan)
    alike(add_product(nothing, left, right, beta=0, alpha=3.0), 3 * left @ right)


def test_other_tensors_are_left_to_torch(maker):
    for x in (torch.randn(3, 4).double(), torch.randn(3, 4).bfloat16(), torch.empty(0, 4)):
        weight = torch.randn(5, 4, dtype=x.dtype)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    with FakeTensorMode():
        x = torch.empty(3, 4)
        assert linear(x, torch.empty(5, 4)).shape == (3, 5) and type(matmul(x, x.t())) is type(x)


@pytest.mark.parametrize("maker", ["AuthenticAMD"], indirect=True)
def test_outside_the_context_nothing_differs_from_torch(maker):
    x, weight = torch.randn(7, 300), torch.randn(500, 300)
    contextvars.Context().run(
        lambda: torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=0, atol=0)
    )
    assert cpu_matmul._product_of(x, weight) is not None


def test_operations_are_counted_and_the_check_of_the_operator_is_not(maker):
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert count_flops(lambda: linear(x, weight)) == 2 * 3 * 4 * 5


@pytest.mark.parametrize("answer", [None, RuntimeError("another torch"), 1.0])
@pytest.mark.parametrize("maker", ["AuthenticAMD"], indirect=True)
def test_an_operator_that_is_gone_fails_or_computes_something_else_is_not_used(maker, answer, monkeypatch):
    class Operator:
        @property
        def default(self):
            if answer is None:
                raise AttributeError("_linear_pointwise")
            return self

        def __call__(self, x, weight, *_):
            if isinstance(answer, Exception):
                raise answer
            return F.linear(x, weight) + answer

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Operator())
    assert not cpu_matmul.has_faster_products()
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
