import json
import math
import re
import time
import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import BadConfig, BadFile, LoraMisfit, UnmatchedKeys
from core.lora.base_weights import BaseWeights
from core.lora.changes import truncated_svd
from core.lora.checkpoints import extract_lora, merge_into_checkpoint
from core.lora.convert import convert_lora, to_plain
from core.lora.file import KEY, LoraFile
from core.lora.hashes import legacy_hash, model_hash
from core.lora.merge import merge_loras
from core.lora.modules import LoraModule
from core.lora.resize import resize_lora
from core.storage.safetensors_file import SafetensorsFile, save_safetensors
from core.tensor_names import NAME_TABLES
from tests.tensor_names.test_keys import REFERENCE
from tests.tooling import SMALL_SD15, SMALL_SDXL, mostly_slow, small_flow_base, write_checkpoint

from .test_file import kohya_tensors, some

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
MODULE = ("denoiser", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")


def decaying(rank: int, outputs: int = 64, inputs: int = 768) -> LoraFile:
    """A LoRA of one module whose singular values are 1, 1/2, 1/4, ..."""
    left = torch.linalg.qr(torch.randn(outputs, rank))[0]
    right = torch.linalg.qr(torch.randn(inputs, rank))[0]
    values = 0.5 ** torch.arange(rank)
    module = LoraModule((right * values).T.contiguous(), left, float(rank))
    return LoraFile.from_modules("sd15", {MODULE: module}, {})


def lokr(name: str, outputs: int = 64, inputs: int = 768) -> dict[str, torch.Tensor]:
    return {f"{name}.lokr_w1": torch.randn(4, 4), f"{name}.lokr_w2": torch.randn(outputs // 4, inputs // 4)}


# --- convert


@pytest.mark.parametrize("scheme", ["diffusers", "comfy"])
def test_alpha_is_multiplied_in_where_readers_would_drop_it(scheme):
    lora = LoraFile.from_tensors(kohya_tensors(some("sdxl", 105), rank=2, alpha=3.0), {"ss_network_dim": "2"})
    converted, error = convert_lora(lora, scheme)
    assert error == 0 and not any(key.endswith(".alpha") for key in converted.tensors)
    back = converted.modules()
    for module_id, module in lora.modules().items():
        assert back[module_id].scale == 1
        assert torch.allclose(back[module_id].delta(), module.delta(), rtol=1e-5, atol=1e-5)


def test_what_is_known_of_a_file_without_metadata_is_written():
    plain = {f"{NAME}.lora_down.weight": torch.ones(2, 768), f"{NAME}.lora_up.weight": torch.ones(64, 2)}
    for tensors, network, rank in ((plain, "networks.lora", "2"), (lokr(NAME), "lycoris.kohya", "None")):
        there = convert_lora(LoraFile.from_tensors(tensors, {}), "comfy")[0]
        assert there.metadata == {
            "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora",
        }  # fmt: skip
        back = convert_lora(there, "kohya")[0].metadata
        assert back["ss_network_module"] == network and back["ss_network_dim"] == rank
        assert back["ss_base_model_version"] == "sd_v1"


def test_the_metadata_never_state_a_rank_that_no_module_has():
    names = [f"transformer.transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]
    tensors = {f"{name}.lora_A.weight": torch.randn(4, 3072) for name in names}
    tensors |= {f"{name}.lora_B.weight": torch.randn(3072, 4) for name in names}
    stated = {"ss_network_dim": "4", "ss_network_alpha": "4.0", "ss_base_model_version": "flux1"}
    lora = LoraFile.from_tensors(tensors, stated)
    split = convert_lora(lora, "diffusers").lora
    assert split.metadata.items() >= stated.items()
    fused = convert_lora(lora, "kohya").lora
    assert fused.entries[0].rank == 12 and fused.metadata["ss_network_dim"] == "12"
    assert "ss_network_alpha" not in fused.metadata and fused.modules().keys() == lora.modules().keys()


def test_the_hash_of_other_tensors_does_not_come_along(tmp_path):
    plain = {f"{NAME}.lora_down.weight": torch.ones(2, 768), f"{NAME}.lora_up.weight": torch.ones(64, 2)}
    lora = LoraFile.from_tensors(plain, {"modelspec.hash_sha256": "0x12", "modelspec.title": "A face"})
    resize_lora(lora, rank=1)[0].save(tmp_path / "a.safetensors")
    metadata = LoraFile.read(tmp_path / "a.safetensors").metadata
    assert "modelspec.hash_sha256" not in metadata and metadata["modelspec.title"] == "A face"


def test_a_lokr_in_diffusers_names_is_refused_unless_a_rank_is_given():
    lora = LoraFile.from_tensors(lokr(NAME), {})
    with pytest.raises(UnmatchedKeys, match="is of kind lokr, which diffusers names cannot express; give a rank"):
        convert_lora(lora, "diffusers")
    converted, error = convert_lora(lora, "diffusers", plain_rank=64)
    assert error < 3e-3 and converted.kind == "lora"  # rounding gave at most 1.0e-3 for 300 random files
    assert torch.allclose(converted.modules()[MODULE].delta(), next(lora.changes())[1], atol=1e-3)


def test_a_dora_becomes_plain_only_with_the_weights_that_it_was_trained_on():
    tensors = {f"{NAME}.lora_down.weight": torch.randn(2, 768), f"{NAME}.lora_up.weight": torch.randn(64, 2)}
    lora = LoraFile.from_tensors(tensors | {f"{NAME}.dora_scale": torch.rand(64, 1)}, {})
    with pytest.raises(UnmatchedKeys, match="depends on the base weights"):
        to_plain(lora, rank=64)


def test_a_dora_of_pefts_is_read_and_written_as_peft_computes_it(tmp_path):
    import peft

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        layers = {"to_k": torch.nn.Linear(768, 8), "conv1": torch.nn.Conv2d(8, 8, 3)}
        return torch.nn.ModuleDict({"mid_block": torch.nn.ModuleDict({"attn2": torch.nn.ModuleDict(layers)})})

    def with_dora(alpha: int):
        config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_k", "conv1"], use_dora=True)
        return peft.get_peft_model(network(), config)  # pyright: ignore

    def weights(model) -> dict[str, torch.Tensor]:
        found = {name: tensor.detach() for name, tensor in model.named_parameters() if name.endswith("weight")}
        return {name.removesuffix(".weight"): tensor for name, tensor in found.items()}

    trained = with_dora(8)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data * 0.5 if "magnitude" in name else torch.randn_like(parameter)
    trained.save_pretrained(tmp_path)
    theirs = weights(trained.merge_and_unload())
    lora = LoraFile.read(tmp_path / "adapter_model.safetensors")
    before = weights(network())
    for (_, path), change in lora.changes(lambda module: before[module[1]]):
        torch.testing.assert_close(before[path] + change, theirs[path], rtol=0, atol=1e-5)
    there = convert_lora(convert_lora(lora, "kohya")[0], "diffusers")[0]
    names = {key.replace("unet.", "base_model.model.", 1): tensor for key, tensor in there.tensors.items()}
    loaded = with_dora(4)
    assert peft.set_peft_model_state_dict(loaded, names).unexpected_keys == []
    for path, weight in weights(loaded.merge_and_unload()).items():
        torch.testing.assert_close(weight, theirs[path], rtol=0, atol=1e-5)


def test_a_dora_with_a_magnitude_for_each_input_is_none_of_pefts():
    tensors = {f"{NAME}.lora_down.weight": torch.randn(2, 768), f"{NAME}.lora_up.weight": torch.randn(64, 2)}
    lora = LoraFile.from_tensors(tensors | {f"{NAME}.dora_scale": torch.rand(1, 768)}, {})
    with pytest.raises(UnmatchedKeys, match="is of kind dora, which diffusers names cannot express"):
        convert_lora(lora, "diffusers")


def test_a_plain_lora_is_regrouped_among_other_kinds():
    name = "lora_unet_layers_0_attention_qkv"
    lora = kohya_tensors({name: [3 * 3840, 3840]}) | {"lora_unet_layers_0_feed_forward_w1.diff": torch.ones(4, 3840)}
    there = convert_lora(LoraFile.from_tensors(lora, {}), "comfy")[0]
    assert {key for key in there.tensors if not key.endswith("lora_A.weight")} == {
        "diffusion_model.layers.0.feed_forward.w1.diff",
        *(f"diffusion_model.layers.0.attention.to_{x}.lora_B.weight" for x in "qkv"),
    }
    back = convert_lora(there, "kohya")[0]
    assert set(back.tensors) == set(lora)


def test_a_part_without_a_name_in_a_scheme_is_refused_whatever_its_kind():
    denoiser = lokr("transformer.transformer_blocks.59.attn.to_q", 3072, 3072)
    lora = LoraFile.from_tensors(denoiser | lokr("text_encoder.model.layers.0.self_attn.q_proj"), {})
    with pytest.raises(UnmatchedKeys, match="the comfy scheme has no names for the text_encoder"):
        convert_lora(lora, "comfy")


def test_a_change_of_a_bias_is_never_left_out_silently():
    plain = {"lora_down.weight": torch.ones(2, 320), "lora_up.weight": torch.ones(320, 2), "alpha": torch.tensor(1.0)}
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    for bias, value in (("diff_b", 3.0), ("lora_up.bias", 1.5)):
        tensors = {f"{name}.{role}": tensor for role, tensor in (plain | {bias: torch.full((320,), 3.0)}).items()}
        lora = LoraFile("sd15", {}, tensors)
        kept = convert_lora(lora, "comfy")[0].tensors
        (changed,) = (tensor for key, tensor in kept.items() if key.endswith(".diff_b"))
        assert torch.equal(changed, torch.full((320,), value))
        in_diffusers = convert_lora(lora, "diffusers")[0].tensors
        assert torch.equal(next(t for key, t in in_diffusers.items() if key.endswith(".lora_B.bias")), changed)
        for refused in (
            lambda lora=lora: convert_lora(lora, "kohya", plain_rank=2),
            lambda lora=lora: merge_loras([(lora, 1.0)]),
            lora.modules,
        ):
            with pytest.raises(UnmatchedKeys, match="to_out_0"):
                refused()


def test_nothing_strange_or_double_is_left_out_silently():
    plain = {f"{NAME}.lora_down.weight": torch.ones(2, 768), f"{NAME}.lora_up.weight": torch.ones(64, 2)}
    also = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k"
    for adapter in (plain, lokr(NAME)):
        for more, reason in (({"mystery": torch.ones(3)}, "'mystery'"), (lokr(also), "changes .* twice")):
            lora = LoraFile("sd15", {}, adapter | more)
            for refused in (
                lambda lora=lora: convert_lora(lora, "comfy"),
                lambda lora=lora: convert_lora(lora, "kohya", plain_rank=2),
                lambda lora=lora: to_plain(lora, 2),
                lambda lora=lora: resize_lora(lora, rank=1),
                lambda lora=lora: merge_loras([(lora, 1.0)]),
            ):
                with pytest.raises(UnmatchedKeys, match=reason):
                    refused()


@pytest.mark.parametrize("role", ["diff", "set_weight", "w_norm", "rescale", "oft_blocks", "hada_w1_a", "lokr_w2"])
def test_a_second_change_of_one_module_is_refused(role):
    plain = {f"{NAME}.lora_down.weight": torch.ones(2, 768), f"{NAME}.lora_up.weight": torch.ones(64, 2)}
    lora = LoraFile("sd15", {}, plain | {f"{NAME}.{role}": torch.ones(64, 768)})
    with pytest.raises(UnmatchedKeys):
        convert_lora(lora, "kohya")


def test_a_small_alpha_makes_no_change_too_small_for_fp16(tmp_path):
    """Kohya's usual alpha is 1, and the up matrix starts at 0. In fp16 this one is 0.1 to 0.2 % off by itself."""
    up, down = 1e-5 * torch.randn(64, 128), torch.randn(128, 768) / 768**0.5
    tensors = {f"{NAME}.lora_down.weight": down, f"{NAME}.lora_up.weight": up, f"{NAME}.alpha": torch.tensor(1.0)}
    lora = LoraFile("sd15", {}, tensors)
    halves = merge_loras([(lora, 0.5), (lora, 0.5)])[0]
    for number, made in enumerate((convert_lora(lora, "diffusers")[0], convert_lora(lora, "comfy")[0], halves)):
        made.save(path := tmp_path / f"{number}.safetensors", torch.float16)
        (_, change), wanted = next(iter(LoraFile.read(path, "sd15").changes())), up @ down / 128
        assert (change.flatten(1) - wanted).norm() < 1e-2 * wanted.norm()


def test_a_linear_changed_like_a_convolution_is_not_fused():
    q, k = (f"transformer.transformer_blocks.0.attn.to_{letter}" for letter in "qk")
    tensors = {
        f"{q}.lora_A.weight": torch.ones(2, 3072, 3, 3), f"{q}.lora_B.weight": torch.ones(3072, 2, 1, 1),
        f"{k}.lora_A.weight": torch.ones(2, 3072), f"{k}.lora_B.weight": torch.ones(3072, 2),
    }  # fmt: skip
    for some_of in (tensors, {name: one for name, one in tensors.items() if name.startswith(q)}):
        with pytest.raises(UnmatchedKeys, match=r"to_q is changed like a convolution"):
            dict(convert_lora(LoraFile("flux1", {}, some_of), "kohya")[0].tensors)


def test_pefts_alpha_and_magnitude_are_written_for_kohyas_readers():
    prefix = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q."
    tensors = {
        f"{prefix}lora_A.weight": torch.ones(2, 320),
        f"{prefix}lora_B.weight": torch.ones(320, 2),
        f"{prefix}lora_magnitude_vector": torch.ones(320),
    }
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6, "unet.r": 2})}
    converted = convert_lora(LoraFile.from_tensors(tensors, metadata), "kohya")[0]
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert {key: tuple(tensor.shape) for key, tensor in converted.tensors.items()} == {
        f"{name}.lora_down.weight": (2, 320), f"{name}.lora_up.weight": (320, 2), f"{name}.alpha": (),
        f"{name}.dora_scale": (320, 1),
    }  # fmt: skip
    assert float(converted.tensors[f"{name}.alpha"]) == 6


def test_what_is_made_of_a_lora_is_not_taken_for_what_was_trained():
    lora = LoraFile.from_tensors(kohya_tensors(some("sd15"), rank=2), {KEY: "0123", "ss_steps": "800"})
    made = [convert_lora(lora, "comfy"), convert_lora(lora, "kohya", plain_rank=2), resize_lora(lora, rank=1)]
    made += [merge_loras([(lora, 1.0)])]
    assert all(KEY not in changed.metadata for changed, _ in made)
    assert [changed.metadata.get("ss_steps") for changed, _ in made] == ["800", "800", "800", None]


OLDER = {
    "sd15": [("mid_block.attentions.0.proj_in", (8, 8, 1, 1)), ("mid_block.resnets.0.conv1", (8, 6, 3, 3))],
    "sd2": [
        ("mid_block.attentions.0.proj_in", (8, 8)),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.2", (8, 4)),
    ],
    "sdxl": [("mid_block.attentions.0.proj_in", (8, 8)), ("down_blocks.0.downsamplers.0.conv", (8, 8, 3, 3))],
    "lumina2": [("layers.0.attn.to_k", (4, 12)), ("layers.0.attn.to_q", (12, 12)), ("layers.0.norm1.linear", (48, 12))],
}


@cache
def layers_of(family: str) -> list[tuple[str, tuple[int, ...]]]:
    """Some layers of the family: of a rectified flow the first of each kind in its small model."""
    if family in OLDER:
        return OLDER[family]
    shapes = reversed([(path, shape) for (_, path), shape in small_flow_base(family).module_shapes().items()])
    return [*{re.sub(r"\d+", "#", path): (path, shape) for path, shape in shapes if len(shape) > 1}.values()]


@settings(max_examples=150)
@given(data=st.data())
def test_any_adapter_makes_the_same_change_after_any_conversions(data):
    family = data.draw(st.sampled_from(list(NAME_TABLES)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    modules = {}
    for path, shape in data.draw(st.lists(st.sampled_from(layers_of(family)), min_size=1, max_size=4, unique=True)):
        rank = data.draw(st.integers(1, 4))
        dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
        down = torch.randn(rank, *shape[1:], generator=generator).to(dtype)
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator).to(dtype)
        modules["denoiser", path] = LoraModule(down, up, data.draw(st.sampled_from([0.0, 1.0, 2.5, float(rank)])))
    lora = LoraFile.from_modules(family, modules, {"ss_base_model_version": NAME_TABLES[family].base_versions[0]})
    if data.draw(st.booleans()):
        # Without alpha the scale is 1.
        lora = LoraFile(family, lora.metadata, {k: t for k, t in lora.tensors.items() if not k.endswith(".alpha")})
    expected = lora.modules()
    for scheme in data.draw(st.lists(st.sampled_from(["kohya", "diffusers", "comfy"]), max_size=4)):
        lora = convert_lora(lora, scheme)[0]
        lora = LoraFile(family, lora.metadata, lora.tensors)
    found = lora.modules()
    assert set(expected) <= set(found)
    for module_id, module in found.items():
        delta = module.delta()
        wanted = expected[module_id].delta() if module_id in expected else torch.zeros_like(delta)
        # Fused modules in half precision round their columns once.
        assert torch.allclose(delta.reshape(wanted.shape), wanted, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("family", NAME_TABLES)
@pytest.mark.parametrize("scheme", ["diffusers", "comfy"])
def test_a_kohya_file_is_the_same_after_a_trip_through_another_scheme(family, scheme):
    """Where the original model has one weight for q, k and v, it is fused, split and fused again."""
    keys, generator = NAME_TABLES[family], torch.Generator().manual_seed(0)
    tensors = {}
    for path, shape in layers_of(family):
        fusion = keys.of_diffusers(path)
        is_fused = keys.original_in_kohya and len(fusion.parts) > 1
        rows = round(sum(fusion.sizes) * shape[1]) if is_fused else shape[0]
        name = "lora_unet_" + (fusion.original if keys.original_in_kohya else path).replace(".", "_")
        kernel = keys.kernel_in_kohya(path) if len(shape) == 2 else None
        extra = (1, 1) if kernel else shape[2:]
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, shape[1], *extra, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, 2, *[1] * len(extra), generator=generator)
        # alpha / rank is a power of two, so that nothing may be rounded
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    there = convert_lora(LoraFile(family, {}, tensors), scheme)[0]
    back = convert_lora(LoraFile(family, {}, dict(there.tensors)), "kohya")[0]
    assert set(back.tensors) == set(tensors)
    for name in tensors:
        if name.endswith("lora_down.weight"):
            assert torch.equal(back.tensors[name], tensors[name]), name
        elif name.endswith("lora_up.weight"):
            alpha = back.tensors[name.replace("lora_up.weight", "alpha")]
            assert torch.equal(back.tensors[name] * alpha, tensors[name]), name


# --- resize


def test_resizing_keeps_the_largest_singular_values():
    # The best approximation of a rank leaves exactly the values that are cut off (Eckart and Young, 1936).
    lora = decaying(8)
    small, error = resize_lora(lora, rank=3)
    values = torch.linalg.svdvals(small.modules()[MODULE].delta())[:4]
    assert torch.allclose(values, torch.tensor([1.0, 0.5, 0.25, 0.0]), atol=1e-4)
    squares = [0.25**n for n in range(8)]
    assert error == pytest.approx(math.sqrt(sum(squares[3:]) / sum(squares)), rel=1e-4)


def test_resizing_by_energy_keeps_the_smallest_rank_with_that_share():
    small, error = resize_lora(decaying(8), energy=0.99)
    # 1, 1/4, 1/16, 1/64: 0.75, 0.94, 0.984, 0.996 of the sum
    assert small.modules()[MODULE].rank == 4 and error**2 < 0.01
    assert small.metadata["ss_network_dim"] == "4"


def test_a_tucker_convolution_is_resized_as_one_change():
    name = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 16, 1, 1),
        f"{name}.lora_mid.weight": torch.randn(4, 4, 3, 3),
        f"{name}.lora_up.weight": torch.randn(16, 4, 1, 1),
        f"{name}.alpha": torch.tensor(2.0),
    }
    lora = LoraFile.from_tensors(tensors, {"ss_base_model_version": "sd_v1"})
    same, _ = resize_lora(lora, rank=4)
    assert f"{name}.lora_mid.weight" not in same.tensors
    assert torch.allclose(next(same.changes())[1], next(lora.changes())[1], atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}])
def test_senseless_sizes_are_refused(options):
    with pytest.raises(BadConfig):
        resize_lora(decaying(2), **options)


def test_the_truncated_svd_of_a_large_matrix_is_that_of_the_full_one():
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(700, 600, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(650, 600, generator=generator))[0]
    # A tail that falls as slowly as those of real weight differences.
    values = 1 / torch.arange(1.0, 601) ** 0.7
    found = truncated_svd((left * values) @ right.T, 16)[1]
    assert torch.allclose(found, values[:16], rtol=1e-3)


@pytest.mark.clock
def test_a_whole_sdxl_lora_is_resized_in_under_a_minute():
    linear = json.loads((REFERENCE / "kohya_sdxl.json").read_text())
    lora = LoraFile.from_tensors(kohya_tensors(linear, rank=64, alpha=32.0), {})
    assert len(lora.entries) == 986
    started = time.process_time()
    small, _ = resize_lora(lora, rank=16)
    assert time.process_time() - started < 60
    module_id = ("text_encoder", "text_model.encoder.layers.0.mlp.fc1")
    full = torch.linalg.svdvals(lora.modules()[module_id].delta())[:16]
    assert torch.allclose(torch.linalg.svdvals(small.modules()[module_id].delta())[:16], full, rtol=1e-4)


# --- merge


def test_a_merge_is_the_weighted_sum_of_the_changes():
    one = LoraFile.from_tensors(kohya_tensors(some("sd15", 90), rank=2), {"modelspec.title": "one"})
    two = LoraFile.from_tensors(kohya_tensors(some("sd15", 45), rank=3, alpha=6.0), {"modelspec.title": "two"})
    merged, error = merge_loras([(one, 0.7), (two, -0.5)])
    assert error == 0 and merged.metadata["modelspec.merged_from"] == "one, two"
    first, second = one.modules(), two.modules()
    assert set(merged.modules()) == {*first, *second}
    for module_id, module in merged.modules().items():
        delta = module.delta()
        wanted = torch.zeros_like(delta)
        for part, weight in ((first, 0.7), (second, -0.5)):
            if module_id in part:
                wanted += weight * part[module_id].delta()
        assert torch.allclose(delta, wanted, atol=1e-3)


def test_a_merge_to_a_rank_is_the_nearest_change_of_that_rank():
    lora = decaying(8)
    merged, error = merge_loras([(lora, 0.5), (lora, 0.5)], rank=3)
    assert merged.modules()[MODULE].rank == 3
    assert torch.allclose(
        merged.modules()[MODULE].delta(), resize_lora(lora, rank=3)[0].modules()[MODULE].delta(), atol=1e-4
    )
    assert 0.1 < error < 0.2


@pytest.mark.parametrize("scheme", ["kohya", "comfy"])
def test_what_was_fused_from_separate_modules_is_separated_into_the_same(scheme):
    """Else converting a LoRA for FLUX.1 to other names and back makes its q, k and v three or four times as large."""
    block = "single_transformer_blocks.0"
    sizes = {
        f"{block}.attn.to_k": 3072,
        f"{block}.attn.to_q": 3072,
        f"{block}.attn.to_v": 3072,
        f"{block}.proj_mlp": 12288,
    }
    tensors = {}
    for rank, (path, outputs) in enumerate(sizes.items(), 2):
        tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(rank, 3072)
        tensors[f"transformer.{path}.lora_B.weight"] = torch.randn(outputs, rank)
    metadata = {"ss_base_model_version": "flux1"}
    fused = dict(convert_lora(LoraFile.from_tensors(tensors, metadata), scheme)[0].tensors)
    back = convert_lora(LoraFile.from_tensors(fused, metadata), "diffusers")[0]
    assert back.tensors.keys() == tensors.keys()
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in tensors.items())
    again = convert_lora(back, scheme)[0]
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in fused.items())


def test_fused_modules_stay_of_their_rank_when_merged():
    tensors = kohya_tensors({"lora_unet_double_blocks_0_img_attn_qkv": [9216, 3072]}, rank=2)
    lora = LoraFile.from_tensors(tensors, {})
    merged, _ = merge_loras([(lora, 1.0), (lora, 1.0)])
    assert merged.tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (4, 3072)


def test_words_come_along_when_merged():
    plain = {f"{NAME}.lora_down.weight": torch.ones(2, 768), f"{NAME}.lora_up.weight": torch.ones(64, 2)}
    first, second, other = ({"bundle_emb.sks.string_to_param.*": torch.full((2, 768), x)} for x in (1.0, 1.0, 2.0))
    one, two, three = (LoraFile.from_tensors(plain | word, {}) for word in (first, second, other))
    merged, _ = merge_loras([(one, 0.5), (two, 0.5)], rank=1)
    assert torch.equal(merged.tensors["bundle_emb.sks.string_to_param.*"], torch.ones(2, 768))
    with pytest.raises(LoraMisfit, match="another file has a different embedding for 'sks'"):
        merge_loras([(one, 0.5), (three, 0.5)])
    with pytest.raises(LoraMisfit, match="has no modules to merge"):
        merge_loras([(one, 0.5), (LoraFile.from_tensors({"emb_params": torch.ones(2, 768)}, {}), 0.5)])


def test_nan_is_not_merged_into_a_checkpoint(tmp_path):
    tensors = {"lora_down.weight": torch.ones(2, 768), "lora_up.weight": torch.ones(64, 2), "alpha": torch.tensor(1.0)}
    good, bad = (
        LoraFile("sd15", {}, {f"{NAME}.{role}": factor * tensor for role, tensor in tensors.items()}, name="bad")
        for factor in (1.0, math.nan)
    )
    weight = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    save_safetensors(tmp_path / "base.safetensors", {weight: torch.ones(64, 768, dtype=torch.float16)})
    for lora, strength, message in (
        (bad, 1.0, "bad: .*to_k: its change contains NaN or infinity"),
        (good, 1e9, r"to_k\.weight would hold NaN or infinity"),
    ):
        with pytest.raises(UnmatchedKeys, match=message):
            merge_into_checkpoint(tmp_path / "base.safetensors", [(lora, strength)], tmp_path / "merged.safetensors")
    assert not (tmp_path / "merged.safetensors").exists()


def test_changes_of_two_widths_are_not_merged():
    """384 is half of 768: the numbers could be taken for a change of twice the rank."""
    one, two = (
        LoraFile("sd15", {}, {f"{NAME}.lora_down.weight": torch.ones(2, n), f"{NAME}.lora_up.weight": torch.ones(64, 2)}, name)
        for n, name in ((768, "one"), (384, "two"))
    )  # fmt: skip
    for pair in ([(one, 1.0), (two, 1.0)], [(two, 1.0), (one, 1.0)]):
        with pytest.raises(
            LoraMisfit, match=rf"{pair[1][0].name}: .*to_k changes a weight of size 64 x .*in another file it is 64 x"
        ):
            merge_loras(pair)


@pytest.mark.parametrize("roles", [{"oft_blocks": (4, 16, 16)}, {"lokr_w1": (8, 8), "lokr_w2": (8, 96)}])
def test_an_infinite_alpha_that_scales_nothing_is_not_carried_on(roles):
    tensors = {f"{NAME}.{role}": torch.full(shape, 0.1) for role, shape in roles.items()}
    lora = LoraFile("sd15", {}, tensors | {f"{NAME}.alpha": torch.tensor(math.inf)}, name="odd")
    with pytest.raises(UnmatchedKeys, match=r"odd: .*to_k: its change contains NaN or infinity"):
        convert_lora(lora, "comfy")


def test_loras_of_two_families_are_not_merged():
    other = LoraFile.from_tensors(kohya_tensors(some("sdxl")), {})
    with pytest.raises(LoraMisfit, match="only LoRAs for the same family"):
        merge_loras([(decaying(2), 1.0), (other, 1.0)])


# --- checkpoints


def test_changes_of_biases_and_normalisation_layers_are_merged_in(tmp_path):
    attention, conv = "model.diffusion_model.middle_block.1.", "model.diffusion_model.input_blocks.3.0.op"
    clip = "conditioner.embedders.1.model.transformer.resblocks.0."
    base = {
        f"{attention}transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, 2048),
        f"{attention}norm.weight": torch.zeros(8),
        f"{attention}norm.bias": torch.zeros(8),
        f"{conv}.weight": torch.zeros(8, 8, 3, 3),
        f"{conv}.bias": torch.zeros(8),
        f"{clip}attn.in_proj_weight": torch.zeros(18, 6),
        f"{clip}attn.in_proj_bias": torch.zeros(18),
    }
    save_safetensors(tmp_path / "base", {name: tensor.half() for name, tensor in base.items()})
    tensors = {
        "lora_unet_mid_block_attentions_0_norm.w_norm": torch.full((8,), 1.0),
        "lora_unet_mid_block_attentions_0_norm.b_norm": torch.full((8,), 2.0),
        "lora_unet_down_blocks_0_downsamplers_0_conv.diff": torch.full((8, 8, 3, 3), 3.0),
        "lora_unet_down_blocks_0_downsamplers_0_conv.diff_b": torch.full((8,), 4.0),
        "lora_te2_text_model_encoder_layers_0_self_attn_k_proj.diff_b": torch.full((6,), 5.0),
    }
    lora = LoraFile("sdxl", {}, tensors)
    assert merge_into_checkpoint(tmp_path / "base", [(lora, 0.5), (lora, 0.5)], tmp_path / "merged") == 5
    merged = SafetensorsFile.open(tmp_path / "merged")
    assert {merged[name].dtype for name in base} == {torch.float16}
    assert [float(merged[f"{attention}norm.{x}"].mean()) for x in ("weight", "bias")] == [1, 2]
    assert [float(merged[f"{conv}.{x}"].mean()) for x in ("weight", "bias")] == [3, 4]
    assert torch.equal(merged[f"{clip}attn.in_proj_bias"].float(), torch.tensor([0.0, 5.0, 0.0]).repeat_interleave(6))
    assert not merged[f"{clip}attn.in_proj_weight"].any()
    bare = LoraFile(
        "sdxl", {}, {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.diff_b": torch.ones(8)}
    )
    with pytest.raises(LoraMisfit, match=r"changes a bias, but mid_block.attentions.0.*to_k has none"):
        merge_into_checkpoint(tmp_path / "base", [(bare, 1.0)], tmp_path / "again")


@pytest.mark.parametrize(
    ("family", "norm", "layer", "shape", "key"),
    [
        ("flux1", "double_blocks.0.img_attn.norm.query_norm.scale", "double_blocks.0.img_attn.proj", (3072, 3072),
         "double_blocks.0.img_attn.norm.query_norm.diff"),
        ("krea2", "blocks.0.prenorm.scale", "blocks.0.attn.wk", (1536, 6144), "blocks.0.prenorm.scale.diff"),
    ],
)  # fmt: skip
def test_changes_of_norms_are_merged_into_scales(family, norm, layer, shape, key, tmp_path):
    """The files of FLUX and Krea 2 have a `.scale` where others have a weight."""
    base = {norm: torch.zeros(8), f"{layer}.weight": torch.zeros(shape)}
    save_safetensors(tmp_path / "base", base)
    assert BaseWeights.open(tmp_path / "base").family == family
    lora = LoraFile(family, {}, {f"diffusion_model.{key}": torch.full((8,), 2.0)})
    assert merge_into_checkpoint(tmp_path / "base", [(lora, 0.5)], tmp_path / "merged") == 1
    merged = SafetensorsFile.open(tmp_path / "merged")
    assert torch.equal(merged[norm], torch.ones(8)) and not merged[f"{layer}.weight"].any()


def test_a_lora_without_a_place_in_the_checkpoint_is_refused(tmp_path):
    weights = {f"{path}.weight": torch.ones(shape) for path, shape in ORIGINAL_WEIGHTS["sdxl"].items()}
    save_safetensors(tmp_path / "base", weights)
    lora = LoraFile.from_tensors(kohya_tensors(some("sdxl")), {})
    with pytest.raises(LoraMisfit, match=r"46 keys are left over, e.g. lora_te1_.*: the base model has no "):
        merge_into_checkpoint(tmp_path / "base", [(lora, 1.0)], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_difference_of_two_checkpoints_is_extracted_and_only_that(small_sdxl, tmp_path):
    base = SafetensorsFile.open(small_sdxl)
    names = {
        "model.diffusion_model.middle_block.1.proj_in.weight": ("denoiser", "mid_block.attentions.0.proj_in"),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": (
            "text_encoder_2",
            "text_model.encoder.layers.0.mlp.fc1",
        ),
    }
    tuned = dict(base)
    changes = {}
    for name, module_id in names.items():
        rows, columns = base.shapes[name]
        changes[module_id] = torch.randn(rows, 2) @ torch.randn(2, columns)
        tuned[name] = base[name] + changes[module_id]
    others = [f"model.diffusion_model.{name}" for name in ("out.2.bias", "out.0.weight", "out.0.bias")]
    embedding = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"
    for name in (*others, embedding, "first_stage_model.decoder.conv_in.weight"):
        tuned[name] = base[name] + 1
    save_safetensors(tmp_path / "tuned", tuned)
    warnings = []
    lora, error = extract_lora(small_sdxl, tmp_path / "tuned", rank=2, on_warning=warnings.append)
    assert len(warnings) == 1 and warnings[0].startswith("left out 5 changed tensors that a LoRA cannot express")
    assert error < 1e-2 and lora.metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    modules = lora.modules()
    assert set(modules) == set(changes)
    for module_id, change in changes.items():
        assert torch.allclose(modules[module_id].delta(), change, atol=1e-2)


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        (SMALL_SDXL, 1),
        (SMALL_SD15, 3),
        pytest.param(SMALL_SD15, 1, marks=pytest.mark.slow),
        pytest.param(SMALL_SDXL, 3, marks=pytest.mark.slow),
    ],
)
def test_a_lora_for_a_unet_with_other_numbers_of_blocks(shape, blocks, tmp_path):
    shape = replace(shape, unet=shape.unet | {"layers_per_block": blocks})
    base = BaseWeights.open(write_checkpoint(tmp_path / "base", shape, torch.float32))
    modules = {
        module: LoraModule(torch.ones(1, *sides[1:]), torch.ones(sides[0], 1, *[1] * (len(sides) - 2)), 0.5)
        for module, sides in base.shapes.items()
        if len(sides) > 1 and module[0] == "denoiser"
    }
    kohya = LoraFile.from_modules(shape.family, modules, {}, names=base.names)
    diffusers = convert_lora(kohya, "diffusers").lora
    back = convert_lora(diffusers, "kohya").lora
    assert set(back.tensors) == set(kohya.tensors) and set(diffusers.modules()) == set(modules)
    both = merge_loras([(kohya, 0.5), (diffusers, 0.5)]).lora
    assert {entry.name for entry in both.entries} == {entry.name for entry in kohya.entries}
    assert merge_into_checkpoint(tmp_path / "base", [(both, 1.0)], tmp_path / "merged") == len(modules)
    for lora in (kohya, diffusers):
        if blocks == 1:
            assert set(convert_lora(lora, "comfy").lora.modules()) == set(modules)
        else:
            with pytest.raises(UnmatchedKeys, match="more than the 2 residual blocks per level of the published"):
                convert_lora(lora, "comfy")
    numbered = {
        f"diffusion_model.{base.name_of(m).removeprefix('model.diffusion_model.').removesuffix('.weight')}": m
        for m in modules
    }
    tensors = {f"{name}.lora_A.weight": modules[module].down for name, module in numbered.items()}
    tensors |= {f"{name}.lora_B.weight": modules[module].up for name, module in numbered.items()}
    original = LoraFile(shape.family, {}, tensors)
    for attempt in (lambda: convert_lora(original, "kohya"), lambda: merge_loras([(original, 1.0)])):
        with pytest.raises(UnmatchedKeys, match="is ambiguous"):
            attempt()
    with pytest.raises(LoraMisfit):
        merge_into_checkpoint(tmp_path / "base", [(original, 1.0)], tmp_path / "merged")


def test_checkpoints_in_original_and_diffusers_names_are_compared(tmp_path):
    block, theirs = "model.diffusion_model.joint_blocks.0.x_block.attn", "transformer_blocks.0.attn"
    base = {"qkv.weight": torch.randn(4608, 1536), "qkv.bias": torch.randn(4608), "proj.weight": torch.randn(8, 1536)}
    change = torch.randn(4608, 2) @ torch.randn(2, 1536)
    save_safetensors(tmp_path / "base", {f"{block}.{name}": tensor for name, tensor in base.items()})
    tuned = {f"{theirs}.to_{x}.weight": t for x, t in zip("qkv", (base["qkv.weight"] + change).chunk(3), strict=True)}
    tuned |= {f"{theirs}.to_{x}.bias": t for x, t in zip("qkv", (base["qkv.bias"] + 1).chunk(3), strict=True)}
    save_safetensors(tmp_path / "tuned", {name: tensor.contiguous() for name, tensor in tuned.items()})
    warnings = []
    lora, _ = extract_lora(tmp_path / "base", tmp_path / "tuned", rank=2, on_warning=warnings.append)
    torch.testing.assert_close(next(lora.changes())[1], change[:1536], rtol=0, atol=1e-2)
    assert len(lora.entries) == 3 and [warning[:11] for warning in warnings] == ["left out 1 "] * 2
    assert warnings[0].endswith("qkv.bias") and "only one of the files has" in warnings[1]


def test_equal_checkpoints_and_two_families_leave_nothing_to_extract(small_sd15, small_sdxl):
    for other, said in (
        (small_sd15, "nothing to extract"),
        (small_sdxl, r"is sd15, but .* is sdxl; give two checkpoints"),
    ):
        with pytest.raises(LoraMisfit, match=said):
            extract_lora(small_sd15, other, rank=2)


# Weights in the original models' names, of the width by which the family is known; few rows where that is possible.
ORIGINAL_WEIGHTS = {
    "sd2": {
        "model.diffusion_model.input_blocks.1.1.proj_in": (8, 320),
        "model.diffusion_model.input_blocks.3.0.op": (8, 8, 3, 3),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_": (48, 16),
    },
    "sdxl": {
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k": (8, 2048),
        "model.diffusion_model.input_blocks.3.0.op": (8, 8, 3, 3),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1": (8, 6),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_": (18, 6),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_proj": (6, 8),
    },
    "sd3": {
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv": (4608, 1536),
        "model.diffusion_model.joint_blocks.23.context_block.adaLN_modulation.1": (3072, 1536),
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": (8, 4096),
    },
    "flux1": {"double_blocks.0.img_mod.lin": (8, 3072), "single_blocks.0.linear2": (8, 15360)},
    "chroma": {"distilled_guidance_layer.layers.0.in_layer": (8, 5120), "double_blocks.0.img_attn.proj": (8, 3072)},
    "flux2": {"model.diffusion_model.double_stream_modulation_img.lin": (8, 6144)},
    "flux3": {
        "txt_mode_blocks.0.q_proj": (8, 3072),
        "early_stream_modulations.txt.lin": (8, 3072),
        "txt_in": (8, 20480),
    },
    "lumina2": {"layers.0.attention.qkv": (3840, 2304), "cap_embedder.1": (8, 2304)},
    "zimage": {"layers.0.feed_forward.w1": (8, 3840), "layers.0.attention.out": (8, 3840)},
    "qwen-image": {"transformer_blocks.0.attn.add_q_proj": (8, 3072), "transformer_blocks.0.img_mod.1": (8, 3072)},
    "qwen-image-21": {"transformer_blocks.0.img_mlp.gate_up": (24576, 4096), "modulation.1": (8, 4096)},
    "krea2": {"blocks.0.attn.wk": (1536, 6144), "txtfusion.projector": (1, 12), "blocks.0.mlp.gate": (8, 6144)},
    "ernie-image": {"layers.0.self_attention.to_k": (8, 4096), "text_proj": (8, 3072), "final_norm.linear": (8, 4096)},
    "longcat-image": {
        "double_blocks.9.img_mod.lin": (8, 3072),
        "single_blocks.19.linear2": (8, 15360),
        "time_in.in_layer": (8, 256),
        "txt_in": (8, 3584),
    },
    "ideogram4": {"layers.0.attention.o": (8, 4608), "layers.0.feed_forward.w1": (8, 4608), "adaln_proj": (8, 4608)},
}


@pytest.mark.parametrize("family", mostly_slow(ORIGINAL_WEIGHTS, "sd2", "sdxl", "flux1", "chroma", "flux2", "zimage"))
def test_what_is_extracted_and_merged_in_makes_the_tuned_model(family, tmp_path):
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base, change = {}, {}
    for path, shape in ORIGINAL_WEIGHTS[family].items():
        name = f"{path}weight" if path.endswith("_") else f"{path}.weight"
        base[name] = random(*shape)
        change[name] = (random(shape[0], 2) @ random(2, math.prod(shape[1:]))).reshape(shape)
    base["first_stage_model.decoder.conv_in.weight"] = random(4, 4, 3, 3)
    tuned = {name: weight + change.get(name, 0) for name, weight in base.items()}
    save_safetensors(tmp_path / "base", base)
    save_safetensors(tmp_path / "tuned", tuned)
    lora, _ = extract_lora(tmp_path / "base", tmp_path / "tuned", rank=2)
    assert lora.family == family
    for scheme in ("kohya", "diffusers", "comfy"):
        converted = convert_lora(lora, scheme)[0]
        assert merge_into_checkpoint(tmp_path / "base", [(converted, 1.0)], tmp_path / "merged") == len(change)
        merged = SafetensorsFile.open(tmp_path / "merged")
        for name, weight in tuned.items():
            assert torch.allclose(merged[name], weight, atol=1e-2), name


@pytest.mark.parametrize("size", [(), (7,)])
def test_a_bias_of_another_size_than_its_layer_s_is_taken_for_none(size, tmp_path):
    layers = {"input_blocks.1.1.proj_in.": (8, 320), "middle_block.1.transformer_blocks.0.attn2.to_k.": (8, 1024)}
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        weights = {f"model.diffusion_model.{layer}weight": torch.full(shape, value) for layer, shape in layers.items()}
        save_safetensors(
            tmp_path / name, weights | {"model.diffusion_model.input_blocks.1.1.proj_in.bias": torch.ones(size)}
        )
    lora, _ = extract_lora(tmp_path / "base", tmp_path / "tuned", rank=1)
    assert len(lora.entries) == 2 and merge_into_checkpoint(tmp_path / "base", [(lora, 1.0)], tmp_path / "merged") == 2
    layer = lora.entries[0].name
    assert layer.endswith("proj_in")
    biased = replace(lora, tensors={**lora.tensors, f"{layer}.diff_b": torch.ones(8)})
    with pytest.raises(LoraMisfit, match=r"changes a bias, but .*proj_in has none"):
        merge_into_checkpoint(tmp_path / "base", [(biased, 1.0)], tmp_path / "merged")


@pytest.mark.parametrize(
    ("sign", "metadata"),
    [
        ({"double_blocks.0.img_mod.lin.scale_weight": torch.ones(1)}, {}),
        ({"double_blocks.0.img_mod.lin.weight": torch.ones(8, 3072, dtype=torch.int8)}, {}),
        ({}, {"_quantization_metadata": "{}"}),
    ],
)
def test_a_model_that_is_quantised_is_refused(tmp_path, sign, metadata):
    save_safetensors(tmp_path / "base", {"double_blocks.0.img_mod.lin.weight": torch.ones(8, 3072)} | sign, metadata)
    with pytest.raises(BadFile, match=f"is quantised, e.g. by '{next(iter(sign | metadata))}'"):
        extract_lora(tmp_path / "base", tmp_path / "base", rank=2)


def test_a_conversion_holds_one_module_in_memory(tmp_path):
    names = [f"lora_unet_double_blocks_{n}_img_attn_qkv" for n in range(12)]
    lora = LoraFile.from_tensors(kohya_tensors({name: [9216, 3072] for name in names}, rank=4, alpha=3.0), {})
    lora.save(tmp_path / "kohya")
    converted = convert_lora(LoraFile.read(tmp_path / "kohya"), "diffusers")[0]
    alive = []
    # The down matrices stay in the file; the up matrices are multiplied by alpha / rank.
    for name in [name for name in converted.tensors if name.endswith("lora_B.weight")]:
        alive.append(weakref.ref(converted.tensors[name]))
        assert sum(reference() is not None for reference in alive) <= 1
    converted.save(tmp_path / "diffusers")
    saved = SafetensorsFile.open(tmp_path / "diffusers")
    assert saved.metadata["sshs_model_hash"] == model_hash(dict(saved))
    assert saved.metadata["sshs_legacy_hash"] == legacy_hash(dict(saved), saved.metadata)


def saying(version: str, architecture: str, names: dict[str, tuple[int, int]]) -> LoraFile:
    tensors = {}
    for name, (outputs, inputs) in names.items():
        tensors[f"{name}.lora_down.weight"] = torch.ones(2, inputs)
        tensors[f"{name}.lora_up.weight"] = torch.ones(outputs, 2)
    metadata = {"ss_base_model_version": version, "modelspec.architecture": architecture, "modelspec.title": "A face"}
    return LoraFile.from_tensors(tensors, metadata)


MADE_FROM_A_LORA = {
    "convert": lambda lora: convert_lora(lora, "comfy")[0],
    "resize": lambda lora: resize_lora(lora, rank=1)[0],
    "merge": lambda lora: merge_loras([(lora, 1.0), (lora, 0.5)])[0],
}


@pytest.mark.parametrize("made", MADE_FROM_A_LORA)
def test_a_wrong_base_model_in_the_metadata_is_put_right(made):
    """ai-toolkit writes sd_1.5 when it is not told, whatever it has trained."""
    lora = saying("sd_1.5", "stable-diffusion-v1/lora", {"lora_unet_single_blocks_0_linear1": (21504, 3072)})
    metadata = MADE_FROM_A_LORA[made](lora).metadata
    assert metadata["ss_base_model_version"] == "flux1" and metadata["modelspec.architecture"] == "flux-1-dev/lora"
    assert metadata["modelspec.title"] == "A face"


@pytest.mark.parametrize("word", ["flux1", "flux.1", "FLUX.1-schnell", "somebody's own words"])
def test_what_does_not_contradict_the_tensors_is_left(word):
    lora = saying(word, "flux-1-schnell/lora", {"lora_unet_single_blocks_0_linear1": (21504, 3072)})
    assert lora.true_metadata == lora.metadata


KLEIN = "diffusion_model.double_blocks.0.img_attn.proj"


@pytest.mark.parametrize(
    ("width", "version", "architecture"),
    [
        (3072, "flux2_klein_4b", "flux.2-klein-4b/lora"),
        (4096, "flux2_klein_9b", "flux.2-klein-9b/lora"),
        (6144, "flux2", "flux.2-dev/lora"),
    ],
)
def test_the_metadata_name_the_published_model_that_the_sizes_tell(width, version, architecture):
    """As SwarmUI and ai-toolkit know them."""
    names = {KLEIN: (width, width), "diffusion_model.single_blocks.0.linear1": (9 * width, width)}
    for said in ("", "flux2", "flux_2_klein_9b"):
        lora = saying(said, "flux-2-dev/lora", names)
        metadata = convert_lora(lora, "kohya")[0].metadata
        assert metadata["ss_base_model_version"].replace("flux_2", "flux2") == version or not said
        assert metadata["modelspec.architecture"].replace("flux-2", "flux.2") == architecture
    of_none = LoraFile.from_tensors(lora.tensors, {})
    assert convert_lora(of_none, "kohya")[0].metadata["modelspec.architecture"] == architecture


def test_sd35_is_told_from_sd3_by_its_second_attention():
    name = "lora_unet_joint_blocks_0_x_block_attn2_proj"
    metadata = convert_lora(saying("sd3", "stable-diffusion-3-medium/lora", {name: (1536, 1536)}), "comfy")[0].metadata
    assert metadata["modelspec.architecture"] == "stable-diffusion-3-3-5-medium/lora"
    assert metadata["ss_base_model_version"] == "sd3"


def test_a_rotation_without_a_bound_gets_one_out_of_reach():
    """SD.Next and sd-scripts clamp the norm to alpha times the outputs, which of alpha 0 leaves nothing."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(8, 40, 40, generator=generator)
    tensors = {"lora_unet_mid_block_attentions_0_proj_in.oft_blocks": blocks}
    tensors["lora_unet_mid_block_attentions_0_proj_in.alpha"] = torch.tensor(0.0)
    lora, base = LoraFile.from_tensors(tensors, {}), torch.randn(320, 320, generator=generator)
    for scheme in ("kohya", "comfy"):
        converted, _ = convert_lora(lora, scheme)
        (alpha,) = (tensor.item() for key, tensor in converted.tensors.items() if key.endswith("alpha"))
        assert (blocks - blocks.transpose(1, 2)).norm() < alpha
        ((_, change),), ((_, before),) = converted.changes(lambda _: base), lora.changes(lambda _: base)
        assert torch.equal(change, before) and change.norm() > 1
