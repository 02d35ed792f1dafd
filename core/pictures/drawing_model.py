"""The networks that draw pictures: loaded once, and kept from one batch of pictures to the next."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..config import Precision
from ..device import clear_variables, free_memory, keeps_quantised_weights, release_heap, release_memory, until_it_fits
from ..errors import BadConfig
from ..lora.apply import AppliedLora, apply
from ..lora.embeddings import new_words
from ..lora.file import LoraFile, fit
from ..lora.kinds import LOW_RANK
from ..models.base import Base
from ..models.memory_plan import MemoryPlan, MemorySaver, drawing_plan
from ..models.spec import Pair
from ..storage.safetensors_file import SafetensorsFile
from .sampling import encode_pairs, load_vae

AppliedAt = tuple[tuple[LoraFile, float], ...]
"""LoRAs, with the strengths that they are applied at."""
Texts = tuple[str, str]
"""A prompt and a negative prompt."""


def with_speed_lora(base: Base, path: str | os.PathLike[str]) -> Base:
    """Return the base model to draw on with a LoRA that distils it to a few steps, such as SDXL-Lightning's.

    The LoRA is applied to the denoiser at full strength, whatever the strength of other LoRAs. Pictures take as many steps
    as its file name gives (`..._4step_lora`), or else the family's usual number, without guidance. Raises BadConfig
    for a family whose distilled models aren't known, and the errors of `LoraFile.read`. Raises LoraMisfit for a LoRA that
    doesn't fit the base model.
    """
    lora = LoraFile.read(path)
    if base.family.few_steps is None:
        raise BadConfig(f"{lora.name}: no model of {base.family.title} that draws in a few steps is known")
    fit(lora.of_parts({"denoiser"}), base.family.name, base.module_shapes()).check(lora.name)
    return base.sped_up(SafetensorsFile.open(path))


class DrawingModel:
    """A base model's networks for drawing, and the LoRAs on its denoiser.

    The denoiser and the VAE are loaded when they are first needed, and kept until the end of the `with` statement. Batches of
    pictures with the same model share them, and the encoded texts. LoRAs stay applied until others are.
    """

    def __init__(
        self,
        base: Base,
        precision: Precision = "auto",
        clip_skip: int = 1,
        device: torch.device | str | None = None,
        keeps_originals: bool = False,
    ):
        """`keeps_originals` is whether other LoRAs or strengths may follow after a batch of pictures."""
        self.base: Base = base
        self.keeps_originals: bool = keeps_originals
        self.at_hand: list[AppliedLora] = []
        """LoRAs that are computed but not applied. `AppliedLora.swap` applies one for a single pass."""
        self._wanted = precision, device
        self._clip_skip = clip_skip
        self._encoded: dict[tuple[AppliedAt, Texts], Pair] = {}
        self._loaded: tuple[nn.Module, MemorySaver] | None = None
        self._as_stored = False
        self._copies = 1
        self._vae: nn.Module | None = None
        self._applied_at: tuple[AppliedAt, AppliedAt] | None = None
        """The LoRAs that are applied, and those in `at_hand`. None before the first."""
        self._applied: list[AppliedLora] = []
        self._is_changed = False
        """Whether the denoiser was changed for good."""
        self._originals: dict[Any, Any] = {}
        """What the applied LoRAs have replaced."""

    @cached_property
    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """The device and the dtype to compute with. Raises BadConfig for a device that is missing."""
        return self.base.device_and_dtype(*self._wanted)

    @cached_property
    def _speed(self) -> AppliedAt:
        """The base model's speed LoRA, which is applied with any others."""
        file = self.base.speed_lora
        return ((LoraFile.read(file.path).of_parts({"denoiser"}), 1.0),) if file else ()

    @property
    def denoiser(self) -> nn.Module:
        assert self._loaded, "apply_only loads it"
        return self._loaded[0]

    @property
    def vae(self) -> nn.Module:
        if self._vae is None:
            self._vae = load_vae(self.base, *self.device_and_dtype)
        return self._vae

    def encode(self, wanted: Mapping[AppliedAt, Collection[Texts]]) -> None:
        """Encode texts with these LoRAs on the text encoders. `encoded` then returns the results.

        If some haven't been encoded yet, the other networks are freed first, since the text encoders need their memory.
        """
        missing = {
            loras: {one for one in texts if (loras, one) not in self._encoded} for loras, texts in wanted.items()
        }
        left = {loras: texts for loras, texts in missing.items() if texts}
        if not left:
            return
        self._free()
        device = self.device_and_dtype[0]
        as_stored = are_low_rank([lora for loras in left for lora, _ in loras], self.base.text_encoders)
        encoders = self.base.load_text_encoders(device, torch.float32, as_stored)
        for loras, texts in left.items():
            with _applied(self.base, loras, encoders, device):
                pairs = encode_pairs(self.base, encoders, texts, self._clip_skip)
            self._encoded |= {(loras, pair): conditioning for pair, conditioning in pairs.items()}
        del encoders  # They may hold page-locked memory, which the denoiser may need.
        self._release()

    def encoded(self, loras: AppliedAt, texts: Texts) -> Pair:
        """Return the conditioning of texts that were encoded with these LoRAs."""
        return self._encoded[loras, texts]

    def has_applied(self, loras: AppliedAt, at_hand: AppliedAt = ()) -> bool:
        """Return whether exactly these LoRAs are applied, and those `at_hand` computed."""
        return self._applied_at == (loras, at_hand)

    def apply_only(self, loras: AppliedAt, at_hand: AppliedAt = (), for_good: bool = False) -> None:
        """Load the denoiser if it isn't loaded, and apply these LoRAs to it and no others.

        The LoRAs `at_hand` are put into the list of that name: each has a copy of the weights that it changes. With `for_good`,
        no other LoRAs will follow, and the original weights are not kept. If others follow nevertheless, the denoiser is
        loaded again.
        """
        if self.has_applied(loras, at_hand):
            return
        self.at_hand.clear()
        if self._is_changed:
            self._free()
        self._load([lora for lora, _ in (*loras, *self._speed, *at_hand)], copies=1 + len(at_hand))
        for one in self._applied[:1]:
            one.remove()  # All, since they share their originals.
        if for_good:
            self._originals.clear()
        self._applied_at, self._applied = None, []
        self._is_changed = for_good and bool(loras or self._speed)  # even if one of them can't be applied
        target, device = {"family": self.base.family.name, "denoiser": self.denoiser}, self.device_and_dtype[0]
        for lora, strength in (*loras, *self._speed):
            part, originals = lora.of_parts({"denoiser"}), self._originals
            one = apply(part, target, strength, for_good=for_good, device=device, originals=originals)
            self._applied.append(one)
        for lora, strength in at_hand:
            one = apply(lora.of_parts({"denoiser"}), target, strength, at_hand=True, device=device)
            one.swap()
            self.at_hand.append(one)
        self._applied_at = loras, at_hand
        self._memory.offload.renew()

    def draw(self, compute: Callable[[], list[Image.Image]]) -> list[Image.Image]:
        """Return what `compute` returns. If memory runs out, call it again with half of the blocks offloaded, then with all."""
        memory = self._memory
        shares = (share for share in (0.5, 1.0) if share > memory.plan.offload)
        return until_it_fits(compute, (partial(memory.adopt, MemoryPlan(offload=share)) for share in shares))

    def __enter__(self) -> "DrawingModel":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error:
            clear_variables(error)
        self._encoded.clear()
        self._free()
        self._release()  # also what text encoders took before a denoiser was loaded

    @property
    def _memory(self) -> MemorySaver:
        assert self._loaded, "apply_only loads it"
        return self._loaded[1]

    def _load(self, loras: Iterable[LoraFile], copies: int) -> None:
        """Load the denoiser for these LoRAs and this number of copies of its weights, or adapt how it is kept in memory."""
        device, dtype = self.device_and_dtype
        as_stored = are_low_rank(loras, {"denoiser"}) and keeps_quantised_weights(device)
        if self._as_stored and not as_stored:
            self._free()
        if self._loaded is None:
            self._loaded = load_denoiser(self.base, device, dtype, as_stored, copies)
            self._as_stored = as_stored
        elif copies < self._copies:
            held = sum(tensor.nbytes for tensor in self._memory.resident())
            plan = _plan(self.base, device, dtype, self._as_stored, copies, held)
            if plan.offload < self._memory.plan.offload:
                self._memory.adopt(plan)
        self._copies = copies

    def _free(self) -> None:
        if self._loaded is None:
            return
        self._loaded = self._vae = self._applied_at = None
        self._applied, self.at_hand, self._originals, self._as_stored, self._is_changed = [], [], {}, False, False
        self._release()

    def _release(self) -> None:
        if self.device_and_dtype[0].type == "cpu":
            release_heap()
        else:
            release_memory()


def are_low_rank(loras: Iterable[LoraFile], parts: Collection[str]) -> bool:
    """Return whether the changes of LoRAs in these parts can be added to weights kept in their stored form."""
    return all(entry.kind in LOW_RANK for lora in loras for entry in lora.of_parts(parts).entries)


def load_denoiser(
    base: Base, device: torch.device, dtype: torch.dtype, as_stored: bool = True, copies: int = 1
) -> tuple[nn.Module, MemorySaver]:
    """Load the denoiser; also return the object that holds the memory plan for drawing on a GPU.

    `copies` is the largest number of copies of its weights in memory. Quantised weights stay quantised if `as_stored`.
    """
    plan = _plan(base, device, dtype, as_stored, copies)
    denoiser = base.load("denoiser", torch.device("cpu") if plan.offload else device, dtype, as_stored)
    memory = MemorySaver(denoiser, device)
    memory.adopt(plan)
    return denoiser, memory


def _plan(
    base: Base, device: torch.device, dtype: torch.dtype, as_stored: bool, copies: int, held: int = 0
) -> MemoryPlan:
    """Return the memory plan for drawing. `held` are the bytes of the device that the denoiser itself takes already."""
    free = None if device.type == "cpu" else free_memory(device)
    size = copies * base.weight_bytes("denoiser", dtype, as_stored)
    return drawing_plan(size, None if free is None else free + held)


@contextmanager
def _applied(base: Base, loras: AppliedAt, networks: Mapping[str, nn.Module], device: torch.device) -> Iterator[None]:
    """Apply the LoRAs to text encoders within the context, and add the words that the files define."""
    with ExitStack() as contexts:
        for lora, strength in loras:
            target = {"family": base.family.name, **networks}
            contexts.enter_context(apply(lora.of_parts(networks), target, strength, device=device))
        contexts.enter_context(new_words(networks, [lora for lora, _ in loras]))
        yield
