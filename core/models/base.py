"""Base models from a checkpoint file, a mapping of tensors, a diffusers folder or a hub id, whose networks load on demand."""

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..device import free_memory
from ..errors import BadConfig, BadFile, FaceLoraError, UnknownFamily, UnmatchedKeys
from ..storage.gguf_file import SUFFIX, open_gguf
from ..storage.lazy import LazyTensors, Stored, dtype_and_shape, narrow_in
from ..storage.safetensors_file import SafetensorsFile, tensor_bytes
from ..tensor_names import NAME_TABLES, PUBLISHED_BLOCKS, NameTable, blocks_in_a_level
from . import text
from .diffusers_folder import download, is_hub_id, read_folder
from .families import detect_family
from .ldm import VAE_PREFIXES, original_unet_names
from .memory_plan import MemoryPlan, MemorySaver
from .objective import FlowSchedule, Schedule
from .pipeline import assemble, encoder_classes, encoder_component, pipeline_class
from .quantised import dequantised
from .recipe import RECIPES_KEY
from .spec import (
    DENOISER_PREFIX,
    Component,
    Conditioning,
    FamilySpec,
    FewSteps,
    LatentShape,
    PredictionType,
    materialise,
)

Source = str | os.PathLike[str] | Mapping[str, Tensor]


@dataclass(frozen=True)
class CaptionEncoder:
    """Text encoders from outside of `core`, such as the CLIP that is wired to a node of ComfyUI."""

    encode: Callable[[str], Conditioning]
    """A function that gives the conditioning of a caption, a batch of 1, as the family's `encode_text` does."""
    fingerprint: str
    """A hash that is equal for equal encoders, as a part of the cache's keys."""


LARGE_ENCODER = 2 * 2**30
"""The size in bytes from which a text encoder counts as a language model."""


@dataclass(frozen=True)
class Base:
    """A base model. Its networks are loaded one by one, when they are needed."""

    family: FamilySpec
    name: str
    """The name of its file or folder, without the path."""
    components: Mapping[str, Component]
    """The networks by part: denoiser, vae, text_encoder, ..., as the family names them."""
    prediction_type: PredictionType
    zero_terminal_snr: bool
    resolution: int
    """The side of the square that the model was trained at, in pixels."""
    says_distilled: bool = False
    """Whether its diffusers folder says that it was distilled to a few steps."""
    file: SafetensorsFile | None = field(default=None, repr=False)
    """The checkpoint file; None for a folder or a mapping."""
    vae_file: SafetensorsFile | None = field(default=None, repr=False)
    """The VAE's own file; None when it has none."""
    files: tuple[SafetensorsFile, ...] = field(default=(), repr=False)
    """All files that were opened, those of text encoders too."""
    caption_encoder: CaptionEncoder | None = field(default=None, repr=False)
    """The encoder of captions that takes the place of the base model's own text encoders."""
    own_recipes: str = field(default="{}", repr=False)
    """The recipes in the metadata of its file, as JSON that `recipe.read_recipes` reads."""
    opened_with: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    """The arguments with which `load_base` opens it in another process too; None where it is not from files alone."""
    _digests: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The sha256 over a part's tensors, by part, for the parts asked for so far."""

    @cached_property
    def latent_shape(self) -> LatentShape:
        return self.family.latent_shape(self.components)

    @property
    def names(self) -> NameTable:
        """The names of its modules in LoRA files."""
        table = NAME_TABLES[self.family.name]
        blocks = blocks_in_a_level(self.components["denoiser"].config)
        return table if blocks == PUBLISHED_BLOCKS else table.for_other_blocks()

    @property
    def size_multiple(self) -> int:
        """The number of pixels that a picture's width and height must be multiples of."""
        return self.latent_shape.pixels * self.latent_shape.multiple

    @property
    def embeds_guidance(self) -> bool:
        """Whether the denoiser takes the guidance scale as an input, so that it predicts once and not twice a step."""
        return self.family.embeds_guidance(self.components["denoiser"].config)

    @property
    def is_distilled(self) -> bool:
        """Whether the model is known to be distilled to a few steps, which training on it would undo."""
        return self.says_distilled or self.family.is_distilled(self.components["denoiser"].config)

    @property
    def is_flow_map(self) -> bool:
        """Whether the model predicts the mean velocity over a step, of which it is told where it leads to."""
        return self.family.is_flow_map(self.components["denoiser"].config)

    def as_distilled(self) -> "Base":
        """The base model as one that says that it was distilled to a few steps, for one of which that is known otherwise."""
        base = replace(self, says_distilled=True)
        base._digests.update(self._digests)
        return base

    @property
    def is_named_distilled(self) -> bool:
        """Whether the model's name is that of one that was distilled to a few steps."""
        return re.search(self.family.distilled_names, self.name, re.IGNORECASE) is not None

    @property
    def few_steps(self) -> FewSteps | None:
        """How the model draws where it, or else its name, says that it was distilled to a few steps; None for all others."""
        named = self.is_named_distilled and not self.embeds_guidance
        return self.family.few_steps if self.is_distilled or named else None

    @property
    def steps(self) -> int:
        """The number of sampling steps that suits the model."""
        return self.few_steps.steps if self.few_steps else self.family.steps

    @property
    def guidance(self) -> float:
        """The scale of guidance that suits the model."""
        return 1.0 if self.few_steps else self.family.guidance

    def schedule(self) -> Schedule:
        """The noise schedule that the model is trained on, which also knows what it predicts."""
        return self.family.schedule(self.prediction_type, self.zero_terminal_snr, self.components)

    def sampling_schedule(self) -> Schedule:
        """The noise schedule that the model draws on."""
        schedule, shift = self.schedule(), self.few_steps and self.few_steps.shift
        if shift is None or not isinstance(schedule, FlowSchedule):
            return schedule
        return replace(schedule, shift=lambda positions: shift)

    def load(self, part: str, device: torch.device, dtype: torch.dtype, as_stored: bool = False) -> nn.Module:
        """The network of a part with frozen weights, in evaluation mode. Raises BadFile when the base model lacks it.

        With `as_stored`, weights that are quantised or in fp8 take the memory that they take in their file: layers widen them
        whenever they are used, and compute the same. They cannot be trained then, nor changed.
        """
        what = f"{self.name}: the {part.replace('_', ' ')}"
        return materialise(self._empty(part), self._component(part).tensors, what, device, dtype, as_stored)

    @cached_property
    def is_narrow(self) -> bool:
        """Whether weights of the denoiser are stored in fewer bits than a training computes with."""
        tensors = self._component("denoiser").tensors
        return any(narrow_in(tensors, name, read=False) for name in tensors)

    def _empty(self, part: str) -> nn.Module:
        """The network of a part without numbers. Raises BadFile when the part is lacking or its config makes no sense."""
        component = self._component(part)
        what = f"{self.name}: the config of the {part.replace('_', ' ')}"
        named = {key: count for key, count in component.config.items() if "layers" in key and "window" not in key}
        if (layers := max(_numbers_in(list(named.values())), default=0)) > len(component.tensors):
            raise BadFile(f"{what} has {layers} layers, and there are {len(component.tensors)} tensors")
        try:
            return self.family.build_empty(part, component.config)
        except FaceLoraError:
            raise
        except Exception as error:  # what diffusers and transformers raise for a config with odd values can be anything
            reason = next(iter(str(error).splitlines()), "")
            raise BadFile(f"{what} makes no sense: {type(error).__name__}: {reason}") from error

    def weight_bytes(self, part: str, dtype: torch.dtype, as_stored: bool = False) -> int:
        """The bytes of the part's weights in that dtype, `as_stored` as in `load`. BadFile when the base has no such part."""
        tensors = self._component(part).tensors
        narrow = {name: narrow_in(tensors, name, read=False) if as_stored else None for name in tensors}
        return sum(
            weight.nbytes if weight else dtype.itemsize * math.prod(dtype_and_shape(tensors, name)[1])
            for name, weight in narrow.items()
        )

    def _component(self, part: str) -> Component:
        if part not in self.components:
            option = "vae" if part == "vae" else "text_encoders"
            raise BadFile(f"{self.name}: has no {part.replace('_', ' ')}; give its file too ({option})")
        return self.components[part]

    def load_text_encoders(
        self, device: torch.device, dtype: torch.dtype, as_stored: bool = True
    ) -> dict[str, nn.Module]:
        """The text encoders by part; empty when a `caption_encoder` takes their place.

        A language model (the encoders of FLUX.1 and later) is loaded in bf16, since T5 overflows in fp16, or in `dtype` when
        most of it is stored in more than 16 bits. Where it does not fit, weights that are quantised or in fp8 stay as they are
        stored (`as_stored`, as in `load`). Where that is too much for a GPU, its layers stay in the computer's memory, and come
        to the GPU one by one. Raises BadFile when one is missing.
        """
        if self.caption_encoder:
            return {}
        encoders = {}
        for part in self.text_encoders:
            tensors = self._component(part).tensors
            layouts = [dtype_and_shape(tensors, name) for name in tensors]
            if sum(stored.itemsize * math.prod(shape) for stored, shape in layouts) < LARGE_ENCODER:
                encoders[part] = self.load(part, device, dtype)
                continue
            # Files with weights in few bits have norms in float32.
            in_more = sum(math.prod(shape) * (1 if stored.itemsize > 2 else -1) for stored, shape in layouts) > 0
            kept = dtype if in_more else torch.bfloat16
            free = free_memory(device)
            room = math.inf if free is None else free / 1.2
            narrow = as_stored and self.weight_bytes(part, kept) >= room
            stays = device.type != "cuda" or self.weight_bytes(part, kept, narrow) < room
            encoders[part] = self.load(part, device if stays else torch.device("cpu"), kept, narrow)
            if not stays:
                MemorySaver(encoders[part], device).adopt(MemoryPlan(offload=1))
        return encoders

    def pipeline(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Any:
        """A diffusers pipeline of the base model, such as StableDiffusionXLPipeline, on the device (the CPU for None).

        Each network is loaded once, and a weight that has the dtype already is not copied. Any scheduler of diffusers can be
        made from the config of its own. Raises BadFile when a part is missing, MissingPackage when the installed diffusers has
        no such pipeline, and BadConfig for a family of which none can be made.
        """
        made = pipeline_class(self.family, dtype)
        wanted = encoder_classes(made)
        encoders = {
            part: encoder_component(self.family.text_encoders[part], self._component(part), wanted[part])
            for part in self.text_encoders
        }
        whole = replace(self, components={**self.components, **encoders})
        networks = {
            part: whole.load(part, device or torch.device("cpu"), dtype) for part in ("denoiser", "vae", *encoders)
        }
        return assemble(made, self.family, networks, whole.components, self.schedule(), self.zero_terminal_snr)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The parts that encode text: those of the family, without optional ones that are not there."""
        optional = self.family.optional_encoders
        return tuple(part for part in self.family.text_encoders if part in self.components or part not in optional)

    def fingerprint(self, *parts: str) -> str:
        """A sha256 over the tensors of the parts, equal for equal weights from any source. The tensors are read once."""
        for part in parts:
            if part not in self._digests:
                self._digests[part] = _digest(part, self._component(part).tensors)
        return hashlib.sha256("".join(self._digests[part] for part in parts).encode()).hexdigest()

    @property
    def text_fingerprint(self) -> str:
        """A hash that is equal for equal encoders of captions."""
        return self.caption_encoder.fingerprint if self.caption_encoder else self.fingerprint(*self.text_encoders)

    @property
    def identity(self) -> str:
        """A text that is equal for base models with the same weights and the same way to predict."""
        prediction = f"{self.prediction_type} {self.zero_terminal_snr}"
        return f"{self.fingerprint('denoiser', 'vae')} {self.text_fingerprint} {prediction}"

    @cached_property
    def sha256(self) -> str | None:
        """The sha256 of the checkpoint file (`ss_new_sd_model_hash`); None when there is no such file."""
        return self.file.sha256() if self.file else None

    @cached_property
    def vae_sha256(self) -> str | None:
        """The sha256 of the VAE's own file; None when it has none."""
        return self.vae_file.sha256() if self.vae_file else None

    @cached_property
    def legacy_hash(self) -> str | None:
        """The old hash of A1111 for the checkpoint file (`ss_sd_model_hash`): 8 hex digits of the sha256 of 64 KiB at 1 MiB."""
        if self.file is None:
            return None
        with self.file.path.open("rb") as file:
            file.seek(0x100000)
            return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]

    def module_shapes(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """The shape of every weight of the denoiser and the text encoders, by (part, module path)."""
        shapes = {}
        for part in ("denoiser", *self.family.text_encoders):
            if part in self.components:
                # From the empty network, since a quantised tensor would have to be computed to know its shape.
                state = self._empty(part).state_dict()
                shapes |= {
                    (part, name.removesuffix(".weight")): tuple(tensor.shape)
                    for name, tensor in state.items()
                    if name.endswith(".weight")
                }
        return shapes


def _digest(part: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{part}.{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


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
    """The base model in a `.safetensors` checkpoint, a mapping of tensors named as in one, a diffusers folder, or a hub id.

    A checkpoint holds all parts, or the denoiser alone. `vae` and `text_encoders` give other parts as files or mappings, in
    the place of those in the checkpoint. `tokenizer` is the folder of a T5 or Qwen tokenizer, for families that have one.
    With a `caption_encoder`, neither text encoders nor a tokenizer are needed. The network is only used for a hub id
    (`owner/name` that is no local path).

    v-prediction and zero terminal SNR are recognised by the marker tensors `v_pred` and `ztsnr` and by modelspec metadata,
    unless the options say otherwise. Raises BadFile, UnknownFamily or UnmatchedKeys when it is not a usable base model, and
    BadConfig for other files beside a folder or hub id, which has its own.
    """
    schedule = {"prediction_type": prediction_type, "zero_terminal_snr": zero_terminal_snr}
    opened_with = None if caption_encoder else _from_files(source, vae, text_encoders, tokenizer, **schedule)
    if not isinstance(source, Mapping):
        path = Path(source)
        # Of os.path: Path's own raise for a folder that may not be looked into, or a name that is too long.
        is_on_hub = not os.path.exists(path) and is_hub_id(str(source))
        if os.path.isdir(path) or is_on_hub:
            parts = {"vae": vae, "text_encoders": text_encoders, "tokenizer": tokenizer}
            if given := [what for what, one in parts.items() if one]:
                raise BadConfig(f"{source}: a folder of diffusers has all parts itself: leave out {', '.join(given)}")
            folder = download(str(source)) if is_on_hub else path
            base = _of_folder(folder, prediction_type, zero_terminal_snr)
            return replace(base, caption_encoder=caption_encoder, opened_with=opened_with)
    name, file = _opened(source)
    metadata = file.metadata if isinstance(file, SafetensorsFile) else {}
    vae_file = None if vae is None else _opened(vae)[1]
    encoder_files = [_opened(text_encoder) for text_encoder in text_encoders]
    try:
        tensors, given = _one_checkpoint(name, file, vae_file, encoder_files)
        family = detect_family(tensors)
        components = family.split(tensors)
        _check_variant(family, components)
        text.check_encoders(family, components, given)
    except (UnknownFamily, UnmatchedKeys) as error:
        beside = "" if vae is None else f" with the VAE of {_opened(vae)[0]}"
        raise type(error)(f"{name}{beside}: {error}") from None
    if tokenizer is not None:
        if family.tokenizer:
            text.load_tokenizer(os.fspath(tokenizer), family.tokenizer)
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
        resolution=_side(metadata.get("modelspec.resolution"), family.resolution),
        file=file if isinstance(file, SafetensorsFile) else None,
        vae_file=vae_file if isinstance(vae_file, SafetensorsFile) else None,
        files=tuple(one for one in opened if isinstance(one, SafetensorsFile)),
        caption_encoder=caption_encoder,
        own_recipes=metadata.get(RECIPES_KEY, "{}"),
        opened_with=opened_with,
    )


def _from_files(
    source: Source,
    vae: Source | None,
    text_encoders: Sequence[Source],
    tokenizer: str | os.PathLike[str] | None,
    **schedule: Any,
) -> Mapping[str, Any] | None:
    """These arguments of `load_base` with absolute paths; None where one of them is a mapping of tensors."""
    if any(isinstance(one, Mapping) for one in (source, vae, *text_encoders)):
        return None

    def placed(path: Any) -> Any:
        return os.path.abspath(path) if path is not None and os.path.exists(path) else path  # else it is a hub id

    encoders = [placed(one) for one in text_encoders]
    return {
        "source": placed(source),
        "vae": placed(vae),
        "text_encoders": encoders,
        "tokenizer": placed(tokenizer),
    } | schedule


_PARTS = (DENOISER_PREFIX, *VAE_PREFIXES, "cond_stage_model.", "conditioner.", "text_encoders.", "unet.")
"""Prefixes of names in a checkpoint with several parts, or in another naming."""

_MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""Tensors that belong to no network and say how a checkpoint predicts."""


def _opened(source: Source) -> tuple[str, Mapping[str, Tensor]]:
    if isinstance(source, Mapping):
        return "given tensors", source
    path = Path(source)
    if path.suffix.lower() == SUFFIX:
        return path.name, open_gguf(source)
    if not path.suffix and path.name == str(source) and not os.path.lexists(path):
        raise BadFile(f"{source}: there is no such file or folder, and a model on the hub is named owner/name")
    file = SafetensorsFile.open(source)
    return file.path.name, file


def _one_checkpoint(
    what: str,
    source: Mapping[str, Tensor],
    vae: Mapping[str, Tensor] | None,
    text_encoders: Sequence[tuple[str, Mapping[str, Tensor]]],
) -> tuple[Mapping[str, Tensor], list[tuple[str, list[str]]]]:
    """The tensors of all files under the names that they would have in one checkpoint, read on demand.

    Also the name of each file of text encoders, with the kinds of encoders in it.
    """
    if not source:
        raise UnknownFamily("there is not a single tensor in it")
    if any(name.endswith((".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight")) for name in source):
        raise UnknownFamily("this is a LoRA, not a base model")
    if not any(name.startswith(_PARTS) for name in source) and (encoder := text.encoder_in(source)):
        raise UnknownFamily(f"this is a text encoder ({encoder}); give it beside a base model (text_encoders)")
    source = dequantised(source, what)
    names = {name: Stored(source, name) for name in source}
    if not any(name.startswith(_PARTS) for name in source):
        # The file has a denoiser alone, whose names have no prefix.
        names = {name.removeprefix("diffusion_model."): read for name, read in names.items()}
        originals = original_unet_names(names)
        names = {
            name if name in _MARKERS else DENOISER_PREFIX + originals.get(name, name): read
            for name, read in names.items()
        }
    if vae is not None:
        # The given VAE takes the place of one in the checkpoint.
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
            "which is not supported; train on the model that it was made from"
        )


def _side(resolution: str | None, default: int) -> int:
    """The side of a square as large as `WIDTHxHEIGHT` in modelspec; the default when that is missing or makes no sense."""
    sides = (resolution or "").lower().split("x")
    if len(sides) == 2 and all(side.isdecimal() and 8 <= int(side) <= 8192 for side in sides):
        return round((int(sides[0]) * int(sides[1])) ** 0.5)
    return default


def _of_folder(folder: Path, prediction_type: str, zero_terminal_snr: bool) -> Base:
    read = read_folder(folder)
    try:
        _check_variant(read.family, read.components)
    except UnknownFamily as error:
        raise UnknownFamily(f"{folder.name}: {error}") from None
    found = read.scheduler.get("prediction_type", "epsilon")
    latent_side = read.components["denoiser"].config.get("sample_size")
    base = Base(
        family=read.family,
        name=folder.name,
        components=read.components,
        prediction_type=read.family.prediction_type(found if prediction_type == "auto" else prediction_type),
        zero_terminal_snr=zero_terminal_snr or bool(read.scheduler.get("rescale_betas_zero_snr")),
        resolution=read.family.resolution,
        says_distilled=read.says_distilled,
    )
    if isinstance(latent_side, int) and read.family.names.is_unet:
        return replace(base, resolution=latent_side * base.latent_shape.pixels)
    return base


def _numbers_in(value: Any) -> Iterator[int]:
    """The integers in a value of a config, which may be lists within lists."""
    if isinstance(value, list):
        for one in value:
            yield from _numbers_in(one)
    elif isinstance(value, int):
        yield value
