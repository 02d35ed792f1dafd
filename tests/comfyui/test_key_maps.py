"""What we say that ComfyUI loads, name by name, against ComfyUI's own maps of names, for every published model of a family."""

import json
import re

import pytest

from core.lora.readers import read_by
from core.tensor_names import NAME_TABLES
from tests.lora.test_damaged_names import Named
from tools.model_tables import OUTPUT, whole

from .scripts import printed_by

pytestmark = pytest.mark.slow

TABLES = json.loads(OUTPUT.read_text())
MODELS = {
    model["title"]: model
    for model in TABLES["models"]
    if model["family"] and NAME_TABLES[model["family"]].loaded.comfyui
}
"""Those that ComfyUI 0.30 has."""
PREFIXES = (
    "lora_unet_", "lora_unet__", "oft_unet_", "lora_transformer_", "lycoris_", "unet.base_model.model.",
    "base_model.model.", "unet.", "transformer.", "diffusion_model.", "",
)  # fmt: skip
TEXT_PREFIXES = (
    "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "text_encoder.", "text_encoder_2.", "text_encoder_3.",
    *(f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "clip_h", "t5xxl")),
)  # fmt: skip


# What ComfyUI's maps have beyond what a file for the family is made of, as a family and a name.
BEYOND = (
    # Tensors, where a file has names of modules.
    r".+\.bias", r"sd3 diffusion_model\.pos_embed", r"zimage diffusion_model\.(cap|x)_pad_token",
    r"krea2 diffusion_model\.(blocks\.\d+\.mod|last\.modulation)\.lin",
    # A projection that these text encoders lack in the published models.
    r"\S+ (lora_te1_|lora_prior_te_|text_encoders\.clip_[lh]\.transformer\.)text_projection",
    # T5 without its name.
    r"\S+ text_encoders\.transformer\..+",
    # Names of related models: FLUX.2, LongCat-Image and FLUX.1 share a map, so do Z-Image and Lumina 2.
    r"(flux1|chroma|longcat-image) .*transformer_blocks.+(linear_in|linear_out|to_qkv_mlp_proj)",
    r"(flux1|chroma|longcat-image) .*single_transformer_blocks[._]\d+[._]attn[._]to_out", r"longcat-image .*time_text_embed.+",
    r"flux2 .*(transformer_blocks[._]\d+[._]((attn[._]to_[qkv]|proj_mlp|proj_out)|ff(_context)?[._]net.+)|time_text_embed.+)",
    r"lumina2 (diffusion_model\.(.+\.attention\.(norm_[qk]|to_.+)|all_.+)|(?!diffusion_model|lora_unet).+)",
    # Not in diffusers' model of SDXL, and an output that diffusers gives a number.
    r"sdxl (lora_unet_|lycoris_|unet\.|)class_embedding[._]linear_[12]", r"krea2 .+attn[._]to_out",
)  # fmt: skip


def is_said_to_load(family: str, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a file with a whole difference of that weight alone is said to load in ComfyUI."""
    types = {f"{name}.diff": ("float16", shape)}
    return read_by("ComfyUI", Named(family, types, {})).verdict == "loads"


def is_said_to_load_a_bias(family: str, name: str, outputs: int) -> bool:
    """Whether a file with a difference of that module's bias alone is said to load in ComfyUI."""
    lora = Named(family, {f"{name}.diff_b": ("float16", (outputs,))}, {})
    return family in lora.identity.families and read_by("ComfyUI", lora).verdict == "loads"


def names_of(model: dict) -> dict[str, tuple[int, ...]]:
    """The names of a model's modules in every naming, those included that belong to other models, and their shapes."""
    tables = [(PREFIXES, whole(table)) for table in model["denoiser"].values()]
    tables += [(TEXT_PREFIXES, whole(TABLES["text_encoders"][name])) for name in model["text"]]
    return {
        prefix + (path.replace(".", "_") if prefix.endswith("_") else path): shape
        for prefixes, table in tables
        for prefix in prefixes
        for path, shape in table.items()
    }


@pytest.fixture(scope="module")
def key_maps() -> dict[str, dict[str, tuple[int, ...]]]:
    maps = json.loads(printed_by("key_maps.py").splitlines()[-1])
    return {title: {name: tuple(shape) for name, shape in names.items()} for title, names in maps.items()}


@pytest.mark.parametrize("title", MODELS)
def test_exactly_the_names_in_comfyuis_own_map_are_said_to_load(key_maps, title):
    model, known = MODELS[title], key_maps[title]
    asked = names_of(model) | known
    said = {name for name, shape in asked.items() if is_said_to_load(model["family"], name, shape)}
    beyond = {name for name in known if re.fullmatch("|".join(BEYOND), f"{model['family']} {name}")}
    assert sorted(said - known.keys()) == []
    assert sorted(known.keys() - said - beyond) == []
    assert len(said) >= 700
    own = said & {f"diffusion_model.{path}" for path in whole(model["denoiser"]["original"])}
    assert {name for name in own if is_said_to_load_a_bias(model["family"], name, asked[name][0])} == {
        name for name in own if f"{name}.bias" in known
    }
