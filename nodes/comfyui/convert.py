"""Conversion between the values of ComfyUI and those of `core`: models, pictures and LoRAs. Only this file uses both."""

# pyright: reportMissingImports=false

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_sampling
import comfy.utils
import numpy as np
import torch
from comfy.model_patcher import get_key_weight
from comfy.quant_ops import QuantizedTensor
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ...core.config import TrainConfig
from ...core.errors import BadConfig, BadPhoto, FaceLoraError, LoraMisfit, UnknownFamily
from ...core.lora.base_weights import BaseLayers
from ...core.lora.convert import convert_lora
from ...core.lora.file import LoraFile, fit
from ...core.lora.names import Entry
from ...core.models.base import Base, CaptionEncoder
from ...core.models.families import FAMILIES, family_without_class
from ...core.models.opening import load_base, stated_resolution
from ...core.models.spec import Conditioning, FewSteps
from ...core.models.text import context_width, pooled_width
from ...core.photos import Photo
from ...core.progress import OnProgress
from ...core.storage.cache_folder import content_key
from ...core.storage.gguf_file import dequantised_array, dtype_of, quantised_gguf
from ...core.storage.safetensors_file import SafetensorsFile, tensor_bytes
from ...core.storage.stored import LazyTensors, LazyValues, QuantisedTensor, Stored, outline
from ...core.tensor_names import NAME_TABLES

FacePhotos = io.Custom("FACE_PHOTOS")
"""The type of list[Photo] between Load Face Photos and Train Face LoRA: photos without loss, decoded only when needed."""
LoraModel = io.Custom("LORA_MODEL")
"""ComfyUI's own type for a LoRA: a dict of tensors under their names in a LoRA file."""

# --- models ---

FAMILY_OF_CLASS = {kind: family for family, table in NAME_TABLES.items() for kind in table.comfyui_classes}
"""The family of a model, by the name of its class in comfy.supported_models."""


def _family(model: Any) -> str | None:
    """Return the family of a MODEL, by its class or by the tensors of a family whose class is not known; None for another."""
    if (kind := _class_name(model)) in FAMILY_OF_CLASS:
        return FAMILY_OF_CLASS[kind]
    found = family_without_class(model.model.diffusion_model.state_dict())
    return found and found.name


def style_family(model: Any) -> str:
    """Return the family of a MODEL for style packs. Raises UnknownFamily for a model that they don't support."""
    if family := _family(model):
        return family
    known = ", ".join(sorted({*FAMILY_OF_CLASS.values(), *FAMILIES}))
    raise UnknownFamily(
        f"MODEL is {_class_name(model)}, which style packs don't support. Set family to one of: {known}"
    )


def few_steps(model: Any) -> FewSteps | None:
    """Return how a MODEL draws whose file's name says that it was distilled to a few steps; None for all others."""
    family, name = FAMILIES.get(_family(model) or ""), _file(model).name
    guided = model.model.model_config.unet_config.get("guidance_embed")
    return family.few_steps_named(name) if family and family.is_named_distilled(name) and not guided else None


def speed_hint(model: Any) -> str:
    """Return which well-known file would let a MODEL draw in a few steps; empty if none is known or it has patches already."""
    few = getattr(FAMILIES.get(_family(model) or ""), "few_steps", None)
    if few is None or not few.known or few_steps(model) or model.patches:
        return ""
    how = (
        f"load it before Apply LoRA, and set the sampler to {few.steps} steps and cfg 1"
        if few.lora
        else "draw on that model"
    )
    return f"These pictures can be drawn in {few.steps} steps without guidance, with {few.known}: {how}."


def trained_family(model: Any) -> str:
    """Return the family of a MODEL, a key of FAMILIES. Raises UnknownFamily for a model that cannot be trained."""
    family = _family(model)
    if family not in FAMILIES:
        known = ", ".join(family.title for family in FAMILIES.values())
        raise UnknownFamily(f"MODEL is {_class_name(model)}. Train Face LoRA can train: {known}")
    return family


def resolution_of(model: Any) -> int:
    """Return the resolution that MODEL's file states, in pixels, or its family's. Raises as `trained_family`."""
    family = FAMILIES[trained_family(model)]
    try:
        metadata = SafetensorsFile.open(_file(model)).metadata
    except FaceLoraError:  # Another kind of file, or none that ComfyUI knows of.
        metadata = {}
    return stated_resolution(metadata, family)


def _class_name(model: Any) -> str:
    return type(model.model.model_config).__name__


def base_from(model: Any, clip: Any, vae: Any, config: TrainConfig) -> Base:
    """Build the base model of MODEL, CLIP and VAE. Patches on them are merged when a weight is read.

    MODEL's quantised weights stay unchanged, except for patched ones, which are dequantised. Nothing is loaded onto the
    device, and no weight is copied until it is used. Raises UnknownFamily for a model that cannot be trained or a CLIP that
    does not belong to it, BadConfig when adapters are computed beside MODEL's weights.
    """
    model_config = model.model.model_config
    if model.injections:
        raise BadConfig(
            "MODEL: training needs LoRAs in the weights, but one is applied in mode 'bypass' or for part of the steps. "
            "In Apply LoRA, set mode to 'into the weights', start_percent to 0 and end_percent to 1"
        )
    family = FAMILIES[trained_family(model)]
    stored = _readers_as_stored(model, "diffusion_model.")
    denoiser = {name.removeprefix("diffusion_model."): read for name, read in stored.items()}
    readers: dict[str, Callable[[], Tensor]] = model_config.process_unet_state_dict_for_saving(denoiser)
    tensors = model_config.process_vae_state_dict_for_saving(dict(vae.get_sd()))
    if family.trains_text_encoders:
        text = {name: read() for name, read in _readers(clip.patcher).items() if name.endswith((".weight", ".bias"))}
        if ("clip_g" in {name.partition(".")[0] for name in text}) != ("clip_g" in family.text_kinds):
            raise UnknownFamily(
                f"CLIP does not belong to MODEL, which is {_class_name(model)}. Connect both from one checkpoint"
            )
        tensors |= model_config.process_clip_state_dict_for_saving(text) | _sampling_markers(model)
    readers |= {name: partial(_trainable, tensor) for name, tensor in tensors.items()}
    base = load_base(
        LazyTensors(readers), prediction_type=config.prediction_type, zero_terminal_snr=config.zero_terminal_snr
    )
    if not family.trains_text_encoders:
        denoiser = base.components["denoiser"].config
        encode = partial(_encode_caption, clip, family.title, context_width(denoiser), pooled_width(denoiser))
        base = replace(base, caption_encoder=CaptionEncoder(encode, _clip_fingerprint(clip)))
    # Samples are drawn at the resolution that is trained.
    return replace(base, name=_file(model).name, resolution=config.resolution or resolution_of(model))


_OF_QUANTISATION = ("comfy_quant", "input_scale", "pre_quant_scale", "weight_scale", "weight_scale_2")
"""Endings of the tensors that belong to a quantised weight; dequantising the weight makes use of them."""
_SAID = (".comfy_quant", ".pre_quant_scale")
"""Endings of the tensors that describe the quantisation, beside its scales. Weights with the latter cannot be read."""


@dataclass(frozen=True)
class _Weight:
    """A parameter of a ComfyUI model without its patches, and the changes to it."""

    stored: Any
    """A tensor, or one of the classes of quantised ones."""
    convert: Callable[..., Any] | None
    patches: list

    def read(self, name: str) -> Tensor:
        """Return it with its patches merged, in its dtype (float16 for 8 bits). Raises when the user cancels."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        value = self._dequantised(name).detach()
        if not self.patches:
            return _trainable(self.convert(value, inplace=False) if self.convert else value)
        dtype = value.dtype if value.dtype.itemsize > 1 else torch.float16
        value = value.to(torch.float32, copy=True)
        value = self.convert(value, inplace=True) if self.convert else value
        return _trainable(comfy.lora.calculate_weight(self.patches, value, name).to(dtype))

    def _dequantised(self, name: str) -> Tensor:
        """Return it without quantisation, from ComfyUI's classes or the pack ComfyUI-GGUF."""
        if isinstance(self.stored, QuantizedTensor):
            return self.stored.dequantize()
        if getattr(self.stored, "tensor_type", None) is not None:
            data = self.stored.as_subclass(Tensor).cpu().numpy()
            return dequantised_array(data, self.stored.tensor_type, tuple(self.stored.tensor_shape), name)
        return self.stored


def _weights(patcher: Any, prefix: str = "") -> dict[str, _Weight]:
    """Return the parameters of a ComfyUI ModelPatcher by name.

    ComfyUI's own `get_key_patches` fails at quantised weights, which have more in the state dict than attributes.
    """
    model = patcher.model
    attributes = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    weights = {}
    for name in patcher.model_state_dict(prefix):
        if name not in attributes or name.endswith(_OF_QUANTISATION):
            continue
        weight, _, convert = get_key_weight(model, name)
        if name in patcher.backup:
            weight = patcher.backup[name].weight
        if name in patcher.hook_backup:
            weight = patcher.hook_backup[name][0]
        if isinstance(weight, Tensor):
            weights[name] = _Weight(weight, convert, patcher.patches.get(name, []))
    return weights


def _readers(patcher: Any) -> dict[str, Callable[[], Tensor]]:
    """Return a function for each parameter of a ComfyUI ModelPatcher, by name, that reads it with its patches merged."""
    return {name: partial(weight.read, name) for name, weight in _weights(patcher).items()}


def _readers_as_stored(patcher: Any, prefix: str) -> dict[str, Callable[[], Tensor]]:
    """Return the same functions, but with quantised weights without patches as they are stored in ComfyUI's files.

    Weights of the pack ComfyUI-GGUF are one tensor each.
    """
    readers: dict[str, Callable[[], Tensor]] = {}
    stored: dict[str, Any] = {}
    beside = patcher.model_state_dict(prefix)
    for name, weight in _weights(patcher, prefix).items():
        if isinstance(weight.stored, QuantizedTensor) and not weight.patches:
            layer = name.removesuffix(".weight")
            stored |= weight.stored.state_dict(name)
            stored |= {name: beside[name] for end in _SAID if (name := layer + end) in beside}
        elif weight.patches or weight.convert:
            readers[name] = partial(weight.read, name)
        elif getattr(weight.stored, "tensor_type", None) is not None:
            readers[name] = _OfGguf({}, name, weight)
        else:
            stored[name] = weight.stored
    usable = LazyValues({name: partial(_usable, tensor) for name, tensor in stored.items()})
    return readers | {name: Stored(usable, name) for name in stored}


def _usable(tensor: Tensor) -> Tensor:
    """Return a tensor of ComfyUI as autograd accepts it. Raises when the user cancels."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    return _trainable(tensor)


@dataclass(frozen=True, eq=False)
class _OfGguf(Stored):
    """A reader of a weight of the pack ComfyUI-GGUF without patches."""

    weight: _Weight

    def __call__(self) -> Tensor:
        return self.weight.read(self.name)

    def layout(self) -> tuple[torch.dtype, tuple[int, ...]]:
        return dtype_of(self.weight.stored.tensor_type), tuple(self.weight.stored.tensor_shape)

    def quantised(self, read: bool = True) -> QuantisedTensor | None:
        stored, data = self.weight.stored, _trainable(self.weight.stored.as_subclass(Tensor))
        data = data if read else outline(data)
        return quantised_gguf(data, stored.tensor_type.name, tuple(stored.tensor_shape))


def _encode_caption(clip: Any, title: str, width: int, pooled: int | None, caption: str) -> Conditioning:
    """Encode a caption as text without prompt weights. Raises UnknownFamily for another model's CLIP."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    with torch.inference_mode():
        try:
            tokens = clip.tokenize(caption, disable_weights=True)
        except TypeError:  # the tokenizer of a text encoder without prompt weights lacks the option
            tokens = clip.tokenize(caption)
        given = clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
    for what, name, wanted in (("texts are", "cond", width), ("pooled texts are", "pooled_output", pooled)):
        found = given[name].shape[-1] if isinstance(given.get(name), Tensor) else None
        if wanted not in (None, found):
            raise UnknownFamily(
                f"CLIP does not belong to MODEL, which is {title}: {what} {wanted} wide there, this CLIP "
                f"has {found or 'none'}. Load the text encoders of {title}, and set the loader's type for it"
            )
    names = {"context": "cond", "pooled": "pooled_output", "context_mask": "attention_mask"}
    # ComfyUI leaves out a mask that hides nothing.
    return {"context_mask": torch.ones(given["cond"].shape[:2])} | {
        ours: given[theirs].clone().cpu() for ours, theirs in names.items() if isinstance(given.get(theirs), Tensor)
    }


def _clip_fingerprint(clip: Any) -> str:
    digest = hashlib.sha256(f"{type(clip.cond_stage_model).__name__} {clip.layer_idx}".encode())
    for name, read in sorted(_readers(clip.patcher).items()):
        tensor = read()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor.contiguous()))
    return digest.hexdigest()


def _trainable(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd accepts, unlike tensors made in inference mode. It shares their memory if possible."""
    tensor = tensor.detach()
    if not tensor.is_inference():
        return tensor
    if tensor.device.type == "cpu" and tensor.ndim and tensor.is_contiguous():
        return torch.from_numpy(tensor.view(torch.uint8).numpy()).view(tensor.dtype)
    return tensor.clone()


def _sampling_markers(model: Any) -> dict[str, Tensor]:
    """Return the marker tensors of a checkpoint's prediction type, from the sampling set on MODEL.

    Raises UnknownFamily for a sampling that cannot be trained.
    """
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) or isinstance(
        sampling, comfy.model_sampling.EDM | comfy.model_sampling.X0
    ):
        raise UnknownFamily(f"MODEL's sampling is {type(sampling).__bases__[0].__name__}, which cannot be trained")
    markers = {}
    if isinstance(sampling, comfy.model_sampling.V_PREDICTION):
        markers["v_pred"] = torch.tensor([])
    if float(sampling.sigma_max) > 1000:  # 14.6 in SD's schedule; the one with zero terminal SNR ends in the thousands
        markers["ztsnr"] = torch.tensor([])
    return markers


def _file(model: Any) -> Path:
    """Return the checkpoint file; `ComfyUI MODEL`, which doesn't exist, if ComfyUI no longer has its path."""
    loader = getattr(model, "cached_patcher_init", None)
    return Path(loader[1][0] if loader and loader[1] and isinstance(loader[1][0], str) else "ComfyUI MODEL")


# --- pictures ---


def image_tensor(image: Image.Image) -> Tensor:
    """Return the picture as an IMAGE of ComfyUI: float32 (1, height, width, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).unsqueeze(0)


def pictures(images: Tensor) -> Iterator[Image.Image]:
    """Yield the pictures of an IMAGE of ComfyUI, which is (batch, height, width, channels) in [0, 1]."""
    for image in images:
        array = (image[..., :3].detach().float().cpu().numpy() * 255).round().clip(0, 255).astype(np.uint8)
        yield Image.fromarray(array)


def picture_key(image: Image.Image) -> str:
    """Return a key of the picture's size and pixels."""
    return content_key(image.size, hashlib.sha256(image.tobytes()).hexdigest())


def moving_bar() -> OnProgress:
    """Return a function that moves the bar of the node at work, and raises if the user has cancelled the run."""
    bar = comfy.utils.ProgressBar(1)

    def move(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return move


def photos_of(
    values: Sequence[Any] | None, captions: Sequence[str] | None = None, masks: Sequence[Tensor] | None = None
) -> list[Photo]:
    """Return the photos connected to an input of type FACE_PHOTOS or IMAGE, with captions and masks in the same order.

    An all-black mask, which Load Image makes for a picture without transparency, is ignored. Raises BadPhoto if the number of
    captions or masks differs from that of the photos.
    """
    photos: list[Photo] = []
    for value in values or ():
        if isinstance(value, Tensor):
            photos += [
                Photo.from_image(image, f"image {len(photos) + i + 1}") for i, image in enumerate(pictures(value))
            ]
        else:
            photos += value
    drawn = [mask for batch in masks or () for mask in batch.reshape(-1, *batch.shape[-2:])]
    for what, given in (("captions", captions), ("masks", drawn)):
        if given and len(given) != len(photos):
            raise BadPhoto(f"{len(given)} {what} for {len(photos)} photos. Connect one for each photo")
    if captions:
        texts = [" ".join(caption.split()) or None for caption in captions]
        photos = [replace(photo, caption=text) for photo, text in zip(photos, texts, strict=True)]
    if drawn:
        photos = [
            photo.with_mask(mask_picture(mask)) if mask.any() else photo
            for photo, mask in zip(photos, drawn, strict=True)
        ]
    return photos


def mask_picture(mask: Tensor) -> Image.Image:
    """Return a mask (h, w) of ComfyUI, 0 to 1, as a grey picture."""
    return Image.fromarray((mask.detach().float().cpu().numpy() * 255).round().clip(0, 255).astype(np.uint8))


# --- LoRAs ---


class LoraTensors(dict):
    """A LORA_MODEL that keeps the metadata and the name of the LoRA, which ComfyUI's own type drops."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str):
        super().__init__(tensors)
        self.metadata = dict(metadata)
        self.name = name


def lora_model(lora: LoraFile) -> LoraTensors:
    """Return the LoRA as a LORA_MODEL, with its tensors copied into memory, so that its file may change."""
    tensors = {key: tensor.clone() for key, tensor in lora.tensors.items()}
    return LoraTensors(tensors, lora.metadata, Path(lora.name).name)


def lora_file(value: Mapping[str, Tensor]) -> LoraFile:
    """Return the LoraFile of a LORA_MODEL from any node. Raises UnknownFamily when it is not a known LoRA."""
    return LoraFile.from_tensors(value, getattr(value, "metadata", {}), getattr(value, "name", "LoRA"))


def loadable(lora: LoraFile, model: Any, clip: Any | None) -> tuple[LoraFile, list[Entry]]:
    """Return the LoRA in a naming scheme in which ComfyUI loads every module, and its entries.

    Without a CLIP, modules of text encoders are left out. Raises LoraMisfit if the LoRA doesn't fit the models, or no scheme
    works. ComfyUI itself would only log that.
    """
    shapes = _shapes("model.", model.model)
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is None:
        lora = lora.of_parts({"denoiser"})
    else:
        shapes |= _shapes("text_encoders.", clip.cond_stage_model)
        names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names)
    base = BaseLayers(shapes, _file(model).name, _family(model))
    fit(lora, base.family, base.shapes, base.biased, widens=True).check(Path(lora.name).name)
    skipped: list[str] = []
    for candidate in _in_every_scheme(lora):
        skipped = [entry.name for entry in candidate.entries if entry.name not in names or "bias" in entry.keys]
        if not skipped:
            return candidate, list(candidate.entries)
    raise LoraMisfit(
        f"{Path(lora.name).name}: ComfyUI would skip {len(skipped)} of {len(lora.entries)} modules, e.g. "
        f"{', '.join(skipped[:3])}, because it doesn't support their names or a bias in the up matrix"
    )


def _shapes(prefix: str, module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a module, by its name after the prefix. Quantised weights have their full shape."""
    stored = {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return stored | {prefix + name: tuple(weight.shape) for name, weight in module.named_parameters()}


def _in_every_scheme(lora: LoraFile) -> Iterator[LoraFile]:
    yield lora
    for scheme in ("kohya", "comfy"):
        try:
            yield convert_lora(lora, scheme)[0]
        except FaceLoraError:
            continue  # The scheme cannot name a module. Then the error is about the file's own names.
