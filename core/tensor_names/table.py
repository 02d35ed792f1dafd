"""The `NameTable` of a model family, which maps module names between naming schemes, and the values that it is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SCHEMES = ("kohya", "diffusers", "comfy")
"""The naming schemes that a LoRA can be written in."""
ModuleId = tuple[str, str]
"""The (part, path) by which a module is known in the whole project, see the package's docstring."""


@dataclass(frozen=True)
class Fusion:
    """A module of the original model, and the diffusers modules that its output rows belong to.

    There is mostly one diffusers module, but three where the original has a fused Linear for q, k and v.
    """

    original: str
    parts: tuple[str, ...]
    sizes: tuple[float, ...] = (1,)
    """The output rows of each part, as multiples of the module's input features; unused when there is one part."""
    halves_swapped: bool = False
    """Whether diffusers stores the two halves of the rows (shift, scale) in the other order (scale, shift).

    It only applies to weights with two such parts. In other blocks of SD3 the layer has six or nine, in the same order."""


def _inputs(weight: Tensor) -> int:
    """The input features of a weight; 1 for the weight of a normalisation layer."""
    return weight.shape[1] if weight.ndim > 1 else 1


@dataclass(frozen=True)
class Place:
    """The place of a weight in the model: a module of the original model, or a module of diffusers."""

    part: str
    fusion: Fusion
    index: int | None
    """The index of the part of the fusion; None for the whole of it, with rows in the original model's order."""

    @property
    def modules(self) -> tuple[ModuleId, ...]:
        """The modules whose weights it holds, in the order of its rows."""
        parts = self.fusion.parts if self.index is None else (self.fusion.parts[self.index],)
        return tuple((self.part, path) for path in parts)

    def rows(self, outputs: int, inputs: int) -> list[int]:
        """The number of rows that each of `modules` has in a weight of this size. Raises ValueError when they do not add up."""
        if len(self.modules) == 1:
            return [outputs]
        rows = [round(size * inputs) for size in self.fusion.sizes]
        if sum(rows) != outputs:
            raise ValueError(f"{outputs} rows are not {' + '.join(map(str, rows))}")
        return rows

    def split(self, tensor: Tensor, inputs: int | None = None) -> list[tuple[ModuleId, Tensor]]:
        """The rows of a tensor by module, in diffusers' order.

        `inputs` is the number of the weight's input features, for tensors such as biases that do not have them. Raises
        ValueError when the rows do not add up.
        """
        inputs = _inputs(tensor) if inputs is None else inputs
        rows = self.rows(tensor.shape[0], inputs)
        return list(zip(self.modules, self._swapped(tensor, inputs).split(rows), strict=True))

    def join(self, tensors: Sequence[Tensor], inputs: int | None = None) -> Tensor:
        """The weight with rows in the file's order, from the weights of `modules`. It is the inverse of `split`."""
        import torch

        whole = torch.cat(list(tensors))
        return self._swapped(whole, _inputs(whole) if inputs is None else inputs)

    def _swapped(self, tensor: Tensor, inputs: int) -> Tensor:
        swapped = self.index is None and self.fusion.halves_swapped and tensor.shape[0] == 2 * inputs
        return tensor.roll(inputs, 0) if swapped else tensor


@dataclass(frozen=True)
class Sign:
    """A module with a certain path and widths, which shows the family of a LoRA."""

    path: str
    """A regular expression that is searched in the dotted path of the module in the file."""
    inputs: frozenset[int] | None = None
    """The allowed input features; None for any, when the sign only says that the structure fits."""
    ratio: float | None = None
    """The number of output rows per input feature; None for any."""
    part: str = "denoiser"

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(self.path)

    def matches(self, part: str, path: str, shape: tuple[int, ...] | None) -> bool:
        """Whether a module has the sign. `shape` is its weight's (out, in, ...), None when it cannot be known."""
        if part != self.part or not self._pattern.search(path):
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
    """The signs of a CLIP of that width as the first text encoder."""
    return (
        Sign(r"^(text_model\.)?encoder\.layers\.", part="text_encoder"),
        Sign(r"(self_attn\.\w+|mlp\.fc1)$", frozenset({width}), part="text_encoder"),
    )


CLIP_G_SIGN = Sign(r"(self_attn\.\w+|mlp\.fc1)$", frozenset({1280}), part="text_encoder_2")


UNET_IN_COMFYUI = frozenset(
    {("kohya", "diffusers"), ("kohya", "original"), ("comfy", "original"), ("lycoris", "diffusers")}
)
"""The names of UNets that ComfyUI loads, as in `LoadedNames.comfyui`."""
TRANSFORMER_IN_COMFYUI = frozenset(
    {("kohya", "original"), ("comfy", "original"), ("diffusers", "diffusers"), ("lycoris", "diffusers")}
)
"""The names of all transformers that ComfyUI loads, as in `LoadedNames.comfyui`; families may add some."""


@dataclass(frozen=True)
class LoadedNames:
    """The names of a family's LoRAs that other programs load. core/lora/readers.py uses it, and states their versions."""

    comfyui: frozenset[tuple[str, str]]
    """The names of the denoiser that ComfyUI loads, as (scheme, "original" or "diffusers" for its paths); empty where its
    version here does not have the family."""
    diffusers: frozenset[str]
    """The schemes that diffusers' pipelines load."""
    comfyui_t5: tuple[str, ...] = ()
    """The prefixes of Kohya's names of T5 that ComfyUI loads."""
    comfyui_lacks: str = r"$^"
    """A regular expression that is found in the paths that are missing in ComfyUI's table of diffusers' names."""
    diffusers_lacks: Mapping[str, str] = field(default_factory=dict)
    """A regular expression, by scheme, that is found in the paths whose names diffusers misreads, and so does not load."""
    diffusers_refuses: Mapping[str, str] = field(default_factory=dict)
    """A regular expression, by scheme. diffusers refuses a whole file when it is found in a path of the denoiser."""
    diffusers_denoiser_lacks: Mapping[str, str] = field(default_factory=dict)
    """The reason why diffusers does not load the denoiser in a scheme whose text encoders it loads, by scheme."""
    diffusers_lokr: frozenset[tuple[str, str]] = frozenset()
    """The names of LoKr files that diffusers' pipelines load, as in `comfyui`."""
    diffusers_lokr_with_alpha: frozenset[str] = frozenset()
    """The schemes of LoKr files that diffusers loads only when they have an alpha."""
    sd_scripts: str | None = None
    """A regular expression of the denoiser's paths in Kohya names that sd-scripts loads; None for a family it lacks."""
    invokeai: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """A regular expression of the denoiser's paths that InvokeAI loads, by names as in `comfyui`; empty without the family."""
    invokeai_text: tuple[str, ...] = ()
    """The beginnings of the names of text encoders' modules that InvokeAI loads."""
    invokeai_prefixes: Mapping[str, str] = field(default_factory=dict)
    """The prefixes of Kohya's names by part that InvokeAI loads, where it does not load those that are written."""
    invokeai_skips: frozenset[str] = frozenset()
    """The schemes in which InvokeAI skips a name that it does not know; in others it refuses the whole file."""
    invokeai_signs: tuple[tuple[Sign, ...], ...] = ()
    """The modules by which it recognises a file: all of one of these; without any it goes by the names alone."""
    invokeai_signs_in: Mapping[str, tuple[tuple[Sign, ...], ...]] = field(default_factory=dict)
    """More of these, by the scheme of the file's names."""

    others: Mapping[str, str] = field(default_factory=dict)
    """The schemes that each of the programs in `readers.OTHERS` loads, with a "+" where it loads CLIP's names as well."""
    others_lack: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """A regular expression, by program and scheme, that is found in the denoiser's paths that the program does not load."""


@dataclass(frozen=True)
class Listing:
    """What somebody who publishes a LoRA has to say of the model that it was trained on."""

    civitai: str
    """The name of the base model in Civitai's list."""
    licence: str
    """The licence under which the model was published."""
    words: Mapping[str, str] = field(default_factory=dict)
    """What metadata say of the model instead of what they say of the family, by key (`NameTable.words_of`)."""


PUBLISHED_BLOCKS = 2
"""The residual blocks in a level of the published UNets."""


@dataclass(frozen=True)
class NameTable:
    """The names of a family, the names of its modules in every scheme, and the signs by which its LoRAs are recognised."""

    name: str
    """The short name in code and messages, such as sd15."""
    base_versions: tuple[str, ...]
    """The beginnings of the names that metadata have for its models; the first is the `ss_base_model_version` to write.

    `families.family_named` compares letters and digits alone."""
    architecture: str
    """The `modelspec.architecture` of its checkpoints; a LoRA adds `/lora`."""
    signs: tuple[Sign, ...]
    of_original: Callable[[str], Fusion | None]
    """The fusion of a denoiser path in original naming; None when it is no such path."""
    of_diffusers: Callable[[str], Fusion]
    """The fusion that a denoiser path in diffusers naming belongs to."""
    loaded: LoadedNames
    """The names that other programs load."""
    listings: Mapping[str, Listing]
    """What is said of each published model of the family where a LoRA is published, by the model's title in the tables."""
    kernel: Callable[[str], int | None] = lambda path: None
    """The kernel size of a denoiser module in diffusers; None for a Linear."""
    kernel_in_kohya: Callable[[str], int | None] = lambda path: None
    """The kernel size in sd-scripts; only needed for 1x1 convolutions that are Linear in diffusers."""
    words: tuple[str, ...] = ()
    """The components of its modules' paths that have a "_" in them, beyond those in keys.py."""
    comfyui_classes: tuple[str, ...] = ()
    """The classes in comfy.supported_models of its models that can be trained; empty where ComfyUI here has none."""
    a1111_version: str = "Unknown"
    """The name of its models in the list of A1111 and Forge."""
    scheme: str = "kohya"
    """The naming scheme in which its LoRAs are written unless another is asked for: the one that most programs load."""
    diffusers_prefix: str = "transformer."
    kohya_prefixes: Mapping[str, str] = field(default_factory=lambda: {"denoiser": "lora_unet_"})
    """The prefix of each part in Kohya names."""
    comfy_prefixes: Mapping[str, str] = field(default_factory=lambda: {"denoiser": "diffusion_model."})
    """The prefix of each part in ComfyUI's own scheme."""
    original_in_kohya: bool = True
    """Whether Kohya names are made from the original model's paths and not from those of diffusers."""
    original_in_comfy: bool = True
    """Whether names in ComfyUI's own scheme are made from the original model's paths and not from those of diffusers."""
    part_names: Mapping[str, str] = field(default_factory=dict)
    """The part of this family's pipeline for a part as prefixes in files number it, where they differ."""
    checkpoint_prefixes: Mapping[str, str] = field(default_factory=dict)
    """The prefix of each text encoder in a whole original checkpoint, for families that are recognised by it.

    Checkpoints can be written only for families that have them."""
    embedding_names: Mapping[str, str] = field(default_factory=dict)
    """The name of each part's tensor in a textual-inversion embedding file; empty for families without such files."""
    has_other_blocks: bool = False
    """Whether the UNet has other numbers of residual blocks in a level than the published ones (`for_other_blocks`)."""
    block_lists: tuple[str, ...] = ()
    """The blocks in each form of list of the LoRA Block Weight extension, where IN04-05 stands for IN04 and IN05."""

    @property
    def is_unet(self) -> bool:
        """Whether the denoiser is a UNet; otherwise it is a transformer."""
        return self.diffusers_prefix == "unet."

    def words_of(self, models: Sequence[str] = ()) -> dict[str, str]:
        """What metadata say of a base model by key, where it is one of these published ones."""
        found = [self.listings[model].words for model in models if model in self.listings]
        own = found[0] if len(found) == 1 else {}
        return {"ss_base_model_version": self.base_versions[0], "modelspec.architecture": self.architecture, **own}

    @property
    def words_of_models(self) -> frozenset[str]:
        """The keys under which metadata say which published model of the family is meant."""
        return frozenset(key for listing in self.listings.values() for key in listing.words)

    def for_other_blocks(self) -> NameTable:
        """The names for a UNet that has not PUBLISHED_BLOCKS residual blocks in each level, which are diffusers' alone.

        The original names number the blocks as the published models have them. A transformer's names are the same.
        """
        return replace(self, original_in_kohya=False, has_other_blocks=True) if self.is_unet else self

    def locate(self, part: str, path: str) -> Place:
        """The place in the model of a path in a file, in original or diffusers naming."""
        if part == "denoiser" and not is_text_path(path):
            fusion = self.of_original(path)
            if fusion is not None:
                return Place(part, fusion, None)
            fusion = self.of_diffusers(path)
            return Place(part, fusion, fusion.parts.index(path))
        # peft uses the same prefix for text encoders and denoisers, so the path decides.
        part = "text_encoder" if part == "denoiser" else self.part_names.get(part, part)
        path = text_encoder_path(path)
        return Place(part, Fusion(path, (path,)), None)


T5_PATHS = ("encoder.block.", "encoder.final_layer_norm", "shared")
"""The beginnings of T5's paths, of which a model has one at most."""


def is_text_path(path: str) -> bool:
    """Whether a path is a text encoder's, where the prefix of a name does not tell: peft's has one for all parts."""
    return path.startswith(("text_model.", "encoder.layers.", "text_projection", *T5_PATHS))


def text_encoder_path(path: str) -> str:
    """A path in a text encoder, with the leading `text_model.` that CLIP has lost in transformers 5."""
    return f"text_model.{path}" if path.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")) else path


def by_rules(*rules: Fusion) -> tuple[Callable[[str], Fusion | None], Callable[[str], Fusion]]:
    """The functions `of_original` and `of_diffusers` of a family whose names are related by rules, where "{}" is a number.

    A path without a rule has the same name in both.
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
