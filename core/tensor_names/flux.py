"""Names of FLUX.1, Chroma, LongCat-Image, FLUX.2 and FLUX.3: blocks with separate image and text streams, then joint blocks."""

from . import loaded_names
from .signs import Sign, clip_signs
from .table import Fusion, Listing, NameTable, by_rules

_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
_SINGLE_QKV = tuple(f"{_SINGLE}.attn.to_{x}" for x in "qkv")
_QKV = (1, 1, 1)

_ATTENTION = (
    Fusion("double_blocks.{}.img_attn.qkv", tuple(f"{_DOUBLE}.attn.to_{x}" for x in "qkv"), _QKV),
    Fusion("double_blocks.{}.txt_attn.qkv", tuple(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv"), _QKV),
    Fusion("double_blocks.{}.img_attn.proj", (f"{_DOUBLE}.attn.to_out.0",)),
    Fusion("double_blocks.{}.txt_attn.proj", (f"{_DOUBLE}.attn.to_add_out",)),
    *(
        Fusion(f"{block}.norm.{original}_norm", (f"{new_block}.attn.norm_{added}{original[0]}",))
        for block, new_block, added in (
            ("double_blocks.{}.img_attn", _DOUBLE, ""),
            ("double_blocks.{}.txt_attn", _DOUBLE, "added_"),
            ("single_blocks.{}", _SINGLE, ""),
        )
        for original in ("query", "key")
    ),
)
_ENDS = (
    Fusion("img_in", ("x_embedder",)),
    Fusion("txt_in", ("context_embedder",)),
    Fusion("final_layer.linear", ("proj_out",)),
    Fusion("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves_swapped=True),
)


def _embedders(parent: str = "", **parts: str) -> tuple[Fusion, ...]:
    return tuple(
        Fusion(f"{original}.{layer}", (f"{parent}{part}.linear_{number}",))
        for original, part in parts.items()
        for number, layer in ((1, "in_layer"), (2, "out_layer"))
    )


_BLOCKS_1 = (
    *_ATTENTION,
    Fusion("double_blocks.{}.img_mlp.0", (f"{_DOUBLE}.ff.net.0.proj",)),
    Fusion("double_blocks.{}.img_mlp.2", (f"{_DOUBLE}.ff.net.2",)),
    Fusion("double_blocks.{}.txt_mlp.0", (f"{_DOUBLE}.ff_context.net.0.proj",)),
    Fusion("double_blocks.{}.txt_mlp.2", (f"{_DOUBLE}.ff_context.net.2",)),
    Fusion("double_blocks.{}.img_mod.lin", (f"{_DOUBLE}.norm1.linear",)),
    Fusion("double_blocks.{}.txt_mod.lin", (f"{_DOUBLE}.norm1_context.linear",)),
    Fusion("single_blocks.{}.linear1", (*_SINGLE_QKV, f"{_SINGLE}.proj_mlp"), (*_QKV, 4)),
    # This rule must come after linear1's: its parts are written under the first matching name, linear1.
    Fusion("single_blocks.{}.linear1_qkv", _SINGLE_QKV, _QKV),
    Fusion("single_blocks.{}.linear2", (f"{_SINGLE}.proj_out",)),
    Fusion("single_blocks.{}.modulation.lin", (f"{_SINGLE}.norm.linear",)),
)
_RULES = by_rules(
    *_BLOCKS_1,
    *_embedders(
        "time_text_embed.", time_in="timestep_embedder", vector_in="text_embedder", guidance_in="guidance_embedder"
    ),
    # Only Chroma has these two modules.
    Fusion("distilled_guidance_layer.layers.{}.in_layer", ("distilled_guidance_layer.layers.{}.linear_1",)),
    Fusion("distilled_guidance_layer.layers.{}.out_layer", ("distilled_guidance_layer.layers.{}.linear_2",)),
    *_ENDS,
)
_RULES_LONGCAT = by_rules(*_BLOCKS_1, *_embedders("time_embed.", time_in="timestep_embedder"), *_ENDS)
_RULES_2 = by_rules(
    *_ATTENTION,
    Fusion("double_blocks.{}.img_mlp.0", (f"{_DOUBLE}.ff.linear_in",)),
    Fusion("double_blocks.{}.img_mlp.2", (f"{_DOUBLE}.ff.linear_out",)),
    Fusion("double_blocks.{}.txt_mlp.0", (f"{_DOUBLE}.ff_context.linear_in",)),
    Fusion("double_blocks.{}.txt_mlp.2", (f"{_DOUBLE}.ff_context.linear_out",)),
    Fusion("single_blocks.{}.linear1", (f"{_SINGLE}.attn.to_qkv_mlp_proj",)),
    Fusion("single_blocks.{}.linear2", (f"{_SINGLE}.attn.to_out",)),
    Fusion("double_stream_modulation_img.lin", ("double_stream_modulation_img.linear",)),
    Fusion("double_stream_modulation_txt.lin", ("double_stream_modulation_txt.linear",)),
    Fusion("single_stream_modulation.lin", ("single_stream_modulation.linear",)),
    *_embedders("time_guidance_embed.", time_in="timestep_embedder", guidance_in="guidance_embedder"),
    *_ENDS,
)
_RULES_3 = by_rules(
    *(
        Fusion(f"{original}.{name}", (f"{block}.{new_name}",))
        for original, block in (
            ("content_mode_blocks.image.{}", "mode_blocks.image.{}"),
            ("content_mode_blocks.image_cond.{}", "mode_blocks.image_cond.{}"),
            ("txt_mode_blocks.{}", "txt_mode_blocks.{}"),
            ("single_blocks.{}", _SINGLE),
        )
        for name, new_name in (
            *((f"{x}_proj", f"attn.to_{x}") for x in "qkv"),
            ("attn_out", "attn.to_out.0"),
            ("mlp_in", "ff.linear_in"),
            ("mlp_out", "ff.linear_out"),
            ("norm.query_norm", "attn.norm_q"),
            ("norm.key_norm", "attn.norm_k"),
        )
    ),
    *(
        Fusion(f"{kind}_stream_modulations.{of}.lin", (f"{kind}_stream_modulations.{of}.linear",))
        for kind in ("early", "single")
        for of in ("image", "image_cond", "txt")
    ),
    *(Fusion(f"emb_in.{of}", (f"x_embedders.{of}",)) for of in ("image", "image_cond")),
    Fusion("txt_in", ("context_embedder",)),
    *_embedders(time_in="timestep_embedder", ref_time_in="target_timestep_embedder"),
    Fusion("final_layer.image.linear", ("proj_out",)),
    Fusion("final_layer.image.adaLN_modulation.1", ("norm_out.linear",), halves_swapped=True),
)

_STRUCTURE = Sign(r"^(double_blocks|single_blocks|(single_)?transformer_blocks)\.\d+\.")
_DOUBLE_ATTENTION = r"^(double_blocks\.\d+\.(img|txt)_attn|transformer_blocks\.(\d|1[0-8])\.attn)\."
"""The attention of up to 19 double blocks. Qwen-Image has 60 blocks with the same name and width in diffusers."""
_WIDTH_1 = frozenset({3072})
_WIDTHS_2 = frozenset({3072, 4096, 6144})
"""The hidden widths of FLUX.2 klein 4B, klein 9B and dev."""
_SIGNS_1 = (
    _STRUCTURE,
    Sign(_DOUBLE_ATTENTION, _WIDTH_1),
    Sign(r"^single_blocks\.\d+\.linear1$", _WIDTH_1, ratio=7),
    Sign(r"^single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp)$", _WIDTH_1),
    Sign(r"^double_blocks\.\d+\.(img|txt)_mlp\.0$", _WIDTH_1, ratio=4),
    Sign(r"^transformer_blocks\.\d+\.ff(_context)?\.net\.0\.proj$", _WIDTH_1, ratio=4),
)
"""The signs of the blocks of FLUX.1 and Chroma."""

_DEV = "FLUX.1 [dev] Non-Commercial License"
FLUX1 = NameTable(
    name="flux1",
    base_versions=("flux1",),
    architecture="flux-1-dev",
    comfyui_classes=("Flux", "FluxSchnell"),
    a1111_version="Flux",
    signs=(
        *_SIGNS_1,
        # Chroma has no modulation layers.
        Sign(r"(mod|modulation)\.lin$|^(vector|guidance)_in\.", frozenset({256, 768, 3072})),
        Sign(r"^(single_)?transformer_blocks\.\d+\.norm(1|1_context)?\.linear$", _WIDTH_1),
        *clip_signs(768),
    ),
    **_RULES,
    listings={
        "FLUX.1": Listing(
            "Flux.1 D",
            _DEV,
            editions={
                "kontext": Listing("Flux.1 Kontext", _DEV),
                "krea": Listing("Flux.1 Krea", _DEV),
                "schnell": Listing("Flux.1 S", "Apache-2.0"),
            },
        )
    },
    loaded=loaded_names.FLUX1,
    kohya_prefixes={"denoiser": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"},
    comfy_prefixes={
        "denoiser": "diffusion_model.",
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.t5xxl.transformer.",
    },
    part_names={"text_encoder_3": "text_encoder_2"},
)
CHROMA = NameTable(
    name="chroma",
    base_versions=("chroma",),
    architecture="chroma",
    comfyui_classes=("Chroma",),
    signs=(*_SIGNS_1, Sign(r"^distilled_guidance_layer\.", frozenset({64, 5120}))),
    **_RULES,
    listings={"Chroma": Listing("Chroma", "Apache-2.0")},
    loaded=loaded_names.CHROMA,
    kohya_prefixes={"denoiser": "lora_unet_", "text_encoder": "lora_te1_"},
    comfy_prefixes={"denoiser": "diffusion_model.", "text_encoder": "text_encoders.t5xxl.transformer."},
    part_names={"text_encoder_2": "text_encoder", "text_encoder_3": "text_encoder"},
)
_BLOCKS_LONGCAT = r"^(double_blocks|transformer_blocks)\.\d\.|^single_(transformer_)?blocks\.1?\d\."
LONGCAT_IMAGE = NameTable(
    name="longcat-image",
    base_versions=("longcat_image",),
    architecture="longcat-image",
    comfyui_classes=("LongCatImage",),
    scheme="diffusers",
    signs=(
        _STRUCTURE,
        # It has 10 double and 20 single blocks with FLUX.1's names. These signs decide if no block has a higher number.
        *(Sign(f"(?={_BLOCKS_LONGCAT}){sign.path}", sign.inputs, sign.ratio) for sign in _SIGNS_1 if sign.decisive),
        Sign(rf"(?={_BLOCKS_LONGCAT}).*\.(((img|txt)_mod|modulation)\.lin|norm(1|1_context)?\.linear)$", _WIDTH_1),
        Sign(r"^((double|transformer)_blocks\.9|single_(transformer_)?blocks\.19)\.", _WIDTH_1),
        Sign(r"^(txt_in|context_embedder)$", frozenset({3584})),
    ),
    **_RULES_LONGCAT,
    # We don't know of an entry for it in Civitai's list.
    listings={"LongCat-Image": Listing("Other", "Apache-2.0")},
    loaded=loaded_names.LONGCAT_IMAGE,
)


def _klein(size: str, licence: str) -> Listing:
    words = {"ss_base_model_version": f"flux2_klein_{size}", "modelspec.architecture": f"flux.2-klein-{size}"}
    name = f"Flux.2 Klein {size.upper()}"
    return Listing(name, licence, words, {"base": Listing(f"{name}-base", licence)})


FLUX2 = NameTable(
    name="flux2",
    base_versions=("flux2",),
    architecture="flux.2-dev",
    comfyui_classes=("Flux2",),
    scheme="comfy",
    signs=(
        _STRUCTURE,
        Sign(_DOUBLE_ATTENTION, _WIDTHS_2),
        Sign(r"^single_blocks\.\d+\.linear1$", _WIDTHS_2, ratio=9),
        Sign(r"^single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj$", _WIDTHS_2, ratio=9),
        Sign(r"^double_blocks\.\d+\.(img|txt)_mlp\.0$", _WIDTHS_2, ratio=6),
        Sign(r"^transformer_blocks\.\d+\.ff(_context)?\.linear_in$", _WIDTHS_2, ratio=6),
        Sign(r"^(double_stream_modulation_(img|txt)|single_stream_modulation)\.", _WIDTHS_2),
    ),
    **_RULES_2,
    listings={
        "FLUX.2 dev": Listing("Flux.2 D", "FLUX Non-Commercial License"),
        "FLUX.2 klein 4B": _klein("4b", "Apache-2.0"),
        "FLUX.2 klein 9B": _klein("9b", "FLUX Non-Commercial License"),
    },
    loaded=loaded_names.FLUX2,
)
_BLOCKS_3 = r"((content_)?mode_blocks\.image(_cond)?|txt_mode_blocks|single_(transformer_)?blocks)\.\d+"
FLUX3 = NameTable(
    name="flux3",
    base_versions=("flux3",),
    architecture="flux-3-image-klein",
    scheme="comfy",
    signs=(
        Sign(rf"^{_BLOCKS_3}\."),
        Sign(rf"^{_BLOCKS_3}\.([qkv]_proj|attn_out|attn\.to_([qkv]|out\.0))$", _WIDTH_1, ratio=1),
        Sign(rf"^{_BLOCKS_3}\.(mlp_in|ff\.linear_in)$", _WIDTH_1, ratio=6),
        Sign(r"^(early|single)_stream_modulations\.", _WIDTH_1),
    ),
    **_RULES_3,
    # We don't know of an entry for it in Civitai's list.
    listings={"FLUX.3 Klein": Listing("Other", "FLUX Kommunity License")},
    loaded=loaded_names.FLUX3,
)
