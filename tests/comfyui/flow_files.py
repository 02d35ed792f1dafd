"""Small random files of the diffusion transformers, as ComfyUI users have them: denoiser, VAE, text encoders."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from core.models.families import FAMILIES
from core.models.ldm import ldm_vae_path
from core.storage.safetensors_file import SafetensorsFile, save_safetensors, write_safetensors
from tests.tooling import RandomTensors

from .graphs import Node, node
from .scripts import printed_by

# Family -> loader of the text encoders.
CLIPS: dict[str, Node] = {
    "sd3": node("DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="clip_g.safetensors", type="sd3"),
    "flux1": node("DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5xxl_fp16.safetensors", type="flux"),
    "chroma": node("CLIPLoader", clip_name="t5xxl_fp16.safetensors", type="chroma"),
    "flux2": node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="flux2"),
    "zimage": node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2"),
    "qwen-image": node("CLIPLoader", clip_name="qwen_2.5_vl_7b.safetensors", type="qwen_image"),
    "krea2": node("CLIPLoader", clip_name="qwen3vl_4b_fp8_scaled.safetensors", type="krea2"),
    "ernie-image": node("CLIPLoader", clip_name="ministral-3-3b.safetensors", type="flux2"),
    "longcat-image": node("CLIPLoader", clip_name="qwen_2.5_vl_7b.safetensors", type="longcat_image"),
    "ideogram4": node("CLIPLoader", clip_name="qwen3vl_8b_fp8_scaled.safetensors", type="ideogram4"),
}
VAES = {"sd3": "ae.safetensors", "flux1": "ae.safetensors", "chroma": "ae.safetensors",
        "flux2": "flux2-vae.safetensors", "zimage": "ae.safetensors",
        "qwen-image": "qwen_image_vae.safetensors", "krea2": "qwen_image_vae.safetensors",
        "ernie-image": "flux2-vae.safetensors", "longcat-image": "ae.safetensors",
        "ideogram4": "flux2-vae.safetensors"}  # fmt: skip

KL = {
    "block_out_channels": (32, 32, 32, 32), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 1,
}  # fmt: skip


def run_model_writer(paths: Mapping[str, Path], weights_alone: bool = False) -> None:
    """Name of a model in model_writer.py -> the file that is written."""
    printed_by("model_writer.py", "yes" if weights_alone else "no", *(part for pair in paths.items() for part in pair))


def write_denoisers(folder: Path, names: dict[str, str], qwen_vae: Path | None = None) -> None:
    """A small denoiser of ComfyUI's own class for each family, in a file of that name; Qwen-Image's VAE if it is wanted."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {family: folder / f".{name}" for family, name in names.items()}
    run_model_writer(made, weights_alone=True)
    for family, path in made.items():
        file = SafetensorsFile.open(path)
        write_part(file, "weights.", folder / names[family])
        if family == "qwen-image" and qwen_vae is not None:
            write_part(file, "vae.weights.", qwen_vae)
        path.unlink()


def write_part(file: SafetensorsFile, prefix: str, path: Path) -> None:
    """The tensors whose names begin with the prefix, without it, in bf16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name.removeprefix(prefix): file[name].bfloat16() for name in file if name.startswith(prefix)}
    save_safetensors(path, tensors, None)


def write_vae(path: Path) -> None:
    """A VAE with random weights, under original names: FLUX.1's, which Z-Image has too, or, by the file's name, FLUX.2's."""
    flux2 = path.name.startswith("flux2")
    config = KL | {"latent_channels": 32 if flux2 else 16, "use_quant_conv": flux2, "use_post_quant_conv": flux2}
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        state = FAMILIES["flux1"].build("vae", config).state_dict()
    shapes = {}
    for name, tensor in state.items():
        path_of = ldm_vae_path(name, len(KL["block_out_channels"]))
        size = tuple(tensor.shape)
        shapes[path_of] = (*size, 1, 1) if ".attn_1." in path_of and len(size) == 2 else size
    draw = RandomTensors(shapes, torch.float16, seed=1)
    norm = dict.fromkeys(("bn.running_mean", "bn.running_var"), torch.ones(128)) if flux2 else {}
    layout = {**draw.layout, **{name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in norm.items()}}
    write_safetensors(path, layout, lambda name: norm[name] if name in norm else draw(name))


def write_text_encoders(folder: Path, names: Sequence[str]) -> None:
    """Files for ComfyUI's lists: what they hold is made up by pack_for_tests.py."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_safetensors(folder / name, {}, lambda _: torch.empty(0))


def write_flow_models(folder: Path) -> None:
    """What CLIPS and VAES name, and the denoisers `FAMILY.safetensors`, in ComfyUI's folder of models."""
    names = {family: f"{family}.safetensors" for family in CLIPS}
    write_denoisers(folder / "diffusion_models", names, qwen_vae=folder / "vae" / VAES["qwen-image"])
    for name in ("ae.safetensors", "flux2-vae.safetensors"):
        write_vae(folder / "vae" / name)
    encoders = {
        name for loader in CLIPS.values() for key, name in loader["inputs"].items() if key.startswith("clip_name")
    }
    write_text_encoders(folder / "text_encoders", sorted(encoders))
