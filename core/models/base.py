"""A base model, whose networks are loaded on demand. `opening` opens one."""

import hashlib
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import Precision
from ..device import device_and_dtype, free_memory, keeps_quantised_weights
from ..errors import BadFile, FaceLoraError, MissingPackage
from ..progress import OnProgress, percent, silent
from ..storage.gguf_file import GgufTensors
from ..storage.safetensors_file import CHUNK_BYTES, SafetensorsFile, tensor_bytes
from ..storage.stored import dtype_and_shape, quantised_in
from ..tensor_names import NAME_TABLES, PUBLISHED_BLOCKS, NameTable, blocks_in_a_level
from .memory_plan import MemoryPlan, MemorySaver
from .objective import FlowSchedule, Schedule
from .pipeline import assemble, encoder_classes, encoder_component, pipeline_class
from .spec import Component, Conditioning, FamilySpec, FewSteps, LatentShape, PredictionType, materialise


@dataclass(frozen=True)
class CaptionEncoder:
    """Text encoders from outside `core`, such as the CLIP wired to a ComfyUI node."""

    encode: Callable[[str], Conditioning]
    """A function that returns the conditioning of a caption, a batch of 1, as the family's `encode_text` does."""
    fingerprint: str
    """A hash that is equal for equal encoders. It is part of the cache's keys."""


LARGE = 100_000_000
"""The fewest weights of a large denoiser. SD1.5 has 860 million, the demo's base model 1.7."""
LARGE_ENCODER = 2 * 2**30
"""A text encoder of at least this many bytes counts as a language model."""
WeightsFile = SafetensorsFile | GgufTensors
"""A file that a base model is read from."""
_File = Literal["file", "vae_file", "speed_lora"]
_FILES: tuple[_File, ...] = ("file", "vae_file", "speed_lora")
"""The files of a base model that have a hash of their own."""


@dataclass(frozen=True)
class Base:
    """A base model. Its networks are loaded one by one, when they are needed."""

    family: FamilySpec
    name: str
    """The name of its file or folder, without the path."""
    components: Mapping[str, Component]
    """The networks by part: denoiser, vae, text_encoder, ..., as named by the family."""
    prediction_type: PredictionType
    zero_terminal_snr: bool
    resolution: int
    """The side of the square that the model was trained at, in pixels."""
    says_distilled: bool = False
    """Whether its diffusers folder declares that it was distilled to a few steps."""
    file: WeightsFile | None = field(default=None, repr=False)
    """The checkpoint file. None for a folder or a mapping."""
    vae_file: WeightsFile | None = field(default=None, repr=False)
    """The VAE's own file, or None."""
    files: tuple[WeightsFile, ...] = field(default=(), repr=False)
    """All files that were opened, including those of text encoders."""
    speed_lora: WeightsFile | None = field(default=None, repr=False)
    """A LoRA that distils the model to a few steps, such as SDXL-Lightning's. Pictures are drawn with it at full strength."""
    caption_encoder: CaptionEncoder | None = field(default=None, repr=False)
    """An encoder of captions that replaces the base model's own text encoders."""
    own_recipes: str = field(default="{}", repr=False)
    """The recipes in its file's metadata, as JSON for `recipe.read_recipes`."""
    opened_with: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    """The arguments for opening it with `load_base` in another process. None if it doesn't come from files only."""
    _digests: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The sha256 of a part's tensors by part, and of whole files, as far as they have been computed."""

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
        """Whether the denoiser takes the guidance scale as an input, and so needs one prediction per step instead of two."""
        return self.family.embeds_guidance(self.components["denoiser"].config)

    @property
    def is_distilled(self) -> bool:
        """Whether the model is known to be distilled to a few steps, which training on it would undo."""
        return self.says_distilled or self.family.is_distilled(self.components["denoiser"].config)

    @property
    def is_flow_map(self) -> bool:
        """Whether the model predicts the mean velocity over a step. It is then also told where the step leads."""
        return self.family.is_flow_map(self.components["denoiser"].config)

    def as_distilled(self) -> "Base":
        """Return the base model marked as distilled to a few steps, for models known to be distilled from another source."""
        base = replace(self, says_distilled=True)
        base._digests.update(self._digests)
        return base

    def sped_up(self, lora: WeightsFile | None) -> "Base":
        """Return the base model with that speed LoRA, or without any."""
        base = replace(self, speed_lora=lora)
        base._digests.update((name, digest) for name, digest in self._digests.items() if name != "speed_lora")
        return base

    @property
    def few_steps(self) -> FewSteps | None:
        """How the model draws if it, its name or its speed LoRA declares distillation to a few steps. None for all others."""
        if self.speed_lora:
            return self.family.few_steps_named(self.speed_lora.path.name)
        named = self.family.is_named_distilled(self.name) and not self.embeds_guidance
        return self.family.few_steps_named(self.name) if self.is_distilled or named else None

    @property
    def draws_roughly(self) -> bool:
        """Whether pictures in the few steps of a sample are too poor to tell whom they show."""
        return self.family.draws_slowly and not self.few_steps

    @property
    def steps(self) -> int:
        """The number of sampling steps that suits the model."""
        return self.few_steps.steps if self.few_steps else self.family.steps

    @property
    def guidance(self) -> float:
        """The guidance scale that suits the model."""
        return 1.0 if self.few_steps else self.family.guidance

    def schedule(self) -> Schedule:
        """Return the noise schedule that the model is trained on. It also defines what the model predicts."""
        return self.family.schedule(self.prediction_type, self.zero_terminal_snr, self.components)

    def sampling_schedule(self) -> Schedule:
        """Return the noise schedule that the model draws on."""
        schedule, shift = self.schedule(), self.few_steps and self.few_steps.shift
        if shift is None or not isinstance(schedule, FlowSchedule):
            return schedule
        return replace(schedule, shift=lambda positions: shift)

    def load(self, part: str, device: torch.device, dtype: torch.dtype, as_stored: bool = False) -> nn.Module:
        """Load the network of a part with frozen weights, in evaluation mode. Raises BadFile when the base model lacks it.

        With `as_stored`, weights that are quantised or in fp8 take as much memory as in their file: layers dequantise them
        whenever they are used, and compute the same. They can then be neither trained nor changed. If the network will
        compute on another device, that one must support such weights too (`keeps_quantised_weights`).
        """
        what = f"{self.name}: the {part.replace('_', ' ')}"
        as_stored = as_stored and keeps_quantised_weights(device)
        return materialise(self._empty(part), self._component(part).tensors, what, device, dtype, as_stored)

    @cached_property
    def is_quantised(self) -> bool:
        """Whether weights of the denoiser are stored in fewer bits than training computes with."""
        tensors = self._component("denoiser").tensors
        return any(quantised_in(tensors, name, read=False) for name in tensors)

    def device_and_dtype(
        self, precision: Precision = "auto", device: torch.device | str | None = None
    ) -> tuple[torch.device, torch.dtype]:
        """Return the device and the dtype to compute with. Raises BadConfig for a device that is missing."""
        return device_and_dtype(precision, device, self.family.overflows_in_fp16, self.is_large)

    @cached_property
    def is_large(self) -> bool:
        """Whether the denoiser has the size of published models, and not that of the demo's or of a test's."""
        # One byte a weight gives their number.
        return "denoiser" in self.components and self.weight_bytes("denoiser", torch.uint8) >= LARGE

    def _empty(self, part: str) -> nn.Module:
        """Build the network of a part without weights.

        Raises BadFile when the part is missing or its config is invalid, MissingPackage when a library is not installed.
        """
        component = self._component(part)
        try:
            return self.family.build_empty(part, component.config)
        except FaceLoraError:
            raise
        except ImportError as error:
            package = (error.name or str(error)).partition(".")[0]
            raise MissingPackage(
                f"the package {package} cannot be imported ({error}); install it with: pip install {package}"
            ) from error
        except Exception as error:  # diffusers and transformers raise many kinds of errors for an odd config
            reason = next(iter(str(error).splitlines()), "")
            what = f"{self.name}: the config of the {part.replace('_', ' ')}"
            raise BadFile(f"{what} is invalid: {type(error).__name__}: {reason}") from error

    def weight_bytes(self, part: str, dtype: torch.dtype, as_stored: bool = False) -> int:
        """Return the bytes of the part's weights in that dtype, `as_stored` as in `load`. Raises BadFile without the part."""
        tensors = self._component(part).tensors
        quantised = {name: quantised_in(tensors, name, read=False) if as_stored else None for name in tensors}
        return sum(
            weight.nbytes if weight else dtype.itemsize * math.prod(dtype_and_shape(tensors, name)[1])
            for name, weight in quantised.items()
        )

    def require(self, *parts: str) -> None:
        """Raise BadFile if one of the parts is missing."""
        for part in parts:
            self._component(part)

    def _component(self, part: str) -> Component:
        if part not in self.components:
            option = "vae" if part == "vae" else "text_encoders"
            raise BadFile(f"{self.name}: has no {part.replace('_', ' ')}. Give its file too ({option})")
        return self.components[part]

    def load_text_encoders(
        self, device: torch.device, dtype: torch.dtype, as_stored: bool = True
    ) -> dict[str, nn.Module]:
        """Load the text encoders by part. Empty when a `caption_encoder` replaces them.

        A language model (the encoders of FLUX.1 and later) is loaded in bf16, since T5 overflows in fp16. If most of it is
        stored in more than 16 bits, `dtype` is used instead. If it does not fit, quantised or fp8 weights stay as they are
        stored (`as_stored`, as in `load`). If that is still too much for a GPU, its layers stay in the computer's memory and
        are copied to the GPU one by one. Raises BadFile when one is missing.
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
            quantised = as_stored and keeps_quantised_weights(device) and self.weight_bytes(part, kept) >= room
            stays = device.type == "cpu" or self.weight_bytes(part, kept, quantised) < room
            encoders[part] = self.load(part, device if stays else torch.device("cpu"), kept, quantised)
            if not stays:
                MemorySaver(encoders[part], device).adopt(MemoryPlan(offload=1))
        return encoders

    def pipeline(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Any:
        """Build a diffusers pipeline of the base model, such as StableDiffusionXLPipeline, on the device (the CPU for None).

        Each network is loaded once, and a weight that already has the dtype is not copied. Any scheduler of diffusers can be
        made from the config of the pipeline's own. Raises BadFile when a part is missing and MissingPackage when the installed
        diffusers does not have the pipeline. Raises BadConfig for a family without pipeline support.
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
        """The parts that encode text: those of the family, without optional ones that are missing."""
        optional = self.family.optional_encoders
        return tuple(part for part in self.family.text_encoders if part in self.components or part not in optional)

    def compute_hashes(self, on_progress: OnProgress = silent) -> None:
        """Compute the hashes of all weights and of the files together. Without this, each is computed when it is needed.

        `on_progress` is called with the percentage that is done and 100. It may raise to cancel.
        """
        every = ("denoiser", "vae", *(() if self.caption_encoder else self.text_encoders))
        parts = [part for part in every if part in self.components and part not in self._digests]
        step = percent(on_progress, sum(len(self.components[part].tensors) for part in parts))
        cancelled = threading.Event()

        def go_on() -> None:
            if cancelled.is_set():
                raise CancelledError

        # Whole files are hashed in a second thread. What one thread has read, the other finds in memory.
        with ThreadPoolExecutor(1) as pool:
            files = pool.submit(lambda: [*(self._file_hash(name, go_on) for name in _FILES), self.legacy_hash])
            try:
                for part in parts:
                    self._digests[part] = _digest(part, self.components[part].tensors, step)
                while not wait([files], timeout=0.2).done:
                    on_progress(100, 100)
            finally:
                cancelled.set()
        files.result()

    def hash_files(self, on_progress: OnProgress = silent) -> None:
        """Compute the hashes of the files, which pictures name. `on_progress` is called as by `compute_hashes`."""
        left: list[_File] = [name for name in _FILES if getattr(self, name) and name not in self._digests]
        step = percent(on_progress, sum(-(-getattr(self, name).size // CHUNK_BYTES) for name in left))
        for name in left:
            self._file_hash(name, step)

    def fingerprint(self, *parts: str) -> str:
        """Return a sha256 over the tensors of the parts, equal for equal weights from any source. The tensors are read once."""
        for part in parts:
            if part not in self._digests:
                self._digests[part] = _digest(part, self._component(part).tensors)
        return hashlib.sha256("".join(self._digests[part] for part in parts).encode()).hexdigest()

    @property
    def text_fingerprint(self) -> str:
        """A hash that is equal for equal encoders of captions."""
        return self.caption_encoder.fingerprint if self.caption_encoder else self.fingerprint(*self.text_encoders)

    @property
    def trained_identity(self) -> str:
        """A text that is equal for base models with the same weights and the same way to predict, with any speed LoRA."""
        prediction = f"{self.prediction_type} {self.zero_terminal_snr}"
        return f"{self.fingerprint('denoiser', 'vae')} {self.text_fingerprint} {prediction}"

    @property
    def identity(self) -> str:
        """A text that is equal for base models that also draw with the same speed LoRA, or without one."""
        return f"{self.trained_identity} {self.speed_lora_sha256}" if self.speed_lora else self.trained_identity

    @property
    def sha256(self) -> str | None:
        """The sha256 of the checkpoint file (`ss_new_sd_model_hash`), or None without one."""
        return self._file_hash("file")

    @property
    def vae_sha256(self) -> str | None:
        """The sha256 of the VAE's own file, or None without one."""
        return self._file_hash("vae_file")

    @property
    def speed_lora_sha256(self) -> str | None:
        """The sha256 of the speed LoRA's file, or None without one."""
        return self._file_hash("speed_lora")

    def _file_hash(self, name: _File, on_chunk: Callable[[], None] = silent) -> str | None:
        file = getattr(self, name)
        if file and name not in self._digests:
            self._digests[name] = file.sha256(on_chunk=on_chunk)
        return self._digests.get(name)

    @cached_property
    def legacy_hash(self) -> str | None:
        """A1111's old hash of the checkpoint file (`ss_sd_model_hash`): 8 hex digits of the sha256 of 64 KiB at 1 MiB."""
        if self.file is None:
            return None
        with self.file.path.open("rb") as file:
            file.seek(0x100000)
            return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]

    def module_shapes(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """Return the shape of every weight of the denoiser and the text encoders, by (part, module path)."""
        shapes = {}
        for part in ("denoiser", *self.family.text_encoders):
            if part in self.components:
                # From the empty network, since the shape of a quantised tensor is only known after computing it.
                weights = ((name.rpartition("."), value) for name, value in self._empty(part).state_dict().items())
                shapes |= {(part, path): tuple(value.shape) for (path, _, kind), value in weights if kind == "weight"}
        return shapes


def _digest(part: str, tensors: Mapping[str, Tensor], step: Callable[[], None] = silent) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{part}.{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
        step()
    return digest.hexdigest()
