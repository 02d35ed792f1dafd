"""Run in a process of its own, with ComfyUI on its path: what does ComfyUI make of LoRA files?

Arguments: pairs of a model and a file. A model is a family, `small-` and the name of a model in model_writer.py or of a family
that is narrow here, or `names-` and a family. Prints one JSON line for each: which keys are reported as not loaded, and for
each patched weight its change times a fixed vector, for `names-` an empty list. The weights are 0 before, or with
`LORA_READER_BASE=random` fixed random ones, for the kinds whose change depends on them.
"""

# pyright: reportMissingImports=false
import functools
import json
import logging
import math
import os
import sys

import comfy.cli_args

comfy.cli_args.args.cpu = True

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.sdxl_clip  # noqa: E402
import comfy.supported_models as supported  # noqa: E402
import comfy.text_encoders.flux  # noqa: E402
import comfy.text_encoders.pixart_t5  # noqa: E402
import comfy.text_encoders.sd2_clip  # noqa: E402
import comfy.text_encoders.sd3_clip  # noqa: E402
import model_writer  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from small_models import IN_COMFYUI  # noqa: E402

UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "num_res_blocks": [2, 2, 2, 2], "dtype": torch.float32,
        "use_spatial_transformer": True, "legacy": False, "use_temporal_attention": False, "transformer_depth_middle": 1,
        "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "model_channels": 320,
        "adm_in_channels": None}  # fmt: skip
FLUX = {"axes_dim": [16, 56, 56], "num_heads": 24, "mlp_ratio": 4.0, "theta": 10000, "out_channels": 16,
        "qkv_bias": True, "txt_ids_dims": [], "patch_size": 2, "in_channels": 16, "hidden_size": 3072,
        "context_in_dim": 4096, "vec_in_dim": 768, "depth": 2, "depth_single_blocks": 2, "guidance_embed": True,
        "yak_mlp": False, "txt_norm": False}  # fmt: skip
LUMINA = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "n_layers": 2, "qk_norm": True}
# As ComfyUI's model_detection reads them off the published checkpoints, with fewer layers.
MODELS = {
    "sd15": (supported.SD15, {**UNET, "context_dim": 768, "use_linear_in_transformer": False, "num_heads": 8}),
    "sd2": (supported.SD20, {**UNET, "context_dim": 1024, "use_linear_in_transformer": True, "num_head_channels": 64}),
    "sdxl": (
        supported.SDXL,
        {**UNET, "context_dim": 2048, "use_linear_in_transformer": True, "num_head_channels": 64,
         "channel_mult": [1, 2, 4], "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10],
         "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
         "adm_in_channels": 2816, "num_classes": "sequential"},
    ),
    "sd3": (
        supported.SD3,
        {"in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 24, "input_size": None,
         "adm_in_channels": 2048, "num_patches": 147456, "pos_embed_max_size": 384, "qk_norm": "rms",
         "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
         "pos_embed_scaling_factor": None, "x_block_self_attn_layers": list(range(13))},
    ),
    "flux1": (supported.Flux, {**FLUX, "image_model": "flux"}),
    "chroma": (
        supported.Chroma,
        {"image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072,
         "hidden_dim": 5120, "n_layers": 5, **{key: FLUX[key] for key in (
             "axes_dim", "num_heads", "mlp_ratio", "theta", "qkv_bias", "txt_ids_dims", "patch_size", "hidden_size",
             "context_in_dim", "vec_in_dim", "depth", "depth_single_blocks")}},
    ),
    "flux2": (
        supported.Flux2,
        {**FLUX, "image_model": "flux2", "axes_dim": [32, 32, 32, 32], "num_heads": 48, "mlp_ratio": 3.0, "theta": 2000,
         "out_channels": 128, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False,
         "txt_ids_dims": [3], "patch_size": 1, "in_channels": 128, "hidden_size": 6144, "context_in_dim": 15360,
         "vec_in_dim": None},
    ),
    "lumina2": (
        supported.Lumina2,
        {**LUMINA, "dim": 2304, "cap_feat_dim": 2304, "n_heads": 24, "n_kv_heads": 8, "axes_dims": [32, 32, 32],
         "axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0},
    ),
    "zimage": (
        supported.ZImage,
        {**LUMINA, "dim": 3840, "cap_feat_dim": 2560, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48],
         "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0,
         "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32},
    ),
    "qwen-image": (supported.QwenImage, {"image_model": "qwen_image", "in_channels": 64, "num_layers": 2}),
    "krea2": (supported.Krea2, {"image_model": "krea2", "layers": 2}),
    "ernie-image": (supported.ErnieImage, {"image_model": "ernie", "num_layers": 2}),
    "longcat-image": (
        supported.LongCatImage,
        {**FLUX, "image_model": "flux", "guidance_embed": False, "vec_in_dim": None, "context_in_dim": 3584,
         "txt_ids_dims": [1, 2]},
    ),
    "ideogram4": (supported.Ideogram4, {"image_model": "ideogram4", "in_channels": 128, "num_layers": 2}),
}  # fmt: skip
MODELS |= {f"small-{name}": (cls, config) for name, (cls, config, *_) in model_writer.MODELS.items()}
MODELS |= {
    f"small-{family}": (MODELS[family][0], {**MODELS[family][1], **small.config})
    for family, small in IN_COMFYUI.items()
    if not small.kind
}
TEXT_ENCODERS = {
    "sd15": comfy.sd1_clip.SD1ClipModel,
    "sd2": comfy.text_encoders.sd2_clip.SD2ClipModel,
    "sdxl": comfy.sdxl_clip.SDXLClipModel,
    "sd3": comfy.text_encoders.sd3_clip.sd3_clip(dtype_t5=torch.float32),
    "flux1": comfy.text_encoders.flux.flux_clip(dtype_t5=torch.float32),
    "chroma": comfy.text_encoders.pixart_t5.pixart_te(dtype_t5=torch.float32),
}
SMALL_CLIP = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "num_hidden_layers": 3}
SMALL_T5 = {"d_model": 64, "d_ff": 160, "d_kv": 64, "num_heads": 1, "num_layers": 2}
SMALL_TEXTS = {f"clip_{kind}_model_config": SMALL_CLIP for kind in "lhg"} | {"t5xxl_model_config": SMALL_T5}


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def probe(inputs: int) -> torch.Tensor:
    return torch.randn(inputs, generator=torch.Generator().manual_seed(inputs))


def base_weight(shape: torch.Size) -> torch.Tensor:
    if os.environ["LORA_READER_BASE"] != "random":
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5


def names_of(cls, config: dict, clip=None) -> tuple[dict, dict]:
    """Of a model and its text encoders: shapes of the weights, and ComfyUI's map from names in LoRA files."""
    model = model_writer.model_of(cls, config, "meta")
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    key_map = comfy.lora.model_lora_keys_unet(model, {})
    if clip is not None:
        shapes |= {key: tensor.shape for key, tensor in clip.state_dict().items()}
        key_map = comfy.lora.model_lora_keys_clip(clip, key_map)
    return shapes, key_map


def text_encoders_of(family: str, options: dict):
    """Of a family that has CLIP or T5, without weights; None for another."""
    make = TEXT_ENCODERS.get(family)
    return make and make(device="meta", dtype=torch.float32, model_options=options)


@functools.cache
def read(name: str) -> tuple[dict, dict]:
    family = name.removeprefix("small-")
    return names_of(*MODELS[name], text_encoders_of(family, SMALL_TEXTS if name != family else {}))


def report(model: str, path: str) -> dict:
    shapes, key_map = read(model.removeprefix("names-"))
    warnings = Warnings()
    logging.getLogger().addHandler(warnings)
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(safetensors.torch.load_file(path)), key_map)
    changes = {}
    for target, patch in patches.items():
        name, offset, function = target, None, None
        if not isinstance(target, str):
            name, offset, function = target[0], target[1], target[2] if len(target) > 2 else None
        if model.startswith("names-"):
            changes[name] = []
            continue
        base = base_weight(shapes[name])
        # Like ModelPatcher.add_patches and comfy.lora.calculate_weight.
        weight = comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, function)], base.clone(), name) - base
        matrix = weight.reshape(weight.shape[0], -1)  # a bias is a matrix of one column
        change = matrix @ probe(matrix.shape[1])
        changes[name] = (torch.tensor(changes[name]) + change).tolist() if name in changes else change.tolist()
    logging.getLogger().removeHandler(warnings)
    return {"not_loaded": warnings.messages, "changes": changes}


if __name__ == "__main__":
    for model, path in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        print("RESULT " + json.dumps(report(model, path)), flush=True)
