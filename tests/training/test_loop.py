"""The training loop: its losses and gradients against plain torch and diffusers, its order, its schedule, its ends."""

import json
import math
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from PIL import Image

from core.cli.common import JsonProgress
from core.config import OPTIMIZERS, TrainConfig
from core.device import deterministic_if
from core.errors import BadConfig, BadFile, TrainingDiverged
from core.lora.file import LoraFile
from core.models import Base, load_base
from core.models.memory_plan import blocks_of
from core.photos import Photo
from core.storage.safetensors_file import SafetensorsFile
from core.training.callbacks import Callbacks, StepReport, StopAndKeep
from core.training.drawing import Drawing
from core.training.encode import Batches
from core.training.identity import run_identity
from core.training.inputs import TrainingInputs
from core.training.loop import train_lora
from core.training.methods import peak_rate
from core.training.optimizer import learning_rate_factor
from core.training.samples import Samples
from core.training.step import Run
from core.training.store import train
from tests.tooling import UNETS, encoded_cache, encoded_image, mostly_slow, started_run

CPU = torch.device("cpu")
PLAIN = TrainConfig(rank=3, alpha=2.0, min_snr_gamma=0.0, precision="fp32")


@pytest.fixture(scope="module")
def caches(bases):
    """Two pictures of the person and two of the class, for each family."""
    return {
        name: encoded_cache(
            base,
            [
                encoded_image(base, "a.png", "a photo of sks person", 1),
                encoded_image(base, "b.png", "sks person, outdoors", 2),
                encoded_image(base, "c.png", "a photo of person", 3, is_class=True),
                encoded_image(base, "d.png", "a photo of person", 4, is_class=True),
            ],
        )
        for name, base in bases.items()
    }


def person_only(cache):
    return replace(cache, images=tuple(image for image in cache.images if not image.is_class))


def reference_prediction(base: Base, run: Run, leaves, noisy, timesteps, conditioning):
    """The frozen network of diffusers with W + alpha / rank * up @ down in the place of each adapted weight."""
    unet = base.load("denoiser", CPU, torch.float32)
    weights: dict[str, torch.Tensor] = dict(unet.named_parameters())
    for path in {name.removeprefix("denoiser.").rpartition(".")[0] for name in leaves}:
        down, up = leaves[f"denoiser.{path}.down"], leaves[f"denoiser.{path}.up"]
        change = 2.0 / 3 * (up.flatten(1) @ down.flatten(1))
        weights[f"{path}.weight"] = weights[f"{path}.weight"] + change.reshape(weights[f"{path}.weight"].shape)
    arguments = {"encoder_hidden_states": conditioning["context"]}
    if base.family.name == "sdxl":
        arguments["added_cond_kwargs"] = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["time_ids"]}
    return torch.func.functional_call(unet, weights, (noisy, timesteps), arguments).sample


def conditioning_of(run: Run, images):
    parts = [run.examples.text[image.caption] | image.conditioning for image in images]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("targets", mostly_slow(("transformer", "transformer+conv"), "transformer+conv"))
@pytest.mark.parametrize("family", UNETS)
def test_the_gradient_of_a_step_is_that_of_plain_torch(bases, caches, family, targets):
    base, config = bases[family], replace(PLAIN, batch_size=2, targets=targets)
    run = started_run(person_only(caches[family]), base, config)
    images = [run.examples.images[index] for index in run.examples.batches.at(0)]
    latents, noise, noisy, timesteps = run.examples.noised(images, run.examples.generator("noise", 0))
    (loss,) = map(run.loss_of, run.examples.passes(0))
    loss.backward()

    leaves = {name: value.detach().clone().requires_grad_() for name, value in run.parameters.items()}
    process = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(noisy, process.add_noise(latents, noise, timesteps), rtol=1e-4, atol=1e-4)  # pyright: ignore
    prediction = reference_prediction(base, run, leaves, noisy, timesteps, conditioning_of(run, images))
    expected = F.mse_loss(prediction, noise)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in run.parameters.items():
        ours, theirs = parameter.grad, leaves[name].grad
        assert ours is not None and theirs is not None
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-9, name


def test_a_step_is_one_of_adamw_on_the_clipped_mean_gradient(bases, caches):
    config = replace(PLAIN, accumulation=2, max_grad_norm=0.01, learning_rate=1e-3, weight_decay=0.1)
    cache, base = person_only(caches["sd15"]), bases["sd15"]
    run, reference = started_run(cache, base, config), started_run(cache, base, config)
    run.train_step()

    optimizer = torch.optim.AdamW(reference.parameters.values(), lr=1e-3, weight_decay=0.1, foreach=False, fused=False)
    with (
        reference.model.fast()
    ):  # Adam turns the rounding of small gradients into steps, so both have the same products.
        for number in (0, 1):
            (loss,) = map(reference.loss_of, reference.examples.passes(number))
            (loss / 2).backward()
    norm = torch.stack([p.grad.norm() for p in reference.parameters.values() if p.grad is not None]).norm()
    assert norm > 0.01
    for parameter in reference.parameters.values():
        assert parameter.grad is not None
        parameter.grad *= 0.01 / (norm + 1e-6)
    optimizer.step()
    for name, parameter in reference.parameters.items():
        torch.testing.assert_close(run.parameters[name], parameter, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_with_min_snr_is_that_of_the_diffusers_training_script(bases, caches, prediction_type):
    base = replace(bases["sd15"], prediction_type=prediction_type)
    run = started_run(person_only(caches["sd15"]), base, replace(PLAIN, batch_size=2, min_snr_gamma=5.0))
    images = [run.examples.images[index] for index in run.examples.batches.at(0)]
    latents, noise, noisy, timesteps = run.examples.noised(images, run.examples.generator("noise", 0))
    (loss,) = map(run.loss_of, run.examples.passes(0))
    with torch.no_grad():
        prediction = reference_prediction(
            base, run, run.parameters, noisy, timesteps, conditioning_of(run, images)
        ).float()
    process = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )
    target = noise if prediction_type == "epsilon" else process.get_velocity(latents, noise, timesteps)  # pyright: ignore
    snr = compute_snr(process, timesteps)
    weights = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    weights = weights / snr if prediction_type == "epsilon" else weights / (snr + 1)
    expected = (F.mse_loss(prediction, target, reduction="none").mean(dim=[1, 2, 3]) * weights).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_prior_preservation_adds_the_weighted_loss_on_class_images(bases, caches):
    """DreamBooth's objective (arXiv:2208.12242, eq. 2): the person's loss + lambda * the class images' loss."""
    base = bases["sd15"]
    run = started_run(caches["sd15"], base, replace(PLAIN, batch_size=2, prior_loss_weight=0.7))
    expected = []
    for images, number, purpose in (
        (run.examples.images, run.examples.batches, "noise"),
        (run.examples.class_images, run.examples.class_batches, "class"),
    ):
        assert number is not None
        chosen = [images[index] for index in number.at(0)]
        assert {image.is_class for image in chosen} == {purpose == "class"}
        _, noise, noisy, timesteps = run.examples.noised(chosen, run.examples.generator(purpose, 0))
        with torch.no_grad():
            prediction = reference_prediction(base, run, run.parameters, noisy, timesteps, conditioning_of(run, chosen))
        expected.append(F.mse_loss(prediction, noise).item())
    person, prior = (loss.item() for loss in map(run.loss_of, run.examples.passes(0)))
    assert person == pytest.approx(expected[0], rel=1e-4)
    assert prior == pytest.approx(0.7 * expected[1], rel=1e-4)
    run.train_step()
    assert run.loss.item() == pytest.approx(expected[0] + 0.7 * expected[1], rel=1e-4)


def test_prior_prediction_holds_the_class_caption_to_the_frozen_model(bases, caches):
    base = bases["sd15"]
    run = started_run(person_only(caches["sd15"]), base, replace(PLAIN, prior_prediction=1.0, prior_loss_weight=0.5))
    images = [run.examples.images[index] for index in run.examples.batches.at(0)]
    _, _, noisy, timesteps = run.examples.noised(images, run.examples.generator("prior", 0))
    of_class = [replace(image, caption=image.class_caption) for image in images]
    conditioning = conditioning_of(run, of_class)
    frozen = base.load("denoiser", CPU, torch.float32)
    with torch.no_grad():
        teacher = frozen(noisy, timesteps, conditioning["context"]).sample
        student = reference_prediction(base, run, run.parameters, noisy, timesteps, conditioning)
    prior, _ = map(run.loss_of, run.examples.passes(0))
    assert prior.item() == pytest.approx(0.5 * F.mse_loss(student, teacher).item(), rel=1e-3)
    prior.backward()
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in run.parameters.values())


def test_photos_and_prior_are_weighted_alike(bases, caches):
    """By min-SNR, of which gamma 5 lowers the weight of the early timesteps."""
    losses = {}
    for gamma in (0.0, 5.0):
        config = replace(PLAIN, prior_prediction=1.0, min_snr_gamma=gamma, timestep_min=50, timestep_max=50)
        run = started_run(person_only(caches["sd15"]), bases["sd15"], config)
        losses[gamma] = [run.loss_of(inputs).item() for inputs in run.examples.passes(0)]
        weight = run.examples.schedule.loss_weights(torch.tensor([50]), config).item()
    assert weight < 0.5 and losses[5.0] == pytest.approx([weight * loss for loss in losses[0.0]], rel=1e-3)


def test_a_masked_picture_counts_inside_its_mask(bases, caches):
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:9, 5:12] = 1
    cache = person_only(caches["sd15"])
    cache = replace(cache, images=(replace(cache.images[0], mask=mask),))
    run = started_run(cache, bases["sd15"], replace(PLAIN, background_weight=0.0))
    _, noise, noisy, timesteps = run.examples.noised(run.examples.images, run.examples.generator("noise", 0))
    (loss,) = map(run.loss_of, run.examples.passes(0))
    with torch.no_grad():
        prediction = reference_prediction(
            bases["sd15"], run, run.parameters, noisy, timesteps, conditioning_of(run, run.examples.images)
        )
    inside = ((prediction - noise) ** 2)[..., 4:9, 5:12].mean()
    assert loss.item() == pytest.approx(inside.item(), rel=1e-4)


def test_caption_dropout_trains_on_the_empty_caption(bases, caches):
    cache, base = person_only(caches["sd15"]), bases["sd15"]
    dropped = started_run(cache, base, replace(PLAIN, caption_dropout=1.0))
    emptied = replace(cache, images=tuple(replace(image, caption="") for image in cache.images))
    runs = dropped, started_run(emptied, base, PLAIN)
    loss, expected = (run.loss_of(*run.examples.passes(0)) for run in runs)
    assert loss.item() == expected.item()


@pytest.mark.parametrize("family", mostly_slow(UNETS, "sd15"))
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision_the_adapter_stays_float32_and_learns(bases, caches, family, precision):
    config = replace(
        PLAIN, precision=precision, max_grad_norm=1.0 if precision == "bf16" else 0.0, text_encoder_lr=1e-4
    )
    run = Run(TrainingInputs.on(CPU, person_only(caches[family]), bases[family], config))
    before = {name: value.detach().clone() for name, value in run.parameters.items()}
    for _ in range(2):
        run.train_step()
    run.check_finite()
    assert {value.dtype for value in run.parameters.values()} == {torch.float32}
    assert next(run.model.denoiser.parameters()).dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    changed = [name for name, value in run.parameters.items() if not torch.equal(value, before[name])]
    assert {name.partition(".")[0] for name in changed} == {"denoiser", *run.model.encoders}


def test_each_picture_comes_as_often_as_it_is_repeated_in_batches_of_one_shape(bases):
    base = bases["sd15"]
    wide = torch.zeros(4, 8, 24)
    images = [encoded_image(base, f"{i}", "", i, repeats=1 + i % 3) for i in range(6)]
    images += [encoded_image(base, f"w{i}", "", i, mean=wide, deviation=wide) for i in range(2)]
    batches = Batches(images, batch_size=3, seed=1)
    epoch = [batches.at(number) for number in range(batches.per_epoch)]
    assert all(len({images[i].mean.shape for i in batch}) == 1 for batch in epoch)
    assert sorted(map(len, epoch)) == [2, 3, 3, 3, 3], "no copies fill a batch up"
    seen = [index for batch in epoch for index in batch]
    assert [seen.count(index) for index in range(8)] == [1, 2, 3, 1, 2, 3, 1, 1]
    shares = [batches.share(number) / len(batches.at(number)) for number in range(batches.per_epoch)]
    assert shares == [pytest.approx(5 / 14)] * 5, "a picture counts as much in a small batch"


def test_the_order_depends_on_the_seed_and_the_epoch_alone(bases):
    images = [encoded_image(bases["sd15"], f"{i}", "", i) for i in range(8)]
    first, second = Batches(images, 1, seed=1), Batches(images, 1, seed=1)
    order = [first.at(number) for number in range(24)]
    assert [second.at(number) for number in reversed(range(24))] == order[::-1]
    assert order[:8] != order[8:16]
    assert [Batches(images, 1, seed=2).at(number) for number in range(8)] != order[:8]


def test_the_learning_rate_rises_then_follows_its_schedule():
    def rates(schedule, steps=10, warmup=4):
        config = TrainConfig(steps=steps, warmup_steps=warmup, schedule=schedule)
        return [learning_rate_factor(step, config) for step in range(steps)]

    assert rates("constant")[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates("linear")[4:] == pytest.approx([1 - i / 6 for i in range(6)])
    assert rates("cosine")[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])


def test_lora_plus_and_the_text_encoder_have_their_own_rates(bases, caches):
    config = replace(PLAIN, learning_rate=1e-4, text_encoder_lr=1e-5, lora_plus_ratio=16.0)
    run = Run(TrainingInputs.on(CPU, person_only(caches["sd15"]), bases["sd15"], config))
    rates = {id(p): group["peak"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {*run.model.encoders, "denoiser"} == {name.partition(".")[0] for name in run.parameters}
    for name, parameter in run.parameters.items():
        rate = 1e-4 if name.startswith("denoiser.") else 1e-5
        assert rates[id(parameter)] == pytest.approx(rate * (16 if name.endswith(".up") else 1))


def test_the_running_average_is_what_is_saved(bases, caches):
    config = replace(PLAIN, ema_decay=0.5, steps=4, learning_rate=1e-2)
    run = Run(TrainingInputs.on(CPU, person_only(caches["sd15"]), bases["sd15"], config))
    name = next(name for name in run.parameters if name.endswith(".up"))
    average = run.parameters[name].detach().clone()
    for step in range(4):
        run.train_step()
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * run.parameters[name].detach()
    torch.testing.assert_close(run.trained()[name], average, rtol=1e-5, atol=1e-8)
    assert not torch.equal(run.trained()[name], run.parameters[name])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns(bases, caches, optimizer):
    if package := OPTIMIZERS[optimizer].package:
        pytest.importorskip(package)
    config = replace(PLAIN, optimizer=optimizer, learning_rate=None if OPTIMIZERS[optimizer].finds_rate else 1e-3)
    run = Run(TrainingInputs.on(CPU, person_only(caches["sd15"]), bases["sd15"], config))
    for _ in range(3):
        run.train_step()
    ups = [value for name, value in run.parameters.items() if name.endswith(".up")]
    assert ups and all(value.abs().max() > 0 for value in ups)


@pytest.mark.parametrize("method", ["pivotal", "textual-inversion"])
def test_prodigy_has_one_rate_also_for_the_vectors_of_a_word(bases, caches, method, capsys):
    run = Run(
        TrainingInputs.on(
            CPU, person_only(caches["sd15"]), bases["sd15"], replace(PLAIN, optimizer="prodigy", method=method)
        )
    )
    run.train_step()
    assert {group["peak"] for group in run.optimizer.param_groups} == {1.0}
    assert capsys.readouterr().out == ""  # where reports in JSON go
    with pytest.raises(BadConfig, match=r"prodigy uses one rate for everything, here 1: leave out .*embedding_lr"):
        replace(PLAIN, optimizer="prodigy", method=method, embedding_lr=0.5)
    with pytest.raises(BadConfig, match="prodigy uses one rate for everything"):
        replace(PLAIN, optimizer="prodigy", text_encoder_lr=PLAIN.embedding_lr)


@pytest.mark.parametrize("method, rate", [("lora", 1e-4), ("loha", 1.5e-5), ("dreambooth", 5e-6), ("oft", 3e-5)])
def test_a_method_that_is_told_no_learning_rate_has_the_one_that_suits_it(bases, caches, method, rate):
    base, cache, config = bases["sd15"], person_only(caches["sd15"]), TrainConfig(method=method, rank=4, steps=1)
    run = Run(TrainingInputs.on(CPU, cache, base, config))
    assert {group["peak"] for group in run.optimizer.param_groups} == {rate}
    told = replace(config, learning_rate=rate)
    assert run_identity(TrainingInputs.on(CPU, cache, base, config)) == run_identity(
        TrainingInputs.on(CPU, cache, base, told)
    )
    assert peak_rate(replace(config, method="dora")) == 1e-4


def test_the_metadata_has_the_learning_rate_of_the_method(bases, caches):
    for method, rate in (("lora", "0.0001"), ("textual-inversion", "0.005")):
        config = TrainConfig(method=method, rank=2, steps=1)  # pyright: ignore
        lora = train_lora(person_only(caches["sd15"]), bases["sd15"], config, device=CPU)
        assert (lora.metadata["ss_learning_rate"], lora.metadata["ss_unet_lr"]) == (rate, rate)


def test_the_same_seed_gives_the_same_file_and_another_seed_another(bases, caches):
    cache, config = person_only(caches["sd15"]), replace(PLAIN, steps=3, dropout=0.1)
    first, second, third = (
        train_lora(cache, bases["sd15"], replace(config, seed=seed), device=CPU).modules()  # pyright: ignore
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[m].up, second[m].up) and torch.equal(first[m].down, second[m].down) for m in first)
    assert not all(torch.equal(first[m].up, third[m].up) for m in first)


def test_training_leaves_the_callers_random_state_alone(bases, caches):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_lora(person_only(caches["sd15"]), bases["sd15"], replace(PLAIN, steps=1, dropout=0.1), device=CPU)
    assert torch.equal(torch.rand(3), expected)


def test_a_run_inside_inference_mode_trains_on_tensors_made_there(bases, caches):
    """As in a ComfyUI node, which is handed tensors that were made in inference mode."""
    file = bases["sd15"].file
    assert isinstance(file, SafetensorsFile)
    with torch.inference_mode():
        base = load_base({name: tensor.clone() for name, tensor in file.items()})
        lora = train_lora(person_only(caches["sd15"]), base, replace(PLAIN, steps=2), device=CPU)
    assert all(module.up.abs().max() > 0 for module in lora.modules().values())  # pyright: ignore


def test_a_run_that_is_cancelled_in_its_first_step_leaves_no_state(bases, caches, tmp_path):
    def cancel():
        raise KeyboardInterrupt

    state = tmp_path / "run.state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        callbacks = Callbacks(check_cancelled=cancel)
        train_lora(person_only(caches["sd15"]), bases["sd15"], PLAIN, device=CPU, state_path=state, callbacks=callbacks)
    assert not state.exists()


def test_a_step_checks_for_cancelling_at_each_block_and_not_at_each_layer(bases, caches):
    calls = []
    inputs = TrainingInputs.on(CPU, person_only(caches["sd15"]), bases["sd15"], replace(PLAIN, prior_prediction=0))
    run = Run(inputs, check_cancelled=lambda: calls.append(1))
    run.accumulate()
    blocks = len(blocks_of(run.model.denoiser))
    assert blocks < len(calls) <= 2 * blocks * PLAIN.accumulation  # forward and backward


def test_a_run_whose_file_cannot_be_made_in_the_end_leaves_a_state(bases, caches, tmp_path, monkeypatch):
    def refuse(*arguments, **settings):
        raise BadFile("no space left")

    state = tmp_path / "run.state.safetensors"
    monkeypatch.setattr("core.training.intermediate_loras.training_metadata", refuse)
    with pytest.raises(BadFile, match="no space left"):
        train_lora(person_only(caches["sd15"]), bases["sd15"], replace(PLAIN, steps=2), device=CPU, state_path=state)
    assert SafetensorsFile.open(state).metadata["step"] == "2"


def test_stop_and_keep_ends_the_run_with_what_it_has_learned(bases, caches):
    def stop(report):
        if report.step == 2:
            raise StopAndKeep

    cache, base = person_only(caches["sd15"]), bases["sd15"]
    kept = train_lora(cache, base, replace(PLAIN, steps=50), device=CPU, callbacks=Callbacks(on_step=stop))
    short = train_lora(cache, base, replace(PLAIN, steps=2), device=CPU)
    assert kept.metadata["ss_steps"] == "2"
    assert all(torch.equal(module.up, kept.modules()[name].up) for name, module in short.modules().items())  # pyright: ignore


@pytest.mark.parametrize("recompute", mostly_slow(("off", "on"), "on"))
def test_a_run_that_is_cancelled_within_a_step_goes_on_exactly(bases, caches, tmp_path, recompute):
    class Interrupt(BaseException):
        pass

    calls = 0

    def check():
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Interrupt

    cache, base = person_only(caches["sd15"]), bases["sd15"]
    config = replace(PLAIN, steps=2, gradient_checkpointing=recompute)
    state = tmp_path / "run.state.safetensors"
    stop_at = 0
    whole = train_lora(cache, base, config, device=CPU, callbacks=Callbacks(check_cancelled=check))
    calls, stop_at = 0, calls - 2  # in the backward pass of the last step
    with pytest.raises(Interrupt):
        train_lora(cache, base, config, device=CPU, state_path=state, callbacks=Callbacks(check_cancelled=check))
    assert SafetensorsFile.open(state).metadata["step"] == "1"
    resumed = train_lora(cache, base, config, device=CPU, state_path=state, resume=True)
    assert all(torch.equal(module.up, resumed.modules()[name].up) for name, module in whole.modules().items())  # pyright: ignore


def test_a_step_that_could_not_be_saved_is_saved_when_the_run_goes_on(bases, photo_folder, tmp_path, monkeypatch):
    config = TrainConfig(rank=2, steps=3, save_every=1, resolution=32, check_photos=False)
    output, save = tmp_path / "me.safetensors", LoraFile.save

    def full(lora, path, *rest):
        if "step000001" in str(path):
            raise BadFile(f"{path}: No space left on device")
        save(lora, path, *rest)

    with monkeypatch.context() as disk, pytest.raises(BadFile, match="No space left"):
        disk.setattr(LoraFile, "save", full)
        train(photo_folder, bases["sd15"], config, output=output, device=CPU)
    train(photo_folder, bases["sd15"], config, output=output, device=CPU, resume=True)
    names = ["me-step000001.safetensors", "me-step000002.safetensors", "me.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_samples_are_made_without_dropout_and_training_goes_on_with_it(bases, caches):
    run = Run(TrainingInputs.on(CPU, person_only(caches["sd15"]), bases["sd15"], replace(PLAIN, dropout=0.3)))
    modes = []

    def sampler(denoiser, encoders, shots):
        modes.append(any(module.training for module in denoiser.modules()))
        return []

    Drawing(run).draw(sampler, [], pytest.fail)
    assert modes == [False]
    assert all(module.training for module in run.model.denoiser.modules())


def test_a_loss_that_is_not_finite_stops_with_step_photo_and_learning_rate(bases, caches, tmp_path):
    cache = person_only(caches["sd15"])
    broken = replace(cache.images[0], mean=torch.full((4, 16, 16), math.nan))
    state = tmp_path / "run.state.safetensors"
    said = r"NaN or infinite in step 1 on a\.png at learning rate 0\.0001\. Nothing was trained yet, so .* download it again$"
    with pytest.raises(TrainingDiverged, match=said):
        train_lora(replace(cache, images=(broken,)), bases["sd15"], PLAIN, device=CPU, state_path=state)
    assert not state.exists()
    run = Run(TrainingInputs.on(CPU, cache, bases["sd15"], PLAIN))
    run.train_step()
    run.update(torch.tensor(math.nan))
    with pytest.raises(TrainingDiverged, match=r"in step 2 on .*\. Lower the learning rate$"):
        run.check_finite()


def test_a_loss_that_is_not_finite_is_null_in_json(capsys):
    JsonProgress().step(StepReport(1, 9, 1e-4, 1.0, 8.0, 0, None, torch.tensor(math.nan)))
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["loss"] is None


def test_an_adapter_that_is_not_finite_is_never_saved(bases, caches):
    run = Run(TrainingInputs.on(CPU, person_only(caches["sd15"]), bases["sd15"], PLAIN))
    run.train_step()
    next(iter(run.parameters.values())).data[0, 0] = math.inf
    with pytest.raises(TrainingDiverged, match="step 1 on"):
        run.check_finite()


def test_numbered_loras_and_samples_come_when_they_are_asked_for(bases, caches):
    saved, sampled = [], []
    config = replace(PLAIN, steps=6, save_every=2, sample_every=3, thumbnail=True)
    lora = train_lora(
        person_only(caches["sd15"]), bases["sd15"], config, device=CPU,
        samples=Samples(lambda denoiser, encoders, shots: [Image.new("RGB", (512, 640), "red")], [("a", 1)]),
        callbacks=Callbacks(
            on_save=lambda step, lora: saved.append((step, lora.metadata["ss_steps"])),
            on_sample=lambda step, images: sampled.append((step, images[0].size)),
        ),
    )  # fmt: skip
    assert saved == [(2, "2"), (4, "4")]
    assert sampled == [(3, (512, 640)), (6, (512, 640))]
    assert lora.metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")


def test_samples_have_the_shape_of_the_persons_photos(bases, photo_folder):
    wide = [Photo.from_image(Image.new("RGB", (96, 64), (shade, 0, 0)), f"{shade}.png") for shade in range(9)]
    config, sizes = TrainConfig(rank=2, steps=1, resolution=32, sample_every=1, sample_steps=1, check_photos=False), []
    train(
        photo_folder, bases["sd15"], config, class_photos=wide, device=CPU,
        callbacks=Callbacks(on_sample=lambda step, images: sizes.extend(image.size for image in images)),
    )  # fmt: skip
    assert sizes and all(width < height for width, height in sizes)


def test_photos_are_trained_on_at_several_resolutions(bases, photo_folder):
    config = TrainConfig(
        rank=2, steps=2, resolution=64, more_resolutions=(48, 32), sample_every=2, sample_steps=1, check_photos=False
    )
    sizes: list[tuple[int, int]] = []
    drawn = Callbacks(on_sample=lambda step, images: sizes.extend(image.size for image in images))
    lora = train(photo_folder, bases["sd15"], config, device=CPU, callbacks=drawn)
    buckets = json.loads(lora.metadata["ss_bucket_info"])["buckets"].values()
    areas = sorted({math.prod(bucket["resolution"]) for bucket in buckets})
    assert len(areas) == 3 and areas[-1] <= 64 * 64 and areas[0] <= 32 * 32
    assert math.prod(sizes[0]) == areas[-1]


def test_what_a_callback_takes_is_not_written_beside_the_output(bases, photo_folder, tmp_path):
    config = TrainConfig(
        rank=2, steps=2, resolution=32, sample_every=1, sample_steps=1, save_every=1, check_photos=False
    )
    saved, drawn = [], []
    callbacks = Callbacks(
        on_save=lambda step, lora: saved.append(step), on_sample=lambda step, images: drawn.append(step)
    )
    path = tmp_path / "me.safetensors"
    lora = train(photo_folder, bases["sd15"], config, output=path, device=CPU, callbacks=callbacks)
    assert (saved, drawn) == ([1], [1, 2])
    assert [*tmp_path.iterdir()] == [path] and lora.name == LoraFile.read(path).name


def test_metadata_that_no_file_can_hold_are_refused_before_the_first_step(bases, photo_folder, tmp_path):
    config = TrainConfig(rank=2, steps=1, resolution=32, check_photos=False)
    steps = Callbacks(on_step=lambda report: pytest.fail("a step was taken"))
    with pytest.raises(BadFile, match=r"metadata: 'epoch' = 3"):
        train(photo_folder, bases["sd15"], config, device=CPU, metadata={"epoch": 3}, callbacks=steps)  # pyright: ignore


def test_a_resumed_run_keeps_the_thumbnail_of_before(bases, caches, tmp_path):
    config = replace(PLAIN, steps=5, sample_every=3, thumbnail=True)
    drawn = Samples(lambda *_: [Image.new("RGB", (64, 80), "red")], [("a", 1)])

    def stop(report):
        if report.step == 4:
            raise KeyboardInterrupt

    def trained(on_step=lambda report: None, **options) -> LoraFile:
        return train_lora(  # pyright: ignore
            person_only(caches["sd15"]), bases["sd15"], config, device=CPU, samples=drawn,
            callbacks=Callbacks(on_step=on_step, on_sample=lambda step, images: None), **options,
        )  # fmt: skip

    whole, state = trained(), tmp_path / "run.state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trained(on_step=stop, state_path=state)
    resumed = trained(state_path=state, resume=True)
    assert resumed.metadata["modelspec.thumbnail"] == whole.metadata["modelspec.thumbnail"]


def test_the_trigger_stands_where_each_reader_looks(bases, caches):
    config = replace(PLAIN, steps=1, trigger_word="ohwx", class_word="woman")
    metadata = train_lora(caches["sd15"], bases["sd15"], config, device=CPU).metadata
    assert metadata["modelspec.trigger_phrase"] == "ohwx woman"
    assert "ohwx woman" in json.loads(metadata["ss_tag_frequency"])["1_ohwx woman"]
    assert json.loads(metadata["ss_datasets"])[0]["subsets"][0]["class_tokens"] == "ohwx woman"
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"1_woman": {"n_repeats": 1, "img_count": 2}}


def test_the_metadata_name_the_precision_that_was_used(bases, caches):
    for precision, name in (("auto", "no"), ("bf16", "bf16")):
        config = replace(PLAIN, steps=1, precision=precision)
        lora = train_lora(person_only(caches["sd15"]), bases["sd15"], config, device=CPU)
        assert lora.metadata["ss_mixed_precision"] == name


def test_no_name_of_a_photo_goes_into_the_file(bases, caches):
    cache = person_only(caches["sd15"])
    named = replace(cache, images=tuple(replace(image, name="anna_secret.jpg") for image in cache.images))
    lora = train_lora(named, bases["sd15"], replace(PLAIN, steps=1), device=CPU)
    assert "anna_secret" not in json.dumps(lora.metadata)
    assert all(isinstance(value, str) for value in lora.metadata.values())


def test_rslora_is_written_as_the_alpha_that_means_the_same(bases, caches, tmp_path):
    config = replace(PLAIN, steps=1, rank=4, alpha=4.0, rslora=True)
    lora = train_lora(person_only(caches["sd15"]), bases["sd15"], config, device=CPU)
    lora.save(tmp_path / "rs.safetensors", torch.float32)
    # alpha / sqrt(rank) = 2 = alpha' / rank with alpha' = 8
    assert {module.alpha for module in LoraFile.read(tmp_path / "rs.safetensors").modules().values()} == {8.0}


def test_deterministic_arithmetic_is_switched_on_and_back(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_if(False):
        assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with deterministic_if(True):
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(BadConfig, match="deterministic = true: kthvalue does not have"), deterministic_if(True):
        raise RuntimeError("kthvalue does not have a deterministic implementation. You can turn off ...")


def test_a_training_is_deterministic_where_that_is_wanted(bases, caches):
    found = []

    def see(_: object) -> None:
        found.append(torch.are_deterministic_algorithms_enabled())

    for wanted in (True, False):
        config = TrainConfig(rank=4, steps=1, precision="fp32", deterministic=wanted)
        train_lora(caches["sd15"], bases["sd15"], config, device=CPU, callbacks=Callbacks(on_step=see))
    assert found == [True, False]


def test_programs_that_cannot_load_the_result_are_named_first(bases, caches, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("core.training.loop.reading_limits", lambda lora: [f"{len(lora.entries)} modules"])
    callbacks = Callbacks(on_warning=told.append, on_step=lambda report: told.append("step"))
    lora = train_lora(caches["sd15"], bases["sd15"], TrainConfig(steps=1, rank=2), callbacks=callbacks)
    assert isinstance(lora, LoraFile)
    assert told.index(f"{len(lora.entries)} modules") < told.index("step")
