"""Quantised files and MODELs are read as ComfyUI has them, bit for bit."""

import json
from pathlib import Path

import gguf
import pytest
import torch

from core.lora.file import LoraFile
from core.models import load_base
from core.models.quantised import dequantised
from core.storage.gguf_file import open_gguf
from core.storage.safetensors_file import SafetensorsFile, tensor_bytes
from core.storage.stored import dtype_and_shape, quantised_in
from tests.tooling import write_gguf

from .graphs import node
from .scripts import printed_by
from .test_flow_nodes import loaders, picture, training_of

CPU = torch.device("cpu")


def written(*paths: Path) -> SafetensorsFile:
    """The file that quantised_writer.py writes."""
    printed_by("quantised_writer.py", *paths)
    return SafetensorsFile.open(paths[0])


def test_weights_in_each_format_are_those_that_comfyui_dequantises(tmp_path):
    file = written(tmp_path / "quantised.safetensors")
    read = dequantised(file, "the file")
    layers = [name.removeprefix("dequantised.") for name in file if name.startswith("dequantised.")]
    assert len(layers) == 11 and {name for name in read if name in file} == {*read}
    assert {name.removesuffix(".weight") for name in read if name.endswith(".weight")} == set(layers)
    for layer in layers:
        name, expected = f"{layer}.weight", file[f"dequantised.{layer}"]
        assert dtype_and_shape(read, name) == (torch.bfloat16, tuple(expected.shape)), layer
        assert torch.equal(read[name], expected), layer
        stored = quantised_in(read, name)
        assert stored and stored.nbytes < 0.6 * expected.nbytes
        assert torch.equal(stored.dequantised(torch.bfloat16), expected)


@pytest.mark.parametrize("family", ["flux1", pytest.param("krea2", marks=pytest.mark.slow)])
def test_a_quantised_model_is_trained_on_and_drawn_with_and_the_library_reads_it(server, flow_models, family):
    folder = server.folder / "models" / "diffusion_models"
    file = written(folder / f"quantised-{family}.safetensors", folder / f"{family}.safetensors")
    said = [bytes(file[name].tolist()).decode() for name in file if name.endswith(".comfy_quant")]
    formats = {"float8_e4m3fn", "int8_tensorwise", "convrot_w4a4", "mxfp8", "nvfp4"}
    assert {json.loads(one)["format"] for one in said} == formats
    graph = training_of(family)
    graph["unet"]["inputs"]["unet_name"] = file.path.name
    graph["train"]["inputs"]["name"] = f"quantised-{family}"
    apply = node("FaceLoRAApply", model=["unet", 0], lora=["train", 0], lora_name="(the connected LoRA)",
                 strength_model=1.0, strength_clip=1.0)  # fmt: skip
    result = server.result(graph | {"apply": apply} | picture(family, ["apply", 0]))
    plain = server.run(loaders(family) | {"unet": graph["unet"]} | picture(family, ["unet", 0]))
    assert "not loaded" not in result.log and server.drawn(result).tobytes() != server.drawn(plain).tobytes()
    lora = LoraFile.read(server.folder / "models" / "loras" / f"quantised-{family}.safetensors")
    assert lora.family == family and lora.metadata["ss_sd_model_name"] == file.path.name

    handed = node("TestHandedOver", model=["unet", 0], name="handed.safetensors")
    result = server.result({"unet": graph["unet"], "handed": handed})
    taken = SafetensorsFile.open(server.folder / "output" / "handed.safetensors")
    of_layers = {name.removesuffix("comfy_quant") for name in file if name.endswith(".comfy_quant")}
    for name in file:
        if name.startswith(tuple(of_layers)) and not name.endswith("bias"):
            assert tensor_bytes(taken[name]) == tensor_bytes(file[name]), name
    handed["inputs"]["model"] = ["apply", 0]
    result = server.result(graph | {"apply": apply, "handed": handed})
    patched = SafetensorsFile.open(server.folder / "output" / "handed.safetensors")
    assert set(patched) < set(taken) and {taken.dtypes[name] for name in set(taken) - set(patched)} >= {torch.uint8}
    assert all(dtype.itemsize > 1 for name, dtype in patched.dtypes.items() if name.endswith("attn.qkv.weight"))

    ours, whole = (
        load_base(path).load("denoiser", CPU, torch.float32) for path in (file.path, folder / f"{family}.safetensors")
    )
    for name, weight in whole.named_parameters():
        assert (ours.get_parameter(name) - weight).norm() < 0.2 * weight.norm(), name


def test_a_model_in_the_form_of_comfyui_gguf_is_trained_on_as_it_is(server, flow_models):
    folder = server.folder / "models" / "diffusion_models"
    kinds = gguf.GGMLQuantizationType
    wide = SafetensorsFile.open(folder / "flux1.safetensors")
    of_layers = {name for name, shape in wide.shapes.items() if len(shape) == 2 and shape[1] % 32 == 0}
    in_q8 = {name for name in of_layers if name.startswith("single_blocks.")}
    path = write_gguf(
        folder / "flux1-in-q8.gguf",
        {
            name: (weight, kinds.Q8_0 if name in in_q8 else kinds.BF16 if name in of_layers else kinds.F32)
            for name, weight in wide.items()
        },
    )
    graph = training_of("flux1")
    graph["train"]["inputs"] |= {"name": "of-gguf", "steps": 1, "samples": 0}
    graph["unet"] = node("TestLoadGguf", wide="flux1.safetensors", name=path.name)
    graph["handed"] = node("TestHandedOver", model=["unet", 0], name="handed-gguf.safetensors")
    result = server.result(graph)
    assert in_q8 and set(result.outputs["handed"]["narrow"]) == {f"diffusion_model.{name}" for name in in_q8}
    taken, expected = SafetensorsFile.open(server.folder / "output" / "handed-gguf.safetensors"), open_gguf(path)
    assert all(tensor_bytes(taken[name]) == tensor_bytes(expected[name]) for name in expected)
    assert LoraFile.read(server.folder / "models" / "loras" / "of-gguf.safetensors").family == "flux1"
