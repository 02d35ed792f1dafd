"""`NameTable`, which maps a model family's module names between naming schemes, and the classes it is made of."""

from __future__ import annotations

import math
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
        """Return the number of rows of each of `modules` in a weight of this size.

        Raises ValueError when they do not add up.
        """
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
class Sign:
    """A module path and widths that are characteristic of a family."""

    path: str
    """A regular expression to search for in the dotted path of the module in the file."""
    inputs: frozenset[int] | None = None
    """The allowed numbers of input features; None for any, if the sign is only about the structure."""
    ratio: float | None = None
    """The number of output rows per input feature; None for any."""
    part: str = "denoiser"

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(self.path)

    def matches(self, part: str, path: str, shape: tuple[int, ...] | None) -> bool:
        """Check that a module has the sign. `shape` is its weight's (out, in, ...), or None if unknown."""
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
        """Whether the sign compares widths, so that a match is evidence for this family only."""
        return self.inputs is not None or self.ratio is not None


def clip_signs(width: int) -> tuple[Sign, ...]:
    """Return the signs of a CLIP of that width as the first text encoder."""
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
"""The names that ComfyUI loads for every transformer, as in `LoadedNames.comfyui`; families may add more."""


@dataclass(frozen=True)
class LoadedNames:
    """The LoRA names of a family that other programs load. core/lora/readers.py uses it and lists the programs' versions."""

    comfyui: frozenset[tuple[str, str]]
    """The names of the denoiser that ComfyUI loads, as (scheme, "original" or "diffusers" for its paths).

    Empty if the tested version lacks the family."""
    diffusers: frozenset[str]
    """The schemes that diffusers' pipelines load."""
    diffusers_paths: Mapping[str, str] = field(default_factory=dict)
    """Whose paths ("original" or "diffusers") the denoiser's names must have in diffusers' pipelines, by scheme.

    Names in the scheme `diffusers` always have its own paths. Other schemes may have both if they are not listed."""
    comfyui_t5: tuple[str, ...] = ()
    """The prefixes of Kohya's names of T5 that ComfyUI loads."""
    comfyui_lacks: str = r"$^"
    """A regular expression for the paths that are missing in ComfyUI's table of diffusers' names."""
    diffusers_forms: Mapping[str, str] = field(default_factory=dict)
    """The forms of tensors' names that diffusers loads, by scheme, where they differ from `readers.FORMS`."""
    diffusers_text_forms: Mapping[str, str] = field(default_factory=dict)
    """The forms of text encoders' names that diffusers loads, by scheme, where they differ from `readers.TEXT_FORMS`."""
    diffusers_lacks: Mapping[str, str] = field(default_factory=dict)
    """A regular expression, by scheme, for the paths that diffusers doesn't load because it misreads their names."""
    diffusers_refuses: Mapping[str, str] = field(default_factory=dict)
    """A regular expression, by scheme. If a path of the denoiser matches, diffusers refuses the whole file."""
    diffusers_blocks: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    """The modules that diffusers expects in every block, by scheme and stack of blocks, if it refuses a file without them."""
    diffusers_linear: tuple[str, ...] = ()
    """The ends of the denoiser's paths that are Linear in diffusers. It refuses a file that has convolutions there."""
    diffusers_lokr: frozenset[tuple[str, str]] = frozenset()
    """The names of LoKr files that diffusers' pipelines load, as in `comfyui`."""
    diffusers_lokr_with_alpha: frozenset[str] = frozenset()
    """The schemes of LoKr files that diffusers loads only when they have an alpha."""
    sd_scripts: str | None = None
    """A regular expression for the denoiser's paths in Kohya names that sd-scripts loads; None if it lacks the family."""
    invokeai: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """A regular expression, by names as in `comfyui`, for the denoiser's paths that InvokeAI loads.

    Empty if InvokeAI lacks the family."""
    invokeai_forms: Mapping[str, str] = field(default_factory=dict)
    """The forms of tensors' names that InvokeAI loads, by scheme, where they differ from `readers.INVOKEAI_FORMS`."""
    invokeai_text: tuple[str, ...] = ()
    """The prefixes of the text encoders' module names that InvokeAI loads."""
    invokeai_prefixes: Mapping[str, str] = field(default_factory=dict)
    """The Kohya prefixes, by part, that InvokeAI loads instead of those in `NameTable.kohya_prefixes`."""
    invokeai_skips: frozenset[str] = frozenset()
    """The schemes whose unknown names InvokeAI skips. In other schemes, it refuses the whole file."""
    invokeai_signs: tuple[tuple[Sign, ...], ...] = ()
    """The modules that InvokeAI recognises a file by: all signs of one group must match. If empty, only the names matter."""
    invokeai_signs_in: Mapping[str, tuple[tuple[Sign, ...], ...]] = field(default_factory=dict)
    """More groups of signs, by the scheme of the file's names."""

    others: Mapping[str, str] = field(default_factory=dict)
    """The schemes that each program in `readers.OTHERS` loads, with a "+" if it loads CLIP's names too."""
    others_lack: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """A regular expression, by program and scheme, for the denoiser's paths that the program does not load."""


@dataclass(frozen=True)
class Listing:
    """What you have to state about the base model when you publish a LoRA."""

    civitai: str
    """The name of the base model in Civitai's list."""
    licence: str
    """The licence of the model."""
    words: Mapping[str, str] = field(default_factory=dict)
    """The metadata of the model, by key, that replace those of the family (`NameTable.words_of`)."""


PUBLISHED_BLOCKS = 2
"""The number of residual blocks per level in the published UNets."""


@dataclass(frozen=True)
class NameTable:
    """The names of a family and of its modules in every scheme, and the signs that identify its LoRAs."""

    name: str
    """The short name in code and messages, such as sd15."""
    base_versions: tuple[str, ...]
    """The prefixes of its models' names in metadata. The first is the `ss_base_model_version` to write.

    `families.family_named` compares only letters and digits."""
    architecture: str
    """The `modelspec.architecture` of its checkpoints; a LoRA adds `/lora`."""
    signs: tuple[Sign, ...]
    of_original: Callable[[str], Fusion | None]
    """The fusion of a denoiser path in original naming; None for any other path."""
    of_diffusers: Callable[[str], Fusion]
    """The fusion that a denoiser path in diffusers naming belongs to."""
    loaded: LoadedNames
    """The names that other programs load."""
    listings: Mapping[str, Listing]
    """The listing of each published model of the family, by the model's title in the tables."""
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

    def words_of(self, models: Sequence[str] = ()) -> dict[str, str]:
        """Return the metadata of a base model by key. `models` are the titles of the published models it may be."""
        found = [self.listings[model].words for model in models if model in self.listings]
        own = found[0] if len(found) == 1 else {}
        return {"ss_base_model_version": self.base_versions[0], "modelspec.architecture": self.architecture, **own}

    @property
    def words_of_models(self) -> frozenset[str]:
        """The metadata keys that distinguish the published models of the family."""
        return frozenset(key for listing in self.listings.values() for key in listing.words)

    def for_other_blocks(self) -> NameTable:
        """Return the names for a UNet whose levels don't have PUBLISHED_BLOCKS residual blocks each.

        They are diffusers' names only, because the original names assume the published models' numbers of blocks. A
        transformer's names stay the same.
        """
        return replace(self, original_in_kohya=False, has_other_blocks=True) if self.is_unet else self

    def locate(self, part: str, path: str) -> Place:
        """Return the place of a file's path in the model. The path may be in original or diffusers naming."""
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
"""The prefixes of T5's paths. A model has one T5 at most."""


def is_text_path(path: str) -> bool:
    """Check that a path is a text encoder's, if the name's prefix doesn't show it: peft has one prefix for all parts."""
    return path.startswith(("text_model.", "encoder.layers.", "text_projection", *T5_PATHS))


def text_encoder_path(path: str) -> str:
    """Return a path in a text encoder, with the leading `text_model.` that transformers 5 dropped from CLIP."""
    return f"text_model.{path}" if path.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")) else path


def by_rules(*rules: Fusion) -> tuple[Callable[[str], Fusion | None], Callable[[str], Fusion]]:
    """Make the functions `of_original` and `of_diffusers` of a family from rules. "{}" in a rule matches a number.

    A path without a rule has the same name in both namings.
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
