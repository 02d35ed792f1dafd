"""Merge LoRAs into one. Modules are concatenated when they are written; only resized ones are held in memory."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..errors import BadConfig, LoraMisfit
from ..progress import OnProgress, silent
from ..storage.stored import LazyValues
from ..tensor_names import NAME_TABLES, ModuleId, bundled_embedding
from .file import LoraFile
from .modules import LoraModule, name_modules, without_tucker
from .new_lora import NewLora, check_rank, metadata_for, unambiguous_names
from .resize import resize_lora
from .stated import AGREED, PHRASE_KEY, SUBJECT_KEY, UNTIL_KEY, trigger_words


def merge_loras(
    loras: Sequence[tuple[LoraFile, float]],
    rank: int | None = None,
    scheme: str | None = None,
    on_progress: OnProgress = silent,
) -> NewLora:
    """Merge LoRAs into the sum of their changes, each times its weight, and return the largest relative error in a module.

    `scheme` is the naming scheme; None means the family's own, which most programs load.

    Without `rank`, the modules are concatenated: the sum is exact, and the ranks add up. With `rank`, the result is then
    resized. Bundled embeddings are kept, except in diffusers' scheme. The metadata are the first file's, with
    `modelspec.merged_from` and without keys that only apply to one file. They state that the person shown has agreed only if
    those of all files do.

    Raises LoraMisfit for LoRAs of different families, without modules, or with different embeddings for one word. Raises
    UnmatchedKeys for a change that is not finite, BadConfig without LoRAs and for a rank below 1.
    """
    if not loras:
        raise BadConfig("nothing to merge: give at least one LoRA")
    family = loras[0][0].family
    families = {lora.family: lora.name for lora, _ in loras}
    if len(families) > 1:
        found = ", ".join(f"{name} is for {family}" for family, name in families.items())
        raise LoraMisfit(f"only LoRAs for the same family can be merged, but {found}")
    scheme = scheme or NAME_TABLES[family].scheme
    if rank is not None:
        check_rank(rank)
    collected: dict[ModuleId, list[LoraModule]] = {}
    vectors: dict[str, Tensor] = {}
    for lora, weight in loras:
        lora.check()
        if not lora.entries:
            raise LoraMisfit(f"{lora.name}: has no modules to merge")
        for key, found in lora.bundled_words().items():
            if not torch.equal(vectors.setdefault(key, found), found):
                raise LoraMisfit(f"{lora.name}: another file has a different embedding for {bundled_embedding(key)!r}")
        for module_id, module in lora.modules(weight).items():
            others = collected.setdefault(module_id, [])
            if others and (here := module.weight_size) != (there := others[0].weight_size):
                raise LoraMisfit(
                    f"{lora.name}: {module_id[1]} changes a weight of size {here[0]} x {here[1]}, but in another file it is "
                    f"{there[0]} x {there[1]}"
                )
            others.append(module)
    tables = (unambiguous_names(lora) for lora, _ in loras)
    names = next((table for table in tables if table.has_other_blocks), NAME_TABLES[family])
    sums = LazyValues({module_id: partial(_concatenate, modules) for module_id, modules in collected.items()})
    tensors = name_modules(names, sums, scheme, {} if scheme == "diffusers" else vectors)
    whole, error = LoraFile(family, _merged_metadata([lora for lora, _ in loras]), tensors), 0.0
    if rank is not None:
        whole, error = resize_lora(whole, rank=rank, on_progress=on_progress)
    return NewLora(replace(whole, metadata=metadata_for(whole, scheme)), error)


def _merged_metadata(loras: Sequence[LoraFile]) -> dict[str, str]:
    titles = [lora.metadata.get("modelspec.title") or lora.metadata.get("ss_output_name") or "LoRA" for lora in loras]
    kept = ("ss_base_model_version", "ss_sd_model_name", "ss_new_sd_model_hash", "ss_sd_model_hash", "ss_v2")
    metadata = {
        key: value
        for key, value in loras[0].metadata.items()
        if key in kept or (key.startswith("modelspec.") and key != "modelspec.thumbnail")
    }
    metadata["modelspec.merged_from"] = ", ".join(titles)
    if all(lora.metadata.get(SUBJECT_KEY) == AGREED for lora in loras):
        metadata[SUBJECT_KEY] = AGREED
    if ends := [lora.metadata[UNTIL_KEY] for lora in loras if UNTIL_KEY in lora.metadata]:
        metadata[UNTIL_KEY] = min(ends)
    phrases = [words[0] for lora in loras if (words := trigger_words(lora.metadata))]
    if phrases:
        metadata[PHRASE_KEY] = ", ".join(dict.fromkeys(phrases))
    return metadata


def _concatenate(modules: Sequence[LoraModule]) -> LoraModule:
    if len(modules) == 1:
        return modules[0]
    modules = [without_tucker(module) for module in modules]
    first = modules[0]
    # A 1x1 convolution may be a Linear in another file, so reshape all to the form of the first.
    downs = [module.down.float().reshape(-1, *first.down.shape[1:]) for module in modules]
    # The sum has one scale, the largest: a small one in the up matrices could make them too small for fp16.
    scale = max((module.scale for module in modules), key=abs) or 1.0
    ups = [module.scale / scale * module.up.float() for module in modules]
    up = torch.cat([one.reshape(first.up.shape[0], -1, *first.up.shape[2:]) for one in ups], dim=1)
    down = torch.cat(downs)
    return LoraModule(down, up, scale * down.shape[0])
