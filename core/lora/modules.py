"""Low-rank changes of weights, and their tensors in each naming scheme."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..errors import UnmatchedKeys, counted
from ..storage.safetensors_file import ComputedTensors
from ..tensor_names import PUBLISHED_BLOCKS, SCHEMES, Fusion, ModuleId, NameTable
from .changes import weight_change


@dataclass(frozen=True, eq=False)
class LoraModule:
    """A low-rank change of one weight: `delta = alpha / rank * up @ down`.

    For a Linear, down is (rank, in) and up is (out, rank). For a convolution, they are (rank, in, kh, kw) and
    (out, rank, 1, 1). With a Tucker core (LyCORIS), down is (rank, in, 1, 1), mid is (rank, rank, kh, kw) and up is
    (out, rank, 1, 1).
    """

    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of rows of down."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """The factor on `up @ down`: alpha / rank."""
        return self.alpha / self.rank

    @property
    def weight_size(self) -> tuple[int, int]:
        """The size of the changed weight: (outputs, inputs times the kernel's size)."""
        kernel = 1 if self.mid is None else self.mid[0, 0].numel()
        return self.up.shape[0], self.down[0].numel() * kernel

    def delta(self) -> Tensor:
        """Compute the change of the weight, float32, in the weight's shape."""
        tensors = {"down": self.down, "up": self.up} | ({} if self.mid is None else {"mid": self.mid})
        return self.scale * weight_change("lora", tensors)


def name_modules(
    table: NameTable, modules: Mapping[ModuleId, LoraModule], scheme: str, extra: Mapping[str, Tensor] | None = None
) -> ComputedTensors:
    """Return the tensors of a file in a scheme (one of SCHEMES), fused if the scheme uses the original model's names.

    `table` has the names of the model, as in NAME_TABLES.

    Only Kohya's scheme has alpha. Readers of the other two ignore it or fail for some families, so the up matrix includes it.
    `modules` are looked up again for each access to a tensor. `extra` tensors keep their names. Raises UnmatchedKeys for an
    unknown scheme, or one that lacks a name for a module.
    """
    if scheme not in SCHEMES:
        raise UnmatchedKeys(f"unknown naming scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    fusions: dict[str, tuple[Fusion, dict[int, ModuleId]]] = {}
    for part, path in modules:
        name, fusion, index = name_in_scheme(table, part, path, scheme)
        fusions.setdefault(name, (fusion, {}))[1][index] = (part, path)

    def tensors_of(name: str, fusion: Fusion, parts: Mapping[int, ModuleId]) -> dict[str, Tensor]:
        module = fuse(fusion, {index: modules[module_id] for index, module_id in parts.items()})
        if scheme != "kohya":
            module = without_tucker(module)
            down, up = _scaled(module)
            return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        in_denoiser = all(part == "denoiser" for part, _ in parts.values())
        if in_denoiser and table.kernel_in_kohya(fusion.parts[0]) == 1 and module.down.ndim == 2:
            module = replace(module, down=module.down[:, :, None, None], up=module.up[:, :, None, None])
        tensors = {f"{name}.lora_down.weight": module.down, f"{name}.lora_up.weight": module.up}
        tensors[f"{name}.alpha"] = torch.tensor(module.alpha)
        return tensors if module.mid is None else tensors | {f"{name}.lora_mid.weight": module.mid}

    makers = [partial(tensors_of, name, *fusion) for name, fusion in fusions.items()]
    return ComputedTensors([*makers, lambda: extra or {}])


def _scaled(module: LoraModule) -> tuple[Tensor, Tensor]:
    """Return down and up with the scale multiplied into them.

    A small scale goes into down, as far as fp16 can hold it there. Up starts at 0 and may be too small for it. Equal down
    matrices stay equal, so modules that share one can be fused again.
    """
    if module.scale == 1:
        return module.down, module.up
    down, factor = module.down.float(), 1.0
    if 0 < abs(module.scale) < 1 and (largest := float(down.abs().max())) > 0:
        # A matrix whose largest value is 2^-13 has 11 binary digits left in fp16.
        factor = 2.0 ** min(0, max(math.frexp(module.scale)[1], -13 - math.frexp(largest)[1]))
    return down * factor, module.up.float() * (module.scale / factor)


def suffix_of(role: str) -> str:
    """Return the suffix for a tensor of that role in Kohya's and ComfyUI's names."""
    if role in ("down", "up", "mid"):
        return f"lora_{role}.weight"
    return "dora_scale" if role == "dora" else role


def name_kinds(names: NameTable, modules: Mapping[ModuleId, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name each module's tensors, given by role, for a file in `scheme_of_kinds`. They may be of any kind of adapter.

    `names` are the names of the base model's modules (`Base.names`). Raises UnmatchedKeys as `scheme_of_kinds` does.
    """
    scheme = scheme_of_kinds(names, modules)
    return {
        f"{name_in_scheme(names, part, path, scheme)[0]}.{suffix_of(role)}": tensor
        for (part, path), roles in modules.items()
        for role, tensor in roles.items()
    }


def scheme_of_kinds(names: NameTable, modules: Iterable[ModuleId]) -> str:
    """Return the naming scheme that has a separate name for each module, which all kinds but a plain LoRA require.

    This is Kohya's scheme unless it fuses some of the modules (q, k and v). Then it is diffusers', if ComfyUI supports these
    names for the family. Otherwise, raises UnmatchedKeys.
    """
    for part, path in modules:
        _, fusion, _ = name_in_scheme(names, part, path, "kohya")
        if len(fusion.parts) > 1:
            if ("diffusers", "diffusers") in names.loaded.comfyui:
                return "diffusers"
            raise UnmatchedKeys(
                f"{path} is fused with {counted(len(fusion.parts) - 1, 'other module')} in files of {names.name}; "
                "only a plain LoRA can be saved for it"
            )
    return "kohya"


def stands_alone(names: NameTable, path: str) -> bool:
    """Check that a module of the denoiser can have a separate name in a file: its own, or one that ComfyUI supports."""
    known = names.is_unet or ("diffusers", "diffusers") in names.loaded.comfyui
    return known or len(names.of_diffusers(path).parts) == 1


def name_in_scheme(keys: NameTable, part: str, path: str, scheme: str) -> tuple[str, Fusion, int]:
    """Return the name of a module in a file, the fusion that it names, and the module's index in the fusion.

    Raises UnmatchedKeys when the scheme has no name for that part of the model.
    """
    alone = Fusion(path, (path,))
    if scheme == "diffusers":
        return (keys.diffusers_prefix if part == "denoiser" else f"{part}.") + path, alone, 0
    in_kohya = scheme == "kohya"
    prefixes = keys.kohya_prefixes if in_kohya else keys.comfy_prefixes
    if part not in prefixes:
        raise UnmatchedKeys(
            f"{path} cannot be saved, because the {scheme} scheme has no names for the {part} of {keys.name}; choose another "
            "scheme"
        )
    original = keys.original_in_kohya if in_kohya else keys.original_in_comfy
    fusion = keys.of_diffusers(path) if part == "denoiser" and original else alone
    if keys.is_unet and fusion is not alone and keys.of_original(fusion.original) not in (None, fusion):
        raise UnmatchedKeys(
            f"{path} has no {scheme} name, because this UNet has more than the {PUBLISHED_BLOCKS} residual blocks per level of "
            f"the published {keys.name} models; use diffusers' names"
        )
    name = fusion.original.replace(".", "_") if in_kohya else fusion.original
    return prefixes[part] + name, fusion, fusion.parts.index(path)


def fuse(fusion: Fusion, parts: Mapping[int, LoraModule]) -> LoraModule:
    """Fuse the changes of diffusers' modules into the change of the original model's module. Missing parts don't change.

    If the parts share one down matrix because they were once fused, the rank is kept. Otherwise, the ranks add up. Raises
    UnmatchedKeys when a part changes the wrong number of rows.
    """
    parts = dict(sorted(parts.items()))  # The order in the file must not matter.
    first = next(iter(parts.values()))
    if len(fusion.parts) == 1:
        if fusion.halves_swapped and first.up.shape[0] == 2 * first.down.shape[1]:
            return replace(first, up=first.up.roll(first.up.shape[0] // 2, 0))
        return first
    if kernels := [index for index, module in parts.items() if module.down.ndim != 2]:
        raise UnmatchedKeys(
            f"{fusion.parts[kernels[0]]} is changed like a convolution, but is a Linear in {fusion.original}"
        )
    rows = [round(size * first.down.shape[1]) for size in fusion.sizes]
    for index, module in parts.items():
        if module.up.shape[0] != rows[index]:
            raise UnmatchedKeys(
                f"{fusion.parts[index]} changes {module.up.shape[0]} rows, but has {rows[index]} in {fusion.original}"
            )
    shared = first.down.float()  # torch cannot compare fp8 tensors.
    if all(module.scale == first.scale and torch.equal(module.down.float(), shared) for module in parts.values()):
        ups = [parts[i].up if i in parts else first.up.new_zeros(rows[i], first.rank) for i in range(len(rows))]
        return LoraModule(first.down, torch.cat(ups), first.alpha)
    # The fused module has one scale. Each part's up matrix is multiplied by the ratio of its own scale to this one.
    scale = max((module.scale for module in parts.values()), key=abs)
    rank = sum(module.rank for module in parts.values())
    up = torch.zeros(sum(rows), rank)
    column = 0
    for index, module in parts.items():
        start = sum(rows[:index])
        factor = module.scale / scale if scale else 0.0
        up[start : start + rows[index], column : column + module.rank] = module.up.float() * factor
        column += module.rank
    # Fusing has increased the rank, so increase alpha too, to keep the scale.
    down = torch.cat([module.down.float() for module in parts.values()])
    return LoraModule(down, up.to(first.up.dtype) if scale else up, scale * rank)


def without_tucker(module: LoraModule) -> LoraModule:
    """Multiply the Tucker core of a module, if it has one, into down, which is then (rank, in, kh, kw)."""
    if module.mid is None:
        return module
    down = torch.einsum("rskl,si->rikl", module.mid.float(), module.down.flatten(1).float())
    return LoraModule(down, module.up, module.alpha)
