"""New LoRAs from old ones: convert, merge, resize, extract; and a LoRA merged into a checkpoint.

All of it is linear algebra on one module at a time. What is only renamed or put together is computed when it is written
(`LoraFile.save`), so a file of any size is converted or merged without being in memory; what has a new rank is held in
memory, but not what it is made of. `on_progress(done, total)` is called after each module.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .base_weights import BaseWeights, bias_name
from .errors import BadConfig, LoraMisfit, UnmatchedKeys
from .lora_file import SCHEMES, Entry, LoraFile, LoraModule, fit, name_modules, without_tucker
from .lora_inspect import (
    Finding,
    edit_metadata,
    file_hashes,
    format_inspection,
    inspect_lora,
    trigger_words,
    verify_lora,
)
from .lora_keys import FAMILIES, ModuleId, Place
from .lora_kinds import BIAS_ROLES, bias_change
from .safetensors_file import SafetensorsFile, write_safetensors

__all__ = [
    "Finding",
    "convert_lora",
    "edit_metadata",
    "extract_lora",
    "file_hashes",
    "format_inspection",
    "inspect_lora",
    "merge_into_checkpoint",
    "merge_loras",
    "resize_lora",
    "to_plain",
    "trigger_words",
    "truncated_svd",
    "verify_lora",
]

OnProgress = Callable[[int, int], None]
BaseWeight = Callable[[ModuleId], Tensor]
"""The weight of a module of the base model, for adapters whose change depends on it (DoRA, OFT)."""


def _silent(done: int, total: int) -> None:
    pass


def convert_lora(
    lora: LoraFile,
    scheme: str,
    plain_rank: int | None = None,
    base_weight: BaseWeight | None = None,
    on_progress: OnProgress = _silent,
) -> tuple[LoraFile, float]:
    """The LoRA in another naming scheme (one of lora_file.SCHEMES), and the largest relative error of a module's change.

    The error is 0 unless `plain_rank` is given: then adapters that are no plain LoRA become one of at most that rank.
    Without it they keep their kind where the scheme can express it, and are refused by name where it cannot.
    """
    if scheme not in SCHEMES:
        raise BadConfig(f"no naming scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    if all(_is_plain(entry) for entry in lora.entries):
        return replace(_from_modules(lora, lora.modules(), scheme), metadata=_metadata_for(lora, scheme)), 0.0
    if plain_rank is not None:
        plain, error = to_plain(lora, plain_rank, base_weight, on_progress)
        return replace(_from_modules(lora, plain.modules(), scheme), metadata=_metadata_for(plain, scheme)), error
    return replace(lora, tensors=_renamed(lora, scheme), metadata=_metadata_for(lora, scheme)), 0.0


def _is_plain(entry: Entry) -> bool:
    return entry.kind in ("lora", "locon") and not entry.changes_bias


def _from_modules(lora: LoraFile, modules: Mapping[ModuleId, LoraModule], scheme: str) -> LoraFile:
    embeddings = {key: lora.tensors[key] for key in lora.embedding_keys}
    return replace(lora, tensors=name_modules(lora.family, modules, scheme, embeddings))


def _metadata_for(lora: LoraFile, scheme: str) -> dict[str, str]:
    """The metadata without what is only true of the old names, with what readers of the new ones want to know."""
    metadata = {key: value for key, value in lora.metadata.items() if key != "lora_adapter_metadata"}
    if scheme == "kohya":
        ranks = {entry.rank for entry in lora.entries}
        metadata.setdefault("ss_base_model_version", FAMILIES[lora.family].base_versions[0])
        metadata.setdefault("ss_network_module", "networks.lora")
        metadata.setdefault("ss_network_dim", str(ranks.pop()) if len(ranks) == 1 else "Dynamic")
    return metadata


_SUFFIXES = {
    "down": ".lora_down.weight",
    "up": ".lora_up.weight",
    "mid": ".lora_mid.weight",
    "dora": ".dora_scale",
}
"""Role -> suffix in Kohya's and ComfyUI's files, where it is not the role itself."""


def _renamed(lora: LoraFile, scheme: str) -> dict[str, Tensor]:
    """The tensors under names of the scheme, with their kind of adapter as it is."""
    family = FAMILIES[lora.family]
    tensors: dict[str, Tensor] = {key: lora.tensors[key] for key in lora.embedding_keys}
    for entry in lora.entries:
        in_kohya = scheme == "kohya"
        original = family.original_in_kohya if in_kohya else family.original_in_comfy
        fusion, index = entry.place.fusion, entry.place.index
        moves_rows = len(fusion.parts) > 1 and original != (index is None)
        swaps_rows = fusion.halves_swapped and original != (index is None)
        if scheme == "diffusers" or moves_rows or swaps_rows:
            raise UnmatchedKeys(
                f"{lora.name}: {entry.name} is of kind {entry.kind}, which {scheme} names cannot express; "
                "give a rank to make it a plain LoRA"
            )
        prefix = (family.kohya_prefixes if in_kohya else family.comfy_prefixes)[entry.part]
        path = fusion.original if original and entry.part == "denoiser" else entry.modules[0][1]
        name = prefix + (path.replace(".", "_") if in_kohya else path)
        found = lora.tensors_of(entry)
        for role, tensor in found.items():
            if role not in BIAS_ROLES:
                tensors[name + _SUFFIXES.get(role, f".{role}")] = tensor
        if "dora" in found and found["dora"].ndim == 1:
            tensors[f"{name}.dora_scale"] = found["dora"].reshape(-1, *[1] * (len(entry.weight_shape or (0, 0)) - 1))
        if entry.kind == "norm" and "b_norm" in found:
            tensors[f"{name}.b_norm"] = found["b_norm"]
        elif (bias := bias_change(entry.kind, found)) is not None:
            tensors[f"{name}.diff_b"] = bias
    return tensors


def to_plain(
    lora: LoraFile, rank: int, base_weight: BaseWeight | None = None, on_progress: OnProgress = _silent
) -> tuple[LoraFile, float]:
    """A plain LoRA in Kohya's scheme with the nearest change of at most that rank, and the largest relative error.

    Modules that are plain already are kept as they are. The error is of the Frobenius norm, at most 1.
    `base_weight` is needed for DoRA and OFT. Changes of biases and normalisation layers have no place in a LoRA and are
    refused.
    """
    _check_rank(rank)
    plain_entries = [entry for entry in lora.entries if _is_plain(entry)]
    kept = {key: lora.tensors[key] for entry in plain_entries for key in entry.keys.values()}
    modules = replace(lora, tensors=kept).modules() if kept else {}
    others = [entry for entry in lora.entries if not _is_plain(entry)]
    worst = 0.0
    for done, entry in enumerate(others, 1):
        if entry.kind == "norm" or entry.changes_bias:
            raise UnmatchedKeys(
                f"{lora.name}: {entry.name} changes a bias or a normalisation, which no LoRA can express"
            )
        for module_id, change in lora.changes_of(entry, base_weight):
            down, up, error = factorise(change, rank, f"{lora.name}: {entry.name}")
            modules[module_id] = LoraModule(down, up, float(down.shape[0]))
            worst = max(worst, error)
        on_progress(done, len(others))
    metadata = {k: v for k, v in lora.metadata.items() if not k.startswith("ss_network_")}
    return LoraFile.from_modules(lora.family, modules, metadata), worst


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise BadConfig(f"a rank must be at least 1, not {rank}")


def factorise(change: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor, float]:
    """Down, up and the relative error of the nearest change of that rank; `name` is for messages."""
    matrix = change.flatten(1)
    total = torch.linalg.vector_norm(matrix, dtype=torch.float64).item() ** 2
    if not math.isfinite(total):
        raise UnmatchedKeys(f"{name}: its change holds NaN or infinity")
    left, values, right = truncated_svd(matrix, min(rank, *matrix.shape))
    missing = max(total - values.double().square().sum().item(), 0.0)
    roots = values.sqrt()
    down = (roots[:, None] * right).reshape(-1, *change.shape[1:])
    up = (left * roots).reshape(-1, len(values), *[1] * (change.ndim - 2))
    return down, up, math.sqrt(missing / total) if total else 0.0


_FULL_SVD_LIMIT = 512
_OVERSAMPLING = 16
_POWER_ITERATIONS = 6


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest `rank` singular triples: (m, rank), (rank) falling, (rank, n). The same input gives the same result.

    Large matrices by subspace iteration with a fixed seed (Halko, Martinsson and Tropp, arXiv:0909.4061).
    """
    columns = rank + _OVERSAMPLING
    if min(matrix.shape) <= max(_FULL_SVD_LIMIT, 2 * columns):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    start = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]


def resize_lora(
    lora: LoraFile,
    rank: int | None = None,
    energy: float | None = None,
    on_progress: OnProgress = _silent,
) -> tuple[LoraFile, float]:
    """The LoRA with smaller modules under the same names, and the largest relative error of a module's change.

    Give one of: `rank`, the most that a module may have; `energy`, in (0, 1], the share of each module's squared singular
    values that must remain. QR of the two factors comes first, so that only rank x rank matrices are decomposed.
    """
    if (rank is None) == (energy is None):
        raise BadConfig("give either a rank or an energy")
    if rank is not None:
        _check_rank(rank)
    elif energy is not None and not 0 < energy <= 1:
        raise BadConfig(f"energy must be above 0 and at most 1, not {energy}")
    tensors = dict(lora.tensors)
    ranks = set()
    worst = 0.0
    for done, entry in enumerate(lora.entries, 1):
        if entry.kind not in ("lora", "locon") or "bias" in entry.keys:
            what = "has a bias in its up matrix" if "bias" in entry.keys else f"is of kind {entry.kind}"
            raise UnmatchedKeys(f"{lora.name}: {entry.name} {what}, not a plain LoRA; convert it first")
        found = lora.tensors_of(entry)
        alpha = found["alpha"].item() if "alpha" in found else float(found["down"].shape[0])
        module = without_tucker(LoraModule(found["down"], found["up"], alpha, found.get("mid")))
        if not (module.down.isfinite().all() and module.up.isfinite().all() and math.isfinite(alpha)):
            raise UnmatchedKeys(f"{lora.name}: {entry.name}: its change holds NaN or infinity")
        small, error = _resize(module, rank, energy)
        tensors[entry.keys["down"]], tensors[entry.keys["up"]] = small.down, small.up
        tensors.pop(entry.keys.get("mid", ""), None)
        if "alpha" in entry.keys:
            tensors[entry.keys["alpha"]] = torch.tensor(small.alpha)
        ranks.add(small.rank)
        worst = max(worst, error)
        on_progress(done, len(lora.entries))
    size = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    metadata = {key: value for key, value in lora.metadata.items() if key != "lora_adapter_metadata"}
    metadata |= {"ss_network_dim": size, "ss_network_alpha": size}
    return replace(lora, tensors=tensors, metadata=metadata), worst


def _resize(module: LoraModule, rank: int | None, energy: float | None) -> tuple[LoraModule, float]:
    down, up = module.down.float(), module.up.float()
    left_basis, left_core = torch.linalg.qr(up.flatten(1))
    right_basis, right_core = torch.linalg.qr(down.flatten(1).T)
    left, values, right = torch.linalg.svd(module.scale * left_core @ right_core.T, full_matrices=False)
    squares = values.double().square()
    kept = squares.cumsum(0)
    total = kept[-1].item()
    if rank is not None:
        size = min(rank, len(values))
    else:
        assert energy is not None
        size = min(int((kept < energy * total).sum()) + 1, len(values))
    roots = values[:size].sqrt()
    small_down = (roots[:, None] * (right[:size] @ right_basis.T)).reshape(size, *down.shape[1:])
    small_up = (left_basis @ left[:, :size] * roots).reshape(up.shape[0], size, *up.shape[2:])
    error = math.sqrt(max(1 - kept[size - 1].item() / total, 0.0)) if total else 0.0
    # alpha = rank: the scale has gone into the singular values, evenly into both factors.
    return LoraModule(small_down, small_up, float(size)), error


def merge_loras(
    loras: Sequence[tuple[LoraFile, float]],
    rank: int | None = None,
    scheme: str = "kohya",
    on_progress: OnProgress = _silent,
) -> tuple[LoraFile, float]:
    """One LoRA with the sum of the changes, each times its weight; and the largest relative error of a module's change.

    Without `rank` exact, by concatenation: ranks add up. With it, resized to that rank afterwards.
    The metadata are the first file's, with `modelspec.merged_from` and without what is true of one of them only.
    """
    if not loras:
        raise BadConfig("nothing to merge: give at least one LoRA")
    families = {lora.family: lora.name for lora, _ in loras}
    if len(families) > 1:
        found = ", ".join(f"{name} is for {family}" for family, name in families.items())
        raise LoraMisfit(f"only LoRAs for the same family can be merged, but {found}")
    family = loras[0][0].family
    if rank is not None:
        _check_rank(rank)
    collected: dict[ModuleId, list[LoraModule]] = {}
    for lora, weight in loras:
        for module_id, module in lora.modules().items():
            collected.setdefault(module_id, []).append(replace(module, alpha=module.alpha * weight))
    titles = [
        lora.metadata.get("modelspec.title") or lora.metadata.get("ss_output_name") or "LoRA" for lora, _ in loras
    ]
    kept = ("ss_base_model_version", "ss_sd_model_name", "ss_new_sd_model_hash", "ss_sd_model_hash", "ss_v2")
    metadata = {
        key: value
        for key, value in loras[0][0].metadata.items()
        if key in kept or (key.startswith("modelspec.") and key not in ("modelspec.thumbnail", "modelspec.hash_sha256"))
    }
    metadata["modelspec.merged_from"] = ", ".join(titles)
    phrases = [words[0] for lora, _ in loras if (words := trigger_words(lora.metadata))]
    if phrases:
        metadata["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(phrases))
    whole, error = LoraFile(family, metadata, name_modules(family, _Sums(collected), scheme)), 0.0
    if rank is not None:
        whole, error = resize_lora(whole, rank=rank, on_progress=on_progress)
    return replace(whole, metadata=_metadata_for(whole, scheme)), error


class _Sums(Mapping[ModuleId, LoraModule]):
    """The sum of several changes of each module, computed when it is asked for."""

    def __init__(self, summands: Mapping[ModuleId, Sequence[LoraModule]]):
        self._summands = summands

    def __getitem__(self, module_id: ModuleId) -> LoraModule:
        return _concatenate(self._summands[module_id])

    def __iter__(self) -> Iterator[ModuleId]:
        return iter(self._summands)

    def __len__(self) -> int:
        return len(self._summands)


def _concatenate(modules: Sequence[LoraModule]) -> LoraModule:
    if len(modules) == 1:
        return modules[0]
    modules = [without_tucker(module) for module in modules]
    first = modules[0]
    # A 1x1 convolution may be a Linear in one file: the shapes of the first count.
    downs = [module.down.float().reshape(-1, *first.down.shape[1:]) for module in modules]
    ups = [(module.scale * module.up.float()).reshape(first.up.shape[0], -1, *first.up.shape[2:]) for module in modules]
    down, up = torch.cat(downs), torch.cat(ups, dim=1)
    return LoraModule(down, up, float(down.shape[0]))


def extract_lora(
    original: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    rank: int,
    on_progress: OnProgress = _silent,
    on_warning: Callable[[str], None] = lambda message: None,
) -> tuple[LoraFile, float]:
    """The difference of two checkpoints as a LoRA, and the largest relative error of a module's change.

    Both are single files of the same family. One pair of weights at a time is in memory, and the LoRA; modules that are
    equal in both are left out. `on_warning` hears of what differs and has no place in a LoRA.
    """
    _check_rank(rank)
    before, after = BaseWeights.open(original), BaseWeights.open(tuned)
    if before.family != after.family:
        raise LoraMisfit(
            f"{before.file.path} is {before.family}, but {after.file.path} is {after.family}: no LoRA between them"
        )
    names_after = {place: name for name, place in after.places.items()}
    tensors: dict[str, Tensor] = {}
    left_out: list[str] = []
    worst = 0.0
    for done, (name, place) in enumerate(before.places.items(), 1):
        if place in names_after:
            new_name = names_after[place]
            change = _difference(before.file, name, after.file, new_name)
            bias, new_bias = bias_name(name), bias_name(new_name)
            if bias in before.file and new_bias in after.file:
                left_out += [bias] if _difference(before.file, bias, after.file, new_bias).any() else []
            if change.ndim == 1:
                left_out += [name] if change.any() else []
            elif change.any():
                for path, part in _paths_in_lora(place, change):
                    down, up, error = factorise(part, rank, f"{after.file.path}: {name}")
                    tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
                    worst = max(worst, error)
        on_progress(done, len(before.places))
    if not tensors:
        raise LoraMisfit(f"{before.file.path} and {after.file.path} have the same weights: there is nothing to extract")
    if left_out:
        on_warning(
            f"{len(left_out)} biases and normalisation layers differ too, which no LoRA can express, e.g. {left_out[0]}"
        )
    lora = LoraFile(before.family, {"modelspec.architecture": FAMILIES[before.family].architecture}, tensors)
    return convert_lora(lora, "kohya")[0], worst


def _difference(before: SafetensorsFile, name: str, after: SafetensorsFile, new_name: str) -> Tensor:
    old, new = before[name], after[new_name]
    if old.shape != new.shape:
        raise LoraMisfit(f"{name} is {list(old.shape)} in one file and {list(new.shape)} in the other")
    return new.float() - old.float()


def _paths_in_lora(place: Place, change: Tensor) -> list[tuple[str, Tensor]]:
    """The change of a weight under the name that it has in a LoRA: whole in the denoiser, q, k and v apart in CLIP."""
    if place.part == "denoiser":
        path = place.fusion.original if place.index is None else place.modules[0][1]
        return [(f"diffusion_model.{path}", change)]
    return [(f"{part}.{path}", rows) for (part, path), rows in place.split(change)]


def merge_into_checkpoint(
    checkpoint: str | os.PathLike[str],
    loras: Sequence[tuple[LoraFile, float]],
    output: str | os.PathLike[str],
    on_progress: OnProgress = _silent,
) -> int:
    """How many tensors were changed, after writing the checkpoint with the LoRAs, each times its strength, merged in.

    The checkpoint is a single file, with text encoders if a LoRA changes them; any kind of adapter will do. One weight at
    a time is in memory, types stay as they are. LoraMisfit when a module, or its bias, has no place in it.
    """
    base = BaseWeights.open(checkpoint)
    file = base.file
    weights: dict[str, list[tuple[LoraFile, float, Entry]]] = {}
    biases: dict[str, str] = {}
    for lora, strength in loras:
        fit(lora, base.family, base.shapes, base.biased).check(lora.name)
        for entry in lora.entries:
            for name in dict.fromkeys(base.name_of(module) for module in entry.modules):
                weights.setdefault(name, []).append((lora, strength, entry))
                if entry.changes_bias:
                    biases[bias_name(name)] = name
    changed = biases.keys() | {name for name, plan in weights.items() if any(e.kind != "bias" for _, _, e in plan)}

    def read(name: str) -> Tensor:
        if name not in changed:
            return file[name]
        weight = biases.get(name, name)
        inputs = math.prod(file.shapes[weight][1:2])
        changes: dict[ModuleId, Tensor] = {}
        for lora, strength, entry in weights[weight]:
            found = lora.bias_changes_of(entry, inputs) if name in biases else lora.changes_of(entry, base.read)
            for module, change in found:
                changes[module] = strength * change + changes.get(module, 0)
        place = base.places[weight]
        parts = [(module, part.float()) for module, part in place.split(file[name], inputs)]
        sums = [part + changes[m].reshape(part.shape) if m in changes else part for m, part in parts]
        return place.join(sums, inputs).to(file.dtypes[name])

    metadata = {key: value for key, value in file.metadata.items() if key != "modelspec.hash_sha256"}
    write_safetensors(output, file.layout, read, metadata, on_progress=on_progress)
    return len(changed)
