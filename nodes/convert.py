"""Between ComfyUI's values and core's: models, pictures, LoRAs. The only place that knows both layouts."""

# pyright: reportMissingImports=false

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_sampling
import comfy.supported_models
import numpy as np
import torch
from comfy.quant_ops import QuantizedTensor
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..core.base import Base, load_base
from ..core.config import TrainConfig
from ..core.errors import BadConfig, BadPhoto, FaceLoraError, LoraMisfit, UnknownFamily
from ..core.families.spec import LazyTensors
from ..core.lora_file import Entry, LoraFile
from ..core.lora_tools import convert_lora
from ..core.photos import Photo

FacePhotos = io.Custom("FACE_PHOTOS")
"""list[Photo]: what Load Face Photos gives and Train Face LoRA takes, without loss and decoded only when needed."""
LoraModel = io.Custom("LORA_MODEL")
"""ComfyUI's own type: a dict of tensors under the names of a LoRA file."""

# --- models ---

FAMILIES = {comfy.supported_models.SD15: "sd15", comfy.supported_models.SDXL: "sdxl"}
"""ComfyUI's class of a model -> the family that can be trained."""
STYLE_FAMILIES = FAMILIES | {
    getattr(comfy.supported_models, name): family
    for name, family in {
        "SD3": "sd3", "Flux": "flux1", "FluxSchnell": "flux1", "Flux2": "flux2", "ZImage": "zimage", "QwenImage": "qwen-image",
    }.items()
    if hasattr(comfy.supported_models, name)
}  # fmt: skip
"""The same for all families that style packs have words for."""


def trained_family(model: Any) -> str:
    """The family of a MODEL that can be trained. UnknownFamily names those that can."""
    kind = type(model.model.model_config)
    if kind not in FAMILIES:
        raise UnknownFamily(
            f"MODEL is {kind.__name__}; Train Face LoRA can train Stable Diffusion 1.x (SD15) and XL (SDXL)"
        )
    return FAMILIES[kind]


def base_from(model: Any, clip: Any, vae: Any, config: TrainConfig) -> Base:
    """A core Base of MODEL, CLIP and VAE as they are wired: whatever is patched onto them is merged in when it is read.

    Nothing is loaded onto the device, and no weight is copied until it is used. UnknownFamily for what cannot be trained.
    """
    model_config = model.model.model_config
    if model.injections:
        raise BadConfig(
            "MODEL: something is computed beside its weights (a LoRA in mode 'bypass' or over part of the steps), which "
            "cannot be trained on; put the LoRA into the weights"
        )
    family = trained_family(model)
    denoiser = _readers(model, "diffusion_model.")
    readers: dict[str, Callable[[], Tensor]] = model_config.process_unet_state_dict_for_saving(
        {name.removeprefix("diffusion_model."): read for name, read in denoiser.items()}
    )
    text = {name: read() for name, read in _readers(clip.patcher).items()}
    if ("clip_g" in {name.partition(".")[0] for name in text}) != (family == "sdxl"):
        kind = type(model_config).__name__
        raise UnknownFamily(f"CLIP does not belong to MODEL, which is {kind}; wire both from one checkpoint")
    tensors = model_config.process_clip_state_dict_for_saving(text)
    tensors |= model_config.process_vae_state_dict_for_saving(dict(vae.get_sd()))
    tensors |= _sampling_markers(model)
    readers |= {name: partial(_trainable, tensor) for name, tensor in tensors.items()}
    base = load_base(
        LazyTensors(readers), prediction_type=config.prediction_type, zero_terminal_snr=config.zero_terminal_snr
    )
    # Samples are drawn at the resolution that is trained.
    return replace(base, name=_file_name(model), resolution=config.resolution or base.resolution)


def _readers(patcher: Any, prefix: str = "") -> dict[str, Callable[[], Tensor]]:
    """Name -> how to read it, for every weight and bias of a ComfyUI ModelPatcher, with its patches merged."""
    return {
        name: partial(_merged, name, weight, convert, patches)
        for name, ((weight, convert), *patches) in patcher.get_key_patches(prefix).items()
        if name.endswith((".weight", ".bias"))
    }


def _merged(name: str, weight: Any, convert: Callable[..., Any], patches: list) -> Tensor:
    """The weight with its patches, in the type in which it is stored; 16 bit where that is less. Can be cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    value = (weight.dequantize() if isinstance(weight, QuantizedTensor) else weight).detach()
    if not patches:
        return _trainable(convert(value, inplace=False))
    dtype = value.dtype if value.dtype.itemsize > 1 else torch.float16
    value = convert(value.to(torch.float32, copy=True), inplace=True)
    return _trainable(comfy.lora.calculate_weight(patches, value, name).to(dtype))


def _trainable(tensor: Tensor) -> Tensor:
    """A tensor that autograd can take, of the same memory where possible: those that ComfyUI makes are for inference only."""
    tensor = tensor.detach()
    if not tensor.is_inference():
        return tensor
    if tensor.device.type == "cpu" and tensor.ndim and tensor.is_contiguous():
        return torch.from_numpy(tensor.view(torch.uint8).numpy()).view(tensor.dtype)
    return tensor.clone()


def _sampling_markers(model: Any) -> dict[str, Tensor]:
    """The marker tensors by which checkpoints say what they predict, from the sampling that is set on MODEL."""
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


def _file_name(model: Any) -> str:
    """The checkpoint's file name, for the metadata, where ComfyUI still knows it."""
    loader = getattr(model, "cached_patcher_init", None)
    path = loader[1][0] if loader and loader[1] and isinstance(loader[1][0], str) else "ComfyUI MODEL"
    return Path(path).name


def style_family(model: Any) -> str:
    """The family of a MODEL as style packs call it. UnknownFamily names the families."""
    kind = type(model.model.model_config)
    if kind not in STYLE_FAMILIES:
        known = ", ".join(sorted(set(STYLE_FAMILIES.values())))
        raise UnknownFamily(f"MODEL is {kind.__name__}, for which style packs have no words; choose one of: {known}")
    return STYLE_FAMILIES[kind]


# --- pictures ---


def image_tensor(image: Image.Image) -> Tensor:
    """An IMAGE: float32 (1, height, width, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).unsqueeze(0)


def pictures(images: Tensor) -> Iterator[Image.Image]:
    """The PIL pictures of an IMAGE (batch, height, width, channels)."""
    for image in images:
        array = (image[..., :3].detach().float().cpu().numpy() * 255).round().clip(0, 255).astype(np.uint8)
        yield Image.fromarray(array)


def photos_of(
    values: Sequence[Any] | None, captions: Sequence[str] | None = None, masks: Sequence[Tensor] | None = None
) -> list[Photo]:
    """Photos from what is wired to an input of type FACE_PHOTOS or IMAGE, with captions and masks in the same order."""
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
            raise BadPhoto(f"{len(given)} {what} for {len(photos)} photos; give one for each")
    if captions:
        texts = [" ".join(caption.split()) or None for caption in captions]
        photos = [replace(photo, caption=text) for photo, text in zip(photos, texts, strict=True)]
    if drawn:
        photos = [photo.with_mask(_mask(mask)) for photo, mask in zip(photos, drawn, strict=True)]
    return photos


def _mask(mask: Tensor) -> Image.Image:
    return Image.fromarray((mask.detach().float().cpu().numpy() * 255).round().clip(0, 255).astype(np.uint8))


# --- LoRAs ---


class LoraTensors(dict):
    """A LORA_MODEL that still knows its metadata and its name."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str):
        super().__init__(tensors)
        self.metadata = dict(metadata)
        self.name = name


def lora_model(lora: LoraFile) -> LoraTensors:
    """A LORA_MODEL that does not depend on the LoRA's file."""
    tensors = {key: tensor.clone() for key, tensor in lora.tensors.items()}
    return LoraTensors(tensors, lora.metadata, Path(lora.name).name)


def lora_file(value: Mapping[str, Tensor]) -> LoraFile:
    """The core LoraFile of a LORA_MODEL, from whichever node it comes."""
    return LoraFile.from_tensors(value, getattr(value, "metadata", {}), getattr(value, "name", "LoRA"))


def loadable(lora: LoraFile, model: Any, clip: Any | None) -> tuple[LoraFile, list[Entry]]:
    """The LoRA in a naming scheme of which ComfyUI loads every name, and its entries that have a place: those of text
    encoders have none if there is no CLIP.

    LoraMisfit, naming some of them, when there is no such scheme: ComfyUI itself would only log it and go on.
    """
    shapes = _place_shapes(model.model, comfy.lora.model_lora_keys_unet(model.model, {}))
    if clip is not None:
        shapes |= _place_shapes(clip.cond_stage_model, comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}))
    problems = []
    for candidate in _in_every_scheme(lora):
        entries = [entry for entry in candidate.entries if clip is not None or entry.part == "denoiser"]
        misfits = {key: "is not understood" for key in candidate.unknown_keys}
        for entry in entries:
            if entry.name not in shapes:
                misfits[entry.name] = "has no place"
            elif "bias" in entry.keys:
                misfits[entry.name] = "has a bias in its up matrix"
            elif not _same_size(entry, shapes[entry.name]):
                sizes = f"{list(entry.weight_shape or ())}, it has {list(shapes[entry.name])}"
                misfits[entry.name] = f"changes a weight of shape {sizes}"
        if not misfits:
            return candidate, entries
        problems.append(misfits)
    first = problems[0]
    examples = "; ".join(f"{name} {why}" for name, why in list(first.items())[:3])
    raise LoraMisfit(
        f"{Path(lora.name).name}: is a LoRA for {lora.family} and does not fit MODEL, which is "
        f"{type(model.model.model_config).__name__}: {len(first)} of {len(lora.entries)} modules, e.g. {examples}"
    )


def _in_every_scheme(lora: LoraFile) -> Iterator[LoraFile]:
    yield lora
    for scheme in ("kohya", "comfy"):
        try:
            yield convert_lora(lora, scheme)[0]
        except FaceLoraError:
            continue  # the scheme has no word for something in it; the reason given is that of the file as it is


def _place_shapes(network: Any, places: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name in a LoRA -> shape of the weight that it changes, from ComfyUI's key map.

    The map's values are a weight's name, or (name, (dimension, start, length)) for a part of a weight.
    """
    weights = network.state_dict()
    shapes = {}
    for name, place in places.items():
        weight, part = (place, None) if isinstance(place, str) else place[:2]
        if weight not in weights:  # the map is made for the usual depth
            continue
        shape = list(weights[weight].shape)
        if part is not None:
            shape[part[0]] = part[2]
        shapes[name] = tuple(shape)
    return shapes


def _same_size(entry: Entry, shape: tuple[int, ...]) -> bool:
    # 1x1 convolutions may be written as Linear and kernels flattened, so only the sizes count.
    own = entry.weight_shape
    return own is None or (own[0] == shape[0] and np.prod(own[1:]) == np.prod(shape[1:]))
