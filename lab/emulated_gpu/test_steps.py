"""Families, memory plans and methods on a fake GPU: dtypes, copies, memory, and a lack of it.

The products of families, plans and methods are for full runs; in every run one case shows them, and a whole training.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from core.models.memory_plan import PLANS, SMALLEST_SLAB, MemoryPlan
from core.training.methods import METHODS
from lab.emulated_gpu import trials
from lab.emulated_gpu.fake_cuda import MESSAGES
from tests.models.quantised_weights import FORMS
from tests.tooling import SMALL_FLOWS, UNETS

FAMILIES = (*UNETS, *SMALL_FLOWS)
COMPUTES_IN_FLOAT32 = ("loha", "oft")
"""Methods whose layers, which are peft's, multiply their own small matrices in float32."""
KNOWN_COPIES = ("models/clip.py:encode_chunks",)
"""Where a step copies something small to the device: tokens for trained text encoders."""
SECOND_IS_PRIOR = {"prior_prediction": 0.5, "seed": 10}
"""Settings by which the second step, but not the first, has prior prediction."""
FAST = (
    ("flux1", -1, {"precision": "fp16", "ema_decay": 0.9}),
    ("flux1", 1, {"accumulation": 2}),
    ("sd15", 2, {"method": "dreambooth", **SECOND_IS_PRIOR}),
    ("sd15", 2, {"method": "dreambooth", "class_images": 1}),
)
SLOW = (
    ("sd15", 1, {"precision": "fp16", "ema_decay": 0.9}),
    ("chroma", 5, {"accumulation": 2}),
    *((family, plan, {}) for family, plan in product(FAMILIES, (0, 1, 2, 3, 4, 5, 8, 10, 11))),
    *(
        (family, 0, {"method": method})
        for family, method in product(FAMILIES, METHODS)
        # Refused: words and checkpoints of flows, and blocks of a narrow Z-Image's odd rows.
        if family in UNETS or method not in ("dreambooth", "pivotal", "textual-inversion")
        if (family, method) != ("zimage", "oft")
    ),
    *((family, -1, {"precision": precision}) for family, precision in product(FAMILIES, ("fp16", "fp32"))),
    *((family, 2, {"prior_prediction": 0.9, "ema_decay": 0.9, "dropout": 0.1}) for family in FAMILIES),
    *((family, 0, {"text_encoder_lr": 1e-4}) for family in UNETS),
    *((family, 0, {"method": "dreambooth", "prior_prediction": 0.9}) for family in UNETS),
)


@pytest.fixture(scope="module")
def checkpoints(small_sd15, small_sdxl) -> Mapping[str, Path]:
    return {"sd15": small_sd15, "sdxl": small_sdxl}


@pytest.mark.parametrize(
    ("family", "plan", "settings"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_step_on_a_gpu(family, plan, settings: dict[str, Any], checkpoints, fake_process):
    case = trials.Case(family, checkpoints.get(family), PLANS[plan], settings=settings)
    method = settings.get("method", "lora")
    step = fake_process.submit(trials.step, case).result()
    wanted = {"fp16": torch.float16, "fp32": torch.float32}.get(settings.get("precision", ""), torch.bfloat16)
    assert step.dtypes - ({torch.float32} if method in COMPUTES_IN_FLOAT32 else set()) == {wanted}
    check_copies(step, PLANS[plan])
    assert step.predicted == pytest.approx(step.peak, rel=0.06)


@pytest.mark.parametrize(
    ("family", "plan"),
    [("zimage", 7), *(pytest.param("flux1", plan, marks=pytest.mark.slow) for plan in range(len(PLANS)))],
)
def test_a_step_with_a_training_adapter_on_a_gpu(family, plan, fake_process):
    case = trials.Case(family, plan=PLANS[plan], adapted=True)
    step, without = (fake_process.submit(trials.step, one).result() for one in (case, replace(case, adapted=False)))
    assert step.dtypes == {torch.bfloat16}
    check_copies(step, PLANS[plan])
    assert step.predicted == pytest.approx(step.peak, rel=0.06)
    assert step.peak > without.peak


QUANTISED_PLANS = (MemoryPlan(), MemoryPlan(1.0), MemoryPlan(1.0, offload=0.5), MemoryPlan(1.0, offload=1.0))


@pytest.mark.parametrize(
    ("form", "plan"),
    [
        ("nvfp4", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in product(FORMS, range(len(QUANTISED_PLANS)))),
    ],
)
def test_a_step_on_quantised_weights_on_a_gpu(form, plan, fake_process):
    case = trials.Case("flux1", plan=QUANTISED_PLANS[plan], form=form)
    step, wide = (fake_process.submit(trials.step, one).result() for one in (case, replace(case, form="")))
    assert step.dtypes == {torch.bfloat16}
    check_copies(step, QUANTISED_PLANS[plan])
    assert step.predicted == pytest.approx(step.peak, rel=0.06)
    assert step.peak < wide.peak


@pytest.mark.parametrize(
    ("form", "capability", "wanted"),
    [
        ("", (8, 6), {torch.int8, torch.bfloat16}),
        ("int8", (8, 6), {torch.int8, torch.bfloat16}),
        ("scaled fp8", (8, 9), {torch.float8_e4m3fn, torch.bfloat16, torch.float32}),  # the scales are in float32
        ("scaled fp8", (8, 6), {torch.bfloat16}),
    ],
)
def test_a_step_with_products_in_8_bits_on_a_gpu(form, capability, wanted, fake_process):
    plan = MemoryPlan(1.0, "full" if form else "8 bits", 0.5)
    case = trials.Case("flux1", plan=plan, form=form, capability=capability, settings={"eight_bit_products": "on"})
    step = fake_process.submit(trials.step, case).result()
    assert step.dtypes == wanted
    check_copies(step, plan)
    assert step.predicted == pytest.approx(step.peak, rel=0.06)


def test_factors_of_products_in_8_bits_may_be_laid_out_column_by_column(fake_process):
    """As packed latents are, which the first layer gets; files that are fp8 throughout have it in 8 bits too."""
    assert fake_process.submit(trials.products_of_columns).result() == {torch.int8: 2, torch.float8_e4m3fn: 2}


ONE_PICTURE = {"precision": "bf16", "batch_size": 1}


def test_a_gpu_is_asked_for_as_many_operations_as_a_cpu(checkpoints, fake_process):
    """(But for SDXL's, norms are more on a CPU. A small SD1.5's heads are so narrow that a GPU pads them.)"""
    case = trials.Case("sdxl", checkpoints["sdxl"], latents=8, settings=ONE_PICTURE)
    on_gpu, on_cpu = fake_process.submit(trials.operations, case).result()
    assert on_gpu == pytest.approx(on_cpu, rel=0.02)


@pytest.mark.parametrize(
    ("family", "layers", "most"),
    [("zimage", "n_layers", 91), pytest.param("flux1", "num_single_layers", 68, marks=pytest.mark.slow)],
)
def test_a_block_asks_a_gpu_for_few_operations(family, layers, most, fake_process):
    """diffusers' own blocks and norms would ask for 223 and 99 with the same adapter."""
    cases = (trials.Case(family, latents=8, settings=ONE_PICTURE, denoiser={layers: count}) for count in (3, 4))
    fewer, more = (fake_process.submit(trials.operations, case).result()[0] for case in cases)
    assert more - fewer <= most


def check_copies(step: trials.Step, plan: MemoryPlan) -> None:
    """Nothing but the plan's blocks is copied, from page-locked memory, and nothing is freed too early."""
    offloaded = [copy for copy in step.copies if copy.place.startswith("models/memory_plan.py")]
    assert all(copy.pinned and copy.direction == "to device" for copy in offloaded)
    assert bool(offloaded) == (plan.offload > 0)
    others = [copy for copy in step.copies if copy not in offloaded]
    assert all(copy.direction == "to device" and copy.place in KNOWN_COPIES and copy.size < 2**16 for copy in others)

    assert step.early == 0
    assert step.pinned <= 1.1 * step.home + SMALLEST_SLAB


# 0.005: among the adapter's copies in the arithmetic's dtype, the first to be made.
@pytest.mark.parametrize(
    "shares", [(0, 0.005, 0.5, 1), pytest.param([at / 199 for at in range(200)], marks=pytest.mark.slow)], ids=len
)
def test_out_of_memory_anywhere_in_a_step_leads_to_the_next_plan(shares, fake_process):
    forms = tuple(MESSAGES)
    found = fake_process.submit(trials.out_of_memory_in_steps, trials.Case("qwen-image"), shares, forms).result()
    assert found == [(str(PLANS[1]), "")] * len(shares)
