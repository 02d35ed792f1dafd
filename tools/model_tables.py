"""Makes core/tensor_names/model_tables.json: which modules the published models have, and the shapes of their weights.

Run it with the Python of the ComfyUI that the tests set up, which sees the packages of this project too:

    PYTHONPATH=tests/.downloads/ComfyUI tests/.downloads/comfyui-environment/bin/python tools/model_tables.py

The models are built without weights by the classes of diffusers and ComfyUI, from the sizes of the published checkpoints.
What is written are names and sizes alone, and which modules have a bias: a path whose numbers run is one entry
("blocks.0-39.ffn.0": [13824, 5120, "bias"]).
"""

import importlib.metadata
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from core.models.families import FAMILIES  # noqa: E402
from core.tensor_names import NAME_TABLES  # noqa: E402

Shapes = dict[str, tuple[int, ...]]
Rows = dict[str, tuple[int | str, ...]]
"""The shape of each module's weight by its path, with BIAS behind it where the module has one."""
BIAS = "bias"
OUTPUT = ROOT / "core" / "tensor_names" / "model_tables.json"
SD_UNET = {"sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280)}
SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER_UNET = SDXL_UNET | {
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "qk_norm": "rms_norm"}
HUNYUAN_VIDEO = {
    "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 20, "depth_single_blocks": 40,
    "axes_dim": [16, 56, 56], "theta": 256, "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False,
    "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
LDM_UNET = "modules.diffusionmodules.openaimodel:UNetModel"
SDXL_LDM = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4], "num_classes": "sequential", "adm_in_channels": 2816, "use_spatial_transformer": True,
    "use_linear_in_transformer": True, "context_dim": 2048, "num_head_channels": 64, "legacy": False,
}  # fmt: skip
COSMOS_PREDICT2 = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "concat_padding_mask": True, "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True, "model_channels": 2048, "num_blocks": 28, "num_heads": 16, "use_adaln_lora": True,
    "adaln_lora_dim": 256,
}  # fmt: skip
OMNIGEN2 = {
    "hidden_size": 2520, "num_layers": 32, "num_refiner_layers": 2, "num_attention_heads": 21, "num_kv_heads": 7,
    "multiple_of": 256, "axes_dim_rope": (40, 40, 40), "text_feat_dim": 2048, "timestep_scale": 1000.0,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A published model: what it is called, and from which class and sizes each library builds its denoiser."""

    title: str
    """As people call it; variants of one model have one title."""
    family: str | None = None
    """The family of this project that it belongs to, None: it is not trained here."""
    diffusers: str | None = None
    """A class of diffusers."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Its arguments where they are not the defaults."""
    comfyui: str | None = None
    """A class of ComfyUI, `module:Class` below comfy.ldm."""
    comfyui_config: Mapping[str, Any] = field(default_factory=dict)
    like: str | None = None
    """The family of this project whose original names it has, where that is not `family`."""
    text: tuple[str, ...] = ()
    """Names in TEXT_ENCODERS, by number."""
    claims: tuple[str, ...] = ()
    """What metadata call it, beside its title and the names of its family."""
    control: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    """The rows of modules whose inputs are wider for a control image, which LoRAs for such images change too."""


CLIPS = ("clip_l", "clip_g")
MODELS = (
    Model("SD 1.5", "sd15", "UNet2DConditionModel", SD_UNET | {"cross_attention_dim": 768}, text=("clip_l",)),
    Model("SD 2", "sd2", "UNet2DConditionModel", SD_UNET | {
        "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        text=("clip_h",)),
    Model("SDXL", "sdxl", "UNet2DConditionModel", SDXL_UNET, text=CLIPS),
    Model("SDXL refiner", None, "UNet2DConditionModel", REFINER_UNET, text=("", "clip_g"), claims=(
        "stable-diffusion-xl-refiner", "stable-diffusion-xl-v1-refiner")),
    Model("Kolors", None, "UNet2DConditionModel", SDXL_UNET | {
        "encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj", "projection_class_embeddings_input_dim": 5632},
        like="sdxl"),
    Model("SSD-1B", comfyui=LDM_UNET, comfyui_config=SDXL_LDM | {
        "transformer_depth": [0, 0, 2, 2, 4, 4], "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
        "transformer_depth_middle": -1}),
    Model("Segmind Vega", comfyui=LDM_UNET, comfyui_config=SDXL_LDM | {
        "transformer_depth": [0, 0, 1, 1, 2, 2], "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        "transformer_depth_middle": -1}),
    Model("Stable Video Diffusion", None, "UNetSpatioTemporalConditionModel"),
    Model("SD3", "sd3", "SD3Transformer2DModel", SD3 | {"qk_norm": None}, text=(*CLIPS, "t5xxl")),
    Model("SD3.5 Medium", "sd3", "SD3Transformer2DModel", SD3 | {"dual_attention_layers": tuple(range(13))},
          text=(*CLIPS, "t5xxl")),
    Model("SD3.5 Large", "sd3", "SD3Transformer2DModel", SD3 | {
        "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}, text=(*CLIPS, "t5xxl")),
    # The LoRAs of FLUX.1 Depth and Canny double the inputs.
    Model("FLUX.1", "flux1", "FluxTransformer2DModel", {"guidance_embeds": True}, text=("clip_l", "t5xxl"),
          control=dict.fromkeys(("x_embedder", "img_in"), (3072, 128, BIAS))),
    Model("Chroma", "chroma", "ChromaTransformer2DModel", text=("t5xxl",)),
    Model("FLUX.2 dev", "flux2", "Flux2Transformer2DModel"),
    Model("FLUX.2 klein 4B", "flux2", "Flux2Transformer2DModel", {
        "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
        "guidance_embeds": False}),
    Model("FLUX.2 klein 9B", "flux2", "Flux2Transformer2DModel", {
        "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
        "guidance_embeds": False}),
    Model("FLUX.3 Klein", "flux3", "Flux3Transformer2DModel", {"flow_map": True}),
    Model("Lumina 2", "lumina2", "Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
    Model("Z-Image", "zimage", "ZImageTransformer2DModel"),
    Model("Qwen-Image", "qwen-image", "QwenImageTransformer2DModel"),
    Model("Qwen-Image 2.1", "qwen-image-21", "QwenImage21Transformer2DModel"),
    Model("Krea 2", "krea2", "Krea2Transformer2DModel"),
    Model("ERNIE-Image", "ernie-image", "ErnieImageTransformer2DModel", {
        "hidden_size": 4096, "num_attention_heads": 32, "num_layers": 36, "ffn_hidden_size": 12288,
        "text_in_dim": 3072}),
    Model("LongCat-Image", "longcat-image", "LongCatImageTransformer2DModel", {"num_layers": 10, "num_single_layers": 20}),
    Model("Ideogram 4", "ideogram4", "Ideogram4Transformer2DModel"),
    Model("MOSS-Image", "moss-image", None, {
        "dim": 3072, "ffn_dim": 8192, "num_heads": 24, "num_layers": 42, "text_dim": 4096, "freq_dim": 256,
        "latent_channels": 128}),
    # What follows is not trained here; its files must not be taken for one of the above.
    Model("HiDream-I1", None, "HiDreamImageTransformer2DModel", {
        "patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [4096, 4096]},
        "hidream.model:HiDreamImageTransformer2DModel", {
        "patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [4096, 4096]}, claims=("hidream",)),
    Model("HunyuanVideo", None, "HunyuanVideoTransformer3DModel", {}, "hunyuan_video.model:HunyuanVideo", HUNYUAN_VIDEO,
          claims=("hunyuan_video",)),
    Model("FramePack", None, "HunyuanVideoFramepackTransformer3DModel"),
    Model("HunyuanVideo 1.5", None, "HunyuanVideo15Transformer3DModel", {}, "hunyuan_video.model:HunyuanVideo",
          HUNYUAN_VIDEO | {"hidden_size": 2048, "num_heads": 16, "depth": 54, "depth_single_blocks": 0,
                           "context_in_dim": 3584, "vec_in_dim": None, "guidance_embed": False, "in_channels": 65,
                           "out_channels": 32, "patch_size": [1, 1, 1]}),
    Model("HunyuanImage 2.1", None, "HunyuanImageTransformer2DModel", {}, "hunyuan_video.model:HunyuanVideo",
          HUNYUAN_VIDEO | {"hidden_size": 3584, "num_heads": 28, "context_in_dim": 3584, "vec_in_dim": None,
                           "in_channels": 64, "out_channels": 64, "patch_size": [1, 1]},
          claims=("hunyuan_image",)),
    Model("HunyuanDiT", None, "HunyuanDiT2DModel", {
        "num_layers": 40, "cross_attention_dim": 1024, "in_channels": 4, "learn_sigma": True, "patch_size": 2,
        "hidden_size": 1408, "mlp_ratio": 4.3637}),
    Model("Wan 14B", None, "WanTransformer3DModel", {}, "wan.model:WanModel", {
        "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}, claims=("wan",)),
    Model("Wan 14B", None, "WanTransformer3DModel", {
        "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}, "wan.model:WanModel", {
        "model_type": "i2v", "in_dim": 36, "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}),
    Model("Wan 1.3B", None, "WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
          "wan.model:WanModel", {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}),
    Model("Wan 2.2 5B", None, "WanTransformer3DModel", {
        "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
        "wan.model:WanModel", {
        "dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "in_dim": 48, "out_dim": 48}),
    Model("Wan 14B", None, "WanVACETransformer3DModel"),
    Model("LTX-Video 2B", None, "LTXVideoTransformer3DModel", {}, "lightricks.model:LTXVModel"),
    Model("LTX-Video 13B", None, "LTXVideoTransformer3DModel", {
        "attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}, "lightricks.model:LTXVModel", {
        "attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}),
    Model("LTX-2", None, "LTX2VideoTransformer3DModel", {}, "lightricks.av_model:LTXAVModel"),
    Model("Cosmos-Predict2 2B", comfyui="cosmos.predict2:MiniTrainDIT", comfyui_config=COSMOS_PREDICT2),
    Model("Anima", comfyui="anima.model:Anima", comfyui_config=COSMOS_PREDICT2),
    Model("OmniGen2", comfyui="omnigen.omnigen2:OmniGen2Transformer2DModel", comfyui_config=OMNIGEN2),
    Model("Boogu", comfyui="boogu.model:BooguTransformer2DModel"),
    Model("Kandinsky 5 Lite", None, "Kandinsky5Transformer3DModel", {}, "kandinsky5.model:Kandinsky5"),
    Model("Kandinsky 5 Image", None, "Kandinsky5Transformer3DModel", {
        "model_dim": 2560, "ff_dim": 10240, "num_visual_blocks": 50}, "kandinsky5.model:Kandinsky5", {
        "model_dim": 2560, "ff_dim": 10240, "num_visual_blocks": 50}),
    Model("Kandinsky 5 Pro", None, "Kandinsky5Transformer3DModel", {
        "model_dim": 4096, "ff_dim": 16384, "num_text_blocks": 4, "num_visual_blocks": 60, "time_dim": 1024},
        "kandinsky5.model:Kandinsky5", {
        "model_dim": 4096, "ff_dim": 16384, "num_text_blocks": 4, "num_visual_blocks": 60, "time_dim": 1024}),
    Model("Lens", comfyui="lens.model:LensTransformer2DModel"),
    Model("Mage-Flow", comfyui="mage_flow.model:MageFlowTransformer2DModel"),
    Model("JoyImage", None, "JoyImageEditTransformer3DModel", {}, "joyimage.model:JoyImageTransformer3DModel"),
    Model("ACE-Step", comfyui="ace.model:ACEStepTransformer2DModel"),
    Model("ACE-Step 1.5", None, "AceStepTransformer1DModel"),
    Model("AuraFlow", None, "AuraFlowTransformer2DModel", {}, "aura.mmdit:MMDiT"),
    Model("PixArt", None, "PixArtTransformer2DModel", {"cross_attention_dim": 1152, "caption_channels": 4096}),
    Model("Sana 1.6B", None, "SanaTransformer2DModel"),
    Model("Sana 4.8B", None, "SanaTransformer2DModel", {"num_layers": 60}),
    Model("Sana 0.6B", None, "SanaTransformer2DModel", {
        "num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
        "cross_attention_dim": 1152}),
    Model("CogView3-Plus", None, "CogView3PlusTransformer2DModel"),
    Model("CogView4", None, "CogView4Transformer2DModel", {
        "num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128}),
    Model("GLM-Image", None, "GlmImageTransformer2DModel", {
        "num_layers": 30, "num_attention_heads": 32, "attention_head_dim": 128}),
    Model("CogVideoX 2B", None, "CogVideoXTransformer3DModel"),
    Model("CogVideoX 5B", None, "CogVideoXTransformer3DModel", {"num_layers": 42, "num_attention_heads": 48}),
    Model("Mochi", None, "MochiTransformer3DModel"),
    Model("Cosmos 1", None, "CosmosTransformer3DModel"),
    Model("Bria", None, "BriaTransformer2DModel"),
    Model("Bria FIBO", None, "BriaFiboTransformer2DModel"),
    Model("Bria FIBO 2", None, "BriaFibo2Transformer2DModel"),
    Model("Ovis-Image", None, "OvisImageTransformer2DModel"),
    Model("PRX", None, "PRXTransformer2DModel"),
    Model("Allegro", None, "AllegroTransformer3DModel"),
    Model("SkyReels 2", None, "SkyReelsV2Transformer3DModel"),
    Model("Nucleus", None, "NucleusMoEImageTransformer2DModel"),
    Model("MotifVideo", None, "MotifVideoTransformer3DModel"),
    Model("MiniMax H3", None, "MiniMaxH3Transformer3DModel"),
)  # fmt: skip
TEXT_ENCODERS = {
    "clip_l": ("CLIPTextModel", "CLIPTextConfig", {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}),
    "clip_g": ("CLIPTextModelWithProjection", "CLIPTextConfig", {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
        "projection_dim": 1280}),
    "clip_h": ("CLIPTextModel", "CLIPTextConfig", {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}),
    "t5xxl": ("T5EncoderModel", "T5Config", {
        "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}),
}  # fmt: skip


def weights(module: torch.nn.Module) -> Rows:
    """The rows of all modules that have a weight."""
    state = module.state_dict()
    paths = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
    return {path: (*state[f"{path}.weight"].shape, *[BIAS] * (f"{path}.bias" in state)) for path in paths}


def from_diffusers(model: Model) -> Rows:
    """The rows of diffusers' network, or of this project's for a family that diffusers doesn't have."""
    import diffusers

    if model.diffusers is None:
        return weights(FAMILIES[model.family or ""].build_empty("denoiser", dict(model.config)))

    with torch.device("meta"):
        return weights(getattr(diffusers, model.diffusers or "")(**model.config))


def from_comfyui(model: Model) -> Rows:
    import_module("comfy.cli_args").args.cpu = True
    operations = import_module("comfy.ops").disable_weight_init
    module, _, name = (model.comfyui or "").partition(":")
    build = getattr(import_module(f"comfy.ldm.{module}"), name)
    options = {"device": torch.device("meta"), "dtype": torch.bfloat16, "operations": operations}
    return weights(build(**model.comfyui_config, **options))


def original(family: str, rows: Rows) -> Rows:
    """The modules under the original model's names, from diffusers': where the original joins several, rows are added."""
    joined: Rows = {}
    for path, (outputs, *others) in rows.items():
        name = NAME_TABLES[family].of_diffusers(path).original
        joined[name] = (joined[name][0] + outputs if name in joined else outputs, *others)  # pyright: ignore[reportOperatorIssue]
    return joined


def from_transformers(name: str) -> Rows:
    import transformers

    model, config, sizes = TEXT_ENCODERS[name]
    with torch.device("meta"):
        shapes = weights(getattr(transformers, model)(getattr(transformers, config)(**sizes)))
    return {path: shape for path, shape in shapes.items() if path != "encoder.embed_tokens"}


def compact(rows: Rows) -> dict[str, list[int | str]]:
    """The table with a path for each run of numbers: `blocks.0.q` to `blocks.3.q` of one shape are `blocks.0-3.q`."""
    table = dict(rows)
    positions = max(path.count(".") for path in table) + 1
    for position in range(positions):
        groups: dict[tuple, list[int]] = defaultdict(list)
        kept = {}
        for path, shape in table.items():
            words = path.split(".")
            if position < len(words) and words[position].isdigit():
                groups[(*words[:position],), (*words[position + 1 :],), shape].append(int(words[position]))
            else:
                kept[path] = shape
        for (before, after, shape), numbers in groups.items():
            for first, last in runs(numbers):
                kept[".".join([*before, f"{first}-{last}" if last > first else str(first), *after])] = shape
        table = kept
    return {path: list(table[path]) for path in sorted(table)}


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The runs of following numbers: 0, 1, 2, 5 are (0, 2) and (5, 5)."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def whole(table: Mapping[str, list[int | str]]) -> Shapes:
    """The shape of each module's weight in a table as it is after `compact`."""
    return {path: tuple(number for number in row if isinstance(number, int)) for path, row in expanded(table).items()}


def biased(table: Mapping[str, list[int | str]]) -> set[str]:
    """The paths of the modules with a bias in a table as it is after `compact`."""
    return {path for path, row in expanded(table).items() if row[-1] == BIAS}


def expanded(table: Mapping[str, list[int | str]]) -> Rows:
    """The table with a path for each module, as it was before `compact`."""

    def words(path: str) -> Iterator[str]:
        options = []
        for word in path.split("."):
            first, _, last = word.partition("-")
            is_run = first.isdecimal() and last.isdecimal() and int(first) < int(last)
            options.append([str(n) for n in range(int(first), int(last) + 1)] if is_run else [word])
        return map(".".join, itertools.product(*options))

    return {path: tuple(row) for run, row in table.items() for path in words(run)}


def entry(model: Model) -> dict[str, Any]:
    named: dict[str, Rows] = {}
    if model.diffusers or model.family:
        named["diffusers"] = from_diffusers(model)
    if naming := model.family or model.like:
        named["original"] = original(naming, named["diffusers"])
    elif model.comfyui:
        named["original"] = from_comfyui(model)
    print(f"{model.title:<24} {', '.join(f'{names}: {len(shapes)}' for names, shapes in named.items())}", flush=True)
    values = {"title": model.title, "family": model.family, "text": model.text, "claims": model.claims}
    values |= {"control": model.control} if model.control else {}
    return values | {"denoiser": {names: compact(shapes) for names, shapes in named.items()}}


def main() -> None:
    versions = f"diffusers {importlib.metadata.version('diffusers')} and ComfyUI {comfyui_version()}"
    text = {name: compact(from_transformers(name)) for name in TEXT_ENCODERS}
    tables = {"made_by": f"tools/model_tables.py, with {versions}", "text_encoders": text}
    models = [entry(model) for model in MODELS]
    lines = [json.dumps(model, separators=(",", ":")) for model in models]
    head = json.dumps(tables, separators=(",", ":"))[:-1]
    OUTPUT.write_text(head + ',"models":[\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
    print(f"{OUTPUT.stat().st_size} bytes")


def comfyui_version() -> str:
    return import_module("comfyui_version").__version__


if __name__ == "__main__":
    main()
