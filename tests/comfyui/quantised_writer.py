"""Run in a process of its own, with ComfyUI on its path: quantised weights as ComfyUI writes them, and as it widens them.

Argument: the file to write. It has random weights in all of ComfyUI's formats under the names of layers (`X.weight` and what
belongs to it), and what ComfyUI makes of each in bf16 as `widened.X`.
"""

# pyright: reportMissingImports=false
import json
import sys

import comfy.cli_args

comfy.cli_args.args.cpu = True

import torch  # noqa: E402
from comfy.quant_ops import QuantizedTensor  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

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
    "mxfp8": ("TensorCoreMXFP8Layout", {}, {"format": "mxfp8"}, (256, 256)),
    "mxfp8_uneven": ("TensorCoreMXFP8Layout", {}, {"format": "mxfp8"}, (160, 96)),
    "nvfp4": ("TensorCoreNVFP4Layout", {}, {"format": "nvfp4"}, (256, 128)),
    "nvfp4_uneven": ("TensorCoreNVFP4Layout", {}, {"format": "nvfp4"}, (144, 80)),
}

generator = torch.Generator().manual_seed(0)
tensors = {}
for name, (layout, options, said, shape) in LAYERS.items():
    weight = torch.randn(shape, generator=generator) * torch.logspace(-3, 1, shape[0])[:, None]
    quantised = QuantizedTensor.from_float(weight.bfloat16(), layout, **options)
    tensors |= quantised.state_dict(f"{name}.weight")
    tensors[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    tensors[f"widened.{name}"] = quantised.dequantize()
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, sys.argv[1])
