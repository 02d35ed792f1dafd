"""The node Sample Headshots, a KSampler that draws only what it hasn't drawn before with the same model."""

# pyright: reportMissingImports=false

import hashlib
import os
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import comfy.samplers
from comfy_api.latest import io
from torch import Tensor

from nodes import common_ksampler  # pyright: ignore  # that of ComfyUI

from ...core.errors import BadConfig
from ...core.storage.safetensors_file import tensor_bytes
from .apply import origin
from .folders import says_no_server_paths
from .style_pack import NOT_VARIED

VARIATION = 0.6
"""The share of the steps in which pictures differ that are drawn to be alike."""
KEPT = 100
"""The number of latents that are kept for each base model, those drawn last."""
_drawn: WeakKeyDictionary[Any, dict[str, dict[str, Any]]] = WeakKeyDictionary()
"""Latents by what they were drawn from, for each MODEL without a LoRA that is still in use."""


class SampleHeadshots(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRASampler",
            display_name="Sample Headshots",
            category="FaceLoRA",
            description="Draws latents like KSampler, one for each item of the lists. If you ask for more pictures, it draws "
            "only the missing ones.",
            search_aliases=["ksampler", "sampler", "draw"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that draws, with the LoRA."),
                *settings_of_each(),
                io.Conditioning.Input("positive", tooltip="The prompt of each picture, from CLIP Text Encode."),
                io.Conditioning.Input("negative", tooltip="The negative prompt of each picture, from CLIP Text Encode."),
                io.Latent.Input("latent_image", tooltip="An empty latent of each picture's size."),
                io.Int.Input(
                    "vary", default=NOT_VARIED, min=NOT_VARIED, max=2**64 - 1, optional=True, advanced=True,
                    tooltip="Seed of the picture to draw more like, the same as in Headshot Style Pack. All others then begin "
                    "with it. -1 (default): none.",
                ),
                io.Float.Input(
                    "variation", default=VARIATION, min=0.01, max=1.0, step=0.01, optional=True, advanced=True,
                    tooltip="The share of the steps in which they differ. A larger share changes more.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latents", is_output_list=True, tooltip="The drawn latents, for VAE Decode."
                )
            ],
        )  # fmt: skip

    @classmethod
    @says_no_server_paths
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, vary=(NOT_VARIED,),
        variation=(VARIATION,),
    ) -> io.NodeOutput:  # fmt: skip
        lists = (model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image)
        # As where ComfyUI itself runs a node for lists: the last item of a shorter list is repeated.
        items = [[one[min(index, len(one) - 1)] for one in lists] for index in range(max(map(len, lists)))]
        if vary[0] == NOT_VARIED:
            return io.NodeOutput([sampled(*item) for item in items])
        chosen = next((sampled(*item) for item in items if item[1] == vary[0]), None)
        if chosen is None:
            raise BadConfig(f"vary = {vary[0]}: set the same seed in Headshot Style Pack, or -1")
        varied = [
            chosen if item[1] == vary[0] else sampled(*item[:-1], chosen, first=first_step(item[2], variation[0]))
            for item in items
        ]
        return io.NodeOutput(varied)


def settings_of_each() -> list[Any]:
    """Return the inputs that say how to draw, with one item for each picture."""
    return [
        io.Int.Input(
            "seed", default=1, min=0, max=2**64 - 1, control_after_generate=False,
            tooltip="Random seed of each picture.",
        ),
        io.Int.Input("steps", default=25, min=1, max=10_000, tooltip="Sampling steps of each picture."),
        io.Float.Input(
            "cfg", default=6.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance (CFG) of each picture."
        ),
        io.Combo.Input(
            "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="The sampling method.",
        ),
        io.Combo.Input(
            "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="How noise is removed step by step.",
        ),
    ]  # fmt: skip


def first_step(steps: int, share: float) -> int:
    """Return the first of the last steps, which are that share of all, at least one."""
    return steps - max(1, round(share * steps))


def sampled(model: Any, *given: Any, first: int = 0) -> dict[str, Any]:
    """Return the latents that `common_ksampler` draws with the model, or has drawn from the same values.

    The latents given to it are drawn again from the step `first` on.
    """
    base, applied = origin(model)
    kept = _drawn.setdefault(base, {})
    digest = hashlib.sha256()
    for part in _content((applied, *given, first)):
        digest.update(part)
    key = digest.hexdigest()
    kept[key] = kept.pop(key, None) or common_ksampler(model, *given, start_step=first)[0]
    for old in list(kept)[:-KEPT]:
        del kept[old]
    return kept[key]


def _content(value: Any) -> Iterator[bytes | memoryview]:
    """Yield what distinguishes a value: of tensors their bytes, of lists and dicts that of their items."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield tensor_bytes(value)
    elif isinstance(value, dict):
        yield from _content([(name, value[name]) for name in sorted(value)])
    elif isinstance(value, list | tuple):
        yield f"{len(value)}[".encode()
        for one in value:
            yield from _content(one)
    elif value is None or isinstance(value, str | int | float):
        yield f"{value!r};".encode()
    else:
        yield os.urandom(16)  # Another object may be just like it and draw something else.
