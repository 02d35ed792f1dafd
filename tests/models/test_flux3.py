"""FLUX.3 Klein against diffusers: its flow map and its steps, and models that ComfyUI 0.30 does not have."""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.flux3 import before_denoise, decoders, encoders
from torch import Tensor

from core.config import TrainConfig
from core.errors import BadConfig, LoraMisfit
from core.lora.apply import apply
from core.lora.file import LoraFile
from core.lora.inspect import verify_lora
from core.lora.readers import not_loaded_by
from core.models import load_base
from core.models.families import FAMILIES
from core.models.memory_plan import blocks_of
from core.pictures.sampling import sample_latents, sampler_name
from core.tensor_names import NAME_TABLES
from core.training.job import check_base_options
from tests.models.family_parts import CPU, error_of, published_lora, random_texts
from tests.models.references import REFERENCES, flux3
from tests.tooling import random_lora, small_flow_base

pytestmark = pytest.mark.ci

FAMILY = FAMILIES["flux3"]
REFERENCE = REFERENCES["flux3"]


@torch.no_grad()
def test_a_flow_map_is_known_by_its_file_and_predicts_towards_the_time_that_it_is_given():
    theirs = REFERENCE.denoiser("flux3", flow_map=True)
    trained_with = {"repa_projectors.0.weight": torch.zeros(3, 3)}
    base = load_base(REFERENCE.original("flux3", theirs) | trained_with)
    assert base.family is FAMILY and base.is_distilled and not small_flow_base("flux3").is_distilled
    ours, generator = base.load("denoiser", CPU, torch.float32), torch.Generator().manual_seed(2)
    latents, times, target = (
        torch.randn(2, 128, 4, 6, generator=generator),
        torch.tensor([0.2, 0.9]),
        torch.tensor([0.1, 0.8]),
    )
    texts = random_texts((9, 4), 32, generator)
    prediction = FAMILY.predict(ours, latents, 1000 * times, texts | {"target": 1000 * target})
    for row, length in enumerate((9, 4)):
        each = slice(row, row + 1)
        expected = flux3(theirs, latents[each], times[each], texts["context"][each, :length], target[each])
        assert error_of(prediction[each], expected) < 1e-5


@torch.no_grad()
def test_pictures_are_encoded_and_decoded_as_by_diffusers_blocks():
    base = small_flow_base("flux3")
    vae: Any = base.load("vae", CPU, torch.float32)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    pixels = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    state = SimpleNamespace(condition_images=[pixels])
    step = encoders.Flux3VaeEncoderStep()
    step.get_block_state, step.set_block_state = lambda _: state, lambda *_: None  # pyright: ignore
    step(SimpleNamespace(vae=vae, _execution_device=CPU), None)  # pyright: ignore
    mean, _ = FAMILY.encode_image(vae, pixels)
    torch.testing.assert_close(mean, state.image_cond_latents[0])
    mean_of, deviation_of = (
        vae.bn.running_mean.view(1, -1, 1, 1),
        (vae.bn.running_var + vae.bn.eps).sqrt().view(1, -1, 1, 1),
    )
    expected = vae.decode(decoders.Flux3DecodeStep._unpatchify_latents(mean * deviation_of + mean_of)).sample
    torch.testing.assert_close(FAMILY.decode_latents(vae, mean), expected)


@torch.no_grad()
@pytest.mark.parametrize("flow_map", [False, True], ids=["base", "distilled"])
def test_pictures_are_drawn_along_diffusers_steps(flow_map):
    """diffusers' scheduler with the shift and the steps of its blocks, and its guidance; two texts of different lengths."""
    base, denoiser = small_flow_base("flux3", flow_map=flow_map), REFERENCE.denoiser("flux3", flow_map=flow_map)
    generator = torch.Generator().manual_seed(1)
    positive, negative = (random_texts((length,), 32, generator) for length in (9, 4))
    ours = sample_latents(
        base, denoiser, [positive], [negative], device=CPU, dtype=torch.float32, seeds=[5], size=(24, 16),
        steps=base.steps, guidance=base.guidance,
    )  # fmt: skip
    steps = before_denoise.Flux3SetTimestepsStep()
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=steps.shift)
    count = 16 if flow_map else steps.num_inference_steps
    scheduler.set_timesteps(sigmas=[1 - index / count for index in range(count)])
    guider: Any = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    latents = torch.randn(128, *ours.shape[2:], generator=torch.Generator().manual_seed(5))[None]
    times = scheduler.timesteps
    assert len(times) == base.steps
    for index, time in enumerate(times):
        following = times[index + 1 : index + 2] if index + 1 < len(times) else torch.zeros(1)
        target = following / 1000 if flow_map else None
        found = [
            flux3(denoiser, latents, time[None] / 1000, states["context"], target) for states in (positive, negative)
        ]
        guider.set_state(step=index, num_inference_steps=count, timestep=time)
        velocity = found[0] if flow_map else guider.forward(*found).pred
        latents = scheduler.step(velocity, time, latents, return_dict=False)[0]  # pyright: ignore
    assert error_of(ours, latents) < 1e-4


def test_a_flow_map_is_drawn_with_eulers_method_alone():
    base = small_flow_base("flux3", flow_map=True)
    assert sampler_name(None, base) == "euler" and sampler_name("unipc", small_flow_base("flux3")) == "unipc"
    with pytest.raises(BadConfig, match="is a flow map, which only supports euler"):
        sampler_name("unipc", base)


def test_a_flow_map_is_trained_only_where_it_is_allowed():
    base = small_flow_base("flux3", flow_map=True)
    with pytest.raises(BadConfig, match=r"distilled to a few steps, .* set allow_distilled"):
        check_base_options(base, TrainConfig())
    check_base_options(base, TrainConfig(allow_distilled=True))
    denoiser, generator = REFERENCE.denoiser("flux3", flow_map=True), torch.Generator().manual_seed(1)
    latents, times = torch.randn(1, 128, 4, 4, generator=generator), torch.tensor([0.3])
    states = random_texts((9,), 32, generator)
    with torch.no_grad():
        ours = FAMILY.predict(denoiser, latents, 1000 * times, states)
        assert error_of(ours, flux3(denoiser, latents, times, states["context"], times)) < 1e-5


def test_blocks_of_the_picture_are_in_memory_plans_too():
    denoiser = small_flow_base("flux3", num_layers=2, num_single_layers=3).load("denoiser", CPU, torch.float32)
    paths = [path for path, module in denoiser.named_modules() if module in blocks_of(denoiser)]
    kinds = ("mode_blocks.image", "txt_mode_blocks", "single_transformer_blocks")
    assert paths == [f"{kind}.{index}" for kind in kinds for index in range(3 if kind.startswith("single") else 2)]


def test_blocks_for_shown_pictures_are_not_loaded():
    base = small_flow_base("flux3")
    lora = random_lora(base, FAMILY.denoiser_targets["attention"])
    of_shown = {
        ("denoiser", path.replace(".image.", ".image_cond.")): module
        for (_, path), module in lora.modules().items()
        if ".image." in path
    }
    whole = LoraFile.from_modules(FAMILY.name, lora.modules() | of_shown, {}, "comfy")

    def weights(network: Any, file: LoraFile) -> dict[str, Tensor]:
        with apply(file, {"family": FAMILY.name, "denoiser": network}):
            return {name: tensor.clone() for name, tensor in network.state_dict().items()}

    loaded: Any = base.load("denoiser", CPU, torch.float32)
    found, expected = weights(loaded, whole), weights(loaded, lora)
    assert not any("image_cond" in name for name in found) and all(torch.equal(found[n], expected[n]) for n in expected)
    theirs, changed = REFERENCE.denoiser("flux3"), "mode_blocks.image_cond.0.attn.to_q.weight"
    assert not torch.equal(weights(theirs, whole)[changed], theirs.state_dict()[changed])
    with pytest.raises(LoraMisfit, match=r"has no mode_blocks\.image_cond"):
        weights(loaded, LoraFile.from_modules(FAMILY.name, of_shown, {}, "comfy"))


# Models that ComfyUI 0.30 does not have: modules of them, and of how many diffusers does not know Kohya's names.
NOT_IN_COMFYUI = {
    "flux3": (
        "FLUX.3 Klein", 3,
        {"mode_blocks.image.4.attn.to_q": (3072, 3072), "txt_mode_blocks.0.ff.linear_in": (18432, 3072),
         "single_transformer_blocks.27.attn.to_out.0": (3072, 3072)},
    ),
    "qwen-image-21": (
        "Qwen-Image 2.1", 1,
        {"transformer_blocks.31.attn.to_q": (4096, 4096), "transformer_blocks.31.img_mlp.gate_layer": (12288, 4096),
         "transformer_blocks.31.img_mlp.proj": (12288, 4096)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["kohya", "diffusers", "comfy"])
@pytest.mark.parametrize("family", NOT_IN_COMFYUI)
def test_inspect_says_that_comfyui_030_does_not_have_it_and_what_diffusers_loads(family, scheme, tmp_path):
    title, unknown, shapes = NOT_IN_COMFYUI[family]
    lora = published_lora(tmp_path / "a.safetensors", family, scheme, shapes)
    assert (lora.family, lora.identity.models) == (family, (title,))
    assert set(not_loaded_by("ComfyUI", lora).values()) == {f"{family} at all"}
    assert len(not_loaded_by("diffusers", lora)) == (unknown if scheme == "kohya" else 0)
    faults = [fault.text for fault in verify_lora(tmp_path / "a.safetensors")]
    assert f"ComfyUI 0.30 does not support {family}; later versions may" in faults
    assert not any("convert it" in fault for fault in faults)


@pytest.mark.parametrize(
    ("family", "module", "models"),
    [
        ("flux1", "single_transformer_blocks.0.attn.to_q", {"FLUX.1", "FLUX.3 Klein"}),
        ("flux2", "transformer_blocks.0.attn.to_q", {"FLUX.2 klein 9B", "Qwen-Image 2.1"}),
    ],
)
def test_attention_that_two_models_have_is_of_the_one_that_the_metadata_say(family, module, models, tmp_path):
    other, width = ("flux3", 3072) if family == "flux1" else ("qwen-image-21", 4096)
    lora = published_lora(tmp_path / "a.safetensors", other, "diffusers", {module: (width, width)})
    assert models <= set(lora.identity.models)
    for said in (family, other):
        version = {"ss_base_model_version": NAME_TABLES[said].base_versions[0]}
        assert LoraFile.from_tensors(lora.tensors, version).family == said
