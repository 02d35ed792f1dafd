"""The modules of a file that ComfyUI 0.30, diffusers 0.42 and peft 0.21 would not load, and the reasons.

All of them skip unknown names, at best with a line in a log, so a file with other names loads and does nothing. The names
of a family that they know are in its name table (`LoadedNames`). tests/comfyui/test_lora_readers.py compares all this
with the programs themselves.
"""

import re
from collections.abc import Collection

from ..tensor_names import NAME_TABLES, NamedTensor, NameTable, is_published, parse_key
from .names import LoraNames

READERS = ("ComfyUI", "diffusers", "peft")


def not_loaded_by(reader: str, lora: LoraNames) -> dict[str, str]:
    """The reason for each module, by name, why a program would not load it; empty when it loads everything.

    `reader` is one of READERS.
    """
    family = NAME_TABLES[lora.family]
    reasons = {e.name: not_loaded(reader, family, e.name, e.kind, e.keys.values()) for e in lora.entries}
    made_up = [e for e in lora.entries if not all(is_published(lora.family, *module) for module in e.modules)]
    reasons |= {entry.name: f"a module that no published {lora.family} model has" for entry in made_up}
    return {name: reason for name, reason in reasons.items() if reason}


def not_loaded(reader: str, family: NameTable, module_name: str, kind: str, keys: Collection[str]) -> str | None:
    """The reason why one of READERS would not load a module; None when it loads it.

    `module_name`, `kind` and `keys` (names of its tensors) are those of a `LoraFile`'s entry.
    """
    named = parse_key(f"{module_name}.alpha")
    assert named is not None
    if reader == "ComfyUI":
        if any(re.search(r"\.lora_(up|B(\.\w+)?)\.bias$", key) for key in keys):
            return "a bias of the up matrix"
        if any("lora_magnitude_vector" in key for key in keys):
            return "lora_magnitude_vector, without which it is another change"
        return _not_loaded_by_comfyui(family, named)
    if any(key.endswith((".diff_b", ".b_norm")) for key in keys):
        return "changes of a bias"
    if reader == "peft":
        if named.scheme not in ("diffusers", "peft"):
            return f"{named.scheme} names"
    elif _is_t5(named):
        return "T5 as a text encoder"
    elif kind == "lokr":
        return _lokr_not_loaded_by_diffusers(family, named, any(key.endswith(".alpha") for key in keys))
    elif named.scheme not in family.loaded.diffusers:
        return f"{named.scheme} names of {family.name}"
    elif named.part == "denoiser" and named.scheme in family.loaded.diffusers_denoiser_lacks:
        return family.loaded.diffusers_denoiser_lacks[named.scheme]
    if kind == "dora" and not any("lora_magnitude_vector" in key for key in keys):
        return "dora_scale, without which it is another change"
    return None if kind in ("lora", "locon", "dora") else f"adapters of kind {kind}"


def _lokr_not_loaded_by_diffusers(family: NameTable, named: NamedTensor, has_alpha: bool) -> str | None:
    if not family.loaded.diffusers_lokr & {(named.scheme, whose) for whose in _whose_paths(family, named)}:
        return f"adapters of kind lokr with {named.scheme} names of {family.name}"
    if named.scheme == "diffusers" and has_alpha:
        return "adapters of kind lokr with an alpha under its own names"
    if named.scheme in family.loaded.diffusers_lokr_with_alpha and not has_alpha:
        prefix = "without a prefix" if named.scheme == "bare" else f"with {named.scheme} names"
        return f"adapters of kind lokr {prefix} and without an alpha"
    in_blocks = named.path.startswith(("transformer_blocks.", "single_transformer_blocks."))
    return None if named.scheme != "lycoris" or in_blocks else "adapters of kind lokr outside the blocks"


def _whose_paths(family: NameTable, named: NamedTensor) -> set[str]:
    """Whose path a name has: the original model's, diffusers', or both."""
    if family.of_original(named.path) is not None:
        return {"original"}
    return {"original", "diffusers"} if family.of_diffusers(named.path).original == named.path else {"diffusers"}


def _is_t5(named: NamedTensor) -> bool:
    return named.path.startswith("encoder.block.")


def _not_loaded_by_comfyui(family: NameTable, named: NamedTensor) -> str | None:
    if named.part != "denoiser":
        if named.scheme == "comfy" or (named.scheme == "kohya" if _is_t5(named) else "text_model" in named.module_name):
            return None
        return f"{named.scheme} names of T5" if _is_t5(named) else "text encoder names without text_model"
    if named.module_name.startswith("oft_unet_"):
        return "names that begin with oft_unet_"
    known, whose = family.loaded.comfyui, _whose_paths(family, named)
    if "original" in whose and (named.scheme, "original") in known:
        return None
    is_lacking = named.path.startswith(family.loaded.comfyui_lacks)
    if "diffusers" in whose and (named.scheme, "diffusers") in known and not is_lacking:
        return None
    # Of diffusers' UNet names it knows all but attentions, which it expects as once hung on their processors.
    is_unet_of_diffusers = family.is_unet and "diffusers" in whose and named.scheme in ("diffusers", "bare")
    if is_unet_of_diffusers and (".processor." in named.module_name or ".to_" not in named.path):
        return None
    return f"{named.scheme} names of {'diffusers' if 'diffusers' in whose else 'the original model'}"
