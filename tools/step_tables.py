"""The table of a step's operations in docs/benchmarks.md: `python -m tools.step_tables` counts them and writes them there.

They are counted on a GPU without numbers (tests/gpu/fake_cuda.py), which is asked for what a GPU is asked for by the installed
torch, with networks of the published depths, but narrow ones: how many they are does not depend on widths. It takes two
minutes of a core.
"""

from tests.gpu.fake_cuda import DEVICE, Card, fake_cuda  # isort: skip  # before torch

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from core.bench.loops import PlainLoop
from core.bench.shapes import denoiser_config
from core.models.spec import Component
from core.training.methods.lora_layer import LoraLayer
from core.training.step import Run
from tools.memory_tables import DOCUMENT, MODELS, base_of, cache_of, config_of
from tools.photo_tables import replace_table, table

NARROW: dict[str, dict[str, Any]] = {
    "SD1.5": denoiser_config("sd15", 64),
    "SDXL": denoiser_config("sdxl", 64),
    "FLUX.1-dev": {"num_attention_heads": 1},
    "Z-Image": {"dim": 128, "n_heads": 1, "n_kv_heads": 1},
}
"""What is narrow in the denoiser's configuration of each model."""


def frozen(layer: LoraLayer, x: Tensor) -> Tensor:
    """The layer without its adapter, with an output that needs a gradient, as it does with one."""
    output = layer.base_layer(x)
    return output if output.requires_grad else output.requires_grad_()


def counted(card: Card, work: Callable[[], object]) -> int:
    """The number of operations that `work` asks the card for, apart from views of memory."""
    card.watch()
    work()
    return card.launches


def operations(name: str, card: Card) -> list[int]:
    """The operations of a step: of the denoiser alone, of the adapter, of the update, of all this, of all this by CUDA graphs,
    and of the peer's passes."""
    model = replace(MODELS[name], resolution=64, config={**MODELS[name].config, **NARROW[name]})
    base, config = base_of(model), replace(config_of(model), gradient_checkpointing="off")
    state = base.family.build_empty("denoiser", model.config).state_dict()
    weights = {key: torch.zeros(tensor.shape, dtype=torch.bfloat16) for key, tensor in state.items()}
    base = replace(base, components={"denoiser": Component(model.config, weights)})
    cache = cache_of(model, base)
    run = Run(cache, base, config, DEVICE)
    run.train_step()  # makes what stays
    step = counted(card, run.train_step)
    passes = counted(card, run.accumulate)
    with patch.object(LoraLayer, "forward", frozen):
        alone = counted(card, run.accumulate)
<<<<<<< HEAD
    peer = PlainLoop(cache, base, config, DEVICE)
=======
    graphed = Run(cache, base, replace(config, cuda_graphs=True), DEVICE)
    graphed.train_step()
    launches = counted(card, graphed.train_step)
    peer = PlainLoop(cache, of_diffusers(base), config, DEVICE)
>>>>>>> 28a627f (Passes of a step can be made by CUDA graphs)
    peer.step()
    return [alone, passes - alone, step - passes, step, launches, counted(card, peer.gradients)]


if __name__ == "__main__":
    with fake_cuda(1000) as card:
        rows = [[name, *(f"{count:,}" for count in operations(name, card))] for name in NARROW]
    header = [
        "",
        "the denoiser alone",
        "the adapter",
        "the update",
        "a step of ours",
        "by CUDA graphs",
        "diffusers + peft, without update",
    ]
    DOCUMENT.write_text(replace_table(DOCUMENT.read_text(), "operations", table(header, rows)))
