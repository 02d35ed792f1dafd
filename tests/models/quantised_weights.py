"""Small base models with weights in each of the forms that files have."""

import json
import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from core.models.base import Base
from core.models.quantised import dequantised
from tests.tooling import small_flow_base

MATRICES = r"(blocks|layers|refiner)\."
"""A pattern of the names of layers in a transformer's blocks."""
FORMS = ("fp8", "scaled fp8", "fp8 by rows", "int8", "convrot", "convrot_w4a4", "mxfp8", "nvfp4")


def stored(name: str, weight: Tensor, form: str) -> dict[str, Tensor]:
    """What a file has of a layer whose weight is about this one (for forms that turn or pack it: as large as this one)."""
    generator = torch.Generator().manual_seed(len(name))
    largest = weight.abs().amax(dim=1, keepdim=True).float()
    rows, columns = weight.shape

    def whole(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    def blocks(size: int) -> int:
        return math.ceil(rows / 128) * 128 * math.ceil(columns / size / 4) * 4

    if form == "fp8":
        return {f"{name}.weight": weight.to(torch.float8_e4m3fn)}
    said = {"format": {"int8": "int8_tensorwise", "convrot": "int8_tensorwise"}.get(form, form)}
    if form in ("scaled fp8", "fp8 by rows"):
        said["format"] = "float8_e4m3fn"
        scale = largest / 448 if form == "fp8 by rows" else largest.amax() / 448
        parts = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    elif form in ("int8", "convrot"):
        said |= {"convrot": True, "convrot_groupsize": 16} if form == "convrot" else {}
        parts = {"weight": whole(-127, 128, rows, columns), "weight_scale": largest / 127}
    elif form == "convrot_w4a4":
        said |= {"convrot_groupsize": 16}
        parts = {"weight": whole(-128, 128, rows, columns // 2), "weight_scale": largest[:, 0] / 8}
    elif form == "mxfp8":
        exponents = whole(117, 119, blocks(32), dtype=torch.uint8)
        parts = {"weight": (weight * 2**9).to(torch.float8_e4m3fn), "weight_scale": exponents}
    else:
        parts = {
            "weight": whole(0, 256, rows, columns // 2, dtype=torch.uint8),
            "weight_scale": whole(1, 5, blocks(16), dtype=torch.float32).to(torch.float8_e4m3fn),
            "weight_scale_2": largest.amax() / 24,
        }
    parts["comfy_quant"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def quantised(tensors: dict[str, Tensor], form: str, pattern: str = MATRICES) -> dict[str, Tensor]:
    """The tensors with the matrices in a denoiser's blocks in that form."""
    result = {}
    for name, tensor in tensors.items():
        is_matrix = re.search(pattern, name) and name.endswith(".weight") and tensor.ndim == 2
        result |= stored(name.removesuffix(".weight"), tensor, form) if is_matrix else {name: tensor}
    return result


def quantised_and_full_base(form: str, family: str = "flux1") -> tuple[Base, Base]:
    """A small base whose denoiser has weights in that form, and one with the weights that they stand for."""
    base = small_flow_base(family)
    denoiser = base.components["denoiser"]
    narrow = dequantised(quantised(dict(denoiser.tensors), form), form)
    wide = {name: narrow[name] for name in narrow}
    wide = {name: tensor.float() if tensor.dtype == torch.float8_e4m3fn else tensor for name, tensor in wide.items()}
    bases = [
        replace(base, components={**base.components, "denoiser": replace(denoiser, tensors=tensors)})
        for tensors in (narrow, wide)
    ]
    return bases[0], bases[1]
