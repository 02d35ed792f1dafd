"""Check LoRA files for faults."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import counted
from ..progress import OnProgress, silent, steps
from ..tensor_names import NAME_TABLES
from .base_weights import BaseWeights
from .file import LoraFile, fit
from .hashes import chunks, file_hashes
from .kinds import needs_base
from .low_rank import LARGEST_VALUE, change_norm, largest_change
from .names import shortened
from .readers import not_loaded_by
from .report import counts
from .words import trigger_words


@dataclass(frozen=True)
class Fault:
    """A fault of a LoRA file that `verify_lora` has found."""

    is_error: bool
    """Whether the fault keeps the file from working as it should. Other faults are warnings."""
    text: str


_HASH_OF_NOTHING = hashlib.sha256().hexdigest()
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
    faults = [
        *_verify_names(lora),
        *_verify_metadata(lora, file_hashes(path, step)),
    ]
    if base is not None:
        weights = BaseWeights.open(base)
        left_over = fit(lora, weights.family, weights.shapes, weights.biased).left_over
        examples = "; ".join(f"{shortened(key)} {why}" for key, why in list(left_over.items())[:3])
        if left_over:
            text = f"{len(left_over)} keys do not fit {weights.file.path.name} ({weights.family}), e.g. {examples}"
            faults.append(Fault(True, text))
    broken = []
    for name, tensor in lora.tensors.items():
        broken += [] if _is_finite(tensor) else [name]
        step()
    if broken:
        faults.append(
            Fault(
                True, f"{counted(len(broken), 'tensor contains', 'tensors contain')} NaN or infinity, e.g. {broken[0]}"
            )
        )
        return faults
    return faults + _verify_norms(lora, step)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


def _verify_names(lora: LoraFile) -> list[Fault]:
    faults = []
    if lora.unknown_keys:
        which = counted(len(lora.unknown_keys), "tensor is", "tensors are")
        text = f"{which} not recognised or incomplete, e.g. {lora.unknown_keys[0]}"
        faults.append(Fault(True, text))
    schemes = Counter(entry.scheme for entry in lora.entries)
    if len(schemes) > 1:
        faults.append(Fault(False, f"it mixes several naming schemes: {counts(schemes)}"))
    modules = Counter(module for entry in lora.entries for module in entry.modules)
    twice = [module for module, count in modules.items() if count > 1]
    if twice:
        faults.append(
            Fault(True, f"{counted(len(twice), 'module is', 'modules are')} changed twice, e.g. {twice[0][1]}")
        )
    refused = not_loaded_by("ComfyUI", lora)
    if refused and not NAME_TABLES[lora.family].loaded.comfyui:
        faults.append(Fault(False, f"ComfyUI 0.30 does not support {lora.family}; later versions may"))
    elif refused:
        # If no published model has these modules, other names would not help.
        advice = "; convert it" if lora.identity.models else ""
        name, reason = next(iter(refused.items()))
        which = f"{counted(len(refused), 'module')}, e.g. {name} ({reason})"
        faults.append(Fault(False, f"ComfyUI would not load {which}{advice}"))
    return faults


def _verify_metadata(lora: LoraFile, hashes: Mapping[str, str]) -> list[Fault]:
    faults = []
    for key, right in lora.true_metadata.items():
        if key in lora.base_words and right != lora.metadata[key]:
            text = f"its metadata say {lora.metadata[key]!r} ({key}), but its tensors are for {right} ({lora.family})"
            faults.append(Fault(False, text))
    in_fact: dict[str, str] = {**hashes, "modelspec.hash_sha256": hashes["sshs_model_hash"]}
    for key in ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"):
        claimed_hash = lora.metadata.get(key, in_fact[key]).removeprefix("0x")
        if claimed_hash != in_fact[key]:
            text = f"{key} is {claimed_hash[:12]} in the metadata, but the file's hash is {in_fact[key][:12]}"
            is_placeholder = claimed_hash == _HASH_OF_NOTHING  # Some tools write this before they hash the file.
            faults.append(Fault(key == "sshs_model_hash" and not is_placeholder, text))
    if lora.other_families:
        text = f"its modules fit {' and '.join(lora.other_families)} as well as {lora.family}, and its metadata don't say which"
        faults.append(Fault(False, text))
    ranks = {str(entry.rank) for entry in lora.entries if entry.rank is not None}
    stated = lora.metadata.get("ss_network_dim", "")
    if stated.isdecimal() and ranks and stated not in ranks:
        faults.append(Fault(False, f"its metadata say rank {stated}, but its modules have {', '.join(sorted(ranks))}"))
    if not trigger_words(lora.metadata):
        faults.append(Fault(False, "its metadata contain no trigger word"))
    return faults


def _verify_norms(lora: LoraFile, step: Callable[[], None]) -> list[Fault]:
    norms, huge = {}, []
    for entry in lora.entries:
        tensors = lora.tensors_of(entry)
        huge += [] if largest_change(entry.kind, tensors) <= LARGEST_VALUE else [entry.name]
        if entry.kind != "bias" and not needs_base(entry.kind, entry.keys):
            norms[entry.name] = change_norm(entry.kind, tensors)
        step()
    faults = []
    if huge:
        which = counted(len(huge), "module")
        text = f"the changes of {which} are too large for a weight, e.g. {huge[0]}"
        faults.append(Fault(True, text))
    zero = [name for name, norm in norms.items() if norm == 0]
    if zero:
        everything = len(zero) == len(norms)
        some = counted(len(zero), "module changes", "modules change")
        text = "no module changes anything" if everything else f"{some} nothing, e.g. {zero[0]}"
        faults.append(Fault(everything, text))
    sizes = sorted(norm for norm in norms.values() if norm > 0)
    if sizes:
        median = sizes[len(sizes) // 2]
        large = [name for name, norm in norms.items() if norm > SUSPICIOUS_NORM * median]
        if large:
            some = counted(len(large), "module changes", "modules change")
            text = f"{some} far more than the others ({SUSPICIOUS_NORM:g} times the median), e.g. {large[0]}"
            faults.append(Fault(False, text))
    return faults
