"""The diffusion transformers against ComfyUI's own classes: the same weights in original naming predict the same."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.base import load_base
from core.families import FAMILIES
from core.safetensors_file import SafetensorsFile

from .setup_comfyui import COMFYUI, PYTHON

CPU = torch.device("cpu")
FLOWS = [name for name, family in FAMILIES.items() if family.flow_shift]
pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Family -> what ComfyUI's model of it is made of and predicts."""
    folder = tmp_path_factory.mktemp("models")
    paths = {family: folder / f"{family}.safetensors" for family in FLOWS}
    arguments = [str(part) for pair in paths.items() for part in pair]
    subprocess.run(
        [str(PYTHON), str(Path(__file__).with_name("model_writer.py")), *arguments],
        env={**os.environ, "PYTHONPATH": str(COMFYUI)},
        check=True,
    )
    return paths


def part_of(file: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): file[name] for name in file if name.startswith(f"{prefix}.")}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", FLOWS)
def test_a_model_predicts_what_comfyuis_own_class_predicts(files, family, prefix):
    file = SafetensorsFile.open(files[family])
    base = load_base({prefix + name: tensor for name, tensor in part_of(file, "weights").items()})
    assert base.family.name == family
    denoiser = base.load("denoiser", CPU, torch.float32)
    for case in (part_of(file, "case0"), part_of(file, "case1")):
        height, width = (side * base.latent_shape.pixels for side in case["latents"].shape[2:])
        conditioning = base.family.image_conditioning((width, height), (0, 0), (width, height))
        conditioning |= {name: case[name] for name in ("context", "pooled", "guidance") if name in case}
        with torch.no_grad():
            prediction = base.family.predict(denoiser, case["latents"], 1000 * case["time"], conditioning)
        error = (prediction - case["prediction"]).norm() / case["prediction"].norm()
        assert error < 1e-3
