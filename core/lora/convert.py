"""Convert, merge and resize LoRAs.

Each module is processed separately. Modules that are only renamed or concatenated are computed when they are written
(`LoraFile.save`), so a file of any size is converted or merged without holding it in memory. Modules with a new rank are
held in memory, but their originals are not. `on_progress(done, total)` is called after each module.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BadConfig, LoraMisfit, UnmatchedKeys
from ..progress import OnProgress, silent
from ..storage.stored import LazyValues
from ..tensor_names import NAME_TABLES, PUBLISHED_BLOCKS, SCHEMES, ModuleId, NameTable, Place, bundled_embedding
from .changes import Factorised, bias_change, decomposed, factorise, scale_of
from .file import KEY, LoraFile
from .kinds import BIAS_ROLES, LOW_RANK, UNBOUND, needs_base
from .metadata import MODELSPEC_VERSION
from .modules import LoraModule, name_in_scheme, name_modules, suffix_of, without_tucker
from .names import AGREED, PHRASE_KEY, SUBJECT_KEY, UNTIL_KEY, Entry, trigger_words
from .readers import PICTURE_PROGRAMS, READERS, not_loaded_by, read_by

_OF_THE_ORIGINAL = re.compile(rf"lora_adapter_metadata|{re.escape(KEY)}")
"""The metadata that don't apply to a changed copy of a LoRA."""
BaseWeight = Callable[[ModuleId], Tensor]
"""A function that returns the weight of a base model's module, for adapters whose change depends on it (DoRA, OFT)."""


class NewLora(NamedTuple):
    """A LoRA made from other LoRAs or from checkpoints, and its error compared with them."""

    lora: LoraFile
    error: float
    """The largest relative error of a module's change, by the Frobenius norm: 0 to 1."""


def convert_lora(
    lora: LoraFile,
    scheme: str,
    plain_rank: int | None = None,
    base_weight: BaseWeight | None = None,
    on_progress: OnProgress = silent,
    names: NameTable | None = None,
) -> NewLora:
    """Convert a LoRA to another naming scheme (one of SCHEMES), and return the largest relative error in a module.

    If `plain_rank` is given, other kinds of adapters become plain LoRAs of at most that rank. Without it, the error is 0:
    they keep their kind, or UnmatchedKeys is raised if the scheme cannot express it. diffusers' scheme leaves out embeddings
    (`embeddings.embedding_files` returns them). `names` are the names of the modules, if they are not those of the LoRA's
    model. Raises BadConfig for an unknown scheme and for a rank below 1.
    """
    if scheme not in SCHEMES:
        raise BadConfig(f"unknown naming scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    if plain_rank is not None:
        check_rank(plain_rank)
    names = names or _names_of(lora)
    lora.check()
    if scheme == "diffusers" and not lora.entries:
        raise UnmatchedKeys(
            f"{lora.name}: has only embeddings, no modules; diffusers reads such a file without a conversion"
        )
    others = [entry for entry in lora.entries if not entry.is_plain]
    if others and plain_rank is not None:
        converted, error = to_plain(lora, plain_rank, base_weight, on_progress)
        modules, kept = converted.modules(), {}
    else:
        converted, error = lora, 0.0
        modules = _low_rank(lora, [entry for entry in lora.entries if entry.kind in LOW_RANK])
        kept = _renamed(lora, names, [entry for entry in others if entry.kind not in LOW_RANK], scheme)
        kept |= _bias_and_shape_tensors(lora, names, scheme)
    # diffusers refuses files with anything but adapters.
    words = {} if scheme == "diffusers" else lora.bundled_words()
    tensors = name_modules(names, modules, scheme, kept | words)
    made = replace(lora, tensors=tensors, metadata=converted.metadata)
    return NewLora(made.with_metadata(metadata_for(made, scheme)), error)


def _names_of(lora: LoraFile) -> NameTable:
    """Return the names of the modules of a LoRA's model in every scheme.

    Raises UnmatchedKeys for original names of a UNet with other numbers of blocks than the published models.
    """
    for entry in lora.entries if lora.table.has_other_blocks else ():
        numbered = re.match(r"(input|output)_blocks\.[1-9]", entry.place.fusion.original)
        if entry.part == "denoiser" and entry.place.index is None and numbered:
            raise UnmatchedKeys(
                f"{lora.name}: {entry.name} is ambiguous, because this UNet does not have {PUBLISHED_BLOCKS} residual blocks "
                f"per level like the published {lora.family} models. Export it again with diffusers' names"
            )
    return lora.table


def convert_for(
    lora: LoraFile,
    readers: Sequence[str],
    plain_rank: int | None = None,
    base_weight: BaseWeight | None = None,
    on_progress: OnProgress = silent,
) -> NewLora:
    """Convert a LoRA to the first naming that all these programs load completely. The error is as in `convert_lora`.

    The namings are SCHEMES, and Kohya's with InvokeAI's own prefixes if it has some.

    `readers` are names in `readers.READERS`, in upper or lower case. Raises BadConfig for an unknown one. Raises
    UnmatchedKeys, with the reason for each naming, if no naming works for all programs.
    """
    known = {reader.lower(): reader for reader in READERS}
    if wrong := [name for name in readers if name.strip().lower() not in known]:
        raise BadConfig(f"unknown program {wrong[0]!r}; known: {', '.join(known)}")
    asked = [known[name.strip().lower()] for name in readers]
    failures = []
    names = _names_of(lora)
    namings = [(scheme, names) for scheme in dict.fromkeys((names.scheme, *SCHEMES))]
    if prefixes := names.loaded.invokeai_prefixes:
        namings.append(("kohya", replace(names, kohya_prefixes={**names.kohya_prefixes, **prefixes})))
    for scheme, names in namings:
        try:
            converted = convert_lora(lora, scheme, plain_rank, base_weight, on_progress, names)
        except UnmatchedKeys as problem:
            failures.append(f"{scheme}: {str(problem).removeprefix(f'{lora.name}: ')}")
            continue
        lacking = {reader: next(iter(not_loaded_by(reader, converted.lora).values()), None) for reader in asked}
        refusing = [f"{reader} does not support {what}" for reader, what in lacking.items() if what]
        if not refusing:
            return converted
        failures.append(f"{scheme}: {' and '.join(refusing)}")
    reasons = "; ".join(dict.fromkeys(failures))
    raise UnmatchedKeys(f"{lora.name}: no naming works completely in {', '.join(asked)}: {reasons}")


def reading_limits(lora: LoraFile) -> list[str]:
    """List the programs of PICTURE_PROGRAMS that cannot load the LoRA completely, with one sentence for each.

    Each sentence says whether a conversion would help. The list is empty for a LoRA that fits no published model.
    """
    limits = []
    for program in PICTURE_PROGRAMS if lora.entries else ():
        reading = read_by(program, lora)
        if not reading.objections or not reading.of_published:
            continue
        verb = "does not load" if reading.verdict == "not at all" else "loads only part of"
        try:
            convert_for(lora, [program])
            advice = f"unless you convert it for {program}"
        except UnmatchedKeys:
            advice = "in any naming"
        limits.append(f"{program} {verb} the LoRA of this training run, {advice}")
    return limits


def _low_rank(lora: LoraFile, entries: Iterable[Entry]) -> dict[ModuleId, LoraModule]:
    return {module_id: module for entry in entries for module_id, module in lora.low_rank_of(entry)}


def _bias_and_shape_tensors(lora: LoraFile, names: NameTable, scheme: str) -> dict[str, Tensor]:
    """Return what files in a scheme have beside low-rank changes: those of biases, and the shapes of widened weights.

    diffusers needs no shapes: it compares the matrices with the model's weights.
    """
    tensors: dict[str, Tensor] = {}
    biases: dict[str, tuple[Place, int, dict[int, Tensor]]] = {}
    for entry in lora.entries:
        if entry.kind not in LOW_RANK or not entry.changes_bias:
            continue
        inputs = entry.shapes["down"][1]
        for (part, path), bias in lora.bias_changes_of(entry, inputs):
            name, fusion, index = name_in_scheme(names, part, path, scheme)
            biases.setdefault(name, (Place(part, fusion, None), inputs, {}))[2][index] = bias
    for name, (place, inputs, parts) in biases.items():
        sizes = enumerate(place.fusion.sizes)
        whole = [parts[n] if n in parts else torch.zeros(round(size * inputs)) for n, size in sizes]
        tensors[f"{name}.{'lora_B.bias' if scheme == 'diffusers' else 'diff_b'}"] = place.join(whole, inputs)
    for entry in lora.widened if scheme != "diffusers" else ():
        name = name_in_scheme(names, *entry.modules[0], scheme)[0]
        tensors[f"{name}.reshape_weight"] = torch.tensor(entry.weight_shape)
    return tensors


def metadata_for(lora: LoraFile, scheme: str) -> dict[str, str]:
    """Return the metadata for the LoRA in a scheme, with the keys that it needs and without those of the old scheme."""
    metadata = lora.base_metadata
    known = {
        "modelspec.sai_model_spec": MODELSPEC_VERSION,
        "modelspec.architecture": f"{metadata['modelspec.architecture']}/lora",
    }
    ranks = {entry.rank for entry in lora.entries}
    if scheme == "kohya":
        is_lora = all(entry.kind in ("lora", "locon") for entry in lora.entries)
        known["ss_base_model_version"] = metadata["ss_base_model_version"]
        known["ss_network_module"] = "networks.lora" if is_lora else "lycoris.kohya"
        known["ss_network_dim"] = str(*ranks) if len(ranks) == 1 else "Dynamic"
    kept = {key: value for key, value in lora.true_metadata.items() if not _OF_THE_ORIGINAL.fullmatch(key)}
    dim = kept.get("ss_network_dim", "")
    if dim.isdecimal() and None not in ranks and dim not in map(str, ranks):
        # Fusing and splitting modules changes their ranks.
        kept = {key: value for key, value in kept.items() if key not in ("ss_network_dim", "ss_network_alpha")}
    return known | kept


def _renamed(lora: LoraFile, family: NameTable, entries: Sequence[Entry], scheme: str) -> dict[str, Tensor]:
    """Rename the tensors of entries to a scheme. Raises UnmatchedKeys for a kind of adapter that it cannot express."""
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        if scheme == "diffusers" and (renamed := _renamed_for_diffusers(lora, family, entry)):
            tensors |= renamed
            continue
        original = family.original_in_kohya if scheme == "kohya" else family.original_in_comfy
        fusion, index = entry.place.fusion, entry.place.index
        moves_rows = len(fusion.parts) > 1 and original != (index is None)
        swaps_rows = fusion.halves_swapped and original != (index is None)
        if scheme == "diffusers" or moves_rows or swaps_rows:
            raise UnmatchedKeys(
                f"{lora.name}: {entry.name} is of kind {entry.kind}, which {scheme} names cannot express; "
                "give a rank to convert it to a plain LoRA"
            )
        name = name_in_scheme(family, *entry.modules[0], scheme)[0]
        found = lora.sound_tensors_of(entry)
        if entry.kind in ("oft", "boft") and "alpha" in found and not found["alpha"].item():
            found["alpha"] = torch.tensor(UNBOUND)
        for role, tensor in found.items():
            if role not in BIAS_ROLES:
                tensors[f"{name}.{suffix_of(role)}"] = tensor
        if "dora" in found and found["dora"].ndim == 1:
            tensors[f"{name}.dora_scale"] = found["dora"].reshape(-1, *[1] * (len(entry.weight_shape or (0, 0)) - 1))
        if entry.kind == "norm" and "b_norm" in found:
            tensors[f"{name}.b_norm"] = found["b_norm"]
        elif (bias := bias_change(entry.kind, found)) is not None:
            tensors[f"{name}.diff_b"] = bias
    return tensors


def _renamed_for_diffusers(lora: LoraFile, family: NameTable, entry: Entry) -> dict[str, Tensor]:
    """Rename the tensors of a norm's new weight, a DoRA like peft's, or a LoKr that diffusers supports; empty for others."""
    name, place = name_in_scheme(family, *entry.modules[0], "diffusers")[0], entry.place
    found = lora.sound_tensors_of(entry)
    if entry.kind == "set":
        return {f"{name}.weight": found["set_weight"]}
    if entry.kind == "dora" and not entry.changes_bias:
        shape = found["dora"].shape  # peft's has one magnitude for each output.
        return _dora_of_peft(lora, entry) if math.prod(shape) == shape[0] == entry.shapes["up"][0] else {}
    is_whole = place.index is None and (len(place.modules) > 1 or place.fusion.halves_swapped)
    is_plain = entry.kind == "lokr" and "dora" not in entry.keys and not entry.changes_bias
    if not is_plain or is_whole or ("diffusers", "diffusers") not in family.loaded.diffusers_lokr:
        return {}
    # Without alpha, and with a whole first factor that includes the scale.
    scale = scale_of("lokr", found)
    if "lokr_w1" not in found:
        found["lokr_w1"] = found["lokr_w1_a"].float() @ found["lokr_w1_b"].float()
    if scale != 1:
        found["lokr_w1"] = found["lokr_w1"].float() * scale
    left_out = ("alpha", "lokr_w1_a", "lokr_w1_b")
    return {f"{name}.{role}": tensor for role, tensor in found.items() if role not in left_out}


def _dora_of_peft(lora: LoraFile, entry: Entry) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    changes = list(lora.low_rank_of(entry))
    magnitudes = dict(entry.place.split(lora.tensors_of(entry)["dora"].flatten(), inputs=entry.shapes["down"][1]))
    for (part, path), module in changes:
        name = name_in_scheme(NAME_TABLES[lora.family], part, path, "diffusers")[0]
        plain, magnitude = without_tucker(module), magnitudes[part, path]
        tensors[f"{name}.lora_A.weight"] = plain.down
        tensors[f"{name}.lora_B.weight"] = plain.up.float() * plain.scale
        is_convolution = plain.down.ndim == 4
        tensors[f"{name}.lora_magnitude_vector"] = magnitude[None, :, None, None] if is_convolution else magnitude
    return tensors


def to_plain(
    lora: LoraFile, rank: int, base_weight: BaseWeight | None = None, on_progress: OnProgress = silent
) -> NewLora:
    """Convert to a plain LoRA of at most that rank in the family's scheme, and return the largest relative error.

    Modules that are already plain are unchanged. The error is that of the Frobenius norm, 0 to 1. DoRA and OFT require
    `base_weight`. Raises UnmatchedKeys for changes of biases and normalisation layers, which a LoRA cannot express.
    """
    check_rank(rank)
    lora.check()
    modules = _low_rank(lora, [entry for entry in lora.entries if entry.is_plain])
    others = [entry for entry in lora.entries if not entry.is_plain]
    worst = 0.0
    for done, entry in enumerate(others, 1):
        if entry.kind in ("norm", "set") or entry.changes_bias or len(entry.weight_shape or ()) == 1:
            raise UnmatchedKeys(
                f"{lora.name}: {entry.name} changes a bias or a normalisation layer, which a plain LoRA cannot express"
            )
        for module_id, (down, up, error) in _nearest(lora, entry, rank, base_weight):
            modules[module_id] = LoraModule(down, up, float(down.shape[0]))
            worst = max(worst, error)
        on_progress(done, len(others))
    metadata = {k: v for k, v in lora.metadata.items() if not k.startswith("ss_network_")}
    return NewLora(LoraFile.from_modules(lora.family, modules, metadata, names=_names_of(lora)), worst)


def _nearest(
    lora: LoraFile, entry: Entry, rank: int, base_weight: BaseWeight | None
) -> Iterator[tuple[ModuleId, Factorised]]:
    # The parts of a fused weight have different singular vectors. Twice as many vectors of the whole approximate them well.
    wanted = rank if len(entry.modules) == 1 else 2 * len(entry.modules) * rank
    try:
        is_known = not needs_base(entry.kind, entry.keys)
        if is_known and (known := decomposed(entry.kind, lora.sound_tensors_of(entry), wanted)):
            rows = torch.arange(known.left.shape[0])
            for module_id, part in entry.place.split(rows, inputs=known.shape[1]):
                yield module_id, known.nearest(part, rank)
            return
    except (RuntimeError, ValueError) as error:
        raise UnmatchedKeys(f"{lora.name}: {entry.name} cannot be computed: {error}") from None
    for module_id, change in lora.changes_of(entry, base_weight):
        yield module_id, factorise(change, rank, f"{lora.name}: {entry.name}")


def check_rank(rank: int) -> None:
    """Raise BadConfig for a rank below 1."""
    if rank < 1:
        raise BadConfig(f"a rank must be at least 1, not {rank}")


def resize_lora(
    lora: LoraFile,
    rank: int | None = None,
    energy: float | None = None,
    on_progress: OnProgress = silent,
) -> NewLora:
    """Reduce the ranks of a LoRA, with the same names, and return the largest relative error in a module.

    Give one of two limits: `rank`, the largest rank of a module, or `energy` in (0, 1], the share of each module's squared
    singular values to keep. After a QR decomposition of both factors, only a rank x rank matrix needs an SVD. Raises
    BadConfig for other limits, UnmatchedKeys for other kinds of adapters.
    """
    if (rank is None) == (energy is None):
        raise BadConfig("give either a rank or an energy")
    if rank is not None:
        check_rank(rank)
    elif energy is not None and not 0 < energy <= 1:
        raise BadConfig(f"energy must be above 0 and at most 1, not {energy}")
    lora.check()
    if not lora.entries:
        raise UnmatchedKeys(f"{lora.name}: has no modules to resize")
    tensors = {**lora.tensors, **{key: lora.sound_vectors(key) for key in lora.embedding_keys}}
    ranks = set()
    worst = 0.0
    for done, entry in enumerate(lora.entries, 1):
        if entry.kind not in ("lora", "locon") or "bias" in entry.keys:
            what = "has a bias in its up matrix" if "bias" in entry.keys else f"is of kind {entry.kind}"
            raise UnmatchedKeys(f"{lora.name}: {entry.name} {what}; convert it to a plain LoRA first")
        found = lora.sound_tensors_of(entry)
        alpha = found["alpha"].item() if "alpha" in found else float(found["down"].shape[0])
        module = without_tucker(LoraModule(found["down"].float(), found["up"].float(), alpha, found.get("mid")))
        small, error = _resize(module, rank, energy)
        tensors[entry.keys["down"]], tensors[entry.keys["up"]] = small.down, small.up
        tensors.pop(entry.keys.get("mid", ""), None)
        if "alpha" in entry.keys:
            tensors[entry.keys["alpha"]] = torch.tensor(small.alpha)
        ranks.add(small.rank)
        worst = max(worst, error)
        on_progress(done, len(lora.entries))
    size = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    metadata = {key: value for key, value in lora.true_metadata.items() if not _OF_THE_ORIGINAL.fullmatch(key)}
    metadata |= {"ss_network_dim": size, "ss_network_alpha": size}
    return NewLora(replace(lora, tensors=tensors, metadata=metadata), worst)


def _resize(module: LoraModule, rank: int | None, energy: float | None) -> tuple[LoraModule, float]:
    down, up = module.down, module.up
    left_basis, left_core = torch.linalg.qr(up.flatten(1))
    right_basis, right_core = torch.linalg.qr(down.flatten(1).T)
    left, values, right = torch.linalg.svd(module.scale * (left_core @ right_core.T), full_matrices=False)
    kept = values.double().square().cumsum(0)
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
    # alpha = rank, because the singular values already include the scale. Both factors get an equal share of them.
    return LoraModule(small_down, small_up, float(size)), error


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
    tables = (_names_of(lora) for lora, _ in loras)
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
