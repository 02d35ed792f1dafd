import hashlib
import io
import json
import time

import pytest
import safetensors.torch
import torch

from core.errors import BadFile, LoraMisfit, UnknownFamily, UnmatchedKeys
from core.lora.file import LoraFile, fit
from core.lora.modules import LoraModule
from core.tensor_names import parse_key
from tests.tensor_names.test_keys import kohya_names


def module_of(shape: list[int], rank: int, alpha: float, generator: torch.Generator) -> LoraModule:
    up_shape = [shape[0], rank] + [1] * (len(shape) - 2)
    return LoraModule(
        torch.randn(rank, *shape[1:], generator=generator), torch.randn(up_shape, generator=generator), alpha
    )


def kohya_tensors(names: dict[str, list[int]], rank: int = 2, alpha: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in names.items():
        module = module_of(shape, rank, alpha, generator)
        tensors[f"{name}.lora_down.weight"] = module.down
        tensors[f"{name}.lora_up.weight"] = module.up
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def some(family: str, step: int = 23) -> dict[str, list[int]]:
    return dict(list(kohya_names(family).items())[::step])


def test_the_delta_of_a_convolution_is_the_change_of_its_output():
    module = module_of([6, 5, 3, 3], rank=4, alpha=8.0, generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(1, 5, 8, 8)
    two_steps = 2.0 * torch.conv2d(torch.conv2d(pixels, module.down), module.up)
    assert torch.allclose(torch.conv2d(pixels, module.delta()), two_steps, atol=1e-4)


def test_a_tucker_core_is_a_convolution_between_down_and_up():
    down, mid, up = torch.randn(4, 5, 1, 1), torch.randn(4, 4, 3, 3), torch.randn(6, 4, 1, 1)
    pixels = torch.randn(1, 5, 8, 8)
    three_steps = torch.conv2d(torch.conv2d(torch.conv2d(pixels, down), mid), up)
    assert torch.allclose(torch.conv2d(pixels, LoraModule(down, up, 4.0, mid).delta()), three_steps, atol=1e-4)


def test_a_fused_qkv_is_split_without_changing_the_weight_change():
    name = "lora_unet_single_blocks_0_linear1"
    tensors = kohya_tensors({name: [7 * 3072, 3072]}, rank=2, alpha=0.5)
    modules = LoraFile.from_tensors(tensors, {}).modules()
    paths = [path for _, path in modules]
    prefix = "single_transformer_blocks.0"
    assert paths == [f"{prefix}.attn.to_q", f"{prefix}.attn.to_k", f"{prefix}.attn.to_v", f"{prefix}.proj_mlp"]
    features = torch.randn(3072)
    whole = 0.25 * tensors[f"{name}.lora_up.weight"] @ (tensors[f"{name}.lora_down.weight"] @ features)
    parts = [module.scale * module.up @ (module.down @ features) for module in modules.values()]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-4)


def test_separate_q_k_v_of_different_rank_and_scale_are_fused_exactly():
    generator = torch.Generator().manual_seed(0)
    paths = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    modules = {
        ("denoiser", paths[0]): module_of([1536, 1536], 2, 1.0, generator),
        ("denoiser", paths[2]): module_of([1536, 1536], 3, 12.0, generator),
    }
    lora = LoraFile.from_modules("sd3", modules, {}, "kohya")
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert lora.tensors[f"{name}.lora_down.weight"].shape == (5, 1536)
    back = lora.modules()
    assert back["denoiser", paths[1]].delta().abs().max() == 0
    for module_id, module in modules.items():
        assert torch.allclose(back[module_id].delta(), module.delta(), atol=1e-4)


def test_shift_and_scale_of_the_last_layer_change_places_in_diffusers():
    # diffusers' checkpoint converters do the same (swap_scale_shift).
    tensors = kohya_tensors({"lora_unet_final_layer_adaLN_modulation_1": [6144, 3072]})
    tensors |= kohya_tensors({"lora_unet_single_blocks_0_linear1": [7 * 3072, 3072]})
    delta = LoraFile.from_tensors(tensors, {}).modules()["denoiser", "norm_out.linear"].delta()
    name = "lora_unet_final_layer_adaLN_modulation_1"
    original = 0.5 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    assert torch.allclose(delta, torch.cat([original[3072:], original[:3072]]))


def test_alpha_and_rslora_in_the_metadata_of_peft_are_used():
    down, up = torch.randn(4, 320), torch.randn(320, 4)
    names = ["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet.mid_block.attentions.0.proj_in"]
    tensors = {
        f"{name}.{suffix}": t for name in names for suffix, t in (("lora_A.weight", down), ("lora_B.weight", up))
    }
    config = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"proj_in": 2}}
    lora = LoraFile.from_tensors(tensors, {"lora_adapter_metadata": json.dumps(config)})
    assert [module.scale for module in lora.modules().values()] == [2.0, 0.5]
    config = {"unet.lora_alpha": 8, "unet.use_rslora": True}
    lora = LoraFile.from_tensors(tensors, {"lora_adapter_metadata": json.dumps(config)})
    assert [module.scale for module in lora.modules().values()] == [4.0, 4.0]


@pytest.mark.clock
def test_an_alpha_for_each_of_hundreds_of_modules_is_found_at_once():
    paths = [f"transformer_blocks.{i}.attn.to_{x}" for i in range(60) for x in ("q", "k", "v", "out.0")]
    paths += [f"transformer_blocks.{i}.attn.{x}" for i in range(60) for x in ("add_q_proj", "add_k_proj", "add_v_proj")]
    tensors = {f"transformer.{path}.lora_{letter}.weight": torch.zeros(shape) for path in paths
               for letter, shape in (("A", (1, 3072)), ("B", (3072, 1)))}  # fmt: skip
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.alpha_pattern": {path: 2 for path in paths}})}
    lora = LoraFile.from_tensors(tensors, metadata)
    started = time.process_time()
    assert {module.scale for module in lora.modules().values()} == {2.0}
    assert time.process_time() - started < 3  # it was more than ten when each module read the metadata


def small_network() -> torch.nn.Module:
    attention = torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8), "to_k": torch.nn.Linear(768, 8)})
    return torch.nn.ModuleDict({"mid_block": torch.nn.ModuleDict({"attn2": attention})})


def test_the_alpha_that_peft_writes_into_a_file_beside_is_used(tmp_path):
    from peft import LoraConfig, get_peft_model

    network = small_network()
    config = LoraConfig(
        r=4, lora_alpha=8, alpha_pattern={"to_q": 2}, target_modules=["to_q", "to_k"], init_lora_weights=False
    )
    model = get_peft_model(network, config)  # pyright: ignore
    model.save_pretrained(tmp_path)
    modules = LoraFile.read(tmp_path / "adapter_model.safetensors").modules()
    assert {path: module.scale for (_, path), module in modules.items()} == {
        "mid_block.attn2.to_q": 0.5, "mid_block.attn2.to_k": 2.0,
    }  # fmt: skip
    for (_, path), module in modules.items():
        layer = network.get_submodule(path)
        torch.testing.assert_close(module.delta(), layer.get_delta_weight("default").detach())  # pyright: ignore
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(BadFile, match=r"adapter_config\.json: cannot be read"):
        LoraFile.read(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "pattern", ["to_(q|v)", r".*attn2\.to_q", "^mid_block.*q", "^mid_block.attn2.to_q", "to_[qv]", "_q"]
)
def test_the_patterns_of_peft_are_regular_expressions_for_the_end_of_a_name(tmp_path, pattern):
    from peft import LoraConfig, get_peft_model

    network = small_network()
    config = LoraConfig(
        r=4, lora_alpha=8, alpha_pattern={pattern: 2}, target_modules=["to_q", "to_k"], init_lora_weights=False
    )
    get_peft_model(network, config).save_pretrained(tmp_path)  # pyright: ignore
    modules = LoraFile.read(tmp_path / "adapter_model.safetensors").modules()
    assert len(modules) == 2
    for (_, path), module in modules.items():
        layer = network.get_submodule(path)
        torch.testing.assert_close(module.delta(), layer.get_delta_weight("default").detach())  # pyright: ignore


@pytest.mark.parametrize("pattern", ["(a+)+", "(a|a)(a|a)(a|a)(a|a)", ".*.*.*.*", "(to_q", "a" * 201 + "|b", ""])
def test_a_pattern_of_peft_that_may_never_end_is_refused(pattern):
    name = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{name}.lora_A.weight": torch.randn(4, 320), f"{name}.lora_B.weight": torch.randn(320, 4)}
    config = {"unet.lora_alpha": 8, "unet.alpha_pattern": {pattern: 2}}
    lora = LoraFile.from_tensors(tensors, {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(UnmatchedKeys, match="which is not understood"):
        list(lora.modules().values())


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_the_alpha_of_pefts_other_adapters_is_used(tmp_path, kind):
    import peft

    config = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[kind](
        r=4, alpha=2, rank_pattern={"to_q": 16}, alpha_pattern={"to_q": 24}, target_modules=["to_q", "to_k"],
        init_weights=False,
    )  # fmt: skip
    network = small_network()
    peft.get_peft_model(network, config).save_pretrained(tmp_path)  # pyright: ignore
    lora = LoraFile.read(tmp_path / "adapter_model.safetensors")
    assert [entry.rank for entry in lora.entries] == [4, 16 if kind == "loha" else None]  # of to_k and to_q
    for (_, path), change in lora.changes():
        wanted = network.get_submodule(path).get_delta_weight("default").detach()  # pyright: ignore
        torch.testing.assert_close(change, wanted)


def test_text_encoder_names_without_text_model_are_read_as_with_it():
    # transformers 5 flattened CLIPTextModel, and trainers took their names from it.
    tensors = kohya_tensors({"lora_te1_encoder_layers_0_mlp_fc1": [3072, 768]}, rank=1)
    assert list(LoraFile.from_tensors(tensors, {}).modules()) == [
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1")
    ]


def test_sd2_projections_are_linear_in_diffusers_and_convolutions_in_kohya():
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = kohya_tensors({name: [1280, 1280, 1, 1], "lora_te_text_model_encoder_layers_0_mlp_fc1": [4096, 1024]})
    tensors |= kohya_tensors({"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": [1280, 1024]})
    modules = LoraFile.from_tensors(tensors, {}).modules()
    assert modules["denoiser", "mid_block.attentions.0.proj_in"].delta().shape == (1280, 1280)
    back = LoraFile.from_modules("sd2", modules, {}).tensors
    assert back[f"{name}.lora_down.weight"].shape == (2, 1280, 1, 1)


def test_flattened_convolutions_of_comfyuis_trainer_get_their_kernel_back():
    name = "diffusion_model.input_blocks.1.0.in_layers.2"
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 320 * 9), f"{name}.lora_up.weight": torch.randn(320, 2)}
    (module,) = LoraFile.from_tensors(tensors, {}).modules().values()
    assert module.delta().shape == (320, 320, 3, 3)


def test_the_legacy_hash_is_that_of_the_file_with_training_metadata_only(tmp_path):
    # Kohya's rule: serialise with the ss_* metadata only and hash 64 KiB from 1 MiB on.
    path = tmp_path / "a.safetensors"
    LoraFile.from_tensors(kohya_tensors(some("sd15", 4), rank=4), {"ss_seed": "1", "modelspec.title": "x"}).save(path)
    tensors = safetensors.torch.load_file(path)
    data = safetensors.torch.save(tensors, {"ss_seed": "1"})
    assert len(data) > 0x110000
    expected = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert LoraFile.read(path).metadata["sshs_legacy_hash"] == expected
    LoraFile.from_tensors(kohya_tensors(some("sd15", 60), rank=1), {}).save(path)  # which ends before 1 MiB
    assert LoraFile.read(path).metadata["sshs_legacy_hash"] == "e3b0c442"


def test_an_alpha_that_the_save_type_would_round_is_kept_exact(tmp_path):
    path = tmp_path / "a.safetensors"
    LoraFile.from_tensors(kohya_tensors(some("sd15", 60), rank=3, alpha=5.3), {}).save(path, torch.bfloat16)
    module = next(iter(LoraFile.read(path).modules().values()))
    assert module.alpha == pytest.approx(5.3, rel=1e-6)


def test_values_that_half_precision_cannot_hold_are_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = kohya_tensors(some("sd15", 60), rank=1)
    tensors[next(iter(tensors))].fill_(1e6)
    with pytest.raises(BadFile, match="are too large for torch"):
        LoraFile.from_tensors(tensors, {}).save(path)
    assert list(tmp_path.iterdir()) == []


def clip_names(prefix: str, layers: int, width: int) -> dict[str, list[int]]:
    return {f"{prefix}text_model_encoder_layers_{i}_self_attn_q_proj": [width, width] for i in range(layers)}


def test_text_encoders_never_outweigh_the_denoiser():
    """SD3 has SDXL's text encoders and FLUX.1 has SD1.x's, with more modules than a short list of blocks."""
    texts = clip_names("lora_te1_", 12, 768) | clip_names("lora_te2_", 32, 1280)
    sd3 = kohya_tensors(some("sd3") | texts, rank=1)
    assert LoraFile.from_tensors(sd3, {}).family == "sd3"
    flux = {"lora_unet_single_blocks_7_linear2": [3072, 15360]} | clip_names("lora_te1_", 12, 768)
    assert LoraFile.from_tensors(kohya_tensors(flux, rank=1), {}).family == "flux1"


@pytest.mark.parametrize(
    ("model", "name", "shape"),
    [
        ("HunyuanVideo", "lora_unet_single_blocks_39_linear1", [21504, 3072]),
        ("HunyuanVideo", "transformer.single_transformer_blocks.38.attn.to_q", [3072, 3072]),
        ("HunyuanVideo", "diffusion_model.double_blocks.0.img_mlp.fc1", [12288, 3072]),
        ("HunyuanVideo 1.5", "diffusion_model.double_blocks.0.img_attn.qkv", [6144, 2048]),
        ("FLUX.3 for video or actions", "diffusion_model.content_mode_blocks.video.0.attn_out", [3072, 3072]),
        ("FLUX.3 for video or actions", "lora_unet_content_mode_blocks_action_prediction_4_q_proj", [3072, 3072]),
        ("Wan", "lora_unet_blocks_0_cross_attn_q", [5120, 5120]),
        ("LTX-Video 2B", "transformer.transformer_blocks.0.attn1.to_k", [2048, 2048]),
        ("AuraFlow", "lora_unet_joint_transformer_blocks_0_attn_to_q", [3072, 3072]),
        ("Stable Cascade", "lora_unet_down_blocks_0_2_attention_attn_to_q", [2048, 2048]),
        (
            "a video model like AnimateDiff",
            "unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q",
            [320, 320],
        ),
        ("SDXL refiner", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", [768, 1280]),
    ],
)
def test_loras_of_models_that_look_like_a_known_one_are_refused_by_name(model, name, shape):
    also = {"lora_unet_single_blocks_0_linear1": [21504, 3072]} if model == "HunyuanVideo" else {}
    with pytest.raises(UnknownFamily, match=f"^x: is for {model}.*, which is not supported; known: sd15, "):
        LoraFile.from_tensors(kohya_tensors(also | {name: shape}, rank=1), {}, name="x")


@pytest.mark.parametrize(
    ("names", "families"),
    [
        ({"lora_unet_double_blocks_0_img_attn_qkv": [9216, 3072]},
         {"": "flux1", "chroma": "chroma", "flux2_klein_4b": "flux2"}),
        (clip_names("lora_te1_", 12, 768), {"": "sd15", "flux1": "flux1", "sd3": "sd3"}),
        (some("sdxl"), {"sd_v1": "sdxl"}),
    ],
    ids=["modules of two families", "a text encoder of three", "modules of one"],
)  # fmt: skip
def test_metadata_tell_the_family_where_the_tensors_fit_several(names, families):
    tensors = kohya_tensors(names, rank=1)
    for said, family in families.items():
        assert LoraFile.from_tensors(tensors, {"ss_base_model_version": said}).family == family


def test_tensors_that_are_no_lora_are_refused():
    with pytest.raises(UnknownFamily, match=r"not a LoRA: no adapter found in its 1 tensor, e.g. 'conv.weight'"):
        LoraFile.from_tensors({"conv.weight": torch.zeros(1)}, {})
    with pytest.raises(UnknownFamily, match=r"no family matches its 1 keys, e.g. 'conv.diff'; known: sd15"):
        LoraFile.from_tensors({"conv.diff": torch.zeros(1)}, {})


def test_a_module_without_its_up_matrix_is_named():
    tensors = kohya_tensors(some("sd15"))
    del tensors[next(key for key in tensors if key.endswith("lora_up.weight"))]
    with pytest.raises(
        UnmatchedKeys, match=r"2 tensors are not recognised, or not part of a complete module .* of shape \[2, 768\]"
    ):
        LoraFile.from_tensors(tensors, {}).modules()


def test_a_misfit_of_the_same_family_does_not_set_it_against_itself():
    lora = LoraFile.from_tensors(kohya_tensors(some("sd15"), rank=1), {})
    with pytest.raises(LoraMisfit, match=r"^x.safetensors: does not fit the base model: \d+ keys are left over, e.g. "):
        fit(lora, "sd15", {}).check("x.safetensors")
    with pytest.raises(LoraMisfit) as of_another:
        fit(lora, "sdxl", {}).check("x.safetensors")
    assert str(of_another.value).count("changes a sd15 model") == 1, "the reason of all keys"


def test_a_wrong_width_is_a_misfit():
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    lora = LoraFile.from_tensors(kohya_tensors({name: [1280, 768]}), {})
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    result = fit(lora, "sd15", {("denoiser", path): (640, 768)})
    assert result.left_over == {name: "shape [1280, 768] does not fit [[640, 768]]"}


def test_a_lora_goes_through_memory_as_it_goes_through_a_file(tmp_path):
    lora = LoraFile.from_tensors(kohya_tensors(some("sd15")), {"ss_tag_frequency": "{}"})
    lora.save(tmp_path / "face.safetensors")
    stream = io.BytesIO()
    lora.save(stream)
    assert stream.getvalue() == (tmp_path / "face.safetensors").read_bytes()
    back = LoraFile.from_bytes(stream.getvalue())
    assert back.metadata == LoraFile.read(tmp_path / "face.safetensors").metadata
    assert back.tensors.keys() == lora.tensors.keys()
    with pytest.raises(BadFile, match="upload: not a valid safetensors file"):
        LoraFile.from_bytes(b"PK\x03\x04" * 9, "upload")


def test_a_missing_alpha_means_alpha_equals_rank():
    tensors = kohya_tensors(some("sd15"), rank=4)
    module_name = next(iter(tensors)).removesuffix(".lora_down.weight")
    del tensors[f"{module_name}.alpha"]
    named = parse_key(f"{module_name}.alpha")
    assert named is not None
    assert LoraFile.from_tensors(tensors, {}).modules()[named.part, named.path].scale == 1.0


def test_factors_in_8_bits_are_split_and_fused_like_others():
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    tensors = {key: t.to(torch.float8_e4m3fn) for key, t in kohya_tensors({name: [3 * 1536, 1536]}).items()}
    lora = LoraFile.from_tensors(tensors, {})
    there = LoraFile.from_modules("sd3", lora.modules(), {}, "diffusers")
    back = LoraFile.from_modules("sd3", there.modules(), {}, "kohya")
    assert back.tensors[f"{name}.lora_down.weight"].shape == (2, 1536)
    for module_id, module in back.modules().items():
        assert torch.equal(module.delta(), lora.modules()[module_id].delta())
