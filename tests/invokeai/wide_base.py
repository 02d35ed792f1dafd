"""The demo's base model in SD1.5's width, which InvokeAI asks for: it draws the same faces."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from core.demo import BASE_FILE
from core.models.base import Base
from core.models.opening import load_base
from core.models.spec import Component

SD15_WIDTH = 768
"""The width of SD1.5's text, by which InvokeAI tells its LoRAs."""


def write_wide_base(folder: Path) -> Path:
    """The model as a folder of diffusers: InvokeAI reads the widths of other networks from its configs alone."""
    wide_base().pipeline().save_pretrained(folder)
    return folder


def wide_base() -> Base:
    """The base whose text encoder computes the same numbers several times beside each other."""
    base = load_base(BASE_FILE)
    text, denoiser = base.components["text_encoder"], base.components["denoiser"]
    times = SD15_WIDTH // text.config["hidden_size"]
    wider = ("hidden_size", "intermediate_size", "num_attention_heads", "projection_dim")
    config = {**text.config, **{name: times * text.config[name] for name in wider}}
    tensors = {name: _repeated(name, text.tensors[name], times) for name in text.tensors}
    reading = {
        name: denoiser.tensors[name].float().repeat(1, times) / times
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        else denoiser.tensors[name]
        for name in denoiser.tensors
    }
    parts = {
        "text_encoder": Component(config, tensors),
        "denoiser": Component({**denoiser.config, "cross_attention_dim": SD15_WIDTH}, reading),
    }
    return replace(base, components={**base.components, **parts}, file=None)


def _repeated(name: str, tensor: Tensor, times: int) -> Tensor:
    if "embedding" in name:
        return tensor.float().repeat(1, times)
    if tensor.ndim == 1:
        return tensor.float().repeat(times)
    return torch.kron(torch.eye(times), tensor.float())
