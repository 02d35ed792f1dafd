"""`NameTable`, which maps a model family's module names between naming schemes, and the classes it is made of."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, TypedDict

from .loaded_names import LoadedNames
from .signs import Sign

if TYPE_CHECKING:
    from torch import Tensor

SCHEMES = ("kohya", "diffusers", "comfy")
"""The naming schemes that a LoRA can be written in."""
ModuleId = tuple[str, str]
"""The (part, path) that identifies a module everywhere in the project. See the package's docstring."""


@dataclass(frozen=True)
class Fusion:
    """A module of the original model, and the diffusers modules that its output rows belong to.

    Usually this is one diffusers module. If the original has a fused Linear for q, k and v, there are three.
    """

    original: str
    parts: tuple[str, ...]
    sizes: tuple[float, ...] = (1,)
    """The output rows of each part, as multiples of the module's input features; unused for a single part."""
    halves_swapped: bool = False
    """Whether diffusers stores the two halves of the rows (shift, scale) in the opposite order (scale, shift).

    This only applies to weights with two such parts. In other blocks of SD3 the layer has six or nine, in the same order."""


@dataclass(frozen=True)
class Place:
    """The place of a weight in the model: a module of the original model or of diffusers."""

    part: str
    fusion: Fusion
    index: int | None
    """The index of the part of the fusion; None for the whole fusion, with rows in the original model's order."""

    @property
    def modules(self) -> tuple[ModuleId, ...]:
        """The modules whose weights it holds, in the order of its rows."""
        parts = self.fusion.parts if self.index is None else (self.fusion.parts[self.index],)
        return tuple((self.part, path) for path in parts)

    def rows(self, outputs: int, inputs: int) -> list[int]:
        """Return the number of rows of each of `modules` in a weight of this size. Raises ValueError if they don't add up."""
        if len(self.modules) == 1:
            return [outputs]
        rows = [round(size * inputs) for size in self.fusion.sizes]
        if sum(rows) != outputs:
            raise ValueError(f"it has {outputs} rows instead of {' + '.join(map(str, rows))}")
        return rows

    def split(self, tensor: Tensor, inputs: int | None = None) -> list[tuple[ModuleId, Tensor]]:
        """Split the rows of a tensor by module, in diffusers' order.

        `inputs` is the weight's number of input features. It is needed for biases and other tensors that don't show it.
        Raises ValueError when the rows do not add up.
        """
        inputs = math.prod(tensor.shape[1:2]) if inputs is None else inputs
        rows = self.rows(tensor.shape[0], inputs)
        return list(zip(self.modules, self._swapped(tensor, inputs).split(rows), strict=True))

    def join(self, tensors: Sequence[Tensor], inputs: int | None = None) -> Tensor:
        """Join the weights of `modules` into one with rows in the file's order. This is the inverse of `split`."""
        import torch

        whole = torch.cat(list(tensors))
        return self._swapped(whole, math.prod(whole.shape[1:2]) if inputs is None else inputs)

    def _swapped(self, tensor: Tensor, inputs: int) -> Tensor:
        swapped = self.index is None and self.fusion.halves_swapped and tensor.shape[0] == 2 * inputs
        return tensor.roll(inputs, 0) if swapped else tensor


@dataclass(frozen=True)
class Listing:
    """What you have to state about the base model when you publish a LoRA."""

    civitai: str
    """The name of the base model in Civitai's list."""
    licence: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The metadata of the model, by key, that replace those of the family (`NameTable.metadata_of`)."""
    editions: Mapping[str, Listing] = field(default_factory=dict)
    """Models with the same tensors, by a word in the plain names (`families.plain_name`) of their files."""

    def of(self, names: Sequence[str]) -> Listing:
        """Return the listing of the edition that one of these plain names names, or this one."""
        return next((one for word, one in self.editions.items() if any(word in name for name in names)), self)


PUBLISHED_BLOCKS = 2
"""The number of residual blocks per level in the published UNets."""


@dataclass(frozen=True)
class NameTable:
    """The names of a family and of its modules in every scheme, and the signs that identify its LoRAs."""

    name: str
    """The short name in code and messages, such as sd15."""
    base_versions: tuple[str, ...]
    """The prefixes of its models' names in metadata, in any punctuation. The first is the `ss_base_model_version` to write."""
    architecture: str
    """The `modelspec.architecture` of its checkpoints; a LoRA adds `/lora`."""
    signs: tuple[Sign, ...]
    listings: Mapping[str, Listing]
    """The listing of each published model of the family, by the model's title in the tables."""
    of_original: Callable[[str], Fusion | None] = lambda path: None
    """The fusion of a denoiser path in original naming; None for any other path."""
    of_diffusers: Callable[[str], Fusion] = lambda path: Fusion(path, (path,))
    """The fusion that a denoiser path in diffusers naming belongs to. By default, all names are alike in both namings."""
    loaded: LoadedNames = LoadedNames()
    """The names that other programs load."""
    kernel: Callable[[str], int | None] = lambda path: None
    """The kernel size of a denoiser module in diffusers; None for a Linear."""
    kernel_in_kohya: Callable[[str], int | None] = lambda path: None
    """The kernel size in sd-scripts; only needed for 1x1 convolutions that are Linear in diffusers."""
    comfyui_classes: tuple[str, ...] = ()
    """The classes in comfy.supported_models of its trainable models; empty if the tested ComfyUI has none."""
    a1111_version: str = "Unknown"
    """The name of its models in A1111's and Forge's list."""
    scheme: str = "kohya"
    """The default naming scheme for writing its LoRAs: the one that most programs load."""
    diffusers_prefix: str = "transformer."
    kohya_prefixes: Mapping[str, str] = field(default_factory=lambda: {"denoiser": "lora_unet_"})
    """The prefix of each part in Kohya names."""
    comfy_prefixes: Mapping[str, str] = field(default_factory=lambda: {"denoiser": "diffusion_model."})
    """The prefix of each part in ComfyUI's own scheme."""
    original_in_kohya: bool = True
    """Whether Kohya names use the original model's paths, not those of diffusers."""
    original_in_comfy: bool = True
    """Whether names in ComfyUI's own scheme use the original model's paths, not those of diffusers."""
    part_names: Mapping[str, str] = field(default_factory=dict)
    """The part of this family's pipeline by the part that a file's prefix states, if they differ."""
    checkpoint_prefixes: Mapping[str, str] = field(default_factory=dict)
    """The prefix of each text encoder in a whole original checkpoint, for families that are recognised by it.

    Checkpoints can only be written for families that have these prefixes."""
    embedding_names: Mapping[str, str] = field(default_factory=dict)
    """The name of each part's tensor in a textual-inversion embedding file; empty for families without such files."""
    has_other_blocks: bool = False
    """Whether the UNet's numbers of residual blocks per level differ from the published ones (`for_other_blocks`)."""
    block_lists: tuple[str, ...] = ()
    """The blocks in each kind of list of the LoRA Block Weight extension. IN04-05 means IN04 and IN05."""

    @property
    def is_unet(self) -> bool:
        """Whether the denoiser is a UNet; otherwise it is a transformer."""
        return self.diffusers_prefix == "unet."

    def metadata_of(self, models: Sequence[str] = ()) -> dict[str, str]:
        """Return the metadata of a base model by key. `models` are the titles of the published models it may be."""
        found = [self.listings[model].metadata for model in models if model in self.listings]
        own = found[0] if len(found) == 1 else {}
        return {"ss_base_model_version": self.base_versions[0], "modelspec.architecture": self.architecture, **own}

    def for_other_blocks(self) -> NameTable:
        """Return the names for a UNet whose levels don't have PUBLISHED_BLOCKS residual blocks each.

        They are diffusers' names only, because the original names assume the published models' numbers of blocks. A
        transformer's names stay the same.
        """
        return replace(self, original_in_kohya=False, has_other_blocks=True) if self.is_unet else self

    def locate(self, part: str, path: str) -> Place:
        """Return the place of a file's path in the model. The path may be in original or diffusers naming."""
        if part == "denoiser" and not is_text_path(path):
            if fusion := self.of_original(path):
                return Place(part, fusion, None)
            fusion = self.of_diffusers(path)
            return Place(part, fusion, fusion.parts.index(path))
        # peft uses the same prefix for text encoders and denoisers, so the path decides.
        part = "text_encoder" if part == "denoiser" else self.part_names.get(part, part)
        path = text_encoder_path(path)
        return Place(part, Fusion(path, (path,)), None)


T5_PATHS = ("encoder.block.", "encoder.final_layer_norm", "shared")
"""The prefixes of T5's paths. A model has one T5 at most."""


def is_text_path(path: str) -> bool:
    """Check that a path is a text encoder's, if the name's prefix doesn't show it: peft has one prefix for all parts."""
    prefixes = ("text_model.", "encoder.layers.", "text_projection", *T5_PATHS)
    return path.startswith(prefixes) and not path.startswith("shared_")  # MOSS-Image has shared_block_modulation


def text_encoder_path(path: str) -> str:
    """Return a path in a text encoder, with the leading `text_model.` that transformers 5 dropped from CLIP."""
    return f"text_model.{path}" if path.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")) else path


@cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)"))


class _ByRules(TypedDict):
    of_original: Callable[[str], Fusion | None]
    of_diffusers: Callable[[str], Fusion]


def by_rules(*rules: Fusion) -> _ByRules:
    """Make these two arguments of a family's NameTable from rules. "{}" in a rule matches a number.

    A path without a rule has the same name in both namings.
    """
    originals = [(rule.original, rule) for rule in rules]
    diffusers = [(part, rule) for rule in rules for part in rule.parts]

    def find(path: str, named: list[tuple[str, Fusion]]) -> Fusion | None:
        for name, rule in named:
            if match := _pattern(name).fullmatch(path):
                numbers = match.groups()
                parts = tuple(part.format(*numbers) for part in rule.parts)
                return Fusion(rule.original.format(*numbers), parts, rule.sizes, rule.halves_swapped)
        return None

    @cache
    def of_original(path: str) -> Fusion | None:
        return find(path, originals)

    @cache
    def of_diffusers(path: str) -> Fusion:
        return find(path, diffusers) or Fusion(path, (path,))

    return {"of_original": of_original, "of_diffusers": of_diffusers}
