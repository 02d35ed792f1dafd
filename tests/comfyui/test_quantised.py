"""Quantised files are read as ComfyUI reads them, bit for bit where it does not round on the way."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from core.models.quantised import dequantised
from core.storage.lazy import dtype_and_shape
from core.storage.safetensors_file import SafetensorsFile

from .setup_comfyui import COMFYUI, PYTHON

pytestmark = pytest.mark.comfyui


def test_weights_in_each_format_are_those_that_comfyui_widens(tmp_path):
    path = tmp_path / "quantised.safetensors"
    subprocess.run(
        [str(PYTHON), str(Path(__file__).with_name("quantised_writer.py")), str(path)],
        env={**os.environ, "PYTHONPATH": str(COMFYUI), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    file = SafetensorsFile.open(path)
    read = dequantised(file, "the file")
    layers = [name.removeprefix("widened.") for name in file if name.startswith("widened.")]
    assert len(layers) == 10 and {name for name in read if name in file} == {*read}
    assert {name.removesuffix(".weight") for name in read if name.endswith(".weight")} == set(layers)
    for layer in layers:
        name, widened = f"{layer}.weight", file[f"widened.{layer}"]
        assert dtype_and_shape(read, name) == (torch.bfloat16, tuple(widened.shape)), layer
        if layer.startswith("fp8"):  # whose scale ComfyUI rounds to bf16 before it multiplies
            torch.testing.assert_close(read[name], widened, rtol=2**-7, atol=0)
        else:
            assert torch.equal(read[name], widened), layer
