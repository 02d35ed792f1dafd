"""Parse the names of LoRA tensors into prefix, module path and suffix, in the same way for all families."""

import re
from dataclasses import dataclass
from functools import lru_cache

from .models import compound_words

# The role of a tensor in its module -> a pattern of the suffixes for that role.
_SUFFIXES = {
    # peft may write the adapter's name after A and B. Early diffusers files have `to_q_lora.down.weight`, and XLabs' files
    # `qkv_lora1.down.weight`.
    "down": r"\.lora_down\.weight|\.lora_A((\.\w+)?\.weight)?|([._]lora|\.lora_linear_layer|(?<=_lora[12]))\.down\.weight",
    "up": r"\.lora_up\.weight|\.lora_B((\.\w+)?\.weight)?|([._]lora|\.lora_linear_layer|(?<=_lora[12]))\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "bias": r"\.lora_(up|B(\.\w+)?)\.bias",
    "dora": r"\.dora_scale|\.magnitude|\.lora_magnitude_vector(\.\w+){0,2}",
    **{role: rf"\.{role}" for role in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{role: rf"\.{role}" for role in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    **{role: rf"\.{role}" for role in ("lokr_t2", "oft_blocks", "oft_diag", "rescale")},
    **{role: rf"\.{role}" for role in ("diff", "diff_b", "w_norm", "b_norm", "reshape_weight")},
    # FLUX.1's control LoRAs have new values of norms, under the model's own names.
    "set_weight": r"\.set_weight|(?<=_norm)\.scale|(?<=\.norm_[qk])\.weight|(?<=\.norm_added_[qk])\.weight",
}
_SUFFIX = re.compile("|".join(rf"(?P<{role}>(?:{pattern})$)" for role, pattern in _SUFFIXES.items()))
# Nearly all tensors have one of these suffixes, so look them up before searching with the patterns.
_EXACT_SUFFIXES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "alpha": "alpha",
}

# (prefix, scheme, part, whether the rest of the name is flattened). The first matching prefix is used.
_PREFIXES = [
    ("lora_unet__", "invokeai", "denoiser", True),
    ("lora_unet_", "kohya", "denoiser", True),
    ("oft_unet_", "kohya", "denoiser", True),
    ("lora_te1_", "kohya", "text_encoder", True),
    ("lora_te2_", "kohya", "text_encoder_2", True),
    ("lora_te3_", "kohya", "text_encoder_3", True),
    ("lora_te_", "kohya", "text_encoder", True),
    ("lora_transformer_", "onetrainer", "denoiser", True),
    ("lycoris_", "lycoris", "denoiser", True),
    ("unet.base_model.model.", "peft", "denoiser", False),
    ("transformer.base_model.model.", "peft", "denoiser", False),
    ("base_model.model.", "peft", "denoiser", False),
    ("unet.", "diffusers", "denoiser", False),
    ("transformer.", "diffusers", "denoiser", False),
    ("text_encoder.", "diffusers", "text_encoder", False),
    ("text_encoder_2.", "diffusers", "text_encoder_2", False),
    ("text_encoder_3.", "diffusers", "text_encoder_3", False),
    ("diffusion_model.", "comfy", "denoiser", False),
    ("text_encoders.clip_l.transformer.", "comfy", "text_encoder", False),
    ("text_encoders.clip_h.transformer.", "comfy", "text_encoder", False),
    ("text_encoders.clip_g.transformer.", "comfy", "text_encoder_2", False),
    ("text_encoders.t5xxl.transformer.", "comfy", "text_encoder_3", False),
    ("", "bare", "denoiser", False),
]


# The FLUX.1 LoRAs of XLabs and USO are attached to attention processors, under their own names.
_XLABS = re.compile(r"(?:diffusion_model\.)?((?:double|single)_blocks\.\d+)\.processor\.((?:qkv|proj)(?:_lora[12])?)")
_XLABS_MODULES = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
    "qkv": "linear1_qkv",
    "proj": "linear2",
}
_ON_PROCESSORS = re.compile(r"(.+\.attn[12])\.processor\.(to_(?:[qkv]|out))")
_UNFINISHED = re.compile(r"(double_blocks\.\d+\.(?:img|txt)_(?:attn|mlp|mod))_(qkv|proj|0|2|lin)")


@dataclass(frozen=True)
class NamedTensor:
    """The parsed name of a LoRA tensor, such as `lora_unet_mid_block_attentions_0_proj_in.alpha`."""

    module_name: str
    """The name in the file without its suffix, which all tensors of a module share."""
    role: str
    """The role of the tensor in its module: down, up, mid, alpha, dora, hada_w1_a, ..."""
    scheme: str
    """The naming scheme: kohya, diffusers, peft, comfy, lycoris, onetrainer, bare (no prefix), invokeai, xlabs or musubi."""
    part: str
    """The part of the model: denoiser, text_encoder, text_encoder_2 or text_encoder_3."""
    path: str
    """The dotted path of the module as in the file, in diffusers' or the original model's naming."""


def unflatten(flat: str) -> str:
    """Restore the dotted path of a module from its flattened form, which has "_" for ".".

    The longest words of published models that contain "_" themselves are components. So is any other text between two "_".
    """
    compounds, longest = compound_words()
    tokens = flat.split("_")
    components, start = [], 0
    while start < len(tokens):
        for end in range(min(start + longest, len(tokens)), start, -1):
            word = "_".join(tokens[start:end])
            if end == start + 1 or word in compounds:
                components.append(word)
                start = end
                break
    return ".".join(components)


@lru_cache(maxsize=1 << 17)
def parse_key(key: str) -> NamedTensor | None:
    """Parse the name of a tensor. Returns None if it is not the name of a LoRA tensor."""
    module_name, _, suffix = key.rpartition(".")
    if suffix == "weight":
        module_name, _, kind = module_name.rpartition(".")
        suffix = f"{kind}.weight"
    role = _EXACT_SUFFIXES.get(suffix)
    if role is None:
        match = _SUFFIX.search(key)
        if match is None:
            return None
        module_name, role = key[: match.start()], str(match.lastgroup)
    return NamedTensor(module_name, role, *_parse_module_name(module_name))


@lru_cache(maxsize=1 << 16)
def _parse_module_name(module_name: str) -> tuple[str, str, str]:
    is_dotted = "." in module_name  # Flattened names have no dots.
    prefix, scheme, part, flat = next(
        entry for entry in _PREFIXES if module_name.startswith(entry[0]) and not (entry[3] and is_dotted)
    )
    path = module_name.removeprefix(prefix)
    if flat:
        path = unflatten(path)
    elif match := _XLABS.fullmatch(path):
        scheme, path = "xlabs", f"{match[1]}.{_XLABS_MODULES[match[2]]}"
    elif match := _UNFINISHED.fullmatch(path):
        # musubi's converter leaves the last dot of the path as "_".
        scheme, path = "musubi", f"{match[1]}.{match[2]}"
    elif match := _ON_PROCESSORS.fullmatch(path):
        # Old versions of diffusers had LoRAs on attention processors, where `attn1.processor.to_out` is `attn1.to_out.0`.
        path = f"{match[1]}.{match[2]}" + ".0" * (match[2] == "to_out")
    return scheme, part, path


_VECTORS = {
    **{name: name for name in ("emb_params", "clip_l", "clip_g", "clip_l_out", "clip_g_out")},
    "text_encoders_0": "clip_l",
    "text_encoders_1": "clip_g",
}
"""What a tensor's name in a textual-inversion file means: the vectors for SD1.x or SD2.x, or for one of SDXL's text encoders.

OneTrainer's `_out` vectors replace a text encoder's output. No other program uses them. diffusers' training scripts number the
text encoders.
"""


def vectors_in(key: str) -> str | None:
    """Return what the vectors of a textual inversion are for, such as "emb_params" or "clip_l"; None for other tensors.

    diffusers names a tensor by its word, such as `<s1>`.
    """
    if key.startswith("<"):
        return "emb_params"
    tail = key.rpartition(".")[2]
    return _VECTORS.get(key) or (("emb_params" if tail == "*" else tail) if bundled_embedding(key) else None)


def bundled_embedding(key: str) -> str | None:
    """Return the word of the bundled textual-inversion embedding that a tensor belongs to; None for other tensors."""
    return key.split(".")[1] if key.startswith("bundle_emb.") and key.count(".") >= 2 else None


def bundled_name(key: str) -> str:
    """Return the bundled name of an embedding's tensor that is named by its word, or else its name in a file of its own."""
    return f"bundle_emb.{key}.string_to_param.*" if key.startswith("<") else _VECTORS.get(key, key)
