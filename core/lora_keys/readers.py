"""Which names ComfyUI knows, from its 0.30's `model_lora_keys_unet` and `model_lora_keys_clip`.

ComfyUI only logs what it does not load, so a file with other names loads and does nothing. tests/test_lora_readers.py
compares this table with ComfyUI itself.
"""

from .family import FamilyKeys
from .names import parse_key

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


def not_loaded_by_comfyui(family: FamilyKeys, module_name: str) -> str | None:
    """Why ComfyUI would not load the module of this name, None when it loads it."""
    named = parse_key(f"{module_name}.alpha")
    assert named is not None
    if named.part != "denoiser":
        if named.scheme == "comfy" or "text_model" in module_name or named.part == "text_encoder_3":
            return None
        return "text encoder names without text_model"
    known = _COMFYUI[family.name]
    original = family.of_original(named.path) is not None
    same_in_both = not original and family.of_diffusers(named.path).original == named.path
    if (original or same_in_both) and (named.scheme, "original") in known:
        return None
    unknown_paths = _UNKNOWN_DIFFUSERS_PATHS.get(family.name, ())
    if not original and (named.scheme, "diffusers") in known and not named.path.startswith(unknown_paths):
        return None
    # Of diffusers' UNet names it knows all but attentions, which it expects as once hung on their processors.
    is_unet_of_diffusers = known is _UNET and not original and named.scheme in ("diffusers", "bare")
    if is_unet_of_diffusers and (".processor." in module_name or ".to_" not in named.path):
        return None
    return f"{named.scheme} names of {'the original model' if original else 'diffusers'}"
