"""What other programs would not load of a file, and why: from what ComfyUI 0.30, diffusers 0.42 and peft 0.21 do.

All of them skip what they do not know, at best with a line in a log, so a file with other names loads and does nothing.
tests/comfyui/test_lora_readers.py compares these tables with the programs themselves.
"""

import re
from collections.abc import Collection

from ..tensor_names.keys import NamedTensor, parse_key
from ..tensor_names.table import NameTable

READERS = ("ComfyUI", "diffusers", "peft")

_UNET = {("kohya", "diffusers"), ("kohya", "original"), ("comfy", "original"), ("lycoris", "diffusers")}
_TRANSFORMER = {("kohya", "original"), ("comfy", "original"), ("diffusers", "diffusers"), ("lycoris", "diffusers")}
_COMFYUI = {
    "sd15": _UNET,
    "sd2": _UNET,
    "sdxl": _UNET,
    "sd3": _TRANSFORMER | {("peft", "diffusers"), ("onetrainer", "diffusers")},
    "flux1": _TRANSFORMER | {("onetrainer", "diffusers"), ("bare", "diffusers")},
    "chroma": _TRANSFORMER | {("onetrainer", "diffusers"), ("bare", "diffusers")},
    "flux2": _TRANSFORMER | {("onetrainer", "diffusers"), ("bare", "diffusers")},
    # Its table of Z-Image's diffusers names serves Lumina 2 too, whose attention has another name in diffusers.
    "lumina2": {("kohya", "original"), ("comfy", "original")},
    "zimage": _TRANSFORMER | {("comfy", "diffusers"), ("bare", "diffusers")},
    "qwen-image": _TRANSFORMER | {("bare", "diffusers"), ("kohya", "diffusers"), ("comfy", "diffusers")},
}
"""Family -> (scheme, whose paths) of the denoiser's names that ComfyUI loads."""
_UNKNOWN_DIFFUSERS_PATHS = {
    "chroma": ("distilled_guidance_layer.",),
    "flux2": ("double_stream_modulation_", "single_stream_modulation.", "time_guidance_embed."),
}
"""Family -> starts of paths that are missing in ComfyUI's table of diffusers' names."""
_DIFFUSERS = {
    "sd15": {"kohya", "diffusers"},
    "sd2": {"kohya", "diffusers"},
    "sdxl": {"kohya", "diffusers"},
    "sd3": {"diffusers"},
    "flux1": {"kohya", "diffusers"},
    "chroma": {"kohya", "diffusers"},
    "flux2": {"kohya", "diffusers", "comfy", "peft"},
    "lumina2": {"diffusers", "comfy"},
    "zimage": {"kohya", "diffusers", "comfy"},
    "qwen-image": {"kohya", "diffusers", "comfy"},
}
"""Family -> schemes that diffusers' pipelines load."""
_LOKR_IN_DIFFUSERS = {
    "flux2": {
        ("comfy", "original"), ("peft", "original"), ("bare", "diffusers"), ("lycoris", "diffusers"),
        ("diffusers", "diffusers"),
    },
    "zimage": {("comfy", "diffusers"), ("bare", "diffusers"), ("diffusers", "diffusers")},
}  # fmt: skip
"""Family -> (scheme, whose paths) of the LoKr files that diffusers' pipelines load."""


def not_loaded(reader: str, family: NameTable, module_name: str, kind: str, keys: Collection[str]) -> str | None:
    """Why one of READERS would not load a module, None when it loads it.

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
    elif named.scheme not in _DIFFUSERS[family.name]:
        return f"{named.scheme} names of {family.name}"
    elif family.name == "sd2" and (named.scheme, named.part) == ("kohya", "denoiser"):
        return "convolutions that sd-scripts has where SD2 has Linear layers"
    if kind == "dora" and not any("lora_magnitude_vector" in key for key in keys):
        return "dora_scale, without which it is another change"
    return None if kind in ("lora", "locon", "dora") else f"adapters of kind {kind}"


def _lokr_not_loaded_by_diffusers(family: NameTable, named: NamedTensor, has_alpha: bool) -> str | None:
    known = _LOKR_IN_DIFFUSERS.get(family.name, set())
    if not known & {(named.scheme, whose) for whose in _whose_paths(family, named)}:
        return f"adapters of kind lokr with {named.scheme} names of {family.name}"
    if named.scheme == "diffusers" and has_alpha:
        return "adapters of kind lokr with an alpha under its own names"
    if (family.name, named.scheme) == ("zimage", "bare") and not has_alpha:
        return "adapters of kind lokr without a prefix and without an alpha"
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
    known, whose = _COMFYUI[family.name], _whose_paths(family, named)
    if "original" in whose and (named.scheme, "original") in known:
        return None
    unknown_paths = _UNKNOWN_DIFFUSERS_PATHS.get(family.name, ())
    if "diffusers" in whose and (named.scheme, "diffusers") in known and not named.path.startswith(unknown_paths):
        return None
    # Of diffusers' UNet names it knows all but attentions, which it expects as once hung on their processors.
    is_unet_of_diffusers = known is _UNET and "diffusers" in whose and named.scheme in ("diffusers", "bare")
    if is_unet_of_diffusers and (".processor." in named.module_name or ".to_" not in named.path):
        return None
    return f"{named.scheme} names of {'diffusers' if 'diffusers' in whose else 'the original model'}"
