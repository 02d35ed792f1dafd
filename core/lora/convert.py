"""Convert LoRAs to other naming schemes and to plain LoRAs.

Each module is processed separately. Modules that are only renamed are computed when they are written (`LoraFile.save`), so a
file of any size is converted without holding it in memory. Modules with a new rank are held in memory, but their originals
are not. `on_progress(done, total)` is called after each module.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import BadConfig, UnmatchedKeys
from ..progress import OnProgress, silent
from ..tensor_names import NAME_TABLES, SCHEMES, ModuleId, NameTable, Place
from .changes import Factorised, bias_change, decomposed, factorise, scale_of
from .file import LoraFile
from .kinds import BIAS_ROLES, LOW_RANK, UNBOUND, needs_base
from .modules import LoraModule, name_in_scheme, name_modules, suffix_of, without_tucker
from .names import Entry
from .new_lora import NewLora, check_rank, metadata_for, unambiguous_names
from .readers import PICTURE_PROGRAMS, READERS, not_loaded_by, read_by

BaseWeight = Callable[[ModuleId], Tensor]
"""A function that returns the weight of a base model's module, for adapters whose change depends on it (DoRA, OFT)."""


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
    names = names or unambiguous_names(lora)
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
    names = unambiguous_names(lora)
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
    return NewLora(LoraFile.from_modules(lora.family, modules, metadata, names=unambiguous_names(lora)), worst)


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
