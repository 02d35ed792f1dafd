"""What a model family says about names: one `NameTable` per family."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SCHEMES = ("kohya", "diffusers", "comfy")
"""The naming schemes that a LoRA can be written in."""
ModuleId = tuple[str, str]
"""(part, path): the identity of a module in the whole project, see the package's docstring."""


@dataclass(frozen=True)
class Fusion:
    """A module of the original model, and the diffusers modules that its output rows belong to.

    Mostly one to one; where the original has one Linear for q, k and v, diffusers has three.
    """

    original: str
    parts: tuple[str, ...]
    sizes: tuple[float, ...] = (1,)
    """Output rows of each part, in multiples of the module's input features; unused when there is one part."""
    halves_swapped: bool = False
    """Whether diffusers stores the two halves of the rows (shift, scale) in the other order (scale, shift).

    Only where there are two: the same layer has six or nine in the other blocks of SD3, in the same order in both."""


def _inputs(weight: Tensor) -> int:
    """Input features of a weight; 1 of a normalisation layer's."""
    return weight.shape[1] if weight.ndim > 1 else 1


@dataclass(frozen=True)
class Place:
    """What a weight of a file is: a module of the original model, or one that diffusers has."""

    part: str
    fusion: Fusion
    index: int | None
    """Which part of the fusion it is; None: the whole of it, in the original model's order of rows."""

    @property
    def modules(self) -> tuple[ModuleId, ...]:
        """The modules whose weights it is, in the order of its rows."""
        parts = self.fusion.parts if self.index is None else (self.fusion.parts[self.index],)
        return tuple((self.part, path) for path in parts)

    def rows(self, outputs: int, inputs: int) -> list[int]:
        """How many rows of a weight of this size each of `modules` has. ValueError when they do not add up."""
        if len(self.modules) == 1:
            return [outputs]
        rows = [round(size * inputs) for size in self.fusion.sizes]
        if sum(rows) != outputs:
            raise ValueError(f"{outputs} rows are not {' + '.join(map(str, rows))}")
        return rows

    def split(self, tensor: Tensor, inputs: int | None = None) -> list[tuple[ModuleId, Tensor]]:
        """Its rows by module, in diffusers' order. `inputs` are the weight's input features, where they are not the tensor's.

        ValueError when the rows do not add up.
        """
        inputs = _inputs(tensor) if inputs is None else inputs
        rows = self.rows(tensor.shape[0], inputs)
        return list(zip(self.modules, self._swapped(tensor, inputs).split(rows), strict=True))

    def join(self, tensors: Sequence[Tensor], inputs: int | None = None) -> Tensor:
        """The weight in the file's order of rows, from those of `modules`: undoes `split`."""
        import torch

        whole = torch.cat(list(tensors))
        return self._swapped(whole, _inputs(whole) if inputs is None else inputs)

    def _swapped(self, tensor: Tensor, inputs: int) -> Tensor:
        swapped = self.index is None and self.fusion.halves_swapped and tensor.shape[0] == 2 * inputs
        return tensor.roll(inputs, 0) if swapped else tensor


@dataclass(frozen=True)
class Sign:
    """Something in a LoRA by which its family is known: a module with this path and these widths."""

    path: str
    """A pattern that is searched in the dotted path, as it stands in the file."""
    inputs: frozenset[int] | None = None
    """Input features of the family's module; None: any, then the sign only says that the structure fits."""
    ratio: float | None = None
    """Output rows per input feature; None: any."""
    part: str = "denoiser"

    def matches(self, part: str, path: str, shape: tuple[int, ...] | None) -> bool:
        """Whether the module is this one; `shape` is its weight's (out, in, ...), None where it cannot be known."""
        if part != self.part or not re.search(self.path, path):
            return False
        if self.inputs is None and self.ratio is None:
            return True
        if shape is None or len(shape) < 2:
            return False
        return (self.inputs is None or shape[1] in self.inputs) and (
            self.ratio is None or shape[0] == round(self.ratio * shape[1])
        )

    @property
    def decisive(self) -> bool:
        """Whether widths were compared, so that a match is evidence for this family and no other."""
        return self.inputs is not None or self.ratio is not None


def clip_signs(width: int) -> tuple[Sign, ...]:
    """The signs of a first text encoder that is a CLIP of that width."""
    return (
        Sign(r"^(text_model\.)?encoder\.layers\.", part="text_encoder"),
        Sign(r"(self_attn\.\w+|mlp\.fc1)$", frozenset({width}), part="text_encoder"),
    )


CLIP_G_SIGN = Sign(r"(self_attn\.\w+|mlp\.fc1)$", frozenset({1280}), part="text_encoder_2")


UNET_IN_COMFYUI = frozenset(
    {("kohya", "diffusers"), ("kohya", "original"), ("comfy", "original"), ("lycoris", "diffusers")}
)
"""What ComfyUI loads of every UNet, see `LoadedNames.comfyui`."""
TRANSFORMER_IN_COMFYUI = frozenset(
    {("kohya", "original"), ("comfy", "original"), ("diffusers", "diffusers"), ("lycoris", "diffusers")}
)
"""What ComfyUI loads of most transformers, and of some more than that."""


@dataclass(frozen=True)
class LoadedNames:
    """Which names of a family's LoRAs other programs load; core/lora/readers.py asks, and says of which versions it is."""

    comfyui: frozenset[tuple[str, str]]
    """(scheme, whose paths: those of the original or of diffusers) of the denoiser's names that ComfyUI loads."""
    diffusers: frozenset[str]
    """Schemes that diffusers' pipelines load."""
    comfyui_lacks: tuple[str, ...] = ()
    """Starts of paths that are missing in ComfyUI's table of diffusers' names."""
    diffusers_denoiser_lacks: Mapping[str, str] = field(default_factory=dict)
    """Scheme -> why diffusers loads no such names of the denoiser, though it does those of the text encoders."""
    diffusers_lokr: frozenset[tuple[str, str]] = frozenset()
    """(scheme, whose paths) of the LoKr files that diffusers' pipelines load."""
    diffusers_lokr_with_alpha: frozenset[str] = frozenset()
    """Schemes of LoKr files that diffusers loads only where they have an alpha."""


@dataclass(frozen=True)
class NameTable:
    """What one family is called, the names of its modules in every scheme, and what its LoRAs are known by."""

    name: str
    """Short name in code and messages: sd15, sdxl."""
    base_versions: tuple[str, ...]
    """Values of `ss_base_model_version` that mean this family; the first is the one to write."""
    architecture: str
    """`modelspec.architecture` of its checkpoints; a LoRA adds `/lora`."""
    signs: tuple[Sign, ...]
    of_original: Callable[[str], Fusion | None]
    """The fusion of an original denoiser path, None when the path is not an original one."""
    of_diffusers: Callable[[str], Fusion]
    """The fusion that a diffusers denoiser path belongs to."""
    loaded: LoadedNames
    """Which of these names other programs load."""
    kernel: Callable[[str], int | None] = lambda path: None
    """The kernel size of a denoiser module in diffusers, None for a Linear."""
    kernel_in_kohya: Callable[[str], int | None] = lambda path: None
    """The same in sd-scripts; only 1x1 convolutions that are Linear in diffusers matter."""
    diffusers_prefix: str = "transformer."
    kohya_prefixes: Mapping[str, str] = field(default_factory=lambda: {"denoiser": "lora_unet_"})
    """Part -> prefix of its Kohya names."""
    comfy_prefixes: Mapping[str, str] = field(default_factory=lambda: {"denoiser": "diffusion_model."})
    """Part -> prefix of its names in ComfyUI's own scheme."""
    original_in_kohya: bool = True
    """Whether Kohya names are made from the original model's paths; else from diffusers' paths."""
    original_in_comfy: bool = True
    """The same for ComfyUI's own scheme."""
    part_names: Mapping[str, str] = field(default_factory=dict)
    """Part as the prefix in a file numbers it -> part of this family's pipeline, where they differ."""
    checkpoint_prefixes: Mapping[str, str] = field(default_factory=dict)
    """Part -> prefix of a text encoder in a whole original checkpoint, where no other family has it; with these a
    checkpoint can be written too."""
    embedding_names: Mapping[str, str] = field(default_factory=dict)
    """Part -> name of its tensor in a file of a textual-inversion embedding; empty where nobody has such files."""
    block_lists: tuple[str, ...] = ()
    """The blocks of each list of the LoRA Block Weight extension; IN04-05 stands for IN04 and IN05."""

    @property
    def is_unet(self) -> bool:
        """Whether the denoiser is a UNet; else it is a transformer."""
        return self.diffusers_prefix == "unet."

    def locate(self, part: str, path: str) -> Place:
        """Where a name found in a file belongs."""
        if part == "denoiser" and not path.startswith("text_model."):
            fusion = self.of_original(path)
            if fusion is not None:
                return Place(part, fusion, None)
            fusion = self.of_diffusers(path)
            return Place(part, fusion, fusion.parts.index(path))
        # peft's files of a text encoder have the same prefix as those of a denoiser.
        part = "text_encoder" if part == "denoiser" else self.part_names.get(part, part)
        path = text_encoder_path(path)
        return Place(part, Fusion(path, (path,)), None)


def text_encoder_path(path: str) -> str:
    """A path in a text encoder with the `text_model.` that transformers 5 dropped from CLIP's, and no other lacks."""
    return f"text_model.{path}" if path.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")) else path


def by_rules(*rules: Fusion) -> tuple[Callable[[str], Fusion | None], Callable[[str], Fusion]]:
    """`of_original` and `of_diffusers` of a family whose names are related by rules; "{}" stands for a number.

    A path that no rule knows has the same name in both.
    """

    def compile_path(path: str) -> re.Pattern[str]:
        return re.compile(re.escape(path).replace(r"\{\}", r"(\d+)"))

    originals = [(compile_path(rule.original), rule) for rule in rules]
    diffusers = [(compile_path(part), rule) for rule in rules for part in rule.parts]

    def find(path: str, patterns: list[tuple[re.Pattern[str], Fusion]]) -> Fusion | None:
        for pattern, rule in patterns:
            if match := pattern.fullmatch(path):
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

    return of_original, of_diffusers
