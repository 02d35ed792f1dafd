"""How large changes are, from their factors alone; and broken LoRAs, which would draw black pictures."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.overrides import TorchFunctionMode

from core.cli import main
from core.errors import UnmatchedKeys
from core.lora.apply import apply
from core.lora.changes import change_norm, decomposed, factorise, largest_change, weight_change
from core.lora.convert import convert_lora, to_plain
from core.lora.file import LoraFile
from core.lora.inspect import inspect_lora, verify_lora
from core.lora.merge import merge_loras
from core.lora.modules import LoraModule
from core.lora.report import format_inspection
from core.lora.resize import resize_lora
from core.storage.safetensors_file import save_safetensors

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
Tensors = dict[str, torch.Tensor]


def of(**shapes: tuple[int, ...]) -> Tensors:
    return {
        role: torch.randn(shape, generator=torch.Generator().manual_seed(len(shapes))) for role, shape in shapes.items()
    }


FACTORS: dict[str, tuple[str, Tensors]] = {
    "lora": ("lora", of(down=(4, 30), up=(20, 4), alpha=())),
    "lora of too high a rank": ("lora", of(down=(40, 30), up=(20, 40))),
    "locon": ("locon", of(down=(4, 5, 3, 3), up=(20, 4, 1, 1))),
    "tucker": ("locon", of(down=(4, 30, 1, 1), up=(20, 4, 1, 1), mid=(4, 4, 3, 3), alpha=())),
    "tucker of too high a rank": ("locon", of(down=(40, 30, 1, 1), up=(20, 40, 1, 1), mid=(40, 40, 3, 3))),
    "loha": ("loha", of(hada_w1_a=(90, 6), hada_w1_b=(6, 80), hada_w2_a=(90, 7), hada_w2_b=(7, 80), alpha=())),
    "loha of low rank": ("loha", of(hada_w1_a=(90, 1), hada_w1_b=(1, 80), hada_w2_a=(90, 2), hada_w2_b=(2, 80))),
    "loha, tucker": (
        "loha",
        of(hada_w1_a=(6, 9), hada_w1_b=(5, 8), hada_t1=(6, 5, 3, 3), hada_w2_a=(2, 9), hada_w2_b=(7, 8), hada_t2=(2, 7, 3, 3)),
    ),
    "loha, tucker of low rank": (
        "loha",
        of(hada_w1_a=(1, 9), hada_w1_b=(2, 8), hada_t1=(1, 2, 3, 3), hada_w2_a=(2, 9), hada_w2_b=(1, 8), hada_t2=(2, 1, 3, 3)),
    ),
    "lokr": ("lokr", of(lokr_w1=(8, 6), lokr_w2=(30, 20, 3, 3), alpha=())),
    "lokr, factorised": (
        "lokr",
        of(lokr_w1_a=(8, 3), lokr_w1_b=(3, 6), lokr_w2_a=(5, 30), lokr_w2_b=(70, 20), lokr_t2=(5, 70, 3, 3), alpha=()),
    ),
    "full": ("full", of(diff=(20, 30))),
    "full, after its bias": ("full", of(diff_b=(20,), diff=(20, 30))),
    "norm, after its bias": ("norm", {"b_norm": torch.zeros(20), "w_norm": torch.ones(20)}),
}  # fmt: skip


@pytest.mark.parametrize("case", FACTORS)
def test_norm_and_bound_are_those_of_the_product(case):
    kind, tensors = FACTORS[case]
    change = weight_change(kind, tensors)
    assert change_norm(kind, tensors) == pytest.approx(change.norm().item(), rel=1e-4)
    assert change.abs().max() <= largest_change(kind, tensors) * 1.0001


class LargestTensor(TorchFunctionMode):
    """Sees every tensor that a function of torch returns."""

    numbers = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


SIDE = 8_000
CLAIMS: dict[str, dict[str, tuple[int, ...]]] = {
    "lokr": {"lokr_w1": (160, 160), "lokr_w2": (200, 200)},
    "loha": {"hada_w1_a": (SIDE, 2), "hada_w1_b": (2, SIDE), "hada_w2_a": (SIDE, 2), "hada_w2_b": (2, SIDE)},
    "rank of thousands": {"lora_down.weight": (SIDE, 1), "lora_up.weight": (1, SIDE)},
    "core": {
        "lokr_w1": (1, 1), "lokr_w2_a": (SIDE, 1), "lokr_w2_b": (2, 30), "lokr_t2": (SIDE, 2, 1, 1),
    },
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_file_is_inspected_without_large_tensors(claim, tmp_path):
    """A LoKr of 95 KB took 17 seconds and 3.4 GB."""
    tensors = {f"{NAME}.{role}": torch.full(shape, 0.1) for role, shape in CLAIMS[claim].items()}
    good = {"lora_down.weight": torch.ones(1, 768), "lora_up.weight": torch.ones(64, 1)}
    tensors |= {f"{NAME.replace('to_k', 'to_v')}.{role}": tensor for role, tensor in good.items()}
    save_safetensors(tmp_path / "a.safetensors", tensors)
    with LargestTensor() as seen:
        report = inspect_lora(tmp_path / "a.safetensors")
        verify_lora(tmp_path / "a.safetensors")
    assert not report["unknown_keys"] and report["norms"]["mid_block"] > 0
    assert 0 < seen.numbers <= 4 * sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("rank", [1, 3, 500])
@pytest.mark.parametrize("case", [case for case in FACTORS if case.startswith(("lokr", "loha"))])
def test_the_nearest_plain_lora_told_from_the_factors_is_that_of_the_product(case, rank):
    kind, tensors = FACTORS[case]
    change, found = weight_change(kind, tensors), decomposed(kind, tensors, rank)
    if found is None:
        assert case in ("loha", "loha, tucker")  # hardly larger than their factors
        return
    down, up, error = found.nearest(torch.arange(len(change)), rank)
    wanted_down, wanted_up, wanted_error = factorise(change, rank, case)
    assert down.shape[1:] == wanted_down.shape[1:] and up.shape[0] == wanted_up.shape[0] and up.ndim == wanted_up.ndim
    made, wanted = (LoraModule(*pair, pair[0].shape[0]).delta() for pair in ((down, up), (wanted_down, wanted_up)))
    assert torch.allclose(made, wanted, atol=1e-4 * float(change.norm()))
    assert error == pytest.approx(wanted_error, abs=1e-3)


def test_of_a_fused_kronecker_product_each_part_has_nearly_its_nearest():
    name, rank = "lora_unet_double_blocks_0_img_attn_qkv", 4
    lora = LoraFile(
        "flux1", {}, {f"{name}.{role}": tensor for role, tensor in of(lokr_w1=(8, 4), lokr_w2=(24, 16)).items()}
    )
    plain, error = to_plain(lora, rank)
    errors = []
    for module, change in lora.changes():
        found = plain.modules()[module].delta()
        errors.append(((found - change).norm() / change.norm()).item())
        assert errors[-1] <= 1.1 * factorise(change, rank, name)[2]
    assert len(errors) == 3 and error == pytest.approx(max(errors), rel=1e-3)


@pytest.mark.parametrize("claim", ["lokr", "loha", "core", "fused"])
def test_a_plain_lora_is_made_without_large_tensors(claim):
    name, family = ("lora_unet_double_blocks_0_img_attn_qkv", "flux1") if claim == "fused" else (NAME, "sd15")
    claims = CLAIMS | {"fused": {"lokr_w1": (180, 60), "lokr_w2": (50, 50)}}
    tensors = {f"{name}.{role}": torch.full(shape, 0.01) for role, shape in claims[claim].items()}
    with LargestTensor() as seen:
        made, _ = to_plain(LoraFile(family, {}, tensors), rank=4)
    results = [tensor for module in made.modules().values() for tensor in (module.down, module.up)]
    assert 0 < seen.numbers <= 8 * sum(tensor.numel() for tensor in [*tensors.values(), *results])


def plain(**changes: torch.Tensor) -> Tensors:
    roles = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(32, 2), "alpha": torch.tensor(1.0)}
    return roles | {role.replace("_weight", ".weight"): tensor for role, tensor in changes.items()}


BROKEN: dict[str, tuple[Tensors, str]] = {
    "NaN": (plain(lora_up_weight=torch.full((32, 2), math.nan)), "contains NaN or infinity"),
    "infinity": (plain(lora_down_weight=torch.full((2, 32), math.inf)), "contains NaN or infinity"),
    "alpha": (plain(alpha=torch.tensor(math.nan)), "contains NaN or infinity"),
    "product": (plain(alpha=torch.tensor(2e6)), r"contains values up to 2e\+06, too large for a weight"),
    "product of 64 bits": (plain(alpha=torch.tensor(1e300, dtype=torch.float64)), "its change contains "),
    "loha": (
        {"hada_w1_a": torch.full((32, 1), 1e3), "hada_w1_b": torch.ones(1, 32), "hada_w2_a": torch.full((32, 1), 1e3),
         "hada_w2_b": torch.ones(1, 32)},
        r"contains values up to 1e\+06",
    ),
    "lokr": ({"lokr_w1": torch.full((4, 4), 1e3), "lokr_w2": torch.full((8, 8), 1e3)}, r"contains values up to 1e\+06"),
}  # fmt: skip


def on_a_model(lora: LoraFile) -> None:
    model = torch.nn.Module()
    inner = model
    for name in ("mid_block", "attentions", "0", "transformer_blocks", "0", "attn2"):
        inner.add_module(name, torch.nn.Module())
        inner = inner.get_submodule(name)
    inner.add_module("to_k", torch.nn.Linear(32, 32, bias=False))
    apply(lora, {"family": "sd15", "denoiser": model})


TOOLS: dict[str, Callable[[LoraFile], object]] = {
    "apply": on_a_model,
    "convert": lambda lora: convert_lora(lora, "kohya"),
    "to_plain": lambda lora: to_plain(lora, rank=1),
    "merge": lambda lora: merge_loras([(lora, 1.0)]),
    "resize": lambda lora: resize_lora(lora, rank=1),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_lora_is_refused_by_the_name_of_its_module(case, tool):
    roles, message = BROKEN[case]
    if tool in ("merge", "resize") and case in ("loha", "lokr"):
        message = "convert it to a plain LoRA"
    lora = LoraFile("sd15", {}, {f"{NAME}.{role}": tensor for role, tensor in roles.items()}, name="bad")
    with pytest.raises(UnmatchedKeys, match=f"bad: {NAME}.* {message}"):
        TOOLS[tool](lora)


@pytest.mark.parametrize("case", BROKEN)
def test_verify_finds_what_is_broken_and_inspect_shows_it(case, tmp_path):
    path = tmp_path / "bad.safetensors"
    save_safetensors(path, {f"{NAME}.{role}": tensor for role, tensor in BROKEN[case][0].items()})
    faults = [fault.text for fault in verify_lora(path) if fault.is_error]
    assert [text for text in faults if NAME in text and ("NaN" in text or "too large for a weight" in text)], faults
    assert format_inspection(inspect_lora(path))


def test_words_with_nan_are_refused_before_anything_is_written(tmp_path):
    path, output = tmp_path / "bad.safetensors", tmp_path / "out.safetensors"
    tensors = {f"{NAME}.{role}": tensor for role, tensor in plain().items()}
    save_safetensors(path, tensors | {"bundle_emb.sks.string_to_param.*": torch.full((2, 768), math.nan)})
    for scheme in ("kohya", "diffusers"):
        assert main(["convert", str(path), "--output", str(output), "--to", scheme]) == 1
        assert main(["merge", str(path), "--output", str(output), "--to", scheme]) == 1
    assert main(["resize", str(path), "--output", str(output), "--rank", "1"]) == 1
    assert not output.exists()


def test_an_empty_tensor_beside_the_factors_is_no_change():
    tensors = FACTORS["lora"][1]
    assert largest_change("dora", tensors | {"dora": torch.empty(0)}) == largest_change("lora", tensors)
