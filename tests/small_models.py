"""The sizes of the small models that tests use with ComfyUI. Those without it are in tests/small_flows.py.

Programs that run with ComfyUI's Python read it, so it imports nothing of this project. A family has up to two entries:

- `comfyui`, what ComfyUI's own class is built with: narrow, but as wide as ComfyUI's attention takes;
- `diffusers`, what the config of diffusers' class has otherwise for a model as narrow as that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class InComfyUI:
    """A small model of ComfyUI's own class."""

    config: Mapping[str, Any]
    """What ComfyUI's model_detection reads off a checkpoint, narrower; where `kind` is empty, only what is narrower."""
    kind: str = ""
    """The name of the class in comfy.supported_models."""
    channels: int = 0
    """Channels of the latents."""
    widths: Mapping[str, int] = field(default_factory=dict)
    """Widths of the text's states (context) and of the pooled text (pooled)."""
    undetected: tuple[str, ...] = ()
    """What of the config ComfyUI does not read off a checkpoint, but takes to be as in the published model."""
    wide: Mapping[str, Any] = field(default_factory=dict)
    """What is otherwise in the config at the published model's widths, with one or two blocks of each kind."""
    wide_widths: Mapping[str, int] = field(default_factory=dict)
    """The `widths` then."""


@dataclass(frozen=True)
class SmallModel:
    """A family's small models."""

    comfyui: InComfyUI | None = None
    diffusers: Mapping[str, Any] | None = None


_FLUX = {"axes_dim": [16, 56, 56], "num_heads": 2, "mlp_ratio": 4.0, "theta": 10000, "out_channels": 16, "qkv_bias": True,
         "txt_ids_dims": [], "patch_size": 2, "in_channels": 16, "hidden_size": 256, "context_in_dim": 64, "vec_in_dim": 48,
         "depth": 2, "depth_single_blocks": 2, "yak_mlp": False, "txt_norm": False}  # fmt: skip

_WIDE_FLUX = {"hidden_size": 3072, "num_heads": 24, "depth": 1, "depth_single_blocks": 1}

SMALL_MODELS = {
    "sd15": SmallModel(comfyui=InComfyUI({"model_channels": 32}), diffusers={"block_out_channels": (32, 64, 128, 128)}),
    "sd2": SmallModel(  # attention takes 64 channels at least, but SD1.5's
        comfyui=InComfyUI({"model_channels": 64}),
        diffusers={"block_out_channels": (64, 128, 256, 256), "attention_head_dim": 8},
    ),
    "sdxl": SmallModel(
        comfyui=InComfyUI(
            {"model_channels": 32, "transformer_depth": [0, 0, 1, 1, 1, 1], "transformer_depth_middle": 1,
             "transformer_depth_output": [0, 0, 0, *[1] * 6]}
        ),
        diffusers={"block_out_channels": (32, 64, 128), "attention_head_dim": 8, "transformer_layers_per_block": [1, 1, 1]},
    ),
    "sd3": SmallModel(
        InComfyUI(  # 3.5 medium
            {"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 3, "input_size": None, "adm_in_channels": 48,
             "num_patches": 144, "pos_embed_max_size": 12, "pos_embed_scaling_factor": None,
             "context_embedder_config": {
                 "target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 192}},
             "qk_norm": "rms", "x_block_self_attn_layers": [0, 1]},
            "SD3", 16, {"context": 4096, "pooled": 48},  # ComfyUI fills CLIP's states up to so many
            wide={"x_block_self_attn_layers": [], "depth": 38, "num_blocks": 2, "adm_in_channels": 2048,
                  "num_patches": 36864, "pos_embed_max_size": 192,
                  "context_embedder_config": {
                      "target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 2432}}},
            wide_widths={"context": 4096, "pooled": 2048},
        ),
        {"num_layers": 3, "num_attention_heads": 3, "caption_projection_dim": 192, "pooled_projection_dim": 48,
         "dual_attention_layers": (0, 1)},
    ),
    "flux1": SmallModel(
        InComfyUI(
            {**_FLUX, "image_model": "flux", "guidance_embed": True}, "Flux", 16, {"context": 64, "pooled": 48},
            wide={**_WIDE_FLUX, "context_in_dim": 4096, "vec_in_dim": 768}, wide_widths={"context": 4096, "pooled": 768},
        ),
        {"num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 48},
    ),
    "chroma": SmallModel(
        InComfyUI(  # it counts the modulations of as many blocks as the published model has
            {**{name: value for name, value in _FLUX.items() if name not in ("yak_mlp", "txt_norm")},
             "image_model": "chroma", "in_channels": 64, "out_channels": 64, "num_heads": 1, "hidden_size": 128, "depth": 19,
             "depth_single_blocks": 38, "in_dim": 64, "out_dim": 128, "hidden_dim": 64, "n_layers": 2},
            "Chroma", 16, {"context": 64},
            ("out_dim", "hidden_dim", "n_layers", "hidden_size", "num_heads", "context_in_dim"),
        ),
        {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 1, "joint_attention_dim": 64,
         "approximator_hidden_dim": 64, "approximator_layers": 2},
    ),
    "flux2": SmallModel(
        InComfyUI(
            {**_FLUX, "image_model": "flux2", "axes_dim": [32] * 4, "mlp_ratio": 3.0, "theta": 2000, "in_channels": 128,
             "out_channels": 128, "patch_size": 1, "vec_in_dim": None, "qkv_bias": False, "ops_bias": False,
             "txt_ids_dims": [3], "context_in_dim": 96, "global_modulation": True, "mlp_silu_act": True,
             "default_ref_method": "index", "ref_index_scale": 10.0, "guidance_embed": False},
            "Flux2", 128, {"context": 96},
            wide={**_WIDE_FLUX, "hidden_size": 4096, "num_heads": 32, "context_in_dim": 12288},
            wide_widths={"context": 12288},
        ),
        {"num_attention_heads": 2, "joint_attention_dim": 96, "guidance_embeds": False},
    ),
    "lumina2": SmallModel(
        comfyui=InComfyUI({"dim": 288, "cap_feat_dim": 64, "n_heads": 3, "n_kv_heads": 1}),
        diffusers={"hidden_size": 288, "num_attention_heads": 3, "num_kv_heads": 1, "cap_feat_dim": 64},
    ),
    "zimage": SmallModel(
        InComfyUI(
            {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 1152, "cap_feat_dim": 64, "n_layers": 2,
             "n_refiner_layers": 1, "qk_norm": True, "n_heads": 9, "n_kv_heads": 9, "axes_dims": [32, 48, 48],
             "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True,
             "time_scale": 1000.0, "pad_tokens_multiple": 32},
            "ZImage", 16, {"context": 64},
            ("dim", "n_heads", "n_kv_heads", "n_refiner_layers", "axes_dims", "axes_lens", "rope_theta",
             "ffn_dim_multiplier", "z_image_modulation", "time_scale", "pad_tokens_multiple"),
            wide={"dim": 3840, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560, "n_layers": 1},
            wide_widths={"context": 2560},
        ),
        {"dim": 1152, "n_heads": 9, "n_kv_heads": 9, "cap_feat_dim": 64, "n_refiner_layers": 1},
    ),
    "qwen-image": SmallModel(
        InComfyUI(
            {"image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "num_attention_heads": 2,
             "joint_attention_dim": 64},
            "QwenImage", 16, {"context": 64}, ("num_attention_heads", "joint_attention_dim"),
            wide={"num_attention_heads": 24, "joint_attention_dim": 3584}, wide_widths={"context": 3584},
        ),
        {"num_attention_heads": 2, "joint_attention_dim": 64},
    ),
    "krea2": SmallModel(
        InComfyUI(
            {"image_model": "krea2", "features": 256, "heads": 2, "kvheads": 1, "layers": 2, "channels": 16, "patch": 2,
             "txtlayers": 12, "txtdim": 64, "txtheads": 2, "txtkvheads": 2},
            "Krea2", 16, {"context": 12 * 64}, ("txtheads", "txtkvheads"),
            wide={"features": 6144, "heads": 48, "kvheads": 12, "layers": 1, "txtdim": 2560, "txtheads": 20,
                  "txtkvheads": 20},
            wide_widths={"context": 12 * 2560},
        ),
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 768, "text_hidden_dim": 64,
         "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 256},
    ),
    "ernie-image": SmallModel(
        InComfyUI(
            {"image_model": "ernie", "hidden_size": 256, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 384,
             "text_in_dim": 64},
            "ErnieImage", 128, {"context": 64},
            ("hidden_size", "num_attention_heads", "num_layers", "ffn_hidden_size", "text_in_dim"),
            wide={"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 1, "ffn_hidden_size": 12288,
                  "text_in_dim": 3072},
            wide_widths={"context": 3072},
        ),
        {"hidden_size": 256, "num_attention_heads": 2, "ffn_hidden_size": 384, "text_in_dim": 64},
    ),
    "longcat-image": SmallModel(
        InComfyUI(
            {**_FLUX, "image_model": "flux", "guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]},
            "LongCatImage", 16, {"context": 64}, ("txt_ids_dims",),
            wide={**_WIDE_FLUX, "context_in_dim": 3584}, wide_widths={"context": 3584},
        ),
        {"num_attention_heads": 2, "joint_attention_dim": 64},
    ),
    "ideogram4": SmallModel(
        InComfyUI(
            {"image_model": "ideogram4", "in_channels": 128, "num_layers": 2, "num_attention_heads": 2,
             "attention_head_dim": 128, "intermediate_size": 384, "adaln_dim": 64, "llm_features_dim": 13 * 16},
            "Ideogram4", 128, {"context": 13 * 16},
            ("num_attention_heads", "attention_head_dim", "intermediate_size", "adaln_dim", "llm_features_dim"),
            wide={"num_layers": 1, "num_attention_heads": 18, "attention_head_dim": 256, "intermediate_size": 12288,
                  "adaln_dim": 512, "llm_features_dim": 13 * 4096},
            wide_widths={"context": 13 * 4096},
        ),
        {"num_attention_heads": 2, "attention_head_dim": 128, "intermediate_size": 384, "adaln_dim": 64,
         "llm_features_dim": 13 * 16},
    ),
}  # fmt: skip
IN_COMFYUI = {family: model.comfyui for family, model in SMALL_MODELS.items() if model.comfyui}
IN_DIFFUSERS = {family: model.diffusers for family, model in SMALL_MODELS.items() if model.diffusers}
