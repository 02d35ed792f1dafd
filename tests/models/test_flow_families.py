"""Rectified flows (FLUX.1 and later): one step against plain torch, learning, sampling, the file that comes out."""

import math
import re
import statistics
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from core.cli.generate import few_steps_hint, prompt_jobs
from core.config import TrainConfig
from core.errors import BadConfig, MissingPackage
from core.lora.apply import apply
from core.lora.file import LoraFile
from core.lora.readers import not_loaded_by
from core.models import Base, load_base
from core.models.families import FAMILIES
from core.models.memory_plan import PLANS
from core.models.objective import FlowSchedule
from core.models.spec import on_device, stack_conditioning
from core.pictures.generate import PictureJob, generate
from core.pictures.sampling import FLOW_SAMPLERS, build_sampler, encode_prompts, sample_latents
from core.tensor_names import NAME_TABLES as KEYS
from core.training.encode import LatentCache
from core.training.inputs import TrainingInputs
from core.training.job import check_base_options, hints
from core.training.memory_prediction import predicted_memory
from core.training.step import Run
from core.training.store import train
from tests.models.family_parts import write_folder
from tests.tooling import (
    SMALL_FLOWS,
    assert_goes_on_exactly,
    assert_trained_alike,
    cache_of,
    command_options,
    encoded_cache,
    encoded_image,
    mostly_slow,
    small_flow_base,
    started_run,
)

CPU = torch.device("cpu")
NOT_IN_COMFYUI = [name for name in SMALL_FLOWS if not (KEYS[name].loaded.comfyui or KEYS[name].loaded.comfyui_later)]
"""Families that ComfyUI 0.30 doesn't have, and of which nobody reports what later versions load."""
PLAIN = TrainConfig(rank=3, alpha=2.0, precision="fp32", batch_size=2)


@pytest.fixture(scope="module")
def bases() -> dict[str, Base]:
    return {name: small_flow_base(name) for name in SMALL_FLOWS}


def cache_on_two(base: Base, size: tuple[int, int] = (8, 12)) -> LatentCache:
    """Two pictures with captions of different lengths."""
    shape = (base.latent_shape.channels, *size)
    captions = ("a photo of sks person", "sks person, outdoors in the evening sun")
    return encoded_cache(base, [encoded_image(base, f"{i}.png", captions[i], i, shape=shape) for i in range(2)])


def run_on_two(base: Base, config: TrainConfig) -> Run:
    """A run whose adapter already changes something."""
    return started_run(cache_on_two(base), base, config)


SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-6}  # fmt: skip


def language_model(family: str) -> Any:
    """The network that a diffusers folder of the family has as its text encoder, small."""
    if family == "zimage":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))
    text = SIZES | {"hidden_size": 256}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 256}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.parametrize("family", ["zimage", "qwen-image"])
def test_a_diffusers_folder_with_a_language_model_is_the_same_base(bases, family, tmp_path):
    base, theirs = bases[family], language_model(family).eval()
    read = load_base(write_folder(tmp_path, base, theirs))
    assert read.family is base.family and read.fingerprint("denoiser", "vae") == base.fingerprint("denoiser", "vae")
    tokens = torch.tensor([[5, 3, 60, 1]])
    with torch.no_grad():
        ours = read.load("text_encoder", CPU, torch.float32)(tokens).last_hidden_state
        expected = theirs(tokens, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "name"), [("zimage", "x_pad_token"), ("sd3", "pos_embed.pos_embed")])
def test_a_tensor_without_its_first_side_of_1_is_read_as_some_gguf_files_have_it(bases, family, name):
    base, component = bases[family], bases[family].components["denoiser"]
    flat = replace(component, tensors={**component.tensors, name: component.tensors[name][0]})
    read = replace(base, components={**base.components, "denoiser": flat}).load("denoiser", CPU, torch.float32)
    assert torch.equal(read.state_dict()[name], component.tensors[name])


def test_a_diffusers_that_is_too_old_for_a_model_is_named(bases, monkeypatch):
    monkeypatch.setattr("diffusers.__version__", "0.35.2")
    with pytest.raises(
        MissingPackage, match=r"needs diffusers 0\.36 or later, but 0\.35\.2 is installed\. Run: pip install"
    ):
        bases["zimage"].load("denoiser", CPU, torch.float32)


def test_every_rectified_flow_has_a_small_model_here():
    assert set(SMALL_FLOWS) == {name for name, family in FAMILIES.items() if family.flow_shift}


@pytest.mark.parametrize("family", SMALL_FLOWS)
def test_the_gradient_of_a_step_is_that_of_plain_torch(bases, family):
    base = bases[family]
    run = run_on_two(base, PLAIN)
    images = [run.examples.images[index] for index in run.examples.batches.at(0)]
    latents, noise, noisy, timesteps = run.examples.noised(images, run.examples.generator("noise", 0))
    (loss,) = map(run.loss_of, run.examples.passes(0))
    loss.backward()

    # W + alpha / rank * up @ down in the place of each adapted weight; the velocity is noise - picture.
    time = timesteps.view(-1, 1, 1, 1) / 1000
    torch.testing.assert_close(noisy, (1 - time) * latents + time * noise)
    denoiser = base.load("denoiser", CPU, torch.float32)
    weights = {f"denoiser.{name}": parameter for name, parameter in denoiser.named_parameters()}
    modules = {path: module for (_, path), module in run.model.adapter.modules().items()}  # pyright: ignore
    leaves = {path: (m.down.clone().requires_grad_(), m.up.clone().requires_grad_()) for path, m in modules.items()}
    for path, (down, up) in leaves.items():
        name = f"denoiser.{path}.weight"
        weights[name] = weights[name] + 2.0 / 3 * up @ down

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.denoiser = denoiser

        def forward(self, *inputs):
            return base.family.predict(self.denoiser, *inputs)

    conditioning = stack_conditioning([run.examples.text[image.caption] | image.conditioning for image in images])
    prediction = torch.func.functional_call(Plain(), weights, (noisy, timesteps, conditioning))
    expected = F.mse_loss(prediction, noise - latents)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    downs: dict[str, torch.Tensor] = {}
    for path, (down, up) in leaves.items():
        if re.fullmatch(SMALL_FLOWS[family].unused, path):
            assert not any(leaf.grad is not None and leaf.grad.any() for leaf in (down, up))
            continue
        assert down.grad is not None and up.grad is not None
        close(run.parameters[f"denoiser.{path}.up"].grad, up.grad)
        first = ".".join(run.model.adapter.shared["denoiser", path])  # pyright: ignore
        downs[first] = downs.get(first, 0) + down.grad  # layers that share their A add up in it
    for name, gradient in downs.items():
        close(run.parameters[f"{name}.down"].grad, gradient)


def close(ours: torch.Tensor | None, theirs: torch.Tensor) -> None:
    assert ours is not None
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-9


@pytest.mark.parametrize("family", SMALL_FLOWS)
def test_a_prediction_never_waits_for_the_device(bases, family, monkeypatch):
    """The meta device has no numbers: whoever asks for one gets an error instead of having to wait."""
    # ERNIE-Image turns autocast off around its positions, which torch cannot do for this device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    base, meta = bases[family], torch.device("meta")
    run = run_on_two(base, PLAIN)
    pictures = run.examples.images[:2]
    conditioning = on_device(run.examples.conditioning(pictures, [picture.caption for picture in pictures]), meta)
    denoiser = base.family.build("denoiser", base.components["denoiser"].config).to(meta)
    latents = torch.empty(2, base.latent_shape.channels, 8, 12, device=meta)
    prediction = base.family.predict(denoiser, latents, torch.empty(2, device=meta), conditioning)
    assert prediction.shape == latents.shape


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL_FLOWS)
def test_the_loss_falls_over_100_steps_on_two_pictures(bases, family):
    run = run_on_two(bases[family], replace(PLAIN, rank=8, learning_rate=1e-2))
    losses = []
    for _ in range(100):
        loss = run.accumulate()
        run.update(loss)
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


@pytest.mark.parametrize("family", SMALL_FLOWS)
def test_recomputing_activations_gives_the_same_step(bases, family):
    plain = run_on_two(bases[family], replace(PLAIN, gradient_checkpointing="off"))
    saving = run_on_two(bases[family], replace(PLAIN, gradient_checkpointing="on"))
    plain.train_step()
    saving.train_step()
    assert_trained_alike(saving.parameters, plain.parameters)


@pytest.mark.parametrize("family", SMALL_FLOWS)
def test_in_half_precision_the_adapter_stays_float32_and_learns(bases, family):
    run = run_on_two(bases[family], replace(PLAIN, precision="bf16"))
    before = {name: value.detach().clone() for name, value in run.parameters.items()}
    run.train_step()
    run.check_finite()
    assert {value.dtype for value in run.parameters.values()} == {torch.float32}
    unchanged = [name for name, value in run.parameters.items() if torch.equal(value, before[name])]
    assert all(re.fullmatch(rf"denoiser\.({SMALL_FLOWS[family].unused})\.(up|down)", name) for name in unchanged)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in SMALL_FLOWS if name != "sd3"])  # whose small blocks differ in size
def test_the_memory_of_each_plan_is_predicted_and_falls(bases, family):
    base = bases[family]
    cache = cache_of(base, side=16 * base.latent_shape.positions_side)
    config = TrainConfig(rank=2, precision="bf16")
    plans = (PLANS[0], PLANS[2], PLANS[-1])
    needs = [predicted_memory(TrainingInputs(cache, base, config, CPU, torch.bfloat16), plan) for plan in plans]
    assert needs == sorted(needs, reverse=True) and needs[0] > needs[1]


@pytest.mark.parametrize("family", mostly_slow(SMALL_FLOWS, "flux3", "qwen-image-21", "longcat-image", "ideogram4"))
def test_a_run_that_is_cancelled_goes_on_to_the_same_tensors(bases, family, tmp_path):
    base = bases[family]
    cache = cache_on_two(base, (4, 6))
    assert_goes_on_exactly(cache, base, TrainConfig(steps=4, rank=2, precision="fp32", batch_size=2), tmp_path)


@pytest.mark.parametrize("family", mostly_slow(SMALL_FLOWS, "flux1", "qwen-image"))
def test_photos_become_a_lora_that_changes_the_pictures(bases, family, photo_folder, tmp_path):
    base, output = bases[family], tmp_path / "me.safetensors"
    quick = TrainConfig(steps=3, rank=2, precision="fp32", learning_rate=1e-2, sample_every=3, sample_steps=2)
    config = replace(quick, check_photos=False, allow_distilled=True)  # which some need without an adapter
    train(photo_folder, base, config, output=output, device=CPU)
    lora = LoraFile.read(output)
    assert (lora.family, lora.metadata["ss_base_model_version"]) == (family, KEYS[family].base_versions[0])
    assert {entry.rank for entry in lora.entries} == {2}  # q, k and v share one A: fused, the rank stays
    assert bool(not_loaded_by("ComfyUI", lora)) == (family in NOT_IN_COMFYUI)
    assert bool(not_loaded_by("diffusers", lora)) == ("diffusers" not in KEYS[family].loaded.diffusers)
    assert any(key.endswith(".alpha") for key in lora.tensors) == (base.names.scheme == "kohya")
    job = PictureJob("a photo of sks person", seed=1, steps=2, guidance=2.0)
    (plain,), (changed,) = (list(generate(base, loras, [job], device=CPU)) for loras in ([], [(lora, 1.0)]))
    assert plain.image.tobytes() != changed.image.tobytes()
    assert len(list((tmp_path / "me-samples").iterdir())) == 1


@pytest.mark.parametrize("family", SMALL_FLOWS)
@pytest.mark.parametrize("method", ["dora", "loha", "lokr", "oft"])
def test_another_kind_of_adapter_is_saved_read_and_applied_module_by_module(bases, family, method, tmp_path):
    """Where Kohya's names join q, k and v, the file has diffusers', which ComfyUI reads part by part."""
    base = bases[family]
    # The rows of a narrow Z-Image are odd.
    config = replace(PLAIN, method=method, rank=11 if (family, method) == ("zimage", "oft") else 4)
    run = run_on_two(base, config)
    for parameter in run.parameters.values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    metadata = {"ss_base_model_version": base.family.base_model_version}
    run.model.adapter.export(run.parameters, base, metadata).save(tmp_path / "me.safetensors", torch.float32)
    lora = LoraFile.read(tmp_path / "me.safetensors")
    assert (lora.kind, lora.family, lora.unknown_keys) == (method, family, ())
    assert bool(not_loaded_by("ComfyUI", lora)) == (family in NOT_IN_COMFYUI)

    applied = base.load("denoiser", CPU, torch.float32)
    before = {name: value.clone() for name, value in applied.named_parameters()}
    apply(lora, {"family": family, "denoiser": applied})
    changed = [name for name, value in applied.named_parameters() if not torch.equal(value, before[name])]
    assert len(changed) == len(lora.entries)
    conditioning = run.examples.conditioning(run.examples.images, [image.caption for image in run.examples.images])
    noisy, timesteps = torch.randn(2, base.latent_shape.channels, 8, 12), torch.tensor([300, 700])
    with torch.no_grad():
        trained = base.family.predict(run.model.denoiser, noisy, timesteps, conditioning)
        found = base.family.predict(applied, noisy, timesteps, conditioning)
    torch.testing.assert_close(found, trained, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_sampling_follows_a_known_flow_to_its_picture(bases, sampler):
    """A network that always sees the one picture x_0 in the noise has the velocity (x_t - x_0) / t."""
    base, target = bases["flux1"], 0.5

    def velocity(denoiser, latents, timesteps, conditioning):
        return (latents - target) / (timesteps.view(-1, 1, 1, 1) / 1000).clamp(min=1e-6)

    known = replace(base, family=replace(base.family, predict=velocity))
    text = encode_prompts(base, {}, ["a prompt"])
    latents = sample_latents(
        known, base.load("denoiser", CPU, torch.float32), text, text, device=CPU,
        dtype=torch.float32, seeds=[1], size=(64, 64), steps=8, guidance=1.0,
        sampler=sampler,
    )  # fmt: skip
    assert (latents - target).abs().max() < 1e-2


def test_times_are_shifted_as_the_authors_of_flux1_shift_them():
    shift = FAMILIES["flux1"].flow_shift
    assert shift
    schedule = FlowSchedule(shift, 2, shift)
    # Black Forest Labs: mu is 0.5 at 256 positions (a picture of 256 px) and 1.15 at 4096 (1024 px).
    for side, mu in ((32, 0.5), (128, 1.15)):
        times = schedule.sampling_times(4, torch.zeros(1, 16, side, side))
        expected = [1 / (1 + math.exp(-mu) * (1 / t - 1)) for t in (1, 0.75, 0.5, 0.25)] + [0]
        assert times.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("sampling", "median"), [("auto", 0.5), ("uniform", 0.5)])
def test_times_are_drawn_with_the_shift_and_within_the_range(sampling, median):
    schedule = FlowSchedule(lambda positions: 9.0, 2, lambda positions: 3.0)
    config = TrainConfig(timestep_sampling=sampling, timestep_min=100, timestep_max=899)
    latents = torch.zeros(20_000, 1, 2, 2)
    drawn = schedule.draw_timesteps(latents, config, torch.Generator().manual_seed(1))
    assert drawn.min() >= 100 and drawn.max() <= 900
    shifted = 3 * median / (1 + 2 * median)
    assert drawn.median().item() == pytest.approx(100 + 800 * shifted, abs=10)
    unshifted = schedule.draw_timesteps(latents, replace(config, timestep_shift=1.0), torch.Generator().manual_seed(1))
    assert unshifted.median().item() == pytest.approx(100 + 800 * median, abs=10)


@pytest.mark.parametrize("family", SMALL_FLOWS)
@pytest.mark.parametrize("side", [512, 1024])
def test_enough_steps_of_training_see_more_picture_than_noise(bases, family, side):
    schedule, positions = bases[family].schedule(), (side // 16) ** 2
    assert isinstance(schedule, FlowSchedule)
    shift = SMALL_FLOWS[family].shift(positions)
    assert schedule.training_shift(positions) == pytest.approx(shift)
    across = side // 16 * schedule.positions_side
    latents = torch.zeros(1, 1, across, across).expand(50_000, -1, -1, -1)
    times = schedule.draw_timesteps(latents, TrainConfig(), torch.Generator().manual_seed(1)) / 1000
    share = (times < 0.5).float().mean().item()
    # A logit-normal time is shifted by log(s).
    normal = statistics.NormalDist(math.log(shift))
    assert share == pytest.approx(normal.cdf(0), abs=0.01) and share > 0.1
    quartiles = times.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    assert quartiles == pytest.approx([1 / (1 + math.exp(-normal.inv_cdf(q))) for q in (0.25, 0.5, 0.75)], abs=0.01)


@pytest.mark.parametrize(
    "wrong",
    [{"min_snr_gamma": 1.0}, {"prediction_type": "v_prediction"}, {"zero_terminal_snr": True}, {"clip_skip": 2}],
)
def test_settings_of_models_that_predict_noise_are_refused(bases, wrong):
    with pytest.raises(
        BadConfig, match=f"{next(iter(wrong))}: FLUX.1 is a rectified flow and does not have this setting"
    ):
        check_base_options(bases["flux1"], TrainConfig(**wrong))


@pytest.mark.parametrize(
    ("family", "name", "steps", "shift"),
    [
        ("krea2", "krea2_turbo_fp8.safetensors", 8, math.exp(1.15)),
        ("zimage", "z_image_turbo_bf16.safetensors", 8, 3.0),
        ("qwen-image", "qwen_image_lightning.safetensors", 8, 3.0),
        ("qwen-image", "Qwen-Image-Lightning-4steps-V2.0.safetensors", 4, 3.0),
        ("ernie-image", "ernie-image-turbo.safetensors", 8, 3.0),
        ("sd3", "sd3.5_large_turbo.safetensors", 4, 3.0),
        ("flux2", "flux-2-klein-4b.safetensors", 4, None),
        ("flux3", "flux3-image-klein.safetensors", None, None),  # whose tensors tell
        ("krea2", "krea2_raw_bf16.safetensors", None, None),
        ("zimage", "z_image_bf16.safetensors", None, None),
        ("flux2", "flux-2-klein-base-4b-fp8.safetensors", None, None),
        ("ernie-image", "ernie-image.safetensors", None, None),
        ("chroma", "chroma-flash.safetensors", None, None),
        ("flux1", "flux1-dev-turbo.safetensors", None, None),  # which takes its guidance as a number
    ],
)
def test_a_model_distilled_by_its_name_draws_in_few_steps(bases, family, name, steps, shift):
    base = replace(bases[family], name=name)
    asked = PictureJob("a photo", seed=1, steps=33, guidance=2.5)
    job, spec = asked.on(base), base.family
    assert job == (replace(asked, steps=steps, guidance=1.0) if steps else asked)
    assert (base.steps, base.guidance) == ((steps, 1.0) if steps else (spec.steps, spec.guidance))
    for latents in (torch.zeros(1, 16, 32, 32), torch.zeros(1, 16, 128, 96)):
        expected = base.schedule().shift_for(latents) if shift is None else shift
        assert base.sampling_schedule().shift_for(latents) == pytest.approx(expected)
    if steps or name.startswith(("chroma-flash", "flux1-dev-turbo")):
        said = f"{name}: judging by its name, was distilled to a few steps, and training on it undoes"
        with pytest.raises(BadConfig, match=re.escape(said)):
            check_base_options(base, TrainConfig())
        check_base_options(base, TrainConfig(), adapted=True)
    elif not base.is_distilled:
        check_base_options(base, TrainConfig())
    assert not [*hints(base, TrainConfig(allow_distilled=True), False, CPU)]


@pytest.mark.parametrize(("given", "drawn"), [((None, None), (8, 1.0)), ((12, 2.0), (12, 2.0))])
def test_the_command_line_draws_a_distilled_model_in_its_steps_unless_they_are_given(bases, given, drawn):
    base = replace(bases["zimage"], name="z_image_turbo_bf16.safetensors")
    words = [f"--{name}={value}" for name, value in zip(("steps", "guidance"), given, strict=True) if value is not None]
    (job,) = prompt_jobs(command_options("generate", "--prompt", "a photo", "--count", "1", *words), base, [])
    assert (job.steps, job.guidance) == drawn


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "hint"),
    [
        ("z_image_turbo.safetensors", None, None, "in 8 steps without guidance; if that is wrong, set --steps and --guidance"),
        ("z_image_turbo.safetensors", 12, None, "draws without guidance; if that is wrong, set --guidance"),
        ("z_image_turbo.safetensors", 12, 2.0, None),
        ("z_image.safetensors", None, None, None),
    ],
)  # fmt: skip
def test_that_a_name_alone_makes_a_model_draw_in_few_steps_is_said(bases, name, steps, guidance, hint):
    base = replace(bases["zimage"], name=name)
    said = few_steps_hint(base, steps, guidance)
    assert [(one.startswith(name), one.endswith(hint)) for one in said] == ([] if hint is None else [(True, True)])
    assert few_steps_hint(replace(base, says_distilled=True), steps, guidance) == []


def test_a_model_that_needs_an_adapter_is_refused_without_one_unless_told_otherwise():
    qwen = small_flow_base("qwen-image-21")
    with pytest.raises(BadConfig, match=r"tend to collapse .* \(training_adapter; the usual one is ShootTheSound/"):
        check_base_options(qwen, TrainConfig())
    check_base_options(qwen, TrainConfig(allow_distilled=True))
    check_base_options(qwen, TrainConfig(), adapted=True)


def test_schnell_is_refused_unless_told_otherwise():
    schnell = small_flow_base("flux1", guidance_embeds=False)
    with pytest.raises(BadConfig, match=r"distilled to a few steps, .* set allow_distilled"):
        check_base_options(schnell, TrainConfig())
    check_base_options(schnell, TrainConfig(allow_distilled=True))
    assert (schnell.steps, schnell.guidance) == (4, 1.0)
    times = build_sampler(None, schnell, 4, torch.zeros(1, 16, 64, 64)).timesteps
    assert times.tolist() == pytest.approx([1000, 750, 500, 250])


@pytest.mark.parametrize("is_distilled", [True, False])
def test_a_klein_folder_that_says_it_is_distilled_is_refused_unless_told_otherwise(
    bases, is_distilled, tmp_path, monkeypatch
):
    base = bases["flux2"]
    encoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))
    read = load_base(write_folder(tmp_path, base, encoder, is_distilled=is_distilled))
    assert read.is_distilled == is_distilled
    if is_distilled:
        with pytest.raises(BadConfig, match=r"distilled to a few steps, .* set allow_distilled"):
            check_base_options(read, TrainConfig())
    check_base_options(read, TrainConfig(allow_distilled=True))
    check_base_options(read, TrainConfig(), adapted=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **options: str(tmp_path))
    assert load_base("someone/klein").name == "klein"  # and not that of the folder in the cache
