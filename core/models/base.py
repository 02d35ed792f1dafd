"""A base model, whose networks are loaded on demand. `opening` opens one."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..device import free_memory, keeps_narrow_weights
from ..errors import BadFile, FaceLoraError
from ..storage.lazy import dtype_and_shape, narrow_in
from ..storage.safetensors_file import SafetensorsFile, tensor_bytes
from ..tensor_names import NAME_TABLES, PUBLISHED_BLOCKS, NameTable, blocks_in_a_level
from .memory_plan import MemoryPlan, MemorySaver
from .objective import FlowSchedule, Schedule
from .pipeline import assemble, encoder_classes, encoder_component, pipeline_class
from .spec import Component, Conditioning, FamilySpec, FewSteps, LatentShape, PredictionType, materialise


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
        as_stored = as_stored and keeps_narrow_weights(device)
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


def _numbers_in(value: Any) -> Iterator[int]:
    """The integers in a value of a config, which may be lists within lists."""
    if isinstance(value, list):
        for one in value:
            yield from _numbers_in(one)
    elif isinstance(value, int):
        yield value
