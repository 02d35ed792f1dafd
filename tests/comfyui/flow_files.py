"""Small random files of the diffusion transformers, as ComfyUI users have them: denoiser, VAE, text encoders."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from core.families import FAMILIES
from core.families.ldm import ldm_vae_path
from core.safetensors_file import SafetensorsFile, write_safetensors
from tests.tooling import RandomTensors

from .setup_comfyui import COMFYUI, PYTHON

# The one VAE that ComfyUI knows, with 16 channels in its latents.
KL = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 16,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip


def write_denoisers(folder: Path, names: dict[str, str]) -> None:
    """A small denoiser of ComfyUI's own class for each family, in a file of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {family: folder / f".{name}" for family, name in names.items()}
    arguments = [str(part) for pair in made.items() for part in pair]
    subprocess.run(
        [str(PYTHON), str(Path(__file__).with_name("model_writer.py")), *arguments],
        env={**os.environ, "PYTHONPATH": str(COMFYUI)},
        check=True,
    )
    for family, path in made.items():
        file = SafetensorsFile.open(path)
        weights = {name.removeprefix("weights."): name for name in file if name.startswith("weights.")}
        layout = {name: (torch.bfloat16, tuple(file[full].shape)) for name, full in weights.items()}
        write_safetensors(
            folder / names[family], layout, lambda name, file=file, weights=weights: file[weights[name]].bfloat16()
        )
        path.unlink()


def write_vae(path: Path) -> None:
    """A VAE with random weights, under the names that FLUX.1's has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        state = FAMILIES["flux1"].build("vae", {**KL, "scaling_factor": 0.3611, "shift_factor": 0.1159}).state_dict()
    shapes = {}
    for name, tensor in state.items():
        path_of = ldm_vae_path(name, len(KL["block_out_channels"]))
        size = tuple(tensor.shape)
        shapes[path_of] = (*size, 1, 1) if ".attn_1." in path_of and len(size) == 2 else size
    draw = RandomTensors(shapes, torch.float16, seed=1)
    write_safetensors(path, draw.layout, draw)


def write_text_encoders(folder: Path, names: Sequence[str]) -> None:
    """Files for ComfyUI's lists: what they hold is made up by pack_for_tests.py."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_safetensors(folder / name, {}, lambda _: torch.empty(0))
