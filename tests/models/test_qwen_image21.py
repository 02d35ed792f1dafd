"""Qwen-Image 2.1: its VAE against diffusers, and names that its files may have."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from core.lora.file import LoraFile
from core.models import load_base
from core.models.families import FAMILIES
from core.pictures.generate import PictureJob, generate
from tests.models.family_parts import CPU, write_folder
from tests.models.references import REFERENCES
from tests.tooling import small_flow_base

pytestmark = pytest.mark.ci

FAMILY, REFERENCE = FAMILIES["qwen-image-21"], REFERENCES["qwen-image-21"]


def test_a_file_with_the_layers_that_comfyui_joins_apart_is_the_same_model():
    apart = REFERENCE.denoiser(FAMILY.name).state_dict()
    read = load_base(dict(apart)).load("denoiser", CPU, torch.float32).state_dict()
    assert read.keys() == apart.keys() and all(torch.equal(read[name], tensor) for name, tensor in apart.items())


def test_the_tokenizer_of_a_diffusers_folder_is_that_of_its_processor(tmp_path):
    (tmp_path / "processor").mkdir()
    base = load_base(write_folder(tmp_path, small_flow_base(FAMILY.name, **REFERENCE.takes), REFERENCE.encoder()))
    assert base.components["text_encoder"].config["tokenizer"] == str(tmp_path / "processor")


VAE_WORDS = (
    (r"^quant_conv\.", "conv1."), (r"^post_quant_conv\.", "conv2."), (r"coder\.conv_in\.", "coder.conv1."),
    (r"\.norm_out\.", ".head.0."), (r"\.conv_out\.", ".head.2."), (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."), (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.(\d)\.resnets\.(\d)\.", r".downsamples.\1.downsamples.\2."),
    (r"\.down_blocks\.(\d)\.downsampler\.", r".downsamples.\1.downsamples.2."),
    (r"\.up_blocks\.(\d)\.resnets\.(\d)\.", r".upsamples.\1.upsamples.\2."),
    (r"\.up_blocks\.(\d)\.upsampler\.", r".upsamples.\1.upsamples.3."),
    (r"\.norm1\.", ".residual.0."), (r"(?<=\.\d)\.conv1\.", ".residual.2."), (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."), (r"\.conv_shortcut\.", ".shortcut."),
)  # fmt: skip


def vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=12, dim_mult=[1, 2, 2], temperal_downsample=[False, True], scale_factor_spatial=4
    ).eval()  # fmt: skip


def in_comfyui(name: str) -> str:
    for pattern, new in VAE_WORDS:
        name = re.sub(pattern, new, name)
    return name


@torch.no_grad()
@pytest.mark.parametrize("naming", ["diffusers", "ComfyUI"])
def test_pictures_are_encoded_and_decoded_as_by_diffusers_with_an_opacity_of_one(naming):
    theirs = vae()
    tensors = theirs.state_dict()
    if naming == "ComfyUI":  # a VAE for videos of one frame
        tensors = {
            in_comfyui(name): tensor.unsqueeze(2) if tensor.ndim == 4 and ".to_qkv" not in name and ".proj" not in name
            and ".resample." not in name and "gamma" not in name else tensor
            for name, tensor in tensors.items()
        }  # fmt: skip
        assert "decoder.upsamples.1.upsamples.3.resample.1.weight" in tensors
    base = load_base(REFERENCE.original(FAMILY.name, REFERENCE.denoiser(FAMILY.name)), vae=tensors)
    assert base.latent_shape.pixels == 4 and base.size_multiple == 8
    ours = base.load("vae", CPU, torch.float32)
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, deviation = FAMILY.encode_image(ours, pixels)
    opaque = torch.cat([pixels, torch.ones(2, 1, 16, 24)], 1).unsqueeze(2)
    pipe = SimpleNamespace(vae=theirs, latent_channels=64)
    expected = diffusers.QwenImage21Pipeline._encode_vae_image(pipe, opaque, torch.Generator())  # pyright: ignore
    assert mean.shape == deviation.shape == (2, 64, 4, 6)
    torch.testing.assert_close(mean, expected.squeeze(2))
    shape = (1, -1, 1, 1, 1)
    latents = mean.unsqueeze(2) * torch.tensor(theirs.config.latents_std).view(shape)
    decoded = theirs.decode(latents + torch.tensor(theirs.config.latents_mean).view(shape)).sample[:, :3, 0]
    torch.testing.assert_close(FAMILY.decode_latents(ours, mean), decoded)


def test_the_joined_layers_of_comfyuis_model_are_split_where_a_lora_is_read(tmp_path):
    base, down, up = "diffusion_model.transformer_blocks.0.img_mlp.gate_up", torch.randn(2, 8), torch.randn(48, 2)
    tensors = {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}
    modules = LoraFile(FAMILY.name, {}, tensors).modules()
    assert [path.rpartition(".")[2] for _, path in modules] == ["gate_layer", "proj"]
    assert torch.equal(torch.cat([module.delta() for module in modules.values()]), up @ down)


def test_pictures_are_drawn_through_its_own_vae_without_a_second_prediction():
    base, calls = small_flow_base("qwen-image-21"), []

    def counted(*given: Any) -> Tensor:
        calls.append(given)
        return FAMILY.predict(*given)

    base = replace(base, family=replace(FAMILY, predict=counted))
    job = PictureJob("a photo of sks person", seed=1, steps=2, guidance=base.guidance, size=(64, 32))
    (shot,) = generate(base, [], [job], device=CPU)
    assert shot.image.size == (64, 32) and shot.image.mode == "RGB" and len(calls) == 2
