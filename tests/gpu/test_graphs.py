"""CUDA graphs of a step's passes on a fake GPU: launches, what a capture would refuse, and memory."""

from itertools import product

import pytest

from core.models.memory_plan import PLANS, MemoryPlan
from tests.gpu import trials
from tests.tooling import SMALL_FLOWS, UNETS

ALL = {"prior_prediction": 1.0, "class_images": 1, "accumulation": 2, "precision": "fp16"}
FAMILIES = (*UNETS, *SMALL_FLOWS)
FAST = (("flux1", PLANS[0], ALL),)
SLOW = (
    *((family, plan, {}) for family, plan in product(FAMILIES, (PLANS[0], MemoryPlan(0.5, "8 bits")))),
    *((family, PLANS[1], ALL) for family in FAMILIES),
    *((family, PLANS[0], {"method": method}) for family, method in product(("sd15", "flux1"), ("dora", "loha", "lokr"))),
)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "plan", "settings"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_pass_is_one_launch(family, plan, settings, fake_process, small_sd15, small_sdxl):
    checkpoint = {"sd15": small_sd15, "sdxl": small_sdxl}.get(family)
    case = trials.Case(family, checkpoint, plan, settings={"batch_size": 1, **settings})
    step = fake_process.submit(trials.graphed_steps, case).result()
    assert not step.warnings and not step.copies and step.early == 0
    passes = settings.get("accumulation", 1) * (1 + 2 * ("prior_prediction" in settings))
    assert len(step.operations) == (3 if passes > 1 else 1)
    # What is left is the noise and what else is drawn for each pass, the copies of its inputs, and the update.
    assert step.launches <= 40 + 45 * passes < step.plain
    check_memory(step)


def test_a_pass_that_copies_from_the_host_is_made_as_it_is(fake_process):
    warning, graphs, on_own_stream = fake_process.submit(trials.copying_pass).result()
    assert "(CUDA error: operation not permitted when stream is capturing)" in warning
    assert not graphs and on_own_stream


def check_memory(step: trials.GraphedSteps) -> None:
    """Nothing outlasts a pass, graphs need no more than is predicted, and a sample has the memory to itself."""
    assert step.outlasting == 0
    # Inputs of graphs, and of the next pass beside them, are not predicted: only next to small networks are they large.
    assert step.peaks[0] < step.peaks[1] <= 1.06 * step.predicted + 2.5 * step.inputs
    assert step.left == 0 and step.released > 0


# 0: before a pass, 0.2: in the pass as it is, 0.7: in the capture.
@pytest.mark.parametrize(
    "shares", [(0, 0.2, 0.7), pytest.param([at / 99 for at in range(100)], marks=pytest.mark.slow)], ids=len
)
def test_out_of_memory_leads_to_the_next_plan_or_to_no_graphs(shares, fake_process):
    found = fake_process.submit(trials.out_of_memory_with_graphs, trials.Case("flux1"), shares).result()
    next_plan, no_graphs = (str(PLANS[1]), True, 2), (str(PLANS[0]), False, 2)
    assert set(found) == {next_plan, no_graphs}
    assert found[:2] == [next_plan] * 2 and no_graphs in found[2:]
