"""The table of a step's operations in docs/benchmarks.md: `python -m tools.step_tables` counts them and writes them there.

They are counted on a CPU with networks of the published depths, but narrow ones: how many they are does not depend on widths,
and a GPU is asked for as many (tests/gpu/test_steps.py). It takes two minutes
of a core.
"""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from core.bench.loops import PlainLoop
from core.bench.report import count_operations
from core.bench.shapes import denoiser_config
from core.models.spec import Component
from core.training.methods.lora_layer import LoraLayer
from core.training.step import Run
from tools.memory_tables import DOCUMENT, MODELS, base_of, cache_of, config_of
from tools.photo_tables import replace_table, table

CPU = torch.device("cpu")
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


def operations(name: str) -> list[int]:
    """The operations of a step: of the denoiser alone, of the adapter, of the update, of all this, and of the peer's passes."""
    model = replace(MODELS[name], resolution=64, config={**MODELS[name].config, **NARROW[name]})
    base, config = base_of(model), replace(config_of(model), gradient_checkpointing="off")
    state = base.family.build_empty("denoiser", model.config).state_dict()
    weights = {key: torch.zeros(tensor.shape, dtype=torch.bfloat16) for key, tensor in state.items()}
    base = replace(base, components={"denoiser": Component(model.config, weights)})
    cache = cache_of(model, base)
    run = Run(cache, base, config, CPU)
    run.train_step()  # makes what stays
    step = count_operations(run.train_step)
    passes = count_operations(run.accumulate)
    with patch.object(LoraLayer, "forward", frozen):
        alone = count_operations(run.accumulate)
    peer = PlainLoop(cache, base, config, CPU)
    peer.step()
    return [alone, passes - alone, step - passes, step, count_operations(peer.gradients)]


if __name__ == "__main__":
    rows = [[name, *(f"{count:,}" for count in operations(name))] for name in NARROW]
    header = [
        "",
        "the denoiser alone",
        "the adapter",
        "the update",
        "a step of ours",
        "diffusers + peft, without update",
    ]
    DOCUMENT.write_text(replace_table(DOCUMENT.read_text(), "operations", table(header, rows)))
