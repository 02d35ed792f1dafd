"""The parts of a tensor's name that are the same for all families: prefix, module path, suffix."""

import re
from dataclasses import dataclass

# Kohya's scheme writes "_" for ".". These are the path components that contain "_" themselves, so that the dots can be
# found again: the longest word of this list that fits is taken, any other text between two "_" is a component.
_COMPOUND_WORDS = """
diffusers' UNets
down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out time_emb_proj conv_shortcut
conv_in conv_out conv_norm_out time_embedding add_embedding linear_1 linear_2
the original UNets
input_blocks middle_block output_blocks in_layers emb_layers out_layers skip_connection time_embed label_emb
CLIP
text_model self_attn q_proj k_proj v_proj out_proj layer_norm1 layer_norm2 final_layer_norm text_projection
token_embedding position_embedding
"""
COMPOUND_WORDS = frozenset(word for word in _COMPOUND_WORDS.split() if "_" in word)
_LONGEST_COMPOUND = max(word.count("_") for word in COMPOUND_WORDS) + 1

# What a tensor is to its module -> the suffixes under which it is found.
_SUFFIXES = {
    "down": ["lora_down.weight", "lora_A.weight", "lora_A.default.weight", "lora.down.weight"],
    "up": ["lora_up.weight", "lora_B.weight", "lora_B.default.weight", "lora.up.weight"],
    "mid": ["lora_mid.weight"],
    "alpha": ["alpha"],
}
_ROLE_OF_SUFFIX = {suffix: role for role, suffixes in _SUFFIXES.items() for suffix in suffixes}
_SUFFIX = re.compile(r"\.(" + "|".join(map(re.escape, sorted(_ROLE_OF_SUFFIX, key=len, reverse=True))) + ")$")

# Prefix -> (scheme, part, whether the rest is written with "_" for "."). Longer prefixes first.
_PREFIXES = [
    ("lora_unet_", "kohya", "denoiser", True),
    ("lora_te1_", "kohya", "text_encoder", True),
    ("lora_te2_", "kohya", "text_encoder_2", True),
    ("lora_te3_", "kohya", "text_encoder_3", True),
    ("lora_te_", "kohya", "text_encoder", True),
    ("unet.", "diffusers", "denoiser", False),
    ("text_encoder.", "diffusers", "text_encoder", False),
    ("text_encoder_2.", "diffusers", "text_encoder_2", False),
    ("text_encoder_3.", "diffusers", "text_encoder_3", False),
    ("diffusion_model.", "comfy", "denoiser", False),
]


@dataclass(frozen=True)
class NamedTensor:
    """What the name of a tensor says: `lora_unet_mid_block_attentions_0_proj_in.alpha` is the alpha of a module."""

    module_name: str
    """The name without its suffix, as it stands in the file: what the tensors of one module share."""
    role: str
    """down, up, mid, alpha, ..."""
    scheme: str
    """kohya, diffusers or comfy."""
    part: str
    """denoiser, text_encoder, text_encoder_2 or text_encoder_3."""
    path: str
    """The dotted path, in the names that the file uses (diffusers' or the original model's)."""


def unflatten(flat: str) -> str:
    """The dotted path of which `flat` is the form with "_" for "."."""
    tokens = flat.split("_")
    components = []
    while tokens:
        for length in range(min(_LONGEST_COMPOUND, len(tokens)), 0, -1):
            word = "_".join(tokens[:length])
            if length == 1 or word in COMPOUND_WORDS:
                components.append(word)
                del tokens[:length]
                break
    return ".".join(components)


def parse_key(key: str) -> NamedTensor | None:
    """What `key` names, or None when it is no LoRA tensor's name."""
    suffix = _SUFFIX.search(key)
    if suffix is None:
        return None
    module_name, role = key[: suffix.start()], _ROLE_OF_SUFFIX[suffix[1]]
    for prefix, scheme, part, flat in _PREFIXES:
        if module_name.startswith(prefix):
            rest = module_name.removeprefix(prefix)
            path = unflatten(rest) if flat else rest
            return NamedTensor(module_name, role, scheme, part, path)
    return None
