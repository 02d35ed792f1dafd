"""What ComfyUI makes of DoRA, LoHa, LoKr and OFT files that we write: each weight's change is the one that was trained."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from core.base import Base
from core.config import TrainConfig
from core.families import FAMILIES
from core.lora_file import LoraFile
from core.lora_keys import FAMILIES as KEYS
from core.methods import METHODS

from .setup_comfyui import COMFYUI, PYTHON

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

KINDS = ("dora", "loha", "lokr", "oft")
BLOCK = "mid_block.attentions.0."
# Path -> layer of some modules as the published models have them: Linear layers that are no squares, both convolutions.
LAYERS = {
    "sd15": {
        f"{BLOCK}proj_in": nn.Conv2d(1280, 1280, 1),
        f"{BLOCK}transformer_blocks.0.attn2.to_k": nn.Linear(768, 1280, bias=False),
        f"{BLOCK}transformer_blocks.0.ff.net.2": nn.Linear(5120, 1280),
        "down_blocks.1.resnets.0.conv1": nn.Conv2d(320, 640, 3, padding=1),
    },
    "sdxl": {
        f"{BLOCK}proj_in": nn.Linear(1280, 1280),
        f"{BLOCK}transformer_blocks.0.attn2.to_k": nn.Linear(2048, 1280, bias=False),
        "down_blocks.1.resnets.0.conv1": nn.Conv2d(320, 640, 3, padding=1),
    },
}


def base_weight(shape) -> torch.Tensor:
    """As in lora_reader.py."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5


def network_of(family: str) -> nn.Module:
    """A network with nothing but these layers, at their paths."""
    network = nn.Module()
    for path, layer in LAYERS[family].items():
        *parents, name = path.split(".")
        parent = network
        for component in parents:
            if not hasattr(parent, component):
                parent.add_module(component, nn.Module())
            parent = getattr(parent, component)
        parent.add_module(name, type(layer)(**options_of(layer)))
        parent.get_submodule(name).weight.data = base_weight(layer.weight.shape)
    return network.requires_grad_(False)


def options_of(layer: nn.Module) -> dict:
    names = (
        ("in_features", "out_features")
        if isinstance(layer, nn.Linear)
        else ("in_channels", "out_channels", "kernel_size")
    )
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[str, str], tuple[LoraFile, dict]]:
    """(method, family) -> the file, and what ComfyUI reports of it."""
    folder = tmp_path_factory.mktemp("kinds")
    files = {}
    for method in KINDS:
        for family in LAYERS:
            config = TrainConfig(method=method, rank=8, alpha=4.0, targets="transformer+conv")
            adapter = METHODS[method].attach({"denoiser": network_of(family)}, FAMILIES[family], config, None)
            generator = torch.Generator().manual_seed(5)
            for parameter in adapter.parameters().values():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
            base = Base(FAMILIES[family], "base", {}, "epsilon", False, 512)
            metadata = {"ss_base_model_version": FAMILIES[family].base_model_version}
            path = folder / f"{method}-{family}.safetensors"
            adapter.export(adapter.parameters(), base, metadata).save(path, torch.float32)
            files[method, family] = LoraFile.read(path)
    arguments = [text for (_, family), file in files.items() for text in (family, file.name)]
    done = subprocess.run(
        [str(PYTHON), str(Path(__file__).with_name("lora_reader.py")), *arguments],
        env={**os.environ, "PYTHONPATH": str(COMFYUI), "OMP_NUM_THREADS": "1", "LORA_READER_BASE": "random"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {key: (file, report) for (key, file), report in zip(files.items(), reports, strict=True)}


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("method", KINDS)
def test_comfyui_changes_every_weight_as_it_was_trained(results, method, family):
    file, report = results[method, family]
    assert report["not_loaded"] == []
    assert report["weights"] == len(file.entries) == len(LAYERS[family])
    for (_, path), change in file.changes(lambda module: base_weight(LAYERS[family][module[1]].weight.shape)):
        original = KEYS[family].of_diffusers(path).original
        found = torch.tensor(report["changes"][f"diffusion_model.{original}.weight"])
        matrix = change.flatten(1) if change.ndim > 1 else change
        wanted = matrix @ torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(matrix.shape[1]))
        assert (found - wanted).norm() <= 1e-3 * wanted.norm(), path
