"""DoRA, LoHa, LoKr and OFT: each against the formula of its paper, from the first step to the file and back."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from core.config import TrainConfig
from core.errors import BadConfig, LoraMisfit, TrainingDiverged, UnmatchedKeys
from core.lora.apply import apply
from core.lora.convert import convert_lora
from core.lora.file import LoraFile
from core.lora.modules import name_kinds, stands_alone
from core.models import load_base
from core.tensor_names import NAME_TABLES
from core.training.inputs import TrainingInputs
from core.training.methods import METHODS, attach
from core.training.methods.dora import column_norms
from core.training.step import Run
from tests.tooling import SMALL_SDXL, assert_goes_on_exactly, mostly_slow, write_checkpoint

CPU = torch.device("cpu")
KINDS = ("dora", "loha", "lokr", "oft")
CONFIG = TrainConfig(
    rank=4, alpha=2.0, targets="transformer+conv", min_snr_gamma=0.0, precision="fp32", learning_rate=1e-2, steps=3
)


def config_of(method: str) -> TrainConfig:
    return replace(CONFIG, method=method)


def adapter_of(base, config, parts=("denoiser",), continue_from=None):
    return attach({part: base.load(part, CPU, torch.float32) for part in parts}, base.family, config, continue_from)


def stir(parameters, amount=0.1):
    """Values as after some training: every tensor moved away from where it started."""
    generator = torch.Generator().manual_seed(3)
    for _, parameter in sorted(parameters.items()):
        parameter.data += amount * torch.randn(parameter.shape, generator=generator)


def changed_weight(method: str, weight, roles, rank=4, alpha=2.0):
    """W' of a module by the formula of its paper, differentiable; written anew from the papers for this test."""
    matrix = weight.flatten(1)
    if method == "dora":  # arXiv:2402.09353, eq. 5 and section 4.3
        moved = matrix + alpha / rank * roles["up"].flatten(1) @ roles["down"].flatten(1)
        columns = moved.reshape(weight.shape)
        norm = columns.pow(2).sum(dim=[axis for axis in range(weight.ndim) if axis != 1], keepdim=True).sqrt().detach()
        return roles["dora"].reshape(1, -1, *[1] * (weight.ndim - 2)) * columns / norm
    if method == "loha":  # arXiv:2108.06098, prop. 1
        first, second = roles["hada_w1_a"] @ roles["hada_w1_b"], roles["hada_w2_a"] @ roles["hada_w2_b"]
        return (matrix + alpha / rank * first * second).reshape(weight.shape)
    if method == "lokr":  # arXiv:2309.14859, eq. 6; a whole second factor has no rank to divide by
        whole = "lokr_w2" in roles
        second = roles["lokr_w2"].flatten(1) if whole else roles["lokr_w2_a"] @ roles["lokr_w2_b"]
        product = torch.einsum("ij,kl->ikjl", roles["lokr_w1"], second).reshape(matrix.shape)
        return (matrix + (1.0 if whole else alpha / rank) * product).reshape(weight.shape)
    blocks = roles["oft_blocks"]  # arXiv:2306.07280, eq. 3: orthogonal blocks by Cayley's transform
    skew, identity = blocks - blocks.mT, torch.eye(blocks.shape[1])
    rotations = (identity + skew) @ torch.linalg.inv(identity - skew)
    return (torch.block_diag(*rotations).T @ matrix).reshape(weight.shape)


def reference_prediction(base, method, values, noisy, timesteps, text):
    unet = base.load("denoiser", CPU, torch.float32)
    weights = dict(unet.named_parameters())
    modules: dict[str, dict] = {}
    for name, value in values.items():
        path, _, role = name.removeprefix("denoiser.").rpartition(".")
        modules.setdefault(path, {})[role] = value
    for path, roles in modules.items():
        weights[f"{path}.weight"] = changed_weight(method, weights[f"{path}.weight"], roles)
    arguments = {"encoder_hidden_states": text["context"]}
    if "pooled" in text:
        arguments["added_cond_kwargs"] = {"text_embeds": text["pooled"], "time_ids": text["time_ids"]}
    return torch.func.functional_call(unet, weights, (noisy, timesteps), arguments).sample


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", KINDS)
def test_the_gradient_of_a_step_is_that_of_the_papers_formula(bases, caches, family, method):
    base = bases[family]
    run = Run(TrainingInputs.on(CPU, caches[family], base, config_of(method)))
    stir(run.parameters)
    images = [run.examples.images[index] for index in run.examples.batches.at(0)]
    _, noise, noisy, timesteps = run.examples.noised(images, run.examples.generator("noise", 0))
    (loss,) = map(run.loss_of, run.examples.passes(0))
    loss.backward()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in run.parameters.items()}
    text = run.examples.conditioning(images, [image.caption for image in images])
    expected = F.mse_loss(reference_prediction(base, method, leaves, noisy, timesteps, text), noise)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, parameter in run.parameters.items():
        ours, theirs = parameter.grad, leaves[name].grad
        assert ours is not None and theirs is not None
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-8, name


@pytest.mark.parametrize("method", ("lora", *KINDS))
def test_a_new_adapter_changes_nothing_and_disabled_is_the_frozen_network(bases, caches, method):
    base, config = bases["sd15"], config_of(method)
    plain = base.load("denoiser", CPU, torch.float32)
    run = Run(TrainingInputs.on(CPU, caches["sd15"], base, config))
    noisy, timesteps, text = torch.randn(1, 4, 16, 16), torch.tensor([400]), run.examples.text["a photo of sks person"]

    def draw(denoiser):
        with torch.no_grad():
            return base.family.predict(denoiser, noisy, timesteps, text)

    expected = draw(plain)
    torch.testing.assert_close(draw(run.model.denoiser), expected, rtol=1e-4, atol=1e-5)
    stir(run.parameters)
    changed = draw(run.model.denoiser)
    assert (changed - expected).norm() > 1e-2 * expected.norm()
    with run.model.adapter.disabled():
        assert torch.equal(draw(run.model.denoiser), expected)
    assert torch.equal(draw(run.model.denoiser), changed)


@pytest.mark.parametrize("method", mostly_slow(("lora", *KINDS), "lora", "loha"))
def test_only_the_adapter_is_trained_on_every_network(bases, method):
    adapter = adapter_of(bases["sdxl"], config_of(method), ("denoiser", "text_encoder", "text_encoder_2"))
    trained = {id(p) for network in adapter.networks.values() for p in network.parameters() if p.requires_grad}
    parameters = adapter.parameters()
    assert trained == {id(p) for p in parameters.values()}
    assert {name.partition(".")[0] for name in parameters} == set(adapter.networks)
    assert {p.dtype for p in parameters.values()} == {torch.float32}


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", mostly_slow(("lora", *KINDS), "lora", "dora", "loha"))
def test_the_saved_file_read_and_applied_draws_what_the_adapter_drew(bases, caches, family, method, tmp_path):
    base = bases[family]
    run = Run(TrainingInputs.on(CPU, caches[family], base, config_of(method)))
    stir(run.parameters)
    metadata = {"ss_base_model_version": base.family.base_model_version}
    run.model.adapter.export(run.parameters, base, metadata).save(tmp_path / "a.safetensors", torch.float32)
    file = LoraFile.read(tmp_path / "a.safetensors")
    assert (file.kind.replace("locon", "lora"), file.family, file.unknown_keys) == (method, family, ())
    applied = base.load("denoiser", CPU, torch.float32)
    apply(file, {"family": family, "denoiser": applied})
    noisy, timesteps = torch.randn(1, 4, 16, 16), torch.tensor([400])
    text = run.examples.conditioning(run.examples.images[:1], ["a photo of sks person"])
    with torch.no_grad():
        expected = base.family.predict(run.model.denoiser, noisy, timesteps, text)
        found = base.family.predict(applied, noisy, timesteps, text)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", KINDS)
def test_it_becomes_a_plain_lora_with_the_error_that_is_stated(bases, method):
    base = bases["sd15"]
    adapter = adapter_of(base, config_of(method))
    stir(adapter.parameters())
    file = adapter.export(adapter.parameters(), base, {"ss_base_model_version": "sd_v1"})
    tensors = base.components["denoiser"].tensors

    def weight(module):
        return tensors[f"{module[1]}.weight"]

    plain, stated = convert_lora(file, "kohya", plain_rank=8, base_weight=weight)  # pyright: ignore
    wanted, found = dict(file.changes(weight)), dict(plain.changes())  # pyright: ignore
    errors = [((found[module] - change.reshape(found[module].shape)).norm() / change.norm()).item()
              for module, change in wanted.items()]  # fmt: skip
    assert set(found) == set(wanted) and 0 < max(errors) < 1
    assert stated == pytest.approx(max(errors), rel=1e-2)


@pytest.mark.parametrize("method", ("lora", *KINDS))
def test_going_on_from_a_file_starts_with_its_change_whatever_its_alpha(bases, method, tmp_path):
    base = bases["sd15"]
    first = adapter_of(base, config_of(method))
    stir(first.parameters())
    metadata = {"ss_base_model_version": "sd_v1"}
    first.export(first.parameters(), base, metadata).save(tmp_path / "a.safetensors", torch.float32)
    file = LoraFile.read(tmp_path / "a.safetensors")
    second = adapter_of(base, replace(config_of(method), alpha=8.0), continue_from=file)
    tensors = base.components["denoiser"].tensors
    wanted, found = (
        dict(lora.changes(lambda module: tensors[f"{module[1]}.weight"]))  # pyright: ignore
        for lora in (file, second.export(second.parameters(), base, metadata))
    )
    assert wanted and all(torch.allclose(found[module], wanted[module], rtol=1e-4, atol=1e-6) for module in wanted)


@pytest.mark.parametrize("method", mostly_slow(KINDS, "lokr"))
def test_a_file_of_another_method_or_rank_to_go_on_from_is_refused(bases, method):
    base = bases["sd15"]
    other = adapter_of(base, config_of("lora"))
    with pytest.raises(LoraMisfit, match="Choose the same"):
        adapter_of(base, config_of(method), continue_from=other.export(other.parameters(), base, {}))
    same = adapter_of(base, config_of(method))
    with pytest.raises(LoraMisfit):
        adapter_of(base, replace(config_of(method), rank=2), continue_from=same.export(same.parameters(), base, {}))


@pytest.mark.parametrize("method", mostly_slow(METHODS, "lora", "dora", "textual-inversion", "pivotal", "dreambooth"))
def test_a_run_that_is_cancelled_goes_on_exactly(bases, caches, method, tmp_path):
    assert_goes_on_exactly(caches["sd15"], bases["sd15"], config_of(method), tmp_path)


NOT_OF_A_METHOD = {
    **{method: {"dropout": 0.1, "lora_plus_ratio": 16.0} for method in ("loha", "lokr", "oft", "dreambooth")},
    "textual-inversion": {"rslora": True},
}


@pytest.mark.parametrize("method", NOT_OF_A_METHOD)
def test_settings_that_a_method_does_not_have_are_refused_by_name(bases, caches, method):
    for name, value in NOT_OF_A_METHOD[method].items():
        with pytest.raises(BadConfig, match=f"{name}: method '{method}' doesn't have this setting"):
            Run(TrainingInputs.on(CPU, caches["sd15"], bases["sd15"], replace(config_of(method), **{name: value})))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("dreambooth", "continues from a checkpoint"),
        *((name, f"method '{name}' starts from words, not from a file") for name in ("textual-inversion", "pivotal")),
    ],
)
def test_what_starts_from_no_lora_refuses_one_to_go_on_from(bases, caches, method, said):
    with pytest.raises(LoraMisfit, match=said):
        Run(TrainingInputs.on(CPU, caches["sd15"], bases["sd15"], config_of(method), start=LoraFile("sd15", {}, {})))


def test_a_row_count_that_no_block_divides_is_refused(bases):
    with pytest.raises(BadConfig, match=r"rank = 1: .* has 32 rows"):
        adapter_of(bases["sd15"], replace(config_of("oft"), rank=1))


def test_modules_that_are_one_in_all_names_that_comfyui_reads_are_refused_by_name():
    with pytest.raises(
        UnmatchedKeys, match="to_k is fused with 2 other modules in files of lumina2; only a plain LoRA"
    ):
        name_kinds(NAME_TABLES["lumina2"], {("denoiser", "layers.0.attn.to_k"): {}})


def test_a_module_stands_alone_unless_comfyui_knows_it_as_one_with_others():
    assert stands_alone(NAME_TABLES["zimage"], "layers.0.attention.to_k")  # whose diffusers names it knows
    assert stands_alone(NAME_TABLES["lumina2"], "layers.0.attn.to_out.0")
    assert not stands_alone(NAME_TABLES["lumina2"], "layers.0.attn.to_k")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_becomes_nan_stops_with_the_photo_and_the_learning_rate(bases, caches, method):
    run = Run(TrainingInputs.on(CPU, caches["sd15"], bases["sd15"], config_of(method)))
    next(iter(run.parameters.values())).data.fill_(float("nan"))
    run.train_step()
    rate = "0.005" if method == "textual-inversion" else "0.01"  # that of the vectors
    with pytest.raises(TrainingDiverged, match=rf"in step 1 on [12]\.png at learning rate {rate}"):
        run.check_finite()


def test_two_files_together_change_each_weight_by_their_sum(bases):
    """A person and a style: also where one is no plain LoRA; the second of two that depend on the weight sees the first."""
    base, files = bases["sd15"], []
    tensors = base.components["denoiser"].tensors
    for method in ("lora", "loha"):
        adapter = adapter_of(base, config_of(method))
        stir(adapter.parameters())
        files.append(adapter.export(adapter.parameters(), base, {"ss_base_model_version": "sd_v1"}))
    denoiser = base.load("denoiser", CPU, torch.float32)
    applied = [
        apply(file, {"family": "sd15", "denoiser": denoiser}, s) for file, s in zip(files, (0.8, 0.5), strict=True)
    ]
    first, second = (dict(file.changes()) for file in files)
    assert first.keys() == second.keys()
    for (part, path), change in first.items():
        before = tensors[f"{path}.weight"]
        wanted = before + 0.8 * change.reshape(before.shape) + 0.5 * second[part, path].reshape(before.shape)
        torch.testing.assert_close(denoiser.get_submodule(path).weight.data, wanted, rtol=1e-5, atol=1e-6)
    for one in reversed(applied):
        one.remove()
    assert all(torch.equal(value, tensors[name]) for name, value in denoiser.state_dict().items())


@pytest.mark.parametrize("method", ["lora", "dora", "loha"])
def test_a_lora_of_an_sdxl_with_one_block_a_level_has_its_names(method, tmp_path):
    """The published models have two, and so other numbers in the original names, which Kohya's are made of."""
    shape = replace(SMALL_SDXL, unet=SMALL_SDXL.unet | {"layers_per_block": 1})
    base = load_base(write_checkpoint(tmp_path / "base", shape, torch.float32))
    networks = {"denoiser": base.load("denoiser", CPU, torch.float32)}
    paths = {name.replace(".", "_") for name, layer in networks["denoiser"].named_modules() if hasattr(layer, "weight")}
    config = replace(config_of(method), targets="transformer+conv")
    adapter = METHODS[method].attach(networks, base.family, config, None)
    lora = adapter.export(adapter.parameters(), base, {})
    assert isinstance(lora, LoraFile)
    names = {entry.name for entry in lora.entries}
    assert len(names) > 20 and names <= {f"lora_unet_{path}" for path in paths}


@pytest.mark.parametrize(
    ("blocks", "of_published"),
    [([2, 2, 2], True), ([1, 1, 1], False), ([1, 2, 2], False), (None, False), ([], False), ([[2]], False)],
)
def test_a_unet_whose_config_lists_its_blocks_has_their_names(blocks, of_published, tmp_path):
    base = load_base(write_checkpoint(tmp_path / "base", SMALL_SDXL, torch.float32))
    base.components["denoiser"].config["layers_per_block"] = blocks
    assert base.names.original_in_kohya == of_published


def test_no_checkpoint_is_written_of_a_unet_whose_levels_have_unlike_blocks(tmp_path):
    """The original names have no place for it, which is said before anything is trained."""
    base = load_base(write_checkpoint(tmp_path / "base", SMALL_SDXL, torch.float32))
    base.components["denoiser"].config["layers_per_block"] = [1, 2, 2]
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(base.components["denoiser"].config)
    assert isinstance(network, torch.nn.Module)
    with pytest.raises(BadConfig, match=r"'dreambooth'.* levels have unlike blocks"):
        METHODS["dreambooth"].attach({"denoiser": network}, base.family, TrainConfig(method="dreambooth"), None)


def test_the_lengths_of_doras_columns_are_exact():
    """Torch's own norm over a dimension that is not the last adds up one after the other, which loses digits."""
    weight = torch.randn(3072, 640, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = weight.double().norm(dim=0)
    assert ((column_norms(weight) - exact).abs() / exact).max() < 1e-6
