"""Extract a LoRA from the difference of two checkpoints, and merge LoRAs into a checkpoint."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import LoraMisfit, UnmatchedKeys, counted
from ..progress import OnProgress, OnWarning, silent
from ..storage.safetensors_file import write_safetensors
from ..tensor_names import Fusion, ModuleId, Place
from .base_weights import BaseWeights, bias_name
from .changes import factorise
from .file import LoraFile, fit
from .modules import LoraModule, name_modules
from .names import Entry, word_of
from .new_lora import NewLora, check_rank, metadata_for


def extract_lora(
    original: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    rank: int,
    on_progress: OnProgress = silent,
    on_warning: OnWarning = silent,
) -> NewLora:
    """Extract the difference of two checkpoints as a LoRA, and return its largest relative error in a module.

    Both checkpoints are single files of the same family. Only the LoRA and one pair of weights are in memory. Modules that
    are equal in both are left out. `on_warning` reports tensors that differ but don't fit into a LoRA. Raises BadConfig for a
    rank below 1, LoraMisfit when the families or shapes differ or nothing differs.
    """
    check_rank(rank)
    before, after = BaseWeights.open(original), BaseWeights.open(tuned)
    if before.family != after.family:
        raise LoraMisfit(
            f"{before.file.path} is {before.family}, but {after.file.path} is {after.family}; give two checkpoints of the "
            "same family"
        )
    found: dict[ModuleId, LoraModule] = {}
    left_out: list[str] = []
    worst = 0.0
    of_layers = before.places.keys() | {bias_name(name) for name in before.places}
    others = [name for name in before.file if name not in of_layers and name in after.file]
    names = [*before.places, *others]
    biased = before.biased & after.biased
    for done, name in enumerate(names, 1):
        place = before.places.get(name)
        modules = () if place is None else place.modules
        if place is None:
            if not _is_equal(before.file[name], after.file[name]):
                left_out.append(name)
        elif set(modules) <= after.shapes.keys():
            old, new = before.file[name], place.join([after.read(module) for module in modules])
            if old.shape != new.shape:
                raise LoraMisfit(f"{name} is {list(old.shape)} in one file and {list(new.shape)} in the other")
            change = new.float() - old.float()
            if biased.issuperset(modules):
                inputs = math.prod(before.file.shapes[name][1:2])
                new_bias = place.join([after.read_bias(module) for module in modules], inputs)
                if not _is_equal(before.file[bias_name(name)], new_bias):
                    left_out.append(bias_name(name))
            if change.ndim == 1 and change.any():
                left_out.append(name)
            elif change.any():
                parts = [(place, change)]
                if place.part != "denoiser":  # q, k and v of CLIP get one rank each, other fused weights one together.
                    split = place.split(change)
                    parts = [(Place(part, Fusion(path, (path,)), None), rows) for (part, path), rows in split]
                for place_of_part, part in parts:
                    down, up, error = factorise(part, rank, f"{after.file.path}: {name}")
                    ups = place_of_part.split(up, inputs=down.shape[1])
                    found |= {module: LoraModule(down, rows, float(down.shape[0])) for module, rows in ups}
                    worst = max(worst, error)
        on_progress(done, len(names))
    if not found:
        raise LoraMisfit(
            f"{before.file.path} and {after.file.path}: nothing to extract, because all weights that a LoRA can change are the "
            "same"
        )
    if left_out:
        kinds = "biases, normalisation, embeddings, VAE"
        which = f"{counted(len(left_out), 'changed tensor')} that a LoRA cannot express ({kinds})"
        on_warning(f"left out {which}, e.g. {left_out[0]}")
    if alone := sorted(before.shapes.keys() ^ after.shapes.keys()):
        which = f"{counted(len(alone), 'module')} that only one of the files has"
        on_warning(f"left out {which}, e.g. {alone[0][1]} of {alone[0][0]}")
    metadata = {"ss_sd_model_name": before.file.path.name}
    lora = LoraFile(before.family, metadata, dict(name_modules(before.names, found, before.names.scheme)))
    fit(lora, before.family, before.shapes).check(str(after.file.path))  # Readers of the file do the same check.
    return NewLora(replace(lora, metadata=metadata_for(lora, before.names.scheme)), worst)


def _is_equal(old: Tensor, new: Tensor) -> bool:
    return old.shape == new.shape and torch.equal(old.float(), new.float())


def merge_into_checkpoint(
    checkpoint: str | os.PathLike[str],
    loras: Sequence[tuple[LoraFile, float]],
    output: str | os.PathLike[str],
    on_progress: OnProgress = silent,
    on_warning: OnWarning = silent,
) -> int:
    """Merge LoRAs, each times its strength, into a checkpoint, write it to `output` and return the number of changed tensors.

    The checkpoint is a single file, with text encoders if a LoRA changes them. The LoRAs may be of any kind. Only one weight
    is in memory at once, and dtypes are kept. `on_warning` reports embeddings, which a checkpoint cannot hold. Raises
    LoraMisfit when the checkpoint lacks a module or its bias, UnmatchedKeys when a merged weight is not finite.
    """
    base = BaseWeights.open(checkpoint)
    file = base.file
    weights: dict[str, list[tuple[LoraFile, float, Entry]]] = {}
    biases: dict[str, str] = {}
    for lora, strength in loras:
        fit(lora, base.family, base.shapes, base.biased).check(lora.name)
        if words := ", ".join(dict.fromkeys(word_of(lora, key) for key in lora.embedding_keys)):
            on_warning(f"{lora.name}: left out the embeddings of {words}, because a checkpoint cannot hold them")
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
        merged = place.join(sums, inputs).to(file.dtypes[name])
        if not merged.float().isfinite().all() and file[name].float().isfinite().all():
            raise UnmatchedKeys(f"{output}: cannot be written: {name} would hold NaN or infinity")
        return merged

    metadata = {key: value for key, value in file.metadata.items() if key != "modelspec.hash_sha256"}
    write_safetensors(output, file.layout, read, metadata, on_progress=on_progress)
    return len(changed)
