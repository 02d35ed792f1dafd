"""Open a base model: a checkpoint file, a mapping of tensors, a diffusers folder or a hub id."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import BadConfig, BadFile, UnknownFamily, UnmatchedKeys
from ..storage.gguf_file import SUFFIX, open_gguf
from ..storage.safetensors_file import SafetensorsFile
from ..storage.stored import LazyTensors, Stored, dtype_and_shape
from . import text
from .base import Base, CaptionEncoder, WeightsFile
from .diffusers_folder import download, is_hub_id, read_folder
from .families import detect_family
from .ldm import VAE_PREFIXES, original_unet_names
from .quantised import dequantised
from .recipe import RECIPES_KEY
from .spec import DENOISER_PREFIX, Component, FamilySpec

Source = str | os.PathLike[str] | Mapping[str, Tensor]
_Source = TypeVar("_Source")
DEMO_FILE = Path(__file__).parent.parent / "demo" / "base.safetensors"


def named_file(source: _Source) -> _Source | Path:
    """Return the file of the base model that comes with the package for "demo", and any other source unchanged.

    Raises BadFile if the file isn't installed, as with the package from ComfyUI's registry.
    """
    if source != "demo":
        return source
    if not DEMO_FILE.exists():
        raise BadFile(
            f"{DEMO_FILE.name}: the demo's base model is missing, since ComfyUI's registry package leaves it out; "
            "install the project from its repository with pip, or use a clone"
        )
    return DEMO_FILE


def load_base(
    source: Source,
    *,
    vae: Source | None = None,
    text_encoders: Sequence[Source] = (),
    tokenizer: str | os.PathLike[str] | None = None,
    caption_encoder: CaptionEncoder | None = None,
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto",
    zero_terminal_snr: bool = False,
) -> Base:
    """Open a base model: a `.safetensors` checkpoint, a mapping of tensors named as in one, a diffusers folder, or a hub id.

    "demo" is the small base model that comes with the package. It knows only faces, in `core.demo`'s style.
    A checkpoint holds all parts, or the denoiser alone. `vae` and `text_encoders` are files or mappings that replace those in
    the checkpoint. `tokenizer` is the folder of a T5 or Qwen tokenizer, for families that have one. With a `caption_encoder`,
    neither text encoders nor a tokenizer are needed. The internet is only used for a hub id (`owner/name` that does not exist
    as a local path).

    v-prediction and zero terminal SNR are recognised by the marker tensors `v_pred` and `ztsnr` and by modelspec metadata,
    unless the options override them. Raises BadFile, UnknownFamily or UnmatchedKeys when it is not a usable base model. Raises
    BadConfig for additional files with a folder or hub id, which has its own.
    """
    if not isinstance(source, str | os.PathLike | Mapping):
        raise BadConfig(
            f"the base model is a {type(source).__name__}: use a file, a folder, a hub id or a mapping of tensors. "
            "Save a diffusers pipeline to a folder with pipeline.save_pretrained(folder)"
        )
    source = named_file(source)
    schedule = {"prediction_type": prediction_type, "zero_terminal_snr": zero_terminal_snr}
    opened_with = None if caption_encoder else _from_files(source, vae, text_encoders, tokenizer, **schedule)
    if not isinstance(source, Mapping):
        path = Path(os.path.abspath(source))  # whose name is not empty for "."
        if has_all_parts(source):
            parts = {"vae": vae, "text_encoders": text_encoders, "tokenizer": tokenizer}
            if given := [what for what, one in parts.items() if one]:
                raise BadConfig(f"{source}: a diffusers folder already has all parts. Leave out {', '.join(given)}")
            folder = path if os.path.exists(path) else download(str(source))
            base = _of_folder(folder, path.name, prediction_type, zero_terminal_snr)
            return replace(base, caption_encoder=caption_encoder, opened_with=opened_with)
    name, file = _opened(source)
    metadata = file.metadata if isinstance(file, SafetensorsFile) else {}
    vae_file = None if vae is None else _opened(vae)[1]
    encoder_files = [_opened(text_encoder) for text_encoder in text_encoders]
    try:
        tensors, given = _one_checkpoint(name, file, vae_file, encoder_files)
        family = detect_family(tensors)
        components = family.split(tensors)
        if not isinstance(source, Mapping):  # In a given mapping, shapes may only be known by computing the tensors.
            for one in components["denoiser"].tensors:
                dtype_and_shape(components["denoiser"].tensors, one)
        _check_variant(family, components)
        text.check_encoders(family, components, given)
    except (UnknownFamily, UnmatchedKeys) as error:
        beside = "" if vae is None else f" with the VAE of {_opened(vae)[0]}"
        raise type(error)(f"{name}{beside}: {error}") from None
    _check_layers(name, components)
    if tokenizer is not None:
        if kind := _tokenizer_kind(family, tensors):
            text.load_tokenizer(os.fspath(tokenizer), kind)
        for part in family.text_encoders:
            if part in components:
                components[part].config["tokenizer"] = os.fspath(tokenizer)
    opened = (file, vae_file, *(encoder for _, encoder in encoder_files))
    found = "v_prediction" if "v_pred" in tensors else metadata.get("modelspec.prediction_type", "epsilon")
    return Base(
        family=family,
        name=name,
        components=components,
        prediction_type=family.prediction_type(found if prediction_type == "auto" else prediction_type),
        zero_terminal_snr=zero_terminal_snr or "ztsnr" in tensors,
        resolution=stated_resolution(metadata, family),
        file=file if isinstance(file, WeightsFile) else None,
        vae_file=vae_file if isinstance(vae_file, WeightsFile) else None,
        files=tuple(one for one in opened if isinstance(one, WeightsFile)),
        caption_encoder=caption_encoder,
        own_recipes=metadata.get(RECIPES_KEY, "{}"),
        opened_with=opened_with,
    )


def has_all_parts(source: str | os.PathLike[str]) -> bool:
    """Return whether a base model is a diffusers folder or a hub id, which take no additional files."""
    # os.path, because Path's own methods raise for a folder without access or a name that is too long.
    return os.path.isdir(source) or (not os.path.exists(source) and is_hub_id(str(source)))


def _from_files(
    source: Source,
    vae: Source | None,
    text_encoders: Sequence[Source],
    tokenizer: str | os.PathLike[str] | None,
    **schedule: Any,
) -> Mapping[str, Any] | None:
    """Return these arguments of `load_base` with absolute paths, or None if one of them is a mapping of tensors."""
    if any(isinstance(one, Mapping) for one in (source, vae, *text_encoders)):
        return None

    def placed(path: Any) -> Any:
        return os.path.abspath(path) if path is not None and os.path.exists(path) else path  # else it is a hub id

    files = {"source": placed(source), "vae": placed(vae), "tokenizer": placed(tokenizer)}
    return files | {"text_encoders": [placed(one) for one in text_encoders]} | schedule


_PARTS = (DENOISER_PREFIX, *VAE_PREFIXES, "cond_stage_model.", "conditioner.", "text_encoders.", "unet.")
"""Prefixes of names in a checkpoint with several parts, or in another naming."""

_MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""Tensors that don't belong to a network but mark how a checkpoint predicts."""


def _opened(source: Source) -> tuple[str, Mapping[str, Tensor]]:
    if isinstance(source, Mapping):
        return "given tensors", source
    path = Path(source)
    if path.suffix.lower() == SUFFIX:
        return path.name, open_gguf(source)
    if not path.suffix and path.name == str(source) and not os.path.lexists(path):
        raise BadFile(f"{source}: not found as a file or folder. For a model on the hub, use owner/name")
    file = SafetensorsFile.open(source)
    return file.path.name, file


def _one_checkpoint(
    what: str,
    source: Mapping[str, Tensor],
    vae: Mapping[str, Tensor] | None,
    text_encoders: Sequence[tuple[str, Mapping[str, Tensor]]],
) -> tuple[Mapping[str, Tensor], list[tuple[str, list[str]]]]:
    """Combine the tensors of all files under the names that they would have in one checkpoint, read on demand.

    Also returns the name of each text encoder file, with the kinds of encoders in it.
    """
    if not source:
        raise UnknownFamily("it does not contain any tensors")
    if any(name.endswith((".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight")) for name in source):
        raise UnknownFamily("this is a LoRA, not a base model")
    if not any(name.startswith(_PARTS) for name in source) and (encoder := text.encoder_in(source)):
        raise UnknownFamily(f"this is a text encoder ({encoder}). Use it together with a base model (text_encoders)")
    source = dequantised(source, what)
    names = {name: Stored(source, name) for name in source}
    if not any(name.startswith(_PARTS) for name in source):
        # The file contains only a denoiser, whose names have no prefix.
        names = {name.removeprefix("diffusion_model."): read for name, read in names.items()}
        originals = original_unet_names(names)
        names = {
            name if name in _MARKERS else DENOISER_PREFIX + originals.get(name, name): read
            for name, read in names.items()
        }
    if vae is not None:
        # The given VAE replaces the one in the checkpoint.
        names = {name: read for name, read in names.items() if not name.startswith(VAE_PREFIXES)}
        for name in vae:
            names[name if name.startswith(VAE_PREFIXES) else VAE_PREFIXES[0] + name] = Stored(vae, name)
    given: list[tuple[str, list[str]]] = []
    for encoder, tensors in text_encoders:
        try:
            encoders = text.encoders_of(dequantised(tensors, encoder))
        except UnknownFamily as error:
            raise UnknownFamily(f"{encoder}: {error}") from None
        given.append((encoder, list(encoders)))
        for kind, stored in encoders.items():
            prefix = text.PREFIX.format(kind)
            names = {name: read for name, read in names.items() if not name.startswith(prefix)}
            names |= {prefix + name: read for name, read in stored.items()}
    return LazyTensors(names), given


def _check_variant(family: FamilySpec, components: Mapping[str, Component]) -> None:
    config = components["denoiser"].config
    if other := family.other_model(config):
        raise UnknownFamily(f"this is {other}, which is not supported yet")
    channels = config.get("in_channels", family.in_channels)
    if channels != family.in_channels:
        kinds = {"9": "an inpainting model", "8": "an InstructPix2Pix model", "384": "a fill (inpainting) model"}
        raise UnknownFamily(
            f"this is {kinds.get(str(channels), 'an unknown variant')} (its denoiser takes {channels} channels), "
            "which is not supported. Train on the model that it was made from"
        )


def _tokenizer_kind(family: FamilySpec, tensors: Mapping[str, Tensor]) -> str | None:
    read = (kind for kind in family.text_kinds if text.has(tensors, kind) and not kind.startswith("clip"))
    return next(read, family.tokenizer)


def _check_layers(name: str, components: Mapping[str, Component]) -> None:
    """Raise BadFile when a part seems to have more layers than tensors. Building them could take minutes and gigabytes."""
    for part, component in components.items():
        named = [count for key, count in component.config.items() if "layers" in key and "window" not in key]
        numbers = [number for number in tree_leaves(named) if isinstance(number, int)]  # they may be lists within lists
        if (layers := max(numbers, default=0)) > len(component.tensors):
            raise BadFile(
                f"{name}: the config of the {part.replace('_', ' ')} has {layers} layers, but there are only "
                f"{len(component.tensors)} tensors"
            )


def stated_resolution(metadata: Mapping[str, str], family: FamilySpec) -> int:
    """Return the resolution of a checkpoint with this metadata: the side, in pixels, of a square as large as modelspec's
    `WIDTHxHEIGHT`. It is the family's if that is missing or invalid."""
    sides = metadata.get("modelspec.resolution", "").lower().split("x")
    if len(sides) == 2 and all(side.isdecimal() and 8 <= int(side) <= 8192 for side in sides):
        return round((int(sides[0]) * int(sides[1])) ** 0.5)
    return family.resolution


def _of_folder(folder: Path, name: str, prediction_type: str, zero_terminal_snr: bool) -> Base:
    read = read_folder(folder)
    try:
        _check_variant(read.family, read.components)
    except UnknownFamily as error:
        raise UnknownFamily(f"{name}: {error}") from None
    _check_layers(name, read.components)
    found = read.scheduler.get("prediction_type", "epsilon")
    latent_side = read.components["denoiser"].config.get("sample_size")
    base = Base(
        family=read.family,
        name=name,
        components=read.components,
        prediction_type=read.family.prediction_type(found if prediction_type == "auto" else prediction_type),
        zero_terminal_snr=zero_terminal_snr or bool(read.scheduler.get("rescale_betas_zero_snr")),
        resolution=read.family.resolution,
        says_distilled=read.says_distilled,
    )
    if isinstance(latent_side, int) and read.family.names.is_unet:
        return replace(base, resolution=latent_side * base.latent_shape.pixels)
    return base
