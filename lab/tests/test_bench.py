"""lab/bench.py: the models are of the published size, the figures are of real steps, and both loops do the same work."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from core.config import TrainConfig
from core.models.base import Base
from core.models.families import FAMILIES
from lab import bench
from lab.bench_loops import OurLoop, PlainLoop
from tests import random_models

CPU = torch.device("cpu")
RESOLUTION = 64
"""Pixels at which 2 x 2 latents are left in the middle: on a single one, attention has nothing to choose and to learn."""
SHALLOW = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@contextmanager
def shallow_sd15() -> Iterator[None]:
    """Here the denoiser of SD1.x has two levels instead of four."""
    shape = random_models.SHAPES["sd15"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_models.SHAPES, "sd15", replace(shape, config={**shape.config, **SHALLOW}, widths=(1, 2)))
        yield


@cache
def small_base(family: str, dtype: torch.dtype) -> Base:
    """A base model whose weights, which no loop changes, all tests share."""
    with shallow_sd15():
        return random_models.random_base(family, 64, CPU, dtype)


def small_loops(family="sd15", precision: Literal["fp32", "bf16"] = "fp32"):
    """Our loop and the peer's on one small denoiser, as the benchmark makes them."""
    config = TrainConfig(rank=4, resolution=RESOLUTION, precision=precision, gradient_checkpointing="off")
    _, dtype = bench.device_and_dtype(config.precision, CPU)
    base = small_base(family, dtype)
    images = random_models.random_cache(base, config)
    return OurLoop(images, base, config, CPU), PlainLoop(images, base, config, CPU)


@pytest.fixture(scope="module")
def report():
    """A report from options as the command line gives them; the rate of products is that of small ones, which take no time."""
    arguments = "--channels 64 --resolution 64 --rank 4 --batch-size 2 --precision fp32 --steps 2"
    with shallow_sd15(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "MATRIX_SECONDS", 0.0)
        return bench.run(bench.arguments().parse_args(arguments.split()), CPU)


# "DiffusionWrapper has 859.52 M params." is what CompVis' code prints when it loads SD1.x; 2,567 M: SDXL-Base in the
# comparison of U-Nets on KOALA's model card (huggingface.co/etri-vilab/koala-700m).
@pytest.mark.parametrize(("family", "millions", "digits"), [("sd15", 859.52, 2), ("sdxl", 2567, 0)])
def test_the_denoiser_has_the_published_number_of_parameters(family, millions, digits):
    with torch.device("meta"):
        denoiser = FAMILIES[family].build("denoiser", random_models.denoiser_config(family))
    assert round(sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6, digits) == millions


def test_attention_is_counted_on_the_cpu_too():
    query, key, value = (torch.randn(1, 2, 64, 8, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 64 * 64 * 8  # of the queries of both heads with the keys

    def attend():
        return F.scaled_dot_product_attention(query, key, value)

    assert bench.count_flops(attend) == 2 * product  # query · key, then · value
    # Backward: the first product again, then one for the gradient of each factor of both.
    assert bench.count_flops(lambda: attend().sum().backward()) == (2 + 5) * product


@pytest.mark.parametrize(
    ("family", "precision"), [("sd15", "bf16"), pytest.param("sdxl", "fp32", marks=pytest.mark.slow)]
)
def test_a_step_of_either_loop_trains_every_layer(family, precision):
    for loop in small_loops(family, precision):
        loop.step()
        parameters = loop.run.parameters if isinstance(loop, OurLoop) else dict(enumerate(loop.parameters))
        values = [parameter.detach() for parameter in parameters.values()]
        assert values and all(bool(value.isfinite().all()) for value in values)
        assert all(bool(value.any()) for value in values)  # B starts at 0 and gets a gradient in the first step


def test_our_step_is_the_training_loop_s_own():
    ours, _ = small_loops()
    ours.step()
    ours.step()
    assert ours.run.step == 2


@pytest.mark.clock
def test_peak_memory_sees_what_was_allocated_and_freed_again():
    def fill(megabytes):
        peak = bench.peak_memory(lambda: torch.ones(megabytes * 2**18).sum(), CPU)
        assert peak is not None
        return peak

    small, large, small_again = fill(1), fill(200), fill(1)
    assert large - small == pytest.approx(199 * 2**20, rel=0.05)
    assert abs(small_again - small) < 20 * 2**20


def test_both_loops_do_the_same_arithmetic(report):
    assert report["ours"]["flops_per_step"] == pytest.approx(report["peer"]["flops_per_step"], rel=1e-3)


@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.85), ("bf16", 0.7)])
def test_our_step_asks_torch_for_fewer_operations_than_the_peers(precision, share, monkeypatch):
    monkeypatch.setattr("core.models.cpu_matmul._onednn", lambda: None)  # A GPU gets the operations without it.
    ours, peer = small_loops(precision=precision)
    assert bench.count_operations(ours.gradients) < share * bench.count_operations(peer.gradients)


def test_operations_are_counted_without_views_and_allocations():
    matrix = torch.ones(3, 4)
    assert bench.count_operations(lambda: torch.empty(3).view(3, 1).expand(3, 4) @ (matrix + 1).t()) == 2


def test_a_step_counts_about_two_forwards_since_frozen_weights_need_no_gradient():
    ours, _ = small_loops()
    assert 1.7 < bench.count_flops(ours.step) / bench.count_flops(ours.forward) < 2.1  # 3 with the weights' gradients


@pytest.mark.clock
def test_the_figures_of_a_report_agree_with_each_other(report):
    for name in ("ours", "peer"):
        figures = report[name]
        assert figures["seconds_per_image"] == figures["seconds_per_step"] / 2
        assert figures["host_seconds_per_step"] <= figures["seconds_per_step"] * 1.01
        assert figures["seconds_to_first_step"] > figures["seconds_per_step"]
        assert figures["peak_bytes"] > report["parameters"] * 4
        rate = figures["flops_per_step"] / figures["seconds_per_step"]
        assert figures["matmul_rate_share"] == pytest.approx(rate / report["matmul_flops_per_second"])
    assert report["step_over_peer_quartiles"] is None  # of two rounds they would mean nothing


@pytest.mark.clock
def test_the_predicted_memory_is_less_than_what_the_process_takes_with_all_its_libraries(report):
    weights = 4 * report["parameters"]
    assert weights < report["predicted_bytes"] < report["ours"]["peak_bytes"]
