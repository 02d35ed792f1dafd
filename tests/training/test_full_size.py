"""Full-size models: what `train` writes has the names and shapes that sd-scripts gives, and diffusers loads it.

The lists in reference/ were made by running sd-scripts 0.10.1 on models without weights.
"""

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.config import TrainConfig
from core.lora.file import LoraFile
from core.models import load_base
from core.models.families import FAMILIES
from core.storage.safetensors_file import SafetensorsFile
from core.training.methods.lora import attach as attach_lora
from tests.tooling import FULL_SD15, FULL_SDXL, configs, mostly_slow, write_checkpoint, write_photos

REFERENCE = Path(__file__).parents[1] / "reference"
ROOT = Path(__file__).parents[2]
SHAPES = {"sd15": FULL_SD15, "sdxl": FULL_SDXL}
NOT_OURS = {"ss_sd_scripts_commit_hash"}
"""The only key of sd-scripts' metadata that has no meaning here."""


def reference_shapes(family: str, targets: str, rank: int) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a LoRA file, from the list of modules that sd-scripts adapts."""
    suffix = "_conv" if targets == "transformer+conv" else ""
    modules = json.loads((REFERENCE / f"kohya_{family}{suffix}.json").read_text())
    if suffix:
        modules |= json.loads((REFERENCE / f"kohya_{family}.json").read_text())
    result: dict[str, tuple[int, ...]] = {}
    for name, (out_size, in_size, *kernel) in modules.items():
        result[f"{name}.lora_down.weight"] = (rank, in_size, *kernel)
        result[f"{name}.lora_up.weight"] = (out_size, rank, *(1 for _ in kernel))
        result[f"{name}.alpha"] = ()
    return result


@pytest.mark.parametrize("targets", mostly_slow(("transformer", "transformer+conv"), "transformer+conv"))
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_names_and_shapes_are_those_of_sd_scripts(family, targets):
    networks = {}
    for part, config in configs(SHAPES[family]).items():
        with torch.device("meta"):
            networks[part] = FAMILIES[family].build(part, config)
    del networks["vae"]
    with torch.device("meta"):
        adapter = attach_lora(networks, FAMILIES[family], TrainConfig(rank=4, targets=targets), None)
    values = {name: torch.zeros(tensor.shape) for name, tensor in adapter.parameters().items()}
    lora = LoraFile.from_modules(family, adapter.modules(values), {})
    found = {name: tuple(tensor.shape) for name, tensor in lora.tensors.items()}
    assert found == reference_shapes(family, targets, 4)


# Reference -> family, and what its denoiser's config has that is not diffusers' default.
FLOWS = {
    "flux1": ("flux1", {"guidance_embeds": True}),
    "sd35_medium": (
        "sd3",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
         "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("reference", FLOWS)
def test_names_and_shapes_of_rectified_flows_are_those_of_sd_scripts(reference):
    name, config = FLOWS[reference]
    family = FAMILIES[name]
    with torch.device("meta"):
        adapter = attach_lora({"denoiser": family.build("denoiser", config)}, family, TrainConfig(rank=4), None)
    values = {name: torch.zeros(tensor.shape) for name, tensor in adapter.parameters().items()}
    lora = LoraFile.from_modules(name, adapter.modules(values), {}, scheme="kohya")
    found = {name: tuple(tensor.shape) for name, tensor in lora.tensors.items()}
    wanted = reference_shapes(reference, "transformer", 4)
    assert found == {name: shape for name, shape in wanted.items() if name.startswith("lora_unet_")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "targets", "options"),
    [
        ("sd15", "transformer", ["--precision", "fp32", "--steps", "2"]),
        ("sdxl", "transformer+conv", ["--precision", "bf16", "--steps", "2", "--gradient-checkpointing", "on"]),
    ],
)
def test_training_on_a_full_size_checkpoint_writes_a_file_that_diffusers_loads(
    request, tmp_path, family, targets, options
):
    base_path = write_checkpoint(tmp_path / "base.safetensors", SHAPES[family], torch.float16)
    request.addfinalizer(base_path.unlink)  # gigabytes, which pytest would keep
    photos = write_photos(tmp_path / "photos", count=2)
    output = tmp_path / "face.safetensors"
    command = [sys.executable, "-m", "core", "train", photos, "--base", base_path, "--output", output, "--upscale"]
    command += ["--no-check-photos"]
    command += ["--resolution", "256", "--rank", "8", "--alpha", "4", "--targets", targets, "--save-precision", "fp32"]
    command += ["--recipe", "none", "--learning-rate", "1e-3", "--text-encoder-lr", "1e-3", *options]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    check_file(output, family, targets, base_path)
    check_diffusers(LoraFile.read(output), base_path, family)


def check_file(output: Path, family: str, targets: str, base_path: Path) -> None:
    file = SafetensorsFile.open(output)
    assert file.shapes == reference_shapes(family, targets, 8)
    assert all(file[name].item() == 4 for name in file if name.endswith(".alpha"))
    content = output.read_bytes()
    header_size = struct.unpack("<Q", content[:8])[0]
    assert file.metadata["sshs_model_hash"] == hashlib.sha256(content[8 + header_size :]).hexdigest()
    expected = json.loads((REFERENCE / "kohya_metadata_sd15.json").read_text())
    assert set(expected) - set(file.metadata) == NOT_OURS
    digest = hashlib.sha256()
    with base_path.open("rb") as base:
        while chunk := base.read(1 << 20):
            digest.update(chunk)
    assert file.metadata["ss_new_sd_model_hash"] == digest.hexdigest()
    assert file.metadata["ss_output_name"] == output.stem
    assert str(output.parent) not in str(file.metadata)


def check_diffusers(lora: LoraFile, base_path: Path, family: str) -> None:
    """diffusers reads the file into its own layers, and their weight change is alpha / rank * B * A."""
    pipeline = load_base(base_path).pipeline(dtype=torch.float32 if family == "sd15" else torch.bfloat16)
    pipeline.load_lora_weights(str(lora.name), adapter_name="face")
    networks = {"denoiser": pipeline.unet, "text_encoder": pipeline.text_encoder}
    if family == "sdxl":
        networks["text_encoder_2"] = pipeline.text_encoder_2
    changed = 0
    for (part, path), module in lora.modules().items():
        network = networks[part]
        flat = part != "denoiser" and not hasattr(network, "text_model")
        layer = network.get_submodule(path.removeprefix("text_model.") if flat else path)
        change = 4 / 8 * torch.einsum("or,r...->o...", module.up.flatten(1), module.down)
        delta = layer.get_delta_weight("face")
        torch.testing.assert_close(delta, change.to(delta.dtype), rtol=2e-2 if family == "sdxl" else 1e-4, atol=1e-6)
        changed += bool(module.up.abs().max() > 0)
    # SDXL does not use the last layer of its first text encoder, nor what comes after the layer it takes.
    assert changed >= len(lora.modules()) - 6
