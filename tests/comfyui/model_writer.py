"""Run by test_flow_models.py in a process of its own, with ComfyUI on its path: small models of ComfyUI's own classes.

Arguments: whether only weights are wanted (yes or no), then pairs of a model's name and file. Writes into each file the
weights of a model of the real architecture but few and narrow layers, random, under ComfyUI's names (`weights.…`), and for
some noisy latents, times and texts what it predicts (`case0.…`). The same of the text encoders in TEXTS (`text.weights.…` as in
a checkpoint, and `text.case0.…` for the captions in the file's metadata) and of the VAEs in VAES (`vae.weights.…`, and
`vae.case0.…`).
"""

# pyright: reportMissingImports=false
import json
import sys
from pathlib import Path
from typing import Any

import comfy.cli_args

comfy.cli_args.args.cpu = True

import comfy.latent_formats  # noqa: E402
import comfy.ldm.models.autoencoder as autoencoder  # noqa: E402
import comfy.ldm.wan.vae  # noqa: E402
import comfy.supported_models as supported  # noqa: E402
import comfy.text_encoders.flux as flux_text  # noqa: E402
import comfy.text_encoders.ideogram4  # noqa: E402
import comfy.text_encoders.krea2  # noqa: E402
import comfy.text_encoders.llama  # noqa: E402
import comfy.text_encoders.longcat_image  # noqa: E402
import comfy.text_encoders.pixart_t5  # noqa: E402
import comfy.text_encoders.qwen3vl  # noqa: E402
import comfy.text_encoders.qwen_image  # noqa: E402
import comfy.text_encoders.sd3_clip as sd3_text  # noqa: E402
import comfy.text_encoders.z_image  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parents[1]))
from small_models import IN_COMFYUI  # noqa: E402

SMALL = {family: small for family, small in IN_COMFYUI.items() if small.kind}
SD3, FLUX2 = dict(SMALL["sd3"].config), dict(SMALL["flux2"].config)
PLAIN_SD3 = {name: value for name, value in SD3.items() if name != "qk_norm"} | {"x_block_self_attn_layers": []}
# Family, and after a dot what kind of it: ComfyUI's class and what its model_detection reads off a checkpoint, narrower;
# channels of the latents; widths of text.
MODELS = {
    family: (getattr(supported, small.kind), dict(small.config), small.channels, small.widths)
    for family, small in SMALL.items()
}
MODELS |= {
    "sd3.large": (supported.SD3, {**PLAIN_SD3, "qk_norm": "rms"}, 16, SMALL["sd3"].widths),
    "sd3.medium": (supported.SD3, PLAIN_SD3, 16, SMALL["sd3"].widths),
    "flux2.9b": (supported.Flux2, {**FLUX2, "num_heads": 3, "hidden_size": 384}, 128, {"context": 96}),
    "flux2.dev": (supported.Flux2, {**FLUX2, "guidance_embed": True}, 128, {"context": 96}),
}
MODELS |= {
    f"{family}.wide": (
        getattr(supported, small.kind),
        {**small.config, **small.wide},
        small.channels,
        small.wide_widths,
    )
    for family, small in SMALL.items()
    if small.wide
}
CASES = ((5, (8, 12)), (32, (8, 12)), (40, (8, 12)), (16, (20, 6)))
"""Tokens of text, and height and width of the latents."""
SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
              "num_key_value_heads": 2}  # fmt: skip
# FLUX.2 takes the states after the 9th, 18th and 27th layer, side by side.
SMALL_KLEIN = {**SMALL_TEXT, "hidden_size": 32, "num_hidden_layers": 28}
SMALL_CLIP = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "num_hidden_layers": 3}
# ComfyUI's tokenizer and text encoder, and its parts' names and sizes.
TEXTS = {
    "sd3": (
        sd3_text.SD3Tokenizer, sd3_text.sd3_clip(dtype_t5=torch.float32),
        {"clip_l": SMALL_CLIP, "clip_g": {**SMALL_CLIP, "hidden_size": 128, "num_attention_heads": 2},
         "t5xxl": {"d_model": 256, "d_ff": 64, "d_kv": 64, "num_heads": 2, "num_layers": 2}},
    ),
    "chroma": (
        comfy.text_encoders.pixart_t5.PixArtTokenizer, comfy.text_encoders.pixart_t5.pixart_te(dtype_t5=torch.float32),
        {"t5xxl": {"d_model": 64, "d_ff": 64, "d_kv": 64, "num_heads": 2, "num_layers": 2}},
    ),
    "flux2": (flux_text.KleinTokenizer, flux_text.klein_te(), {"qwen3_4b": SMALL_KLEIN}),
    "flux2.9b": (flux_text.KleinTokenizer8B, flux_text.klein_te(model_type="qwen3_8b"), {"qwen3_8b": SMALL_KLEIN}),
    "zimage": (
        comfy.text_encoders.z_image.ZImageTokenizer, comfy.text_encoders.z_image.ZImageTEModel, {"qwen3_4b": SMALL_TEXT},
    ),
    "qwen-image": (
        comfy.text_encoders.qwen_image.QwenImageTokenizer, comfy.text_encoders.qwen_image.QwenImageTEModel,
        {"qwen25_7b": SMALL_TEXT},
    ),
    "krea2": (
        comfy.text_encoders.krea2.Krea2Tokenizer, comfy.text_encoders.krea2.Krea2TEModel,
        {"qwen3vl_4b": {**SMALL_TEXT, "num_hidden_layers": 36}},
    ),
    "longcat-image": (
        comfy.text_encoders.longcat_image.LongCatImageTokenizer, comfy.text_encoders.longcat_image.LongCatImageTEModel,
        {"qwen25_7b": SMALL_TEXT},
    ),
    "ideogram4": (
        # Of the half that reads text; of the whole model ComfyUI 0.30 norms the last layer's states.
        comfy.text_encoders.ideogram4.Ideogram4Tokenizer, comfy.text_encoders.ideogram4.te(),
        {"qwen3vl_8b": {**SMALL_TEXT, "hidden_size": 16, "num_hidden_layers": 36}},
    ),
}  # fmt: skip
CAPTIONS = ("", "a photo of sks person", "sks person (35), café at night, 東京, smiling: {close-up}")
_KL = {"double_z": True, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1,
       "attn_resolutions": [], "dropout": 0.0, "z_channels": 16}  # fmt: skip
_MODULES = "comfy.ldm.modules.diffusionmodules.model."
VAES = {
    "sd3": (
        autoencoder.AutoencodingEngine,
        {
            "regularizer_config": {"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
            "encoder_config": {"target": f"{_MODULES}Encoder", "params": _KL},
            "decoder_config": {"target": f"{_MODULES}Decoder", "params": _KL},
        },
        comfy.latent_formats.SD3,
    ),
    "flux2": (
        autoencoder.AutoencoderKL,
        {"ddconfig": {**_KL, "z_channels": 32, "batch_norm_latent": True}, "embed_dim": 32},
        comfy.latent_formats.Flux2,
    ),
    "qwen-image": (
        comfy.ldm.wan.vae.WanVAE,
        {"dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]},
        comfy.latent_formats.Wan21,
    ),
}


def model_of(cls: Any, config: dict[str, Any], device: str = "cpu") -> Any:
    """A model of ComfyUI's own class, of the sizes in the config also where the class takes its own for granted."""
    made = cls(dict(config))
    made.unet_config |= config
    return made.get_model({}, "", device=torch.device(device))


def random_weights(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            owner, _, kind = name.rpartition(".")
            parameter.data = noise + 1 if "norm" in owner.rpartition(".")[2] and kind != "bias" else noise
        else:
            deviation = 0.7 * parameter[0].numel() ** -0.5
            parameter.data = deviation * torch.randn(parameter.shape, generator=generator)
    for name in set(model.state_dict()) - set(dict(model.named_parameters())):
        buffer = model.get_buffer(name)
        buffer.copy_(torch.rand(buffer.shape, generator=generator))


@torch.no_grad()
def write(name: str, path: str, weights_alone: bool) -> None:
    cls, config, channels, widths = MODELS[name]
    model = model_of(cls, config).float()
    random_weights(model.diffusion_model)
    tensors = {f"weights.{key}": value.contiguous() for key, value in model.diffusion_model.state_dict().items()}
    if name in VAES:
        tensors |= vae_tensors(name)
    if weights_alone:
        return safetensors.torch.save_file(tensors, path)
    generator = torch.Generator().manual_seed(2)
    for number, (length, (height, width)) in enumerate(CASES):
        if name.startswith("qwen-image"):
            width = -(-width // 4) * 4  # odd counts of positions are numbered one apart from the authors' code
        case = {
            "latents": torch.randn(1, channels, height, width, generator=generator),
            "time": torch.tensor([0.3 + 0.2 * number]),
            "context": torch.randn(1, length, widths["context"], generator=generator),
        }
        given: dict[str, Any] = {"c_crossattn": case["context"]}
        if name.startswith("flux2") and not name.endswith("wide"):  # whose texts end at the last of 512 tokens
            filled = model.extra_conds(cross_attn=case["context"], noise=case["latents"], device="cpu")
            given["c_crossattn"] = filled["c_crossattn"].cond
        if name.startswith("zimage"):
            given["num_tokens"] = length
        if "pooled" in widths:
            given["y"] = case["pooled"] = torch.randn(1, widths["pooled"], generator=generator)
        if name == "chroma":
            given["guidance"] = torch.zeros(1)
        if config.get("guidance_embed"):
            given["guidance"] = case["guidance"] = torch.tensor([3.5])
        latents = case["latents"]
        frames = latents.unsqueeze(2) if model.latent_format.latent_dimensions == 3 else latents
        denoised = model.apply_model(frames, case["time"], **given).reshape(latents.shape)
        case["prediction"] = (latents - denoised) / case["time"].view(-1, 1, 1, 1)
        tensors |= {f"case{number}.{key}": value.contiguous() for key, value in case.items()}
    if name in TEXTS:
        tensors |= text_tensors(name)
    safetensors.torch.save_file(tensors, path, {"captions": json.dumps(CAPTIONS)})


def text_tensors(name: str) -> dict[str, torch.Tensor]:
    tokenizer_class, cls, sizes = TEXTS[name]
    tokenizer = tokenizer_class()
    # Hundreds of millions of weights that are for pictures.
    comfy.text_encoders.llama.qwen_vl.Qwen2VLVisionTransformer = lambda **_: torch.nn.Identity()
    comfy.text_encoders.qwen3vl.Qwen3VLVisionModel = lambda *_, **__: torch.nn.Identity()
    options = {f"{part}_model_config": dict(config) for part, config in sizes.items()}
    encoder = cls(dtype=torch.float32, model_options=options)
    tensors = {}
    for part in sizes:
        transformer = getattr(encoder, part).transformer
        random_weights(transformer)
        prefix = f"text.weights.text_encoders.{part}.transformer"
        tensors |= {f"{prefix}.{key}": value.contiguous() for key, value in transformer.state_dict().items()}
    # SD3's CLIPs are filled up to the width of the real T5: the small one is asked by itself.
    t5 = encoder.t5xxl if name == "sd3" else None
    if t5 is not None:
        encoder.t5xxl = None
    for number, caption in enumerate(CAPTIONS):
        # The others take brackets for text anyway.
        plain = {"disable_weights": True} if name in ("sd3", "chroma") else {}
        tokens = tokenizer.tokenize_with_weights(caption, **plain)
        context, pooled = encoder.encode_token_weights(tokens)[:2]
        case = {"context": context}
        if t5 is not None:
            case |= {"pooled": pooled, "of_t5": t5.encode_token_weights(tokens["t5xxl"])[0]}
        tensors |= {f"text.case{number}.{key}": value.contiguous() for key, value in case.items()}
    return tensors


def vae_tensors(family: str) -> dict[str, torch.Tensor]:
    cls, config, latent_format = VAES[family]
    vae, scaled = cls(**config).eval(), latent_format()
    random_weights(vae)
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1
    frames = scaled.latent_dimensions == 3
    latents = scaled.process_in(vae.encode(pixels.unsqueeze(2) if frames else pixels))
    decoded = vae.decode(scaled.process_out(latents))
    case = {"pixels": pixels, "latents": latents.squeeze(2), "decoded": decoded.squeeze(2)}
    tensors = {f"vae.weights.{name}": value.contiguous() for name, value in vae.state_dict().items()}
    return tensors | {f"vae.case0.{name}": value.contiguous() for name, value in case.items()}


if __name__ == "__main__":
    weights_alone, *pairs = sys.argv[1:]
    for name, path in zip(pairs[::2], pairs[1::2], strict=True):
        write(name, path, weights_alone == "yes")
