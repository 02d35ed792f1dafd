"""The weights of a checkpoint by module, for every family with supported LoRA files.

No network is built, and only the header is read. That is enough to check whether a LoRA fits, to merge it, and to compare two
checkpoints.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ..errors import BadFile, UnknownFamily, counted
from ..models.clip import OPENCLIP_LAYER
from ..models.quantised import sign_of_quantisation
from ..storage.safetensors_file import SafetensorsFile
from ..tensor_names import NAME_TABLES, PUBLISHED_BLOCKS, Fusion, ModuleId, NameTable, Place, families_of, other_model
from ..tensor_names.unet import diffusers_unet_path

_DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")
_TEXT_ENCODERS = {
    prefix: (family.name, part)
    for family in NAME_TABLES.values()
    for part, prefix in family.checkpoint_prefixes.items()
}
"""The family and the part of a text encoder, by a prefix in checkpoints that only that family has."""
_OTHER_PARTS = (
    "cond_stage_model.", "conditioner.", "text_encoder", "first_stage_model.", "vae.", "model_ema.", "control_model.",
)  # fmt: skip


class BaseLayers:
    """The layers of a base model that a LoRA can change, for `lora.file.fit`."""

    family: str
    """A name in tensor_names.NAME_TABLES."""
    places: dict[str, Place]
    """The modules that each weight belongs to, by the weight's name."""
    shapes: dict[ModuleId, tuple[int, ...]]
    """The shape of each module's weight in diffusers."""
    biased: set[ModuleId]
    """The modules that have a bias of the right size."""
    names: NameTable
    """The names of its modules in LoRA files. UNets with other blocks than the published ones use diffusers' names."""

    def __init__(self, tensor_shapes: Mapping[str, tuple[int, ...]], name: str, family: str | None = None):
        """Find the layers by the shapes of a model's tensors, in original or diffusers naming.

        The family is detected if it isn't given. Raises UnknownFamily, with `name` in the message, when none matches.
        """
        paths = _paths(tensor_shapes)
        self.family = family or _family_of(tensor_shapes, paths, name)
        self.places = {}
        self.shapes = {}
        self.biased = set()
        self._names: dict[ModuleId, str] = {}
        layers = _layers_per_block(paths.values())
        table = NAME_TABLES[self.family]
        self.names = table if layers == PUBLISHED_BLOCKS else table.for_other_blocks()
        for weight, (part, path) in paths.items():
            place, shape = _changed_place(table, part, path, layers), tensor_shapes[weight]
            if place is None:
                continue
            try:
                rows = place.rows(shape[0], math.prod(shape[1:2]))
            except ValueError:  # The weight has another size than the family's.
                continue
            self.places[weight] = place
            for module, outputs in zip(place.modules, rows, strict=True):
                self.shapes[module] = (outputs, *shape[1:])
                self._names[module] = weight
            if tensor_shapes.get(bias_name(weight)) == tuple(shape[:1]):
                self.biased.update(place.modules)

    def name_of(self, module: ModuleId) -> str:
        """Return the name of the tensor that is, or includes, the weight of a module."""
        return self._names[module]


class BaseWeights(BaseLayers):
    """The weights and biases in a checkpoint file by module. Open it with `BaseWeights.open(path)`."""

    file: SafetensorsFile

    def __init__(self, file: SafetensorsFile):
        super().__init__(file.shapes, str(file.path))
        self.file = file

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "BaseWeights":
        """Open a file with a whole checkpoint or a denoiser alone, in original or diffusers naming.

        Raises BadFile when it is damaged or quantised, UnknownFamily when the base model is not recognised.
        """
        file = SafetensorsFile.open(path)
        sign = sign_of_quantisation(file)
        if sign is not None:
            raise BadFile(
                f"{file.path}: is quantised, e.g. by {sign!r}, so its tensors are not the weights themselves; "
                "use the model in fp32, bf16, fp16 or plain fp8"
            )
        return cls(file)

    def read(self, module: ModuleId) -> Tensor:
        """Read the weight of a module, with its rows in diffusers' order."""
        name = self._names[module]
        return dict(self.places[name].split(self.file[name]))[module]

    def read_bias(self, module: ModuleId) -> Tensor:
        """Read the bias of a module in `biased`, in diffusers' order."""
        name = self._names[module]
        inputs = math.prod(self.file.shapes[name][1:2])
        return dict(self.places[name].split(self.file[bias_name(name)], inputs))[module]


def bias_name(name: str) -> str:
    """Return the name of the bias that belongs to a weight."""
    return name.removesuffix("weight") + "bias"


def _paths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, str]]:
    """Return the part, or its prefix in the file, and the module path of each weight, by its name."""
    denoiser = next((prefix for prefix in _DENOISER_PREFIXES if any(name.startswith(prefix) for name in shapes)), "")
    found = {}
    for name, shape in shapes.items():
        if len(shape) not in (1, 2, 4) or not name.endswith(("weight", ".scale")):
            continue
        path = name.removesuffix("_weight").removesuffix(".weight")
        text = re.match(r"text_encoders\.\w+\.transformer\.", name)
        prefix = text[0] if text else next((p for p in _TEXT_ENCODERS if name.startswith(p)), None)
        if prefix is not None and name.endswith("weight"):
            found[name] = (prefix, path.removeprefix(prefix))
        elif name.startswith(denoiser) and (denoiser or not name.startswith(_OTHER_PARTS)):
            found[name] = ("denoiser", path.removeprefix(denoiser))
    return found


def _family_of(shapes: Mapping[str, tuple[int, ...]], paths: Mapping[str, tuple[str, str]], model: str) -> str:
    prefixes = {prefix for prefix, _ in paths.values()}
    weights = {name: place for name, place in paths.items() if name.endswith("weight")}
    modules = [(part, path, shapes[name]) for name, (part, path) in weights.items() if part == "denoiser"]
    if other := other_model(modules):
        raise UnknownFamily(f"{model}: is {other}, which is not supported. Supported: {', '.join(NAME_TABLES)}")
    families = [_TEXT_ENCODERS[prefix][0] for prefix in sorted(prefixes & set(_TEXT_ENCODERS))] or families_of(modules)
    if not modules or not families:
        example = next(iter(shapes), "none")
        raise UnknownFamily(
            f"{model}: is not a base model: no family matches its {counted(len(shapes), 'tensor')}, e.g. {example!r}. "
            f"Supported: {', '.join(NAME_TABLES)}"
        )
    return families[0]


def _layers_per_block(paths: Iterable[tuple[str, str]]) -> int:
    """Return the number of residual blocks per level of a UNet, from the position of the first downsampler or last block."""
    before, last = [], []
    for _, path in paths:
        if match := re.fullmatch(r"input_blocks\.(\d+)\.0\.op", path):
            before.append(int(match[1]) - 1)
        elif match := re.match(r"down_blocks\.\d+\.resnets\.(\d+)\.", path):
            last.append(int(match[1]) + 1)
    return min(before, default=max(last, default=PUBLISHED_BLOCKS))


def _changed_place(family: NameTable, part: str, path: str, layers: int) -> Place | None:
    """Return the place of a path in the family, or None when LoRAs don't change that module."""
    if part == "denoiser":
        if path.endswith(".scale") and family.of_original(path) is None:
            # The weight of a norm in FLUX's files. In Krea 2's names it is not a module's weight.
            path = path.removesuffix(".scale")
            if family.of_original(path) is None:
                return None
        place = family.locate(part, path)
        if place.fusion.original == path and path != place.fusion.parts[0] and family.is_unet:
            # The family's table is for the published models, and smaller ones have fewer blocks in a level.
            return Place(part, Fusion(path, (diffusers_unet_path(path, layers),)), None)
        return place
    by_comfy = {prefix: own for own, prefix in family.comfy_prefixes.items()}
    own = _TEXT_ENCODERS[part][1] if part in _TEXT_ENCODERS else by_comfy.get(part)
    if own is None or "embedding" in path or path.startswith("text_projection"):
        return None
    if match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", path):
        layer = f"text_model.encoder.layers.{match[1]}."
        if match[2] == "attn.in_proj":
            return Place(own, Fusion(path, tuple(f"{layer}self_attn.{x}_proj" for x in "qkv"), (1, 1, 1)), None)
        path = layer + OPENCLIP_LAYER.get(match[2], match[2])
    return family.locate(own, path)
