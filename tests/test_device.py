"""core/device.py: the precision that `auto` chooses, as ComfyUI 0.30 does (comfy/model_management.py, should_use_bf16)."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core import device as devices
from core.device import fastest_dtype, processor, usable_device
from core.errors import BadConfig

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("architecture", "capability", "dtype"),
    [
        ("gfx1030", (10, 3), FP16),  # RX 6800: its compute capability looks newer than an H100's
        ("gfx906:sramecc+:xnack-", (9, 0), FP16),  # Radeon VII
        ("gfx1100", (11, 0), BF16),  # RX 7900
        ("gfx942:sramecc+:xnack-", (9, 4), BF16),  # MI300
    ],
)
def test_an_amd_card_has_bf16_from_rdna_3_and_cdna_on(architecture, capability, dtype, monkeypatch):
    card = SimpleNamespace(name="AMD Radeon", gcnArchName=architecture, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert fastest_dtype(torch.device("cuda", 0)) == dtype


@pytest.mark.parametrize(("has", "dtype"), [(True, BF16), (False, FP32)])
def test_an_intel_gpu_has_bf16_where_it_says_so(has, dtype, monkeypatch):
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda: has)
    assert fastest_dtype(torch.device("xpu", 0)) == dtype


def test_an_intel_gpu_has_its_own_name(monkeypatch):
    monkeypatch.setattr("torch.xpu.get_device_name", lambda device: "Intel Arc B580")
    assert processor(torch.device("xpu")) == "Intel Arc B580"


@pytest.mark.parametrize(("newer", "dtype"), [(True, BF16), (False, FP32)])
def test_an_apple_gpu_has_bf16_from_macos_14_on(newer, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: newer)
    assert fastest_dtype(torch.device("mps")) == dtype


@pytest.mark.parametrize(
    ("flags", "is_large", "dtype"),
    [
        ("avx512f avx512_bf16", True, BF16),
        ("avx512f amx_bf16 amx_tile", True, BF16),
        ("avx512f avx512_vnni", True, FP32),
        ("avx512f avx512_bf16", False, FP32),
    ],
)
def test_a_processor_with_products_of_bf16_computes_large_models_so(flags, is_large, dtype, monkeypatch):
    monkeypatch.setattr(devices, "described_processor", lambda: f"model name: EPYC\nflags\t\t: fpu {flags}\n")
    assert fastest_dtype(torch.device("cpu"), is_large=is_large) == dtype
    assert processor(torch.device("cpu")) == "EPYC"


def test_where_linux_does_not_describe_the_processor_its_name_does(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "Path", lambda _: tmp_path / "missing")
    monkeypatch.setattr("platform.processor", lambda: "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD")
    assert (
        devices.described_processor()
        == processor(torch.device("cpu"))
        == "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD"
    )


def test_a_device_can_be_given_by_its_name_as_to_torch():
    assert usable_device("cpu") == torch.device("cpu")
    with pytest.raises(BadConfig, match=r"^device toaster: .*; available: .*cpu$"):
        usable_device("toaster")


def test_a_card_without_an_index_is_the_current_one(monkeypatch):
    """Memory is counted for a card with its index."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)
    assert usable_device(torch.device("cuda")) == torch.device("cuda", 1)


def test_an_apple_gpu_is_bound_to_what_macos_recommends(monkeypatch):
    """By default torch takes 1.7 times as much, and macOS swaps."""
    shares = []
    monkeypatch.setattr(torch.mps, "set_per_process_memory_fraction", shares.append)
    with devices.within_free_memory(torch.device("mps")):
        assert shares == [1.0]
    assert shares == [1.0, 1.7]


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_arithmetic_is_exact_beside_a_program_that_sets_the_precision_of_float32():
    backends: Any = torch.backends
    places = [backends.cuda.matmul, backends.cudnn.conv]
    before = [place.fp32_precision for place in places]
    try:
        places[0].fp32_precision, places[1].fp32_precision = "tf32", "ieee"
        with devices.exact_arithmetic(tf32=False):
            assert [place.fp32_precision for place in places] == ["ieee", "ieee"]
        assert [place.fp32_precision for place in places] == ["tf32", "ieee"]
    finally:
        places[0].fp32_precision, places[1].fp32_precision = before
