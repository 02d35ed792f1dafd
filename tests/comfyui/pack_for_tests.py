"""Custom nodes of ComfyUI for the tests: what a small graphics card makes of a model, and weights as they are used.

ComfyUI knows models by their published widths. Here its own classes are also found, and built, for narrow ones.
"""

# pyright: reportMissingImports=false

import gc
import os
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.ernie
import comfy.text_encoders.flux
import comfy.text_encoders.ideogram4
import comfy.text_encoders.krea2
import comfy.text_encoders.llama
import comfy.text_encoders.longcat_image
import comfy.text_encoders.pixart_t5
import comfy.text_encoders.qwen3vl
import comfy.text_encoders.qwen_image
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.z_image
import comfy.utils
import folder_paths
import gguf
import tokenizers
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from small_models import IN_COMFYUI


class PartlyLoaded:
    """MODEL as ComfyUI leaves it where memory is short: half of its weights patched in place, the rest as they are used.

    (ComfyUI takes `--lowvram` and `--cpu` not together.)
    """

    CATEGORY = "tests"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    def load(self, model):
        comfy.model_management.load_models_gpu([model])
        model.partially_unload(model.offload_device, model.model_size() // 2)
        assert model.model.model_lowvram
        return (model,)


class PatchedWeights:
    """Writes the weights that patches change, as they are then, into a file of the output folder."""

    CATEGORY = "tests"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "name": ("STRING", {})}})
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "write"

    def write(self, model, name):
        comfy.model_management.load_models_gpu([model])
        weights = {key: comfy.utils.get_attr(model.model, key).detach().clone() for key in model.patches}
        folder = folder_paths.get_output_directory()
        os.makedirs(folder, exist_ok=True)
        comfy.utils.save_torch_file(weights, os.path.join(folder, name))
        return {}


class InGguf(torch.Tensor):
    """A weight as the pack ComfyUI-GGUF keeps it: the bytes of its blocks, its kind, and the shape that it stands for."""

    def __new__(cls, stored):
        return torch.from_numpy(stored.data).as_subclass(cls)

    def __init__(self, stored):
        self.tensor_type, self.tensor_shape = stored.tensor_type, torch.Size(stored.shape.tolist()[::-1])

    def detach(self):
        return self


class LoadGguf:
    """The MODEL of a file with the weights of another, in GGUF, in place of its own; for all but drawing."""

    CATEGORY = "tests"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"wide": ("STRING", {}), "name": ("STRING", {})}})
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    def load(self, wide, name):
        wide, name = (folder_paths.get_full_path("diffusion_models", file) for file in (wide, name))
        model = comfy.sd.load_diffusion_model(wide)
        for stored in gguf.GGUFReader(name).tensors:
            comfy.utils.set_attr_param(model.model.diffusion_model, stored.name, InGguf(stored))
        return (model,)


class HandedOver:
    """Writes the tensors of a MODEL as Train Face LoRA takes them into a file of the output folder.

    Shows the names of those that stay narrow.
    """

    CATEGORY = "tests"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "name": ("STRING", {})}})
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "write"

    def write(self, model, name):
        convert = next(module for path, module in sys.modules.items() if path.endswith(".nodes.comfyui.convert"))
        readers = convert._readers_as_stored(model, "diffusion_model.")
        folder = folder_paths.get_output_directory()
        os.makedirs(folder, exist_ok=True)
        tensors = {key.removeprefix("diffusion_model."): read().contiguous() for key, read in readers.items()}
        comfy.utils.save_torch_file(tensors, os.path.join(folder, name))
        narrow = [key for key, read in readers.items() if isinstance(read, convert.Stored) and read.quantised()]
        return {"ui": {"narrow": narrow}}


class DenoisersOfTrainings:
    """Shows how many of diffusers' UNets are alive, garbage included. ComfyUI's own MODEL is none of them."""

    CATEGORY = "tests"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES = ("MODEL",)
    OUTPUT_NODE = True
    FUNCTION = "count"

    def count(self, model):
        alive = [found for found in gc.get_objects() if type(found).__name__ == "UNet2DConditionModel"]
        return {"ui": {"alive": [len(alive)]}, "result": (model,)}


NODE_CLASS_MAPPINGS = {
    "TestPartlyLoaded": PartlyLoaded, "TestPatchedWeights": PatchedWeights, "TestHandedOver": HandedOver,
    "TestLoadGguf": LoadGguf, "TestDenoisersOfTrainings": DenoisersOfTrainings,
}  # fmt: skip

# ComfyUI takes what is 3840 wide for a Z-Image, every Qwen-Image and Chroma is 3072 wide, and LongCat-Image's texts are 3584
# wide; these are the narrow ones of model_writer.py.
SMALL = {
    small.config["image_model"]: {name: small.config[name] for name in small.undetected}
    for small in IN_COMFYUI.values()
    if small.undetected
}
SMALL_ZIMAGE, SMALL_LONGCAT = SMALL.pop("lumina2"), SMALL.pop("flux")
detect = comfy.model_detection.detect_unet_config


def detect_also_small(*arguments, **options):
    config = detect(*arguments, **options)
    if config is None:
        return None
    if config.get("dim") == SMALL_ZIMAGE["dim"]:
        return config | SMALL_ZIMAGE
    if config.get("image_model") == "flux" and config["vec_in_dim"] is None:
        return config | SMALL_LONGCAT
    return config | SMALL.get(config.get("image_model"), {})


comfy.model_detection.detect_unet_config = detect_also_small
comfy.supported_models.ZImage.unet_config = {"image_model": "lumina2", "dim": SMALL_ZIMAGE["dim"]}
comfy.supported_models.LongCatImage.unet_config |= {
    "context_in_dim": IN_COMFYUI["longcat-image"].config["context_in_dim"]
}

# Whose widths it does not read off a checkpoint at all.
comfy.supported_models.Ideogram4.unet_extra_config |= SMALL["ideogram4"]

# Small UNets: the demo's base, and SMALL_SDXL of tests/tooling.py. Nodes know a model by the name of its class.


def clip_sizes(state_dict, prefix):
    """What differs from CLIP-L in a CLIP of that state; nothing where the state has none."""
    if f"{prefix}embeddings.token_embedding.weight" not in state_dict:
        return {}
    layers = {
        name.split(".layers.")[1].split(".")[0] for name in state_dict if name.startswith(f"{prefix}encoder.layers.")
    }
    width = state_dict[f"{prefix}embeddings.token_embedding.weight"].shape[1]
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64,
            "num_hidden_layers": len(layers), "projection_dim": width}  # fmt: skip


def sized_clip(cls, sizes):
    """ComfyUI's text encoder with other sizes: part -> what differs."""

    def build(model_options, **options):
        own = {f"{part}_model_config": config for part, config in sizes.items()}
        return cls(model_options={**model_options, **own}, **options)

    return build


class SD15(comfy.supported_models.SD15):
    unet_config: ClassVar = {**comfy.supported_models.SD15.unet_config, "context_dim": 64, "model_channels": 64}

    def clip_target(self, state_dict):
        sizes = clip_sizes(state_dict, "cond_stage_model.transformer.text_model.")
        tokenizer = partial(comfy.sd1_clip.SDTokenizer, embedding_size=64)
        return comfy.supported_models_base.ClipTarget(
            partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
            sized_clip(comfy.sd1_clip.SD1ClipModel, {"clip_l": sizes}),
        )


class SD20(comfy.supported_models.SD20):
    unet_config: ClassVar = {**comfy.supported_models.SD20.unet_config, "model_channels": 64}


class SDXL(comfy.supported_models.SDXL):
    unet_config: ClassVar = {
        "context_dim": 192,
        "model_channels": 64,
        "adm_in_channels": 1664,
        "use_temporal_attention": False,
    }

    def clip_target(self, state_dict):
        first = clip_sizes(state_dict, "conditioner.embedders.0.transformer.text_model.")
        second = {**first, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "num_hidden_layers": 3,
                  "projection_dim": 128}  # fmt: skip
        clip = sized_clip(comfy.sdxl_clip.SDXLClipModel, {"clip_l": first, "clip_g": second})
        return comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, clip)


comfy.supported_models.models += [SD15, SD20, SDXL]

# ComfyUI has one width for the VAEs of its older models.
read_vae, KL, ENGINE = comfy.sd.VAE.__init__, comfy.sd.AutoencoderKL, comfy.sd.AutoencodingEngine


def read_vae_of_any_width(self, sd, **options):
    if "encoder.down.0.block.0.conv2.weight" not in sd:
        return read_vae(self, sd, **options)
    blocks = {match.groups(): sd[name].shape[0] for name in sd
              if (match := re.fullmatch(r"encoder\.down\.(\d)\.block\.(\d)\.conv2\.weight", name))}  # fmt: skip
    widths = [blocks[level, "0"] for level in sorted({level for level, _ in blocks})]
    sizes = {"ch": widths[0], "ch_mult": [width // widths[0] for width in widths],
             "num_res_blocks": len(blocks) // len(widths)}  # fmt: skip

    def kl(ddconfig, embed_dim, decoder_ddconfig=None):
        return KL(ddconfig=ddconfig | sizes, embed_dim=embed_dim)

    def engine(encoder_config, decoder_config, **others):
        configs = [config | {"params": config["params"] | sizes} for config in (encoder_config, decoder_config)]
        return ENGINE(encoder_config=configs[0], decoder_config=configs[1], **others)

    comfy.sd.AutoencoderKL, comfy.sd.AutoencodingEngine = kl, engine
    try:
        return read_vae(self, sd, **options)
    finally:
        comfy.sd.AutoencoderKL, comfy.sd.AutoencodingEngine = KL, ENGINE


comfy.sd.VAE.__init__ = read_vae_of_any_width

# The text encoders of the diffusion transformers have billions of parameters, and ComfyUI knows them by their sizes. Here
# its loaders build them narrow, with random weights, whatever is in the file; tokenizers and everything else are its own.
QWEN3 = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
SIZES = {
    "flux": {
        "clip_l": {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2},
        "t5xxl": {"d_model": 64, "d_ff": 64, "d_kv": 64, "num_heads": 1, "num_layers": 1},
    },
    "flux2": {"qwen3_4b": {**QWEN3, "hidden_size": 32}},  # FLUX.2 reads three layers side by side
    "chroma": {"t5xxl": {"d_model": 64, "d_ff": 64, "d_kv": 64, "num_heads": 1, "num_layers": 1}},
    "lumina2": {"qwen3_4b": QWEN3},
    "qwen_image": {"qwen25_7b": {**QWEN3, "num_hidden_layers": 2}},
    "krea2": {"qwen3vl_4b": QWEN3},
    "ernie": {"ministral3_3b": {**QWEN3, "num_hidden_layers": 3}},
    "longcat_image": {"qwen25_7b": {**QWEN3, "num_hidden_layers": 2}},
    "ideogram4": {"qwen3vl_8b": {**QWEN3, "hidden_size": 16}},  # Ideogram 4 reads thirteen layers side by side
    "sd3": {
        "clip_l": {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 3},
        "clip_g": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 3},
    },
}
TARGETS = {
    "flux": (comfy.text_encoders.flux.flux_clip(torch.float32), comfy.text_encoders.flux.FluxTokenizer),
    "flux2": (comfy.text_encoders.flux.klein_te(torch.float32), comfy.text_encoders.flux.KleinTokenizer),
    "chroma": (comfy.text_encoders.pixart_t5.pixart_te(torch.float32), comfy.text_encoders.pixart_t5.PixArtTokenizer),
    "lumina2": (comfy.text_encoders.z_image.te(torch.float32), comfy.text_encoders.z_image.ZImageTokenizer),
    "qwen_image": (comfy.text_encoders.qwen_image.te(torch.float32), comfy.text_encoders.qwen_image.QwenImageTokenizer),
    "krea2": (comfy.text_encoders.krea2.te(torch.float32), comfy.text_encoders.krea2.Krea2Tokenizer),
    "ernie": (comfy.text_encoders.ernie.te(torch.float32), comfy.text_encoders.ernie.ErnieTokenizer),
    "longcat_image": (
        comfy.text_encoders.longcat_image.te(torch.float32),
        comfy.text_encoders.longcat_image.LongCatImageTokenizer,
    ),
    "ideogram4": (
        comfy.text_encoders.ideogram4.te_qwen3vl(torch.float32),
        comfy.text_encoders.ideogram4.Ideogram4Qwen3VLTokenizer,
    ),
    "sd3": (comfy.text_encoders.sd3_clip.sd3_clip(t5=False), comfy.text_encoders.sd3_clip.SD3Tokenizer),
}
# Hundreds of millions of weights that are for pictures.
comfy.text_encoders.llama.qwen_vl.Qwen2VLVisionTransformer = lambda **_: torch.nn.Identity()
comfy.text_encoders.qwen3vl.Qwen3VLVisionModel = lambda *_, **__: torch.nn.Identity()


def byte_tokenizer(_):
    """A token for each byte, in the place of a Mistral's: ComfyUI 0.30 does not make that with transformers 5.24."""
    words = ["<unk>", "<s>", "</s>", *(f"<{number}>" for number in range(3, 11)), "<pad>"]
    words += sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({word: number for number, word in enumerate(words)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {"tokenizer_object": made, "legacy": False}


comfy.text_encoders.flux.load_mistral_tokenizer = byte_tokenizer


def small_clip(kind: str):
    clip, tokenizer = TARGETS[kind]
    options = {f"{name}_model_config": sizes for name, sizes in SIZES[kind].items()}
    made = comfy.sd.CLIP(SimpleNamespace(params={}, clip=clip, tokenizer=tokenizer), model_options=options)
    generator = torch.Generator().manual_seed(3)
    for parameter in made.cond_stage_model.parameters():
        if parameter.ndim:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1, generator=generator)
    return made


def load_one(self, clip_name, type="stable_diffusion", device="default"):
    # ComfyUI has no type for ERNIE-Image, whose text encoder it knows by its width.
    return (small_clip("ernie" if clip_name.startswith("ministral") else type),)


def load_two(self, clip_name1, clip_name2, type, device="default"):
    return (small_clip(type),)


comfyui = sys.modules["nodes"]
comfyui.CLIPLoader.load_clip, comfyui.DualCLIPLoader.load_clip = load_one, load_two
