"""Names of SD3 and SD3.5: joint blocks with an image and a text ("context") stream."""

from . import loaded_names
from .signs import CLIP_G_SIGN, Sign, clip_signs
from .table import Fusion, Listing, NameTable, by_rules

_BLOCK = "transformer_blocks.{}"
_JOINT = "joint_blocks.{}"
_QKV = (1, 1, 1)

_RULES = by_rules(
    Fusion(f"{_JOINT}.x_block.attn.qkv", tuple(f"{_BLOCK}.attn.to_{x}" for x in "qkv"), _QKV),
    Fusion(f"{_JOINT}.context_block.attn.qkv", tuple(f"{_BLOCK}.attn.add_{x}_proj" for x in "qkv"), _QKV),
    Fusion(f"{_JOINT}.x_block.attn2.qkv", tuple(f"{_BLOCK}.attn2.to_{x}" for x in "qkv"), _QKV),
    Fusion(f"{_JOINT}.x_block.attn.proj", (f"{_BLOCK}.attn.to_out.0",)),
    Fusion(f"{_JOINT}.context_block.attn.proj", (f"{_BLOCK}.attn.to_add_out",)),
    Fusion(f"{_JOINT}.x_block.attn2.proj", (f"{_BLOCK}.attn2.to_out.0",)),
    *(Fusion(f"{_JOINT}.x_block.{a}.ln_{x}", (f"{_BLOCK}.{a}.norm_{x}",)) for a in ("attn", "attn2") for x in "qk"),
    *(Fusion(f"{_JOINT}.context_block.attn.ln_{x}", (f"{_BLOCK}.attn.norm_added_{x}",)) for x in "qk"),
    Fusion(f"{_JOINT}.x_block.mlp.fc1", (f"{_BLOCK}.ff.net.0.proj",)),
    Fusion(f"{_JOINT}.x_block.mlp.fc2", (f"{_BLOCK}.ff.net.2",)),
    Fusion(f"{_JOINT}.context_block.mlp.fc1", (f"{_BLOCK}.ff_context.net.0.proj",)),
    Fusion(f"{_JOINT}.context_block.mlp.fc2", (f"{_BLOCK}.ff_context.net.2",)),
    Fusion(f"{_JOINT}.x_block.adaLN_modulation.1", (f"{_BLOCK}.norm1.linear",)),
    # In the last block this layer has only shift and scale.
    Fusion(f"{_JOINT}.context_block.adaLN_modulation.1", (f"{_BLOCK}.norm1_context.linear",), halves_swapped=True),
    Fusion("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves_swapped=True),
    Fusion("final_layer.linear", ("proj_out",)),
    Fusion("x_embedder.proj", ("pos_embed.proj",)),
    Fusion("t_embedder.mlp.0", ("time_text_embed.timestep_embedder.linear_1",)),
    Fusion("t_embedder.mlp.2", ("time_text_embed.timestep_embedder.linear_2",)),
    Fusion("y_embedder.mlp.0", ("time_text_embed.text_embedder.linear_1",)),
    Fusion("y_embedder.mlp.2", ("time_text_embed.text_embedder.linear_2",)),
)

_LICENCE = "Stability AI Community License"
SD3 = NameTable(
    name="sd3",
    base_versions=("sd3", "stable-diffusion-3", "stable-diffusion-v3"),
    architecture="stable-diffusion-3-medium",
    comfyui_classes=("SD3",),
    scheme="diffusers",
    a1111_version="SD3",
    signs=(
        Sign(r"^(joint_blocks|transformer_blocks)\.\d+\."),
        Sign(r"^joint_blocks\.\d+\.(x|context)_block\.attn2?\.", frozenset({1536, 2432})),
        Sign(r"^transformer_blocks\.\d+\.attn2?\.", frozenset({1536, 2432})),
        *clip_signs(768),
        CLIP_G_SIGN,
    ),
    **_RULES,
    kernel=lambda path: 2 if path == "pos_embed.proj" else None,
    listings={
        "SD3": Listing("SD 3", _LICENCE),
        "SD3.5 Medium": Listing("SD 3.5 Medium", _LICENCE, {"modelspec.architecture": "stable-diffusion-3-3-5-medium"}),
        "SD3.5 Large": Listing("SD 3.5 Large", _LICENCE, {"modelspec.architecture": "stable-diffusion-3-3-5-large"}),
    },
    loaded=loaded_names.SD3,
    kohya_prefixes={
        "denoiser": "lora_unet_",
        "text_encoder": "lora_te1_",
        "text_encoder_2": "lora_te2_",
        "text_encoder_3": "lora_te3_",
    },
    comfy_prefixes={
        "denoiser": "diffusion_model.",
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": "text_encoders.t5xxl.transformer.",
    },
)
