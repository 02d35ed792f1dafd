"""Inspect a LoRA file: its header, its hashes and how much each block changes; and check it for faults."""

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..errors import LoraMisfit, counted
from ..models.base import Base
from ..progress import OnProgress, silent, steps
from ..tensor_names import NAME_TABLES
from .base_weights import BaseWeights
from .changes import LARGEST_VALUE, change_norm, largest_change
from .content import shortened
from .file import LoraFile, fit
from .hashes import chunks, file_hashes
from .kinds import needs_base
from .readers import not_loaded_by
from .report import counts, inspect_header
from .stated import trigger_words


def inspect_lora(path: str | os.PathLike[str], on_progress: OnProgress = silent) -> dict[str, Any]:
    """Report everything about a LoRA file, as values for JSON: the report of `inspect_header`, `hashes` and `norms`.

    Raises BadFile or UnknownFamily when it is not a LoRA file.
    """
    report = inspect_header(path)
    lora = LoraFile.read(path)
    step = steps(on_progress, chunks(path) + len(lora.entries))
    return report | {"hashes": file_hashes(path, step), "norms": block_norms(lora, step)}


def block_norms(lora: LoraFile, step: Callable[[], None] = lambda: None) -> dict[str, float | None]:
    """Compute the Frobenius norm of each block's change, without DoRA and OFT; None if not finite. Each module is a `step`."""
    norms: dict[str, float] = {}
    for entry in lora.entries:
        step()
        if entry.kind == "bias" or needs_base(entry.kind, entry.keys):
            continue
        path = entry.modules[0][1]
        match = re.match(r"(?:text_model\.encoder\.)?\w+(?:\.\d+)?", path)
        block = match[0].removeprefix("text_model.encoder.") if match else path
        block = block if entry.part == "denoiser" else f"{entry.part}.{block}"
        norms[block] = math.hypot(norms.get(block, 0.0), change_norm(entry.kind, lora.tensors_of(entry)))
    return {
        block: round(norms[block], 6) if math.isfinite(norms[block]) else None
        for block in sorted(norms, key=lambda name: [(w, int(n or 0)) for w, n in re.findall(r"(\D+)(\d*)", name)])
    }


def movement_of(lora: LoraFile, base: Base) -> dict[str, Any] | None:
    """Return the `median` of |dW| / |W| over the LoRA's layers, and the `largest` one with the name of its `layer`.

    The norms are Frobenius norms, and dW is the change at strength 1. For a LoRA, |s B A|² = s² trace(BᵀB AAᵀ) takes only
    products of r x r. Each weight is read once. Layers that the base model doesn't have, and those whose change depends on the
    weight (DoRA, OFT), are left out. Returns None if none is left. Raises LoraMisfit for a LoRA of another family.
    """
    if lora.family != base.family.name:
        raise LoraMisfit(f"{lora.name}: is for {lora.family}, but {base.name} is {base.family.name}")

    def norm(part: str, path: str) -> float:
        weight = base.components[part].tensors.get(f"{path}.weight") if part in base.components else None
        return 0.0 if weight is None else change_norm("full", {"diff": weight})

    shares: dict[str, float] = {}
    for entry in lora.entries:
        if entry.kind != "bias" and not needs_base(entry.kind, entry.keys):
            weights = [norm(*module) for module in entry.modules]
            if all(weights):
                shares[entry.name] = change_norm(entry.kind, lora.tensors_of(entry)) / math.hypot(*weights)
    if not (shares and math.isfinite(sum(shares.values()))):
        return None
    layer = max(shares, key=lambda name: shares[name])
    return {"median": round(median(shares.values()), 6), "largest": round(shares[layer], 6), "layer": layer}


@dataclass(frozen=True)
class Fault:
    """A fault of a LoRA file that `verify_lora` has found."""

    is_error: bool
    """Whether the fault keeps the file from working as it should. Other faults are warnings."""
    text: str


SUSPICIOUS_NORM = 20.0
"""A module's change is suspicious above this multiple of the median."""


def verify_lora(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, on_progress: OnProgress = silent
) -> list[Fault]:
    """Check that a LoRA file matches its metadata and that its changes are plausible, and return its faults.

    With a checkpoint `base`, modules that do not fit it are faults too. Raises BadFile or UnknownFamily when it is not a LoRA
    file.
    """
    lora = LoraFile.read(path)
    step = steps(on_progress, chunks(path) + len(lora.tensors) + len(lora.entries))
    faults = [*_verify_names(lora), *_verify_metadata(lora, file_hashes(path, step))]
    if base is not None:
        weights = BaseWeights.open(base)
        left_over = fit(lora, weights.family, weights.shapes, weights.biased).left_over
        if left_over:
            examples = "; ".join(f"{shortened(key)} {why}" for key, why in list(left_over.items())[:3])
            text = f"{len(left_over)} keys do not fit {weights.file.path.name} ({weights.family}), e.g. {examples}"
            faults.append(Fault(True, text))
    broken: list[str] = []
    for name, tensor in lora.tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            broken.append(name)
        step()
    if broken:
        which = counted(len(broken), "tensor contains", "tensors contain")
        return [*faults, Fault(True, f"{which} NaN or infinity, e.g. {broken[0]}")]
    return [*faults, *_verify_norms(lora, step)]


def _verify_names(lora: LoraFile) -> Iterator[Fault]:
    if lora.unknown_keys:
        which = counted(len(lora.unknown_keys), "tensor is", "tensors are")
        yield Fault(True, f"{which} not recognised or incomplete, e.g. {lora.unknown_keys[0]}")
    schemes = Counter(entry.scheme for entry in lora.entries)
    if len(schemes) > 1:
        yield Fault(False, f"it mixes several naming schemes: {counts(schemes)}")
    modules = Counter(module for entry in lora.entries for module in entry.modules)
    if twice := [module for module, count in modules.items() if count > 1]:
        yield Fault(True, f"{counted(len(twice), 'module is', 'modules are')} changed twice, e.g. {twice[0][1]}")
    refused = not_loaded_by("ComfyUI", lora)
    loaded = NAME_TABLES[lora.family].loaded
    if refused and not (loaded.comfyui or loaded.comfyui_later):
        yield Fault(False, f"ComfyUI 0.30 does not support {lora.family}; later versions may")
    elif refused:
        # If no published model has these modules, other names would not help.
        advice = "; convert it" if lora.identity.models else ""
        name, reason = next(iter(refused.items()))
        which = f"{counted(len(refused), 'module')}, e.g. {name} ({reason})"
        yield Fault(False, f"ComfyUI would not load {which}{advice}")


def _verify_metadata(lora: LoraFile, hashes: Mapping[str, str]) -> Iterator[Fault]:
    for key, right in lora.true_metadata.items():
        if key in lora.base_metadata and right != lora.metadata[key]:
            claim = f"its metadata say {lora.metadata[key]!r} ({key})"
            yield Fault(False, f"{claim}, but its tensors are for {right} ({lora.family})")
    in_fact: dict[str, str] = {**hashes, "modelspec.hash_sha256": hashes["sshs_model_hash"]}
    for key in ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"):
        claimed_hash = lora.metadata.get(key, in_fact[key]).removeprefix("0x")
        if claimed_hash != in_fact[key]:
            text = f"{key} is {claimed_hash[:12]} in the metadata, but the file's hash is {in_fact[key][:12]}"
            # Some tools write the hash of nothing before they hash the file.
            is_placeholder = claimed_hash == hashlib.sha256().hexdigest()
            yield Fault(key == "sshs_model_hash" and not is_placeholder, text)
    if lora.other_models:
        others, fit_them = " and ".join(lora.other_models), "fit" if lora.is_known else "are named like those of"
        yield Fault(
            False, f"its modules {fit_them} {others} as well as {lora.family}, and its metadata don't say which"
        )
    ranks = {str(entry.rank) for entry in lora.entries if entry.rank is not None}
    stated = lora.metadata.get("ss_network_dim", "")
    if stated.isdecimal() and ranks and stated not in ranks:
        yield Fault(False, f"its metadata say rank {stated}, but its modules have {', '.join(sorted(ranks))}")
    if not trigger_words(lora.metadata):
        yield Fault(False, "its metadata contain no trigger word")


def _verify_norms(lora: LoraFile, step: Callable[[], None]) -> Iterator[Fault]:
    norms: dict[str, float] = {}
    huge: list[str] = []
    for entry in lora.entries:
        tensors = lora.tensors_of(entry)
        huge += [] if largest_change(entry.kind, tensors) <= LARGEST_VALUE else [entry.name]
        if entry.kind != "bias" and not needs_base(entry.kind, entry.keys):
            norms[entry.name] = change_norm(entry.kind, tensors)
        step()
    if huge:
        yield Fault(True, f"the changes of {counted(len(huge), 'module')} are too large for a weight, e.g. {huge[0]}")
    if zero := [name for name, norm in norms.items() if norm == 0]:
        everything, some = len(zero) == len(norms), counted(len(zero), "module changes", "modules change")
        yield Fault(everything, "no module changes anything" if everything else f"{some} nothing, e.g. {zero[0]}")
    sizes = sorted(norm for norm in norms.values() if norm > 0)
    most = SUSPICIOUS_NORM * sizes[len(sizes) // 2] if sizes else 0.0
    if large := [name for name, norm in norms.items() if norm > most]:
        some = counted(len(large), "module changes", "modules change")
        yield Fault(False, f"{some} far more than the others ({SUSPICIOUS_NORM:g} times the median), e.g. {large[0]}")
