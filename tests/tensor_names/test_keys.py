import json
import time
from pathlib import Path

import pytest

from core.models.families import FAMILIES
from core.tensor_names import NAME_TABLES, bundled_embedding, parse_key
from core.tensor_names.keys import unflatten

REFERENCE = Path(__file__).parents[1] / "reference"
# Module lists enumerated by running sd-scripts 0.10.1's network code on models without weights.
KOHYA_LISTS = {
    "sd15": ["kohya_sd15.json", "kohya_sd15_conv.json"],
    "sd2": ["kohya_sd2.json"],
    "sdxl": ["kohya_sdxl.json", "kohya_sdxl_conv.json"],
    "sd3": ["kohya_sd35_medium.json"],
    "flux1": ["kohya_flux1.json"],
    "lumina2": ["kohya_lumina2.json"],
}


def kohya_names(family: str) -> dict[str, list[int]]:
    return {k: v for name in KOHYA_LISTS[family] for k, v in json.loads((REFERENCE / name).read_text()).items()}


@pytest.mark.parametrize("family", KOHYA_LISTS)
def test_every_kohya_name_is_found_and_is_written_back_the_same(family):
    keys, names = NAME_TABLES[family], kohya_names(family)
    assert names
    for name in names:
        named = parse_key(f"{name}.alpha")
        assert named is not None
        place = keys.locate(named.part, named.path)
        path = place.fusion.original if keys.original_in_kohya else place.fusion.parts[0]
        assert keys.kohya_prefixes[place.part] + path.replace(".", "_") == name


@pytest.mark.parametrize("family", KOHYA_LISTS)
def test_no_two_kohya_names_mean_the_same_module(family):
    found = set()
    for name in kohya_names(family):
        named = parse_key(f"{name}.alpha")
        assert named is not None
        modules = set(NAME_TABLES[family].locate(named.part, named.path).modules)
        assert modules and not modules & found
        found |= modules


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        # diffusers' first LoRA files, hung on attention processors
        (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight",
            ("down", "diffusers", "denoiser", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"),
        ),
        ("base_model.model.mid_block.attentions.0.proj_in.lora_A.weight", ("down", "peft", "denoiser", None)),
        (
            "transformer.single_transformer_blocks.3.proj_out.lora_B.default.weight",
            ("up", "diffusers", "denoiser", None),
        ),
        ("transformer.x_embedder.lora_B.bias", ("bias", "diffusers", "denoiser", "x_embedder")),
        (
            "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_linear_layer.up.weight",
            ("up", "diffusers", "text_encoder", None),
        ),
        (
            "lycoris_double_blocks_3_img_attn_qkv.lokr_w1",
            ("lokr_w1", "lycoris", "denoiser", "double_blocks.3.img_attn.qkv"),
        ),
        (
            "diffusion_model.layers.3.attention.to_q.lora_magnitude_vector.default.weight",
            ("dora", "comfy", "denoiser", None),
        ),
        (
            "lora_transformer_single_transformer_blocks_7_attn_to_q.lora_up.weight",
            ("up", "onetrainer", "denoiser", "single_transformer_blocks.7.attn.to_q"),
        ),
        (
            "oft_unet_mid_block_attentions_0_proj_in.oft_blocks",
            ("oft_blocks", "kohya", "denoiser", "mid_block.attentions.0.proj_in"),
        ),
        ("double_blocks.0.img_attn.proj.lora_A.weight", ("down", "bare", "denoiser", "double_blocks.0.img_attn.proj")),
        (
            "text_encoders.clip_g.transformer.text_model.encoder.layers.3.mlp.fc2.diff_b",
            ("diff_b", "comfy", "text_encoder_2", None),
        ),
    ],
)
def test_names_of_other_tools_are_understood(key, expected):
    named = parse_key(key)
    assert named is not None
    role, scheme, part, path = expected
    assert (named.role, named.scheme, named.part) == (role, scheme, part)
    assert path is None or named.path == path


def test_a_checkpoint_tensor_is_no_adapter_tensor():
    assert parse_key("model.diffusion_model.input_blocks.0.0.weight") is None


def test_a_bundled_embedding_is_known_by_its_name():
    assert bundled_embedding("bundle_emb.mytoken.string_to_param.*") == "mytoken"
    assert bundled_embedding("lora_unet_mid_block_attentions_0_proj_in.alpha") is None


def test_a_name_beyond_the_full_size_model_follows_the_same_grammar():
    # The smallest UNets have attentions where the full one has none.
    named = parse_key("lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_ff_net_0_proj.alpha")
    assert named is not None
    assert named.path == "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj"


def test_a_family_has_the_names_that_are_registered():
    assert all(family.names is NAME_TABLES[name] for name, family in FAMILIES.items())


def test_a_long_name_takes_linear_time():
    begun = time.process_time()
    assert unflatten("_" * 400_000) == "." * 400_000
    assert time.process_time() - begun < 3
