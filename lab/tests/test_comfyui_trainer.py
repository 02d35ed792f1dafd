"""lab/comfyui_trainer.py: ComfyUI's own trainer as a peer of lab/bench.py."""

from dataclasses import replace

import pytest
import torch

from core.config import TrainConfig
from core.errors import BadConfig, BadFile
from core.lora.file import LoraFile
from core.models import load_base
from lab.bench import bench
from lab.bench_loops import ComfyLoop
from lab.peer_trainers import ComfyUI
from tests.comfyui.real_widths import COMFY_SD15
from tests.comfyui.setup_comfyui import COMFYUI, PYTHON
from tests.random_models import random_cache
from tests.tooling import RandomTensors, original_shapes, write_photos

CPU = torch.device("cpu")
CONFIG = TrainConfig(rank=2, precision="fp32", resolution=64)
# One level is enough: ComfyUI's trainer asks for no more of the model than what it is.
ONE_LEVEL = {
    "block_out_channels": (320,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


@pytest.fixture(scope="module")
def base():
    shapes = original_shapes(replace(COMFY_SD15, unet={**COMFY_SD15.unet, **ONE_LEVEL}))
    shapes = {name: shape for name, shape in shapes.items() if name.startswith("model.diffusion_model.")}
    draw = RandomTensors(shapes, torch.float32, seed=1)
    # ComfyUI knows diffusers' names of models of the published size only.
    original = {name: draw(name) for name in shapes}
    base = load_base(original)
    return replace(base, components={"denoiser": replace(base.components["denoiser"], tensors=original)})


def test_it_makes_one_step_for_each_turn_and_saves(base, tmp_path):
    loop = ComfyLoop(random_cache(base, CONFIG), base, CONFIG, CPU, COMFYUI, PYTHON)
    steps = [loop.step() for _ in range(2)]
    loop.save(tmp_path / "lora.safetensors")
    loop.close()
    assert LoraFile.read(tmp_path / "lora.safetensors").family == "sd15"
    weights = sum(tensor.nbytes for tensor in base.components["denoiser"].tensors.values())
    for step in steps:
        assert step["processor"] > 0 and 0 < step["seconds"] < 60 and step["peak"] > weights


def test_it_trains_on_photos_and_the_demos_base_model(tmp_path):
    photos = write_photos(tmp_path / "photos", count=2)
    seconds = ComfyUI(COMFYUI, PYTHON).train(photos, 1, [1, 3], tmp_path)
    assert 0 < seconds[0] < seconds[1]
    early, late = (LoraFile.read(tmp_path / f"{steps}.safetensors") for steps in (1, 3))
    assert early.tensors.keys() == late.tensors.keys()
    assert any(not torch.equal(early.tensors[name], late.tensors[name]) for name in late.tensors)


def test_what_is_no_comfyui_is_named_before_anything_is_timed(tmp_path):
    with pytest.raises(BadFile, match=r"--comfyui .*: this folder has no ComfyUI that can train"):
        bench("sd15", CONFIG, device=CPU, comfyui=tmp_path)


def test_what_its_trainer_says_last_is_shown(base, tmp_path):
    (tmp_path / "comfy_extras").mkdir()
    (tmp_path / "comfy_extras" / "nodes_train.py").touch()
    with pytest.raises(BadConfig, match=r"exit status 1; its last line: ModuleNotFoundError: No module named 'comfy'"):
        ComfyLoop(random_cache(base, CONFIG), base, CONFIG, CPU, tmp_path, PYTHON)
