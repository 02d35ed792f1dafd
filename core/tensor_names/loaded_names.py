"""What other programs load of each family's LoRAs: the differences between their names, by family.

core/lora/readers.py uses it and lists the programs' versions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .signs import Sign


@dataclass(frozen=True)
class LoadedNames:
    """The LoRA names of a family that other programs load."""

    comfyui: frozenset[tuple[str, str]] = frozenset()
    """The denoiser's names that ComfyUI loads: (scheme, "original" or "diffusers" paths). Empty if it lacks the family."""
    comfyui_later: frozenset[tuple[str, str]] = frozenset()
    """Those that a later ComfyUI loads, by what its users report, if the tested one lacks the family."""
    diffusers: frozenset[str] = frozenset()
    """The schemes that diffusers' pipelines load."""
    diffusers_paths: Mapping[str, str] = field(default_factory=dict)
    """Whose paths ("original" or "diffusers") the denoiser's names must have in diffusers' pipelines, by scheme.

    Names in the scheme `diffusers` always have its own paths. Other schemes may have both if they are not listed."""
    comfyui_t5: tuple[str, ...] = ()
    """The prefixes of Kohya's names of T5 that ComfyUI loads."""
    comfyui_lacks: str = r"$^"
    """A regular expression for the paths that are missing in ComfyUI's table of diffusers' names."""
    diffusers_forms: Mapping[str, str] = field(default_factory=dict)
    """The forms of tensors' names that diffusers loads, by scheme, where they differ from `readers.FORMS`."""
    diffusers_text_forms: Mapping[str, str] = field(default_factory=dict)
    """The forms of text encoders' names that diffusers loads, by scheme, where they differ from `readers.TEXT_FORMS`."""
    diffusers_lacks: Mapping[str, str] = field(default_factory=dict)
    """A regular expression, by scheme, for the paths that diffusers doesn't load because it misreads their names."""
    diffusers_refuses: Mapping[str, str] = field(default_factory=dict)
    """A regular expression, by scheme. If a path of the denoiser matches, diffusers refuses the whole file."""
    diffusers_blocks: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    """The modules that diffusers expects in every block, by scheme and stack of blocks, if it refuses a file without them."""
    diffusers_linear: tuple[str, ...] = ()
    """The ends of the denoiser's paths that are Linear in diffusers. It refuses a file that has convolutions there."""
    diffusers_lokr: frozenset[tuple[str, str]] = frozenset()
    """The names of LoKr files that diffusers' pipelines load, as in `comfyui`."""
    diffusers_lokr_with_alpha: frozenset[str] = frozenset()
    """The schemes of LoKr files that diffusers loads only when they have an alpha."""
    sd_scripts: str | None = None
    """A regular expression for the denoiser's paths in Kohya names that sd-scripts loads; None if it lacks the family."""
    invokeai: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """A regular expression, by names as in `comfyui`, for the denoiser's paths that InvokeAI loads. Empty if it lacks it."""
    invokeai_forms: Mapping[str, str] = field(default_factory=dict)
    """The forms of tensors' names that InvokeAI loads, by scheme, where they differ from `readers.INVOKEAI_FORMS`."""
    invokeai_text: tuple[str, ...] = ()
    """The prefixes of the text encoders' module names that InvokeAI loads."""
    invokeai_prefixes: Mapping[str, str] = field(default_factory=dict)
    """The Kohya prefixes, by part, that InvokeAI loads instead of those in `NameTable.kohya_prefixes`."""
    invokeai_skips: frozenset[str] = frozenset()
    """The schemes whose unknown names InvokeAI skips. In other schemes, it refuses the whole file."""
    invokeai_signs: tuple[tuple[Sign, ...], ...] = ()
    """The modules that InvokeAI recognises a file by: all signs of one group must match. If empty, only the names matter."""
    invokeai_signs_in: Mapping[str, tuple[tuple[Sign, ...], ...]] = field(default_factory=dict)
    """More groups of signs, by the scheme of the file's names."""

    others: Mapping[str, str] = field(default_factory=dict)
    """The schemes that programs in `readers.OTHERS` load, with a "+" if CLIP's names too. Of others, nothing is known."""
    others_lack: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """A regular expression, by program and scheme, for the denoiser's paths that the program does not load."""


UNET_IN_COMFYUI = frozenset(
    {("kohya", "diffusers"), ("kohya", "original"), ("comfy", "original"), ("lycoris", "diffusers")}
)
"""The names of UNets that ComfyUI loads, as in `LoadedNames.comfyui`."""
TRANSFORMER_IN_COMFYUI = frozenset(
    {("kohya", "original"), ("comfy", "original"), ("diffusers", "diffusers"), ("lycoris", "diffusers")}
)
"""The names that ComfyUI loads for every transformer, as in `LoadedNames.comfyui`; families may add more."""


_ALL_SCHEMES = "kohya diffusers comfy"
_ALL_FORMS = "lora_A lora_A+ lora_down lora_down+ named named+"
_ALL_FORMS_WHOLE = "lora_A lora_A+~ lora_down lora_down+ named named+~"

_UNET_IN_OTHERS = {
    "A1111": "kohya+", "Forge": "kohya+", "SD.Next": "kohya+", "stable-diffusion.cpp": "kohya+ diffusers comfy",
    "OneTrainer": "kohya+ diffusers+ comfy+",
}  # fmt: skip
"""The schemes that programs load for both SD1.5 and SDXL, as in `LoadedNames.others`."""


def _invokeai_signs(context_width: int) -> tuple[tuple[Sign, ...], ...]:
    return ((Sign(r"attn2\.to_[kv]$", frozenset({context_width})),), (Sign(r"self_attn\.", part="text_encoder"),))


SD15 = LoadedNames(
    UNET_IN_COMFYUI,
    diffusers=frozenset({"kohya", "diffusers"}),
    diffusers_paths={"kohya": "diffusers"},
    sd_scripts=r"\.(attentions|resnets|downsamplers|upsamplers)\.",
    invokeai={("kohya", "diffusers"): ""},
    invokeai_text=("lora_te_text_model_",),
    invokeai_skips=frozenset({"kohya"}),
    invokeai_signs=_invokeai_signs(768),
    others=_UNET_IN_OTHERS | {"ai-toolkit": "kohya"},
)

SD2 = replace(
    SD15,
    diffusers_linear=(".proj_in", ".proj_out"),
    invokeai_signs=_invokeai_signs(1024),
    others={"A1111": "kohya+", "SD.Next": "kohya+"},
)

SDXL = LoadedNames(
    UNET_IN_COMFYUI,
    diffusers=frozenset({"kohya", "diffusers"}),
    sd_scripts=r"^(input_blocks\.[1-9]\d*|middle_block|output_blocks)\.",
    invokeai={("kohya", "original"): "", ("kohya", "diffusers"): ""},
    invokeai_text=("lora_te1_text_model_", "lora_te2_text_model_"),
    invokeai_signs=((Sign(r"attn2\.to_[kv]$", frozenset({2048})),), (Sign(r"\.transformer_blocks\.[2-9]\."),)),
    others=_UNET_IN_OTHERS,
)

SD3 = LoadedNames(
    TRANSFORMER_IN_COMFYUI | {("peft", "diffusers"), ("onetrainer", "diffusers")},
    comfyui_t5=("lora_te3_",),
    diffusers=frozenset({"diffusers"}),
    sd_scripts=r"^joint_blocks\.",
    others={
        "Forge": "kohya comfy",
        "stable-diffusion.cpp": "diffusers comfy",
        "OneTrainer": "diffusers",
        "ai-toolkit": "diffusers",
    },
)

_FLUX_IN_COMFYUI = TRANSFORMER_IN_COMFYUI | {("onetrainer", "diffusers"), ("bare", "diffusers")}
_ORIGINAL_BLOCKS, _DIFFUSERS_BLOCKS = r"^(double|single)_blocks\.", r"^(single_)?transformer_blocks\."
FLUX1 = LoadedNames(
    _FLUX_IN_COMFYUI,
    comfyui_t5=("lora_te2_", "lora_te3_"),
    diffusers=frozenset({"kohya", "diffusers", "comfy", "xlabs"}),
    diffusers_paths={"kohya": "original", "comfy": "original"},
    # diffusers takes comfy names that end as in files of ComfyUI's own trainer for sd-scripts' names.
    diffusers_forms={"diffusers": "lora_A lora_A+ lora lora+ lora_down lora_down+~", "comfy": "lora_down lora_down+"},
    diffusers_text_forms={
        "diffusers": "lora_A lora_A+ lora_linear_layer lora_linear_layer+",
        "comfy": "lora_down lora_down+",
    },
    diffusers_lacks=dict.fromkeys(("kohya", "comfy"), r"^((time|guidance|vector|txt|img)_in|final_layer)\b"),
    sd_scripts=_ORIGINAL_BLOCKS,
    invokeai={
        ("kohya", "original"): _ORIGINAL_BLOCKS,
        ("comfy", "original"): "",
        ("diffusers", "diffusers"): _DIFFUSERS_BLOCKS,
        ("peft", "diffusers"): _DIFFUSERS_BLOCKS,
        ("xlabs", "original"): r"^double_blocks\.",
    },
    invokeai_text=("lora_te1_text_model_", "lora_te2_encoder_block_"),
    invokeai_prefixes={"text_encoder_2": "lora_te2_"},
    others={
        "Forge": "kohya+ diffusers+ comfy+",
        "SD.Next": "kohya",
        "stable-diffusion.cpp": "kohya+ diffusers+ comfy+",
        "mflux": "diffusers",
        "OneTrainer": "diffusers+",
        "ai-toolkit": "diffusers",
    },
    others_lack={("SD.Next", "kohya"): r"^(?!double_blocks|single_blocks)"},
)

CHROMA = LoadedNames(
    _FLUX_IN_COMFYUI,
    diffusers=FLUX1.diffusers,
    diffusers_paths=FLUX1.diffusers_paths,
    diffusers_forms=FLUX1.diffusers_forms,
    diffusers_lacks=dict.fromkeys(("kohya", "comfy"), r"^((txt|img)_in|final_layer)\b"),
    diffusers_refuses=dict.fromkeys(("kohya", "comfy"), r"^distilled_guidance_layer\."),
    comfyui_t5=("lora_te1_",),
    comfyui_lacks=r"^distilled_guidance_layer\.",
    sd_scripts=_ORIGINAL_BLOCKS,
    others=dict.fromkeys(("SD.Next", "stable-diffusion.cpp"), _ALL_SCHEMES)
    | {"Forge": "kohya comfy", "OneTrainer": "diffusers", "ai-toolkit": "comfy"},
    others_lack={("OneTrainer", "diffusers"): r"^(?!transformer_blocks|single_transformer_blocks)"},
)

# In diffusers only the denoiser loads LoRAs, the pipeline doesn't.
LONGCAT_IMAGE = LoadedNames(
    _FLUX_IN_COMFYUI, comfyui_lacks=r"^time_embed\.", others={"stable-diffusion.cpp": _ALL_SCHEMES}
)

FLUX2 = LoadedNames(
    _FLUX_IN_COMFYUI,
    diffusers=frozenset({"kohya", "diffusers", "comfy", "peft"}),
    diffusers_paths={"kohya": "original"},
    diffusers_forms={"comfy": "lora_A"},
    diffusers_lacks={
        "kohya": r"^(guidance_in|(double|single)_stream_modulation(_img|_txt)?|final_layer\.adaLN_modulation)\."
    },
    invokeai={
        ("kohya", "original"): _ORIGINAL_BLOCKS,
        ("comfy", "original"): _ORIGINAL_BLOCKS,
        ("diffusers", "diffusers"): "",
        ("peft", "diffusers"): "",
        ("bare", "diffusers"): "",
    },
    invokeai_skips=frozenset({"comfy"}),
    # The smallest FLUX.2 is as wide as FLUX.1. The rows of another layer tell them apart.
    invokeai_signs=(
        (Sign(r"^double_blocks\.\d+\.img_attn\.proj$", frozenset({4096, 6144})),),
        (
            Sign(r"^double_blocks\.\d+\.img_attn\.proj$", frozenset({3072})),
            Sign(r"^double_blocks\.\d+\.img_mlp\.0$", frozenset({3072}), ratio=6),
        ),
        (Sign(r"^(single_transformer_blocks\.0\.attn\.to_qkv_mlp_proj|transformer_blocks\.0\.ff\.linear_in)$"),),
        (Sign(r"^context_embedder$"),),
    ),
    comfyui_lacks=r"^(double_stream_modulation_|single_stream_modulation\.|time_guidance_embed\.)",
    diffusers_lokr=frozenset(
        {
            ("comfy", "original"),
            ("peft", "original"),
            ("bare", "diffusers"),
            ("lycoris", "diffusers"),
            ("diffusers", "diffusers"),
        }
    ),
    others={
        "SD.Next": _ALL_SCHEMES,
        "stable-diffusion.cpp": "kohya comfy",
        "mflux": "diffusers",
        "OneTrainer": "diffusers",
        "ai-toolkit": "comfy",
        "musubi-tuner": "kohya",
    },
)

FLUX3 = LoadedNames(
    diffusers=frozenset({"diffusers", "comfy"}),
    diffusers_lacks={"comfy": r"^(emb_in|txt_in|(ref_)?time_in|(early|single)_stream_modulations|final_layer)\b"},
)

_LUMINA2_REFINER = ("attention.qkv", "attention.out", *(f"feed_forward.w{n}" for n in (1, 2, 3)))
_LUMINA2_LAYER = (*_LUMINA2_REFINER, "adaLN_modulation.1")
# ComfyUI uses Z-Image's table of diffusers names for Lumina 2 too. It misses the attention, whose name differs.
LUMINA2 = LoadedNames(
    frozenset({("kohya", "original"), ("comfy", "original")}),
    diffusers=frozenset({"diffusers", "comfy"}),
    diffusers_forms={"comfy": "lora_A"},
    diffusers_blocks={
        "comfy": {"layers": _LUMINA2_LAYER, "noise_refiner": _LUMINA2_LAYER, "context_refiner": _LUMINA2_REFINER}
    },
    diffusers_refuses={"comfy": r"^([xt]_embedder|cap_embedder|final_layer)\b"},
    sd_scripts=r"^(layers|noise_refiner|context_refiner|final_layer)\.",
)

ZIMAGE = LoadedNames(
    TRANSFORMER_IN_COMFYUI | {("comfy", "diffusers"), ("bare", "diffusers")},
    diffusers=frozenset({"kohya", "diffusers", "comfy"}),
    diffusers_forms={
        "kohya": "lora_down lora_down+ lora lora+",
        "comfy": "lora_A lora_A+ lora_down lora_down+ lora lora+ named named+",
        "diffusers": "lora_A lora",
    },
    diffusers_lacks={"kohya": r"^(x_embedder|final_layer)\b"},
    diffusers_lokr=frozenset({("comfy", "diffusers"), ("bare", "diffusers"), ("diffusers", "diffusers")}),
    diffusers_lokr_with_alpha=frozenset({"bare"}),
    invokeai={("diffusers", "diffusers"): "", ("comfy", "diffusers"): ""},
    invokeai_forms=dict.fromkeys(("diffusers", "comfy"), _ALL_FORMS_WHOLE),
    others=dict.fromkeys(("SD.Next", "stable-diffusion.cpp", "mflux", "musubi-tuner"), _ALL_SCHEMES)
    | {"OneTrainer": "diffusers comfy", "ai-toolkit": "diffusers comfy"},
    others_lack={
        ("stable-diffusion.cpp", "kohya"): r"feed_forward",
        ("mflux", "kohya"): r"attention",
        ("musubi-tuner", "kohya"): r"attention",
    },
)

_QWEN_FORMS = {"kohya": _ALL_FORMS, "comfy": _ALL_FORMS, "diffusers": "lora_A lora"}
QWEN_IMAGE = LoadedNames(
    TRANSFORMER_IN_COMFYUI | {("bare", "diffusers"), ("kohya", "diffusers"), ("comfy", "diffusers")},
    diffusers=frozenset({"kohya", "diffusers", "comfy"}),
    diffusers_forms=_QWEN_FORMS,
    invokeai={
        ("kohya", "diffusers"): r"^transformer_blocks\.",
        ("diffusers", "diffusers"): "",
        ("bare", "diffusers"): "",
    },
    invokeai_forms=dict.fromkeys(("diffusers", "bare"), _ALL_FORMS_WHOLE),
    invokeai_skips=frozenset({"kohya"}),
    others=dict.fromkeys(("SD.Next", "stable-diffusion.cpp", "OneTrainer"), _ALL_SCHEMES)
    | {"mflux": "kohya comfy", "ai-toolkit": "diffusers comfy", "musubi-tuner": "kohya"},
)

QWEN_IMAGE_21 = LoadedNames(
    diffusers=frozenset({"kohya", "diffusers", "comfy"}),
    diffusers_forms=_QWEN_FORMS,
    diffusers_lacks={"kohya": r"gate_(layer|up)$"},
    diffusers_refuses={"kohya": r"^(txt_in|modulation)\."},
)

_NO_NORM = r"^(?!.*norm)"
KREA2 = LoadedNames(
    TRANSFORMER_IN_COMFYUI | {("comfy", "diffusers"), ("bare", "diffusers")},
    diffusers=frozenset({"diffusers", "comfy"}),
    diffusers_paths={"comfy": "original"},
    diffusers_forms={"comfy": "lora_A"},
    comfyui_lacks="norm",
    invokeai={
        **{(scheme, "original"): _NO_NORM for scheme in ("kohya", "invokeai", "comfy")},
        **{(scheme, "diffusers"): _NO_NORM for scheme in ("diffusers", "bare")},
    },
    invokeai_forms=dict.fromkeys(("kohya", "invokeai", "comfy", "diffusers", "bare"), _ALL_FORMS),
    invokeai_signs=((Sign(r"^(txtfusion|text_fusion)\.|^time_mod_proj$"),),),
    invokeai_signs_in={"comfy": ((Sign(r"\.attn\.wq$"), Sign(r"\.attn\.gate$")),)},
    others=dict.fromkeys(("SD.Next", "stable-diffusion.cpp", "mflux", "OneTrainer"), _ALL_SCHEMES)
    | {"ai-toolkit": "comfy", "musubi-tuner": "kohya comfy"},
)

ERNIE_IMAGE = LoadedNames(
    frozenset({("kohya", "diffusers"), ("comfy", "diffusers"), ("diffusers", "diffusers")}),
    diffusers=frozenset({"diffusers", "comfy", "peft"}),
    others=dict.fromkeys(("SD.Next", "mflux"), _ALL_SCHEMES)
    | {"stable-diffusion.cpp": "diffusers comfy", "ai-toolkit": "comfy"},
)

_IDEOGRAM4_LAYERS = r"layers\.\d+\.(attention\.(qkv|o)|feed_forward\.w[123]|adaln_modulation)"
_IDEOGRAM4_ENDS = r"(input_proj|adaln_proj|final_layer\.linear)$"
IDEOGRAM4 = LoadedNames(
    frozenset({("kohya", "original"), ("comfy", "original")}),
    diffusers=frozenset({"diffusers", "comfy"}),
    diffusers_forms={"comfy": "lora_A lora_A+ lora_down lora_down+"},
    # diffusers refuses the whole file if it has any other module.
    diffusers_refuses={"comfy": rf"^(?!{_IDEOGRAM4_LAYERS}$)"},
    others={"mflux": _ALL_SCHEMES, "musubi-tuner": "kohya"},
    others_lack={
        ("mflux", "kohya"): r"^(?!layers\.\d+\.adaln_modulation$)",
        ("mflux", "diffusers"): rf"attention|^(?!{_IDEOGRAM4_LAYERS}$|{_IDEOGRAM4_ENDS})",
        ("mflux", "comfy"): rf"^(?!{_IDEOGRAM4_LAYERS}$|{_IDEOGRAM4_ENDS})",
    },
)
