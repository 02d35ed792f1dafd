"""Build a diffusers pipeline from a base model's networks."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import BadConfig, MissingPackage
from ..storage.stored import LazyTensors, Stored
from . import text
from .clip import TOKENIZER_FOLDER, without_prefix
from .objective import FlowSchedule, Schedule
from .packages import import_diffusers
from .spec import Component, FamilySpec

_PAD_TOKENS = {"clip_l": "<|endoftext|>", "clip_g": "!"}
_FEW_POSITIONS, _MANY_POSITIONS = 256, 4096
"""The numbers of positions where a flow's shift is measured. Between them its logarithm is linear."""


def pipeline_class(family: FamilySpec, dtype: torch.dtype) -> Any:
    """Return the class of the family's pipeline in diffusers.

    Raises MissingPackage if the installed version lacks it, BadConfig for a family or a dtype that it does not support here.
    """
    diffusers = import_diffusers()
    found = getattr(diffusers, family.pipeline_class, None)
    if found is None:
        raise MissingPackage(
            f"{family.title}: diffusers {diffusers.__version__} lacks {family.pipeline_class}. Install a newer diffusers"
        )
    halves = [text.KINDS[kind] for kind in family.text_encoders.values() if kind.startswith("qwen")]
    if halves:
        raise BadConfig(
            f"{family.title}: a pipeline cannot be made of it: {family.pipeline_class} needs the whole of {halves[0]}, but "
            "only the part that reads text is loaded here"
        )
    if dtype == torch.float16 and "t5xxl" in family.text_encoders.values():
        raise BadConfig(f"{family.title}: dtype = {dtype}: T5 overflows in it. Choose torch.bfloat16 or torch.float32")
    return found


def encoder_component(kind: str, component: Component, wanted: Any) -> Component:
    """Convert the text encoder to the class `wanted` that a pipeline requires.

    A CLIP without a projection gets an identity projection, as SD3's has in diffusers.
    """
    if not kind.startswith("clip") or "WithProjection" not in str(wanted):
        return component
    tensors, width = component.tensors, component.config["hidden_size"]
    if "text_projection.weight" in tensors:
        return component
    readers: dict[str, Callable[[], torch.Tensor]] = {name: Stored(tensors, name) for name in tensors}
    config = component.config | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": width}
    readers["text_projection.weight"] = lambda: torch.eye(width)
    return Component(config, LazyTensors(readers))


def encoder_classes(pipeline: Any) -> dict[str, Any]:
    """Return the class of each part that a pipeline of this class takes, from its signature."""
    return {name: given.annotation for name, given in inspect.signature(pipeline.__init__).parameters.items()}


def assemble(
    pipeline: Any,
    family: FamilySpec,
    networks: Mapping[str, nn.Module],
    components: Mapping[str, Component],
    schedule: Schedule,
    is_zero_snr: bool,
) -> Any:
    """Assemble a pipeline of that class from networks by part, with its tokenizers and a scheduler on the base's schedule.

    Optional parts of the family, and parts that base models don't have, are None.
    """
    parts: dict[str, Any] = {"scheduler": _scheduler(schedule, is_zero_snr), "vae": networks["vae"]}
    parts[family.denoiser_folder] = networks["denoiser"]
    for part in family.text_encoders.keys() & networks.keys():
        parts[part] = without_prefix(networks[part])
        tokenizer = _tokenizer(family.text_encoders[part], components[part].config.get("tokenizer"))
        parts[part.replace("text_encoder", "tokenizer")] = tokenizer
    taken = inspect.signature(pipeline.__init__).parameters
    required = [name for name, given in taken.items() if given.default is given.empty and name != "self"]
    parts = dict.fromkeys(required) | parts
    if "requires_safety_checker" in taken:
        parts["requires_safety_checker"] = False
    return pipeline(**parts)


def _tokenizer(kind: str, folder: str | None) -> Any:
    if kind in _PAD_TOKENS:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(TOKENIZER_FOLDER, pad_token=_PAD_TOKENS[kind])
    tokenizer = text.load_tokenizer(folder, kind)
    tokenizer.pad_token = tokenizer.pad_token or "<pad>"
    return tokenizer


def _scheduler(schedule: Schedule, is_zero_snr: bool) -> Any:
    """Build Euler's method for a rectified flow, else DDIM. Schedulers made from its config have the same noise schedule."""
    diffusers = import_diffusers()
    if isinstance(schedule, FlowSchedule):
        few, many = (schedule.shift(positions) for positions in (_FEW_POSITIONS, _MANY_POSITIONS))
        if few == many:
            return diffusers.FlowMatchEulerDiscreteScheduler(shift=few)
        return diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=math.log(few),
            max_shift=math.log(many),
            base_image_seq_len=_FEW_POSITIONS,
            max_image_seq_len=_MANY_POSITIONS,
        )
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=schedule.prediction_type,
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
        rescale_betas_zero_snr=is_zero_snr,
        timestep_spacing="trailing" if is_zero_snr else "leading",
    )
