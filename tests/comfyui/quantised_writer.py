"""Run in a process of its own, with ComfyUI on its path: quantised weights as ComfyUI writes them, and as it widens them.

Arguments: the file to write, and perhaps a model. Without one the file has random weights in all of ComfyUI's formats under
the names of layers (`X.weight` and what belongs to it), and what ComfyUI makes of each in bf16 as `dequantised.X`. Of a model
it has all tensors, the matrices in attentions and MLPs quantised in one format after the other.
"""

# pyright: reportMissingImports=false
import json
import re
import sys

import comfy.cli_args

comfy.cli_args.args.cpu = True

import torch  # noqa: E402
from comfy.quant_ops import QuantizedTensor  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

INT8 = {"format": "int8_tensorwise"}
# Name -> (ComfyUI's layout, its options, what is written of the layer, shape of the weight).
LAYERS = {
    "fp8": ("TensorCoreFP8E4M3Layout", {"scale": "recalculate"}, {"format": "float8_e4m3fn"}, (48, 80)),
    "fp8_e5m2": ("TensorCoreFP8E5M2Layout", {"scale": "recalculate"}, {"format": "float8_e5m2"}, (48, 80)),
    "int8": ("TensorWiseINT8Layout", {}, INT8, (48, 80)),
    "int8_rows": ("TensorWiseINT8Layout", {"per_channel": True}, INT8, (48, 80)),
    "convrot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}, INT8 | {"convrot": True}, (48, 512)),
    "convrot_64": (
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
        INT8 | {"convrot": True, "convrot_groupsize": 64},
        (48, 192),
    ),
    "convrot_w4a4": (
        "TensorCoreConvRotW4A4Layout",
        {"convrot_groupsize": 64},
        {"format": "convrot_w4a4", "convrot_groupsize": 64},
        (48, 192),
    ),
    "mxfp8": ("TensorCoreMXFP8Layout", {}, {"format": "mxfp8"}, (256, 256)),
    "mxfp8_uneven": ("TensorCoreMXFP8Layout", {}, {"format": "mxfp8"}, (160, 96)),
    "nvfp4": ("TensorCoreNVFP4Layout", {}, {"format": "nvfp4"}, (256, 128)),
    "nvfp4_uneven": ("TensorCoreNVFP4Layout", {}, {"format": "nvfp4"}, (144, 80)),
}

tensors = {}


def quantise(name: str, weight: torch.Tensor, like: str) -> QuantizedTensor:
    layout, options, said, _ = LAYERS[like]
    quantised = QuantizedTensor.from_float(weight.bfloat16(), layout, **options)
    tensors.update(quantised.state_dict(f"{name}.weight"))
    tensors[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return quantised


def write_random_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    for name, (*_, shape) in LAYERS.items():
        weight = torch.randn(shape, generator=generator) * torch.logspace(-3, 1, shape[0])[:, None]
        tensors[f"dequantised.{name}"] = quantise(name, weight, name).dequantize()


def write_model(path: str) -> None:
    tensors.update(load_file(path))
    matrices = [
        name
        for name in tensors
        if re.search(r"(attn|mlp|linear)[^.]*(\.\w+)?\.weight$", name) and tensors[name].ndim == 2
    ]
    for number, name in enumerate(matrices):
        like = ("fp8", "int8", "int8_rows", "convrot_64", "convrot_w4a4", "mxfp8", "nvfp4")[number % 7]
        quantise(name.removesuffix(".weight"), tensors.pop(name), like)


if len(sys.argv) > 2:
    write_model(sys.argv[2])
else:
    write_random_weights()
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, sys.argv[1])
