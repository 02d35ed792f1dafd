"""FLUX.1's LoRAs for control images (Depth, Canny): own names, biases, new weights of norms, and doubled inputs."""

import json
from types import SimpleNamespace

import pytest
import torch

import core
from core.cli import main
from core.errors import LoraMisfit, UnmatchedKeys
from core.lora import LoraFile, convert_lora, inspect_header
from core.lora.convert import convert_for, to_plain
from core.lora.file import fit
from core.lora.readers import read_by
from core.storage.safetensors_file import save_safetensors
from tools.model_tables import whole

from .test_identity import TABLES
from .test_sidecars import DOWNLOADS, module_of


@pytest.fixture(scope="module")
def control() -> dict[str, torch.Tensor]:
    """The names and shapes of FLUX.1-Depth-dev-lora, at rank 2."""
    (model,) = (model for model in TABLES["models"] if model["title"] == "FLUX.1")
    generator, tensors = torch.Generator().manual_seed(0), {}
    for path, shape in (whole(model["denoiser"]["original"]) | {"img_in": (3072, 128)}).items():
        if len(shape) == 1:
            tensors[f"{path}.scale"] = torch.randn(shape, generator=generator)
            continue
        tensors[f"{path}.lora_A.weight"] = torch.randn(2, shape[1], generator=generator)
        tensors[f"{path}.lora_B.weight"] = torch.randn(shape[0], 2, generator=generator)
        tensors[f"{path}.lora_B.bias"] = torch.randn(shape[0], generator=generator)
    return tensors


def is_same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_an_inspection_says_who_loads_it_and_what_is_missing_here(control, tmp_path, capsys):
    save_safetensors(tmp_path / "depth.safetensors", control)
    assert main(["inspect", str(tmp_path / "depth.safetensors"), "--fast", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["family"], report["identity"]["models"], report["unknown_keys"]) == ("flux1", ["FLUX.1"], [])
    loading = [name for name, reading in report["readers"].items() if not reading["verdict"].startswith("not ")]
    assert report["readers"]["diffusers"]["not_as_meant"] == 1
    assert loading == ["ComfyUI", "diffusers", "InvokeAI"]
    assert "img_in has 128 inputs" in report["needs"] and ", ".join(loading) in report["needs"]
    assert "cannot draw with a control image" in report["needs"]


def test_it_is_converted_like_in_diffusers_and_back(control):
    from diffusers.loaders.lora_conversion_utils import _convert_bfl_flux_control_lora_to_diffusers

    lora = LoraFile.from_tensors(control, {})
    converted = convert_lora(lora, "diffusers").lora
    expected = _convert_bfl_flux_control_lora_to_diffusers(dict(control))
    # It swaps the halves of this matrix too, whose rows are ranks and not shifts and scales.
    key = "transformer.norm_out.linear.lora_A.weight"
    expected[key] = expected[key].flip(0)
    assert len(expected) == 1664 and is_same(converted.tensors, expected)
    refused = read_by("diffusers", lora).objections
    assert list(refused) == ["final_layer.adaLN_modulation.1"] and refused["final_layer.adaLN_modulation.1"].loads
    assert read_by("diffusers", converted).verdict == "loads"
    back = convert_lora(LoraFile.from_tensors(dict(converted.tensors), {}), "comfy").lora
    assert is_same(back.tensors, convert_lora(lora, "comfy").lora.tensors)
    assert [read_by("ComfyUI", file).verdict for file in (back, converted)] == ["loads", "not at all"]
    assert convert_for(converted, ["ComfyUI"]).lora.scheme == "kohya"


def test_it_is_converted_like_in_comfyui(control, monkeypatch):
    stubs = {"comfy": SimpleNamespace(utils=None), "comfy.utils": SimpleNamespace()}
    theirs = module_of(DOWNLOADS / "ComfyUI/comfy/lora_convert.py", stubs, monkeypatch).convert_lora(dict(control))
    assert is_same(convert_lora(LoraFile.from_tensors(control, {}), "comfy").lora.tensors, theirs)


def test_a_file_without_one_of_its_modules_is_refused_by_diffusers_alone(control):
    left_out = ("single_blocks.37.linear2.", "guidance_in.")
    part = {key: tensor for key, tensor in control.items() if not key.startswith(left_out)}
    lora = LoraFile.from_tensors(part, {})
    assert [read_by(name, lora).verdict for name in ("ComfyUI", "diffusers")] == ["loads", "not at all"]


def test_it_is_refused_by_a_base_model_without_the_inputs(control):
    lora = LoraFile.from_tensors(control, {})
    shapes = {("denoiser", "x_embedder"): (3072, 64)}
    of_input = LoraFile.from_tensors({key: tensor for key, tensor in control.items() if key.startswith("img_in.")}, {})
    with pytest.raises(LoraMisfit, match="img_in: it adds inputs for a control image, which this base model does not"):
        fit(of_input, "flux1", shapes).check()
    assert fit(of_input, "flux1", shapes, widens=True).fits
    with pytest.raises(UnmatchedKeys, match="changes a bias or a normalisation layer"):
        to_plain(lora, 1)


def test_applied_it_adds_to_weights_and_biases_and_replaces_norms():
    from diffusers import FluxTransformer2DModel

    config = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    sizes = {"in_channels": 8, "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4)}
    network = FluxTransformer2DModel(**config, **sizes)
    name, norm = "x_embedder", "transformer_blocks.0.attn.norm_added_k"
    down, up, bias, new = torch.randn(1, 8), torch.randn(16, 1), torch.randn(16), torch.randn(8)
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.lora_B.bias": bias}
    tensors = {f"transformer.{key}": tensor for key, tensor in (tensors | {f"{norm}.weight": new}).items()}
    lora = LoraFile.from_tensors(tensors, {"ss_base_model_version": "flux1"})
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with core.apply(lora, {"family": "flux1", "denoiser": network}):
        after = network.state_dict()
        torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + up @ down)
        torch.testing.assert_close(after[f"{name}.bias"], before[f"{name}.bias"] + bias)
        torch.testing.assert_close(after[f"{norm}.weight"], new)
    assert is_same(network.state_dict(), before)


def test_the_norms_of_a_checkpoint_are_no_lora(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(128)})
    with pytest.raises(Exception, match="not a LoRA: no adapter found in its 1 tensor"):
        inspect_header(tmp_path / "a.safetensors")
