"""Applying a LoRA: the weights become W + strength * alpha / rank * B A, in our networks and in diffusers' pipelines."""

from dataclasses import replace

import pytest
import torch

from core.config import TrainConfig
from core.errors import LoraMisfit, UnmatchedKeys
from core.lora.apply import apply
from core.lora.file import LoraFile
from core.lora.modules import LoraModule
from core.models.quantised_layers import QuantisedLayer, quantise_weights
from core.training.methods.lora import attach as attach_lora
from tests.operation_count import count_operations
from tests.tooling import UNETS, mostly_slow

CPU = torch.device("cpu")
CONFIG = TrainConfig(rank=4, alpha=2.0, targets="transformer+conv", text_encoder_lr=1e-4)


@pytest.fixture(scope="module")
def loras(bases, tmp_path_factory) -> dict[str, LoraFile]:
    """For each family a LoRA file with random changes of the denoiser and of all text encoders."""
    result = {}
    for name, base in bases.items():
        networks = {part: base.load(part, CPU, torch.float32) for part in ("denoiser", *base.family.text_encoders)}
        adapter = attach_lora(networks, base.family, CONFIG, None)
        generator = torch.Generator().manual_seed(4)
        values = {
            key: 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in adapter.parameters().items()
        }
        metadata = {"ss_base_model_version": base.family.base_model_version}
        path = tmp_path_factory.mktemp("lora") / f"{name}.safetensors"
        LoraFile.from_modules(name, adapter.modules(values), metadata).save(path, torch.float32)
        result[name] = LoraFile.read(path)
    return result


def networks_of(base):
    return {part: base.load(part, CPU, torch.float32) for part in ("denoiser", *base.family.text_encoders)}


@pytest.mark.parametrize("family", UNETS)
def test_every_named_weight_changes_by_strength_times_alpha_over_rank_b_a(bases, loras, family):
    networks, originals = networks_of(bases[family]), networks_of(bases[family])
    apply(loras[family], {"family": family, **networks}, strength=0.8, text_encoder_strength=0.3)
    modules = loras[family].modules()
    assert {part for part, _ in modules} == set(networks)
    for part, network in networks.items():
        before = dict(originals[part].named_parameters())
        for name, weight in network.named_parameters():
            module = modules.get((part, name.removesuffix(".weight")))
            expected = before[name]
            if module is not None and name.endswith(".weight"):
                change = 2 / 4 * (module.up.flatten(1) @ module.down.flatten(1)).reshape(weight.shape)
                expected = expected + (0.8 if part == "denoiser" else 0.3) * change
            torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", mostly_slow(UNETS, "sd15"))
def test_a_diffusers_pipeline_gets_the_same_weights_as_from_diffusers_own_loader(bases, loras, family):
    untouched, ours, theirs = (bases[family].pipeline() for _ in range(3))
    parts = ("unet", *bases[family].family.text_encoders)
    for part in parts:
        for weight in getattr(theirs, part).parameters():
            weight.data = weight.data.clone()  # diffusers adds to it in place, and the three share a file's mapping
    apply(loras[family], ours)
    theirs.load_lora_weights(loras[family].name)
    theirs.fuse_lora(components=list(parts))
    theirs.unload_lora_weights()
    for part in parts:
        before, expected = (dict(getattr(pipeline, part).named_parameters()) for pipeline in (untouched, theirs))
        changed = 0
        for name, weight in getattr(ours, part).named_parameters():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
            changed += not torch.equal(weight, before[name])
        named = sum(module_part == part.replace("unet", "denoiser") for module_part, _ in loras[family].modules())
        assert changed == named > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_product_gives_the_same_weights_within_rounding(bases, loras, dtype, monkeypatch):
    """A GPU adds the product to the weight at once. Here the CPU does so too, for two LoRAs and a Tucker core."""
    first = loras["sd15"]
    key = next(name for name in first.tensors if "resnets" in name and name.endswith("lora_down.weight"))
    down, core = first.tensors[key], torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    tucker = {key: down[..., :1, :1].clone(), key.replace("lora_down", "lora_mid"): core}
    second = LoraFile.from_tensors({**first.tensors, **tucker}, first.metadata)
    assert any("mid" in entry.keys for entry in second.entries)
    found, operations = [], []
    for sums_apart in ("cpu", "none"):
        monkeypatch.setattr("core.lora.apply.SUMS_APART", sums_apart)
        networks = {part: network.to(dtype) for part, network in networks_of(bases["sd15"]).items()}
        target = {"family": "sd15", **networks}
        operations.append(count_operations(lambda on=target: [apply(first, on, 0.8), apply(second, on, -0.3)]))
        found.append({(part, name): weight for part in networks for name, weight in networks[part].named_parameters()})
    for name, expected in found[0].items():
        torch.testing.assert_close(
            found[1][name], expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
        )
    assert operations[1] < operations[0]  # The bits may be equal: some processors add the product as the sum does.


def test_what_was_applied_can_be_removed_bit_for_bit(bases, loras, tmp_path):
    networks, originals = networks_of(bases["sd15"]), networks_of(bases["sd15"])
    loras["sd15"].save(tmp_path / "me.safetensors")
    applied = apply(tmp_path / "me.safetensors", {"family": "sd15", **networks}, strength=1.7)
    assert not torch.equal(networks["denoiser"].conv_in.weight, networks["denoiser"].conv_out.weight)
    applied.remove()
    for part, network in networks.items():
        before = dict(originals[part].named_parameters())
        assert all(torch.equal(weight, before[name]) for name, weight in network.named_parameters())


@pytest.mark.parametrize("narrow", [False, True])
def test_what_is_applied_for_good_changes_the_same_and_keeps_no_originals(bases, loras, narrow, monkeypatch):
    networks, others = networks_of(bases["sd15"]), networks_of(bases["sd15"])
    monkeypatch.setattr("core.models.quantised_layers.SMALLEST", 1)
    for network in (networks["denoiser"], others["denoiser"]) if narrow else ():
        quantise_weights(network, CPU)
    applied = apply(loras["sd15"], {"family": "sd15", **networks}, for_good=True)
    apply(loras["sd15"], {"family": "sd15", **others})
    applied.remove()
    assert not applied.originals
    for part, network in networks.items():
        expected = dict(others[part].named_parameters())
        assert all(torch.equal(weight, expected[name]) for name, weight in network.named_parameters())
    layers = zip(networks["denoiser"].modules(), others["denoiser"].modules(), strict=True)
    quantised_pairs = [(one, other) for one, other in layers if isinstance(one, QuantisedLayer)]
    assert bool(quantised_pairs) == narrow
    assert all(torch.equal(one.weight, other.weight) for one, other in quantised_pairs)


def test_at_the_end_of_a_context_the_lora_is_removed_whatever_happened_in_it(bases, loras):
    denoiser = bases["sd15"].load("denoiser", CPU, torch.float32)
    before = {name: weight.clone() for name, weight in denoiser.state_dict().items()}
    with (
        pytest.raises(RuntimeError),
        apply(loras["sd15"].of_parts({"denoiser"}), {"family": "sd15", "denoiser": denoiser}),
    ):
        assert not all(torch.equal(weight, before[name]) for name, weight in denoiser.state_dict().items())
        raise RuntimeError
    assert all(torch.equal(weight, before[name]) for name, weight in denoiser.state_dict().items())


def test_text_encoders_that_are_not_there_are_left_alone(bases, loras):
    denoiser = bases["sdxl"].load("denoiser", CPU, torch.float32)
    applied = apply(loras["sdxl"], {"family": "sdxl", "denoiser": denoiser})
    assert {part for (part, _), _ in applied.originals} == {"denoiser"}


def test_a_denoiser_that_is_not_there_is_missed(bases, loras):
    encoder = bases["sd15"].load("text_encoder", CPU, torch.float32)
    with pytest.raises(LoraMisfit):
        apply(loras["sd15"], {"family": "sd15", "text_encoder": encoder})


def test_what_is_removed_has_the_precision_that_the_pipeline_has_by_then(bases, loras):
    pipeline = bases["sd15"].pipeline()
    before = {name: weight.to(torch.bfloat16) for name, weight in pipeline.unet.state_dict().items()}
    applied = apply(loras["sd15"], pipeline)
    pipeline.to(torch.bfloat16)
    applied.remove()
    after = pipeline.unet.state_dict()
    assert before and all(
        after[name].dtype == torch.bfloat16 and torch.equal(after[name], before[name]) for name in before
    )


def test_a_lora_of_t5_is_applied():
    """Its paths begin with `encoder.` like CLIP's, and have no `text_model.` before."""
    from transformers import T5Config, T5EncoderModel

    path = "encoder.block.0.layer.0.SelfAttention.q"
    network = T5EncoderModel(T5Config(d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=4, vocab_size=8))
    before = network.get_submodule(path).weight.detach().clone()  # pyright: ignore
    module = LoraModule(torch.randn(2, 16), torch.randn(16, 2), 1.0)
    apply(
        LoraFile.from_modules("flux1", {("text_encoder_2", path): module}, {}),
        {"family": "flux1", "text_encoder_2": network},
    )
    torch.testing.assert_close(network.get_submodule(path).weight, before + module.delta())


@pytest.mark.parametrize("wrong", ["of another family", "with a key that makes no sense"])
def test_a_lora_that_does_not_fit_is_refused_and_changes_nothing(bases, loras, wrong):
    lora, said = loras["sdxl"], "it is for sdxl, but the base model is sd15"
    if wrong == "with a key that makes no sense":
        broken = dict(loras["sd15"].tensors)
        last = [name for name in broken if name.endswith("lora_up.weight")][-1]
        lora, said = replace(loras["sd15"], tensors=broken | {last: broken[last][:-1]}), None
    networks, originals = networks_of(bases["sd15"]), networks_of(bases["sd15"])
    with pytest.raises((LoraMisfit, UnmatchedKeys), match=said):
        apply(lora, {"family": "sd15", **networks})
    for part, network in networks.items():
        before = dict(originals[part].named_parameters())
        assert all(torch.equal(weight, before[name]) for name, weight in network.named_parameters())


def test_a_pipeline_that_is_not_known_is_refused_with_those_that_are(loras):
    class WanPipeline:
        pass

    with pytest.raises(
        LoraMisfit, match=r"can't be applied to a WanPipeline\. Known pipelines: StableDiffusionPipeline"
    ):
        apply(loras["sd15"], WanPipeline())


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
DOWN_UP = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(32, 2), "alpha": torch.tensor(1.0)}


def named(modules: dict[str, dict[str, torch.Tensor]]) -> LoraFile:
    tensors = {
        f"lora_unet_{path.replace('.', '_')}.{role}": tensor
        for path, roles in modules.items()
        for role, tensor in roles.items()
    }
    return LoraFile.from_tensors(tensors, {"ss_base_model_version": "sd_v1"})


def test_changes_of_biases_and_normalisation_layers_are_applied_and_removed(bases):
    modules = {
        f"{BLOCK}.attn1.to_out.0": {**DOWN_UP, "diff_b": torch.full((32,), 3.0)},
        f"{BLOCK}.attn2.to_out.0": {"diff_b": torch.full((32,), 5.0)},
        f"{BLOCK}.norm1": {"w_norm": torch.full((32,), 7.0), "b_norm": torch.full((32,), 9.0)},
    }
    networks = networks_of(bases["sd15"])
    before = {name: value.clone() for name, value in networks["denoiser"].named_parameters()}
    applied = apply(named(modules), {"family": "sd15", **networks}, strength=0.5)
    after = dict(networks["denoiser"].named_parameters())
    expected = {
        f"{BLOCK}.attn1.to_out.0.weight": 0.5 * 0.5 * 2, f"{BLOCK}.attn1.to_out.0.bias": 1.5,
        f"{BLOCK}.attn2.to_out.0.bias": 2.5, f"{BLOCK}.norm1.weight": 3.5, f"{BLOCK}.norm1.bias": 4.5,
    }  # fmt: skip
    assert expected.keys() <= after.keys()
    for name, value in after.items():
        torch.testing.assert_close(value, before[name] + expected.get(name, 0.0), rtol=0, atol=1e-5)
    applied.remove()
    assert all(torch.equal(value, before[name]) for name, value in networks["denoiser"].named_parameters())


def test_the_bias_of_the_up_matrix_is_scaled_as_peft_scales_it(bases):
    """peft's lora_bias: merging adds lora_B.bias times the scaling to the bias of the layer."""
    path = f"{BLOCK}.attn1.to_out.0"
    roles = {
        "lora_down.weight": torch.zeros(2, 32),
        "lora_up.weight": torch.zeros(32, 2),
        "lora_up.bias": torch.ones(32),
    }
    networks = networks_of(bases["sd15"])
    bias = networks["denoiser"].get_submodule(path).bias.clone()  # pyright: ignore
    apply(named({path: {**roles, "alpha": torch.tensor(0.5)}}), {"family": "sd15", **networks})
    torch.testing.assert_close(networks["denoiser"].get_submodule(path).bias, bias + 0.25)  # pyright: ignore


def test_a_change_of_a_bias_that_is_not_there_is_a_misfit(bases):
    lora = named({f"{BLOCK}.attn1.to_q": {**DOWN_UP, "diff_b": torch.ones(32)}})
    with pytest.raises(LoraMisfit, match=r"changes a bias, but .*attn1.to_q has none"):
        apply(lora, {"family": "sd15", **networks_of(bases["sd15"])})
    lora = named({f"{BLOCK}.attn1.to_out.0": {"diff_b": torch.ones(31)}})
    with pytest.raises(LoraMisfit, match=r"a bias of 31 does not fit 32 outputs"):
        apply(lora, {"family": "sd15", **networks_of(bases["sd15"])})


def test_a_sum_too_large_for_the_weights_leaves_the_model_as_it_was(bases, loras):
    networks = {part: network.half() for part, network in networks_of(bases["sd15"]).items()}
    before = {name: tensor.clone() for name, tensor in networks["denoiser"].named_parameters()}
    for strength in (1e7, float("nan")):
        with pytest.raises(UnmatchedKeys, match=r"sd15\.safetensors: the weight of .* would hold NaN or infinity"):
            apply(loras["sd15"], {"family": "sd15", **networks}, strength)
    assert all(torch.equal(tensor, before[name]) for name, tensor in networks["denoiser"].named_parameters())
