"""New LoRAs from old ones: convert, merge, resize, extract; and a LoRA merged into a checkpoint.

All of it is linear algebra on one module at a time: nothing large is ever in memory, and `on_progress(done, total)` is
called after each module.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .errors import BadConfig, LoraMisfit, UnmatchedKeys
from .families import detect_family
from .lora_file import SCHEMES, Entry, LoraFile, LoraModule, name_modules, without_tucker
from .lora_inspect import (
    Finding,
    edit_metadata,
    file_hashes,
    format_inspection,
    inspect_lora,
    trigger_words,
    verify_lora,
)
from .lora_keys import FAMILIES, ModuleId
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
    is_plain = lora.kind in ("lora", "locon") and not any("bias" in entry.keys for entry in lora.entries)
    if is_plain:
        return replace(_from_modules(lora, lora.modules(), scheme), metadata=_metadata_for(lora, scheme)), 0.0
    if plain_rank is not None:
        plain, error = to_plain(lora, plain_rank, base_weight, on_progress)
        return replace(_from_modules(lora, plain.modules(), scheme), metadata=_metadata_for(plain, scheme)), error
    return replace(lora, tensors=_renamed(lora, scheme), metadata=_metadata_for(lora, scheme)), 0.0


def _from_modules(lora: LoraFile, modules: Mapping[ModuleId, LoraModule], scheme: str) -> LoraFile:
    embeddings = {key: lora.tensors[key] for key in lora.embedding_keys}
    return replace(lora, tensors=name_modules(lora.family, modules, scheme) | embeddings)


def _metadata_for(lora: LoraFile, scheme: str) -> dict[str, str]:
    """The metadata without what is only true of the old names, with what readers of the new ones want to know."""
    metadata = {key: value for key, value in lora.metadata.items() if key != "lora_adapter_metadata"}
    if scheme == "kohya":
        ranks = {entry.rank for entry in lora.entries}
        metadata.setdefault("ss_base_model_version", FAMILIES[lora.family].base_versions[0])
        metadata.setdefault("ss_network_module", "networks.lora")
        metadata.setdefault("ss_network_dim", str(ranks.pop()) if len(ranks) == 1 else "Dynamic")
    return metadata


def _renamed(lora: LoraFile, scheme: str) -> dict[str, Tensor]:
    """The tensors under names of the scheme, with their kind of adapter as it is."""
    family = FAMILIES[lora.family]
    tensors: dict[str, Tensor] = {key: lora.tensors[key] for key in lora.embedding_keys}
    for entry in lora.entries:
        in_kohya = scheme == "kohya"
        original = family.original_in_kohya if in_kohya else family.original_in_comfy
        moves_rows = len(entry.fusion.parts) > 1 and original != (entry.index is None)
        swaps_rows = entry.fusion.halves_swapped and original != (entry.index is None)
        if scheme == "diffusers" or moves_rows or swaps_rows:
            raise UnmatchedKeys(
                f"{lora.name}: {entry.name} is of kind {entry.kind}, which {scheme} names cannot express; "
                "give a rank to make it a plain LoRA"
            )
        prefix = (family.kohya_prefixes if in_kohya else family.comfy_prefixes)[entry.part]
        path = entry.fusion.original if original and entry.part == "denoiser" else entry.modules[0][1]
        name = prefix + (path.replace(".", "_") if in_kohya else path)
        for key in entry.keys.values():
            suffix = re.sub(r"^\.lora_magnitude_vector.*", ".dora_scale", key.removeprefix(entry.name))
            tensors[name + suffix] = lora.tensors[key]
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
    plain_entries = [entry for entry in lora.entries if entry.kind in ("lora", "locon") and "bias" not in entry.keys]
    kept = {key: lora.tensors[key] for entry in plain_entries for key in entry.keys.values()}
    modules = replace(lora, tensors=kept).modules() if kept else {}
    others = [entry for entry in lora.entries if entry not in plain_entries]
    worst = 0.0
    for done, entry in enumerate(others, 1):
        extra = [role for role in ("bias", "diff_b", "b_norm", "w_norm", "set_weight") if role in entry.keys]
        if entry.kind in ("bias", "norm") or extra:
            raise UnmatchedKeys(
                f"{lora.name}: {entry.name} changes a bias or a normalisation, which no LoRA can express"
            )
        for module_id, change in lora.changes_of(entry, base_weight):
            down, up, error = _factorise(change, rank)
            modules[module_id] = LoraModule(down, up, float(down.shape[0]))
            worst = max(worst, error)
        on_progress(done, len(others))
    metadata = {k: v for k, v in lora.metadata.items() if not k.startswith("ss_network_")}
    return LoraFile.from_modules(lora.family, modules, metadata), worst


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise BadConfig(f"a rank must be at least 1, not {rank}")


def _factorise(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Down, up and the relative error of the nearest change of that rank."""
    matrix = change.flatten(1)
    left, values, right = truncated_svd(matrix, min(rank, *matrix.shape))
    total = matrix.double().square().sum().item()
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
            raise UnmatchedKeys(
                f"{lora.name}: {entry.name} is of kind {entry.kind}, not a plain LoRA; convert it first"
            )
        found = lora.tensors_of(entry)
        alpha = found["alpha"].item() if "alpha" in found else float(found["down"].shape[0])
        module = without_tucker(LoraModule(found["down"], found["up"], alpha, found.get("mid")))
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
            module = without_tucker(module)
            collected.setdefault(module_id, []).append(replace(module, alpha=module.alpha * weight))
    merged = {module_id: _concatenate(modules) for module_id, modules in collected.items()}
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
    whole = LoraFile.from_modules(family, merged, metadata, scheme)
    if rank is not None:
        whole, error = resize_lora(whole, rank=rank, on_progress=on_progress)
        return replace(whole, metadata=_metadata_for(whole, scheme)), error
    on_progress(len(merged), len(merged))
    return replace(whole, metadata=_metadata_for(whole, scheme)), 0.0


def _concatenate(modules: Sequence[LoraModule]) -> LoraModule:
    if len(modules) == 1:
        return modules[0]
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
) -> tuple[LoraFile, float]:
    """The difference of two checkpoints as a LoRA, and the largest relative error of a module's change.

    Both are single files in original naming, of the same family. One pair of weights at a time is in memory; modules
    that are equal in both are left out.
    """
    _check_rank(rank)
    first, second = SafetensorsFile.open(original), SafetensorsFile.open(tuned)
    family, other = detect_family(first), detect_family(second)
    if family.name != other.name:
        raise LoraMisfit(f"{first.path} is {family.title}, but {second.path} is {other.title}: no LoRA between them")
    before, after = family.split(first), family.split(second)
    pairs = [
        (part, name)
        for part in ("denoiser", *family.text_encoders)
        for name in before[part].tensors
        if name.endswith(".weight") and ".embeddings." not in name and name in after[part].tensors
    ]
    modules: dict[ModuleId, LoraModule] = {}
    worst = 0.0
    for done, (part, name) in enumerate(pairs, 1):
        old, new = before[part].tensors[name], after[part].tensors[name]
        if old.ndim in (2, 4):
            if old.shape != new.shape:
                raise LoraMisfit(
                    f"{name} of the {part} is {list(old.shape)} in one file and {list(new.shape)} in the other"
                )
            change = new.float() - old.float()
            if change.any():
                down, up, error = _factorise(change, rank)
                modules[part, name.removesuffix(".weight")] = LoraModule(down, up, float(down.shape[0]))
                worst = max(worst, error)
        on_progress(done, len(pairs))
    if not modules:
        raise LoraMisfit(f"{first.path} and {second.path} have the same weights: there is nothing to extract")
    lora = LoraFile.from_modules(family.name, modules, {"modelspec.architecture": f"{family.architecture}/lora"})
    return replace(lora, metadata=_metadata_for(lora, "kohya")), worst


_DENOISER = "model.diffusion_model."
_TEXT_ENCODERS = {
    ("sd15", "text_encoder"): "cond_stage_model.transformer.",
    ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.",
    ("sdxl", "text_encoder_2"): "conditioner.embedders.1.model.transformer.resblocks.",
}
_OPENCLIP = {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}


def _place(family: str, module_id: ModuleId, names: Mapping[str, tuple[int, ...]]) -> tuple[str, slice] | None:
    """The tensor and its rows in a checkpoint of original naming that are the module's weight, None: it has none."""
    part, path = module_id
    part_number, sizes = 0, (1.0,)
    if part == "denoiser":
        fusion = FAMILIES[family].of_diffusers(path)
        part_number, sizes = fusion.parts.index(path), fusion.sizes
        candidates = [f"{_DENOISER}{fusion.original}.weight", f"{fusion.original}.weight"]
    elif (prefix := _TEXT_ENCODERS.get((family, part), "")).endswith("resblocks."):
        match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", path)
        if match is None:
            return None
        if re.fullmatch(r"self_attn\.[qkv]_proj", match[2]):
            part_number, sizes = "qkv".index(match[2].split(".")[1][0]), (1.0, 1.0, 1.0)
            candidates = [f"{prefix}{match[1]}.attn.in_proj_weight"]
        else:
            candidates = [f"{prefix}{match[1]}.{_OPENCLIP.get(match[2], match[2])}.weight"]
    else:
        comfy = FAMILIES[family].comfy_prefixes.get(part, "")
        candidates = [
            f"{prefix}{path}.weight",
            f"{prefix}{path.removeprefix('text_model.')}.weight",
            f"{comfy}{path}.weight",
        ]
    name = next((name for name in candidates if name in names), None)
    if name is None:
        return None
    if len(sizes) == 1:
        return name, slice(0, names[name][0])
    rows = [round(size * names[name][1]) for size in sizes]
    return name, slice(sum(rows[:part_number]), sum(rows[: part_number + 1]))


def merge_into_checkpoint(
    checkpoint: str | os.PathLike[str],
    loras: Sequence[tuple[LoraFile, float]],
    output: str | os.PathLike[str],
    on_progress: OnProgress = _silent,
) -> int:
    """How many tensors were changed, after writing the checkpoint with the LoRAs, each times its strength, merged in.

    The checkpoint is a single file in original naming, with text encoders if a LoRA changes them; any kind of adapter
    will do. One weight at a time is in memory, types stay as they are. LoraMisfit when a module has no place in it.
    """
    file = SafetensorsFile.open(checkpoint)
    plan: dict[str, list[tuple[LoraFile, float, Entry]]] = {}
    for lora, strength in loras:
        missing = list(lora.unknown_keys)
        for entry in lora.entries:
            places = [_place(lora.family, module, file.shapes) for module in entry.modules]
            if entry.kind == "bias" or any(place is None for place in places):
                missing.append(entry.name)
            for name in {place[0] for place in places if place is not None}:
                plan.setdefault(name, []).append((lora, strength, entry))
        if missing:
            raise LoraMisfit(
                f"{lora.name}: does not fit {file.path}: it is for {lora.family}, and {len(missing)} of its keys have "
                f"no place in the checkpoint, e.g. {missing[0]}"
            )
    done = 0

    def read(name: str) -> Tensor:
        nonlocal done
        tensor = _merged(file, name, plan[name]) if name in plan else file[name]
        done += 1
        on_progress(done, len(file))
        return tensor

    layout = {name: (file.dtypes[name], file.shapes[name]) for name in file}
    metadata = {key: value for key, value in file.metadata.items() if key != "modelspec.hash_sha256"}
    write_safetensors(output, layout, read, metadata)
    return len(plan)


def _merged(file: SafetensorsFile, name: str, changes: Sequence[tuple[LoraFile, float, Entry]]) -> Tensor:
    weight = file[name].float().clone()
    for lora, strength, entry in changes:

        def base_weight(module_id: ModuleId, family: str = lora.family) -> Tensor:
            place = _place(family, module_id, file.shapes)
            assert place is not None
            return _reordered(family, module_id, file[place[0]][place[1]])

        for module_id, change in lora.changes_of(entry, base_weight):
            place = _place(lora.family, module_id, file.shapes)
            assert place is not None
            rows = weight[place[1]]
            if change.numel() != rows.numel():
                shapes = f"{list(change.shape)} is not {list(rows.shape)}"
                raise LoraMisfit(f"{lora.name}: {entry.name} does not fit {file.path}: {shapes}")
            rows += strength * _reordered(lora.family, module_id, change).reshape(rows.shape)
    return weight.to(file.dtypes[name])


def _reordered(family: str, module_id: ModuleId, tensor: Tensor) -> Tensor:
    """A weight or change in the other one of the original's and diffusers' orders of rows."""
    swapped = module_id[0] == "denoiser" and FAMILIES[family].of_diffusers(module_id[1]).halves_swapped
    return tensor.roll(tensor.shape[0] // 2, 0) if swapped and tensor.shape[0] == 2 * tensor.shape[1] else tensor
