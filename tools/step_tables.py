"""Two tables of a step in docs/benchmarks.md, which `python -m tools.step_tables` counts and writes there.

They are what a step asks a GPU for, with networks of the published sizes: counted on a GPU without numbers
(tests/gpu/fake_cuda.py), which is asked for what a GPU is asked for by the installed torch. It takes four minutes of a core.
"""

from tests.gpu.fake_cuda import DEVICE, Card, fake_cuda  # isort: skip  # before torch

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from core.models.spec import Component
from core.training.inputs import TrainingInputs
from core.training.methods.lora_layer import LoraLayer
from core.training.step import Run
from tools.bench_loops import PlainLoop
from tools.memory_tables import DOCUMENT, MODELS, base_of, cache_of, config_of
from tools.photo_tables import replace_table, table

COUNTED = ("SD1.5", "SDXL", "FLUX.1-dev", "Z-Image")


def frozen(layer: LoraLayer, x: Tensor) -> Tensor:
    """The layer without its adapter, with an output that needs a gradient, as it does with one."""
    output = layer.base_layer(x)
    return output if output.requires_grad else output.requires_grad_()


class Asked(NamedTuple):
    """What a card is asked for."""

    operations: int
    """Those that are no views of memory."""
    moved: int
    """The bytes of what they read and write."""


def asked(card: Card, work: Callable[[], object]) -> Asked:
    """What `work` asks the card for."""
    card.watch()
    work()
    return Asked(card.launches, card.moved)


def steps(name: str, card: Card) -> dict[str, Asked]:
    """What each part of a step asks for: the denoiser alone, all passes, a step, and the peer's passes."""
    model = MODELS[name]
    base, config = base_of(model), replace(config_of(model), gradient_checkpointing="off")
    state = base.family.build_empty("denoiser", model.config).state_dict()
    # Numbers that nobody writes take no memory.
    weights = {key: torch.empty(tensor.shape, dtype=torch.bfloat16) for key, tensor in state.items()}
    base = replace(base, components={"denoiser": Component(model.config, weights)})
    cache = cache_of(model, base)
    run = Run(TrainingInputs.on(DEVICE, cache, base, config))
    run.train_step()  # makes what stays
    step, passes = asked(card, run.train_step), asked(card, run.accumulate)
    with patch.object(LoraLayer, "forward", frozen):
        alone = asked(card, run.accumulate)
    peer = PlainLoop(cache, base, config, DEVICE)
    peer.step()
    return {"alone": alone, "passes": passes, "step": step, "peer": asked(card, peer.gradients)}


if __name__ == "__main__":
    with fake_cuda(1000) as card:
        found = {name: steps(name, card) for name in COUNTED}
    rows = []
    for name, step in found.items():
        alone, passes, whole, peer = (step[part].operations for part in ("alone", "passes", "step", "peer"))
        rows.append([name, *(f"{n:,}" for n in (alone, passes - alone, whole - passes, whole, peer))])
    header = [
        "",
        "the denoiser alone",
        "the adapter",
        "the update",
        "a step of ours",
        "diffusers + peft, without update",
    ]
    moved = [
        [name, *(f"{step[part].moved / 2**30:,.0f}" for part in ("alone", "passes", "peer"))]
        for name, step in found.items()
    ]
    text = replace_table(DOCUMENT.read_text(), "operations", table(header, rows))
    header = ["GiB", "the denoiser alone", "with the adapter", "diffusers + peft"]
    DOCUMENT.write_text(replace_table(text, "moved", table(header, moved)))
