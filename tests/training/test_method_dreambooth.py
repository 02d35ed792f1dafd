"""Full DreamBooth: every weight, held to memory, written as a checkpoint that is read again, and as a LoRA."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from PIL import Image

from core.config import TrainConfig
from core.errors import OutOfMemory
from core.lora.file import LoraFile
from core.models import load_base
from core.storage.safetensors_file import SafetensorsFile
from core.training.callbacks import NO_CALLBACKS, Callbacks
from core.training.inputs import TrainingInputs
from core.training.intermediate_loras import IntermediateLoras
from core.training.loop import train_lora
from core.training.metadata import WEIGHTS_KEY
from core.training.methods import files_beside
from core.training.methods.dreambooth import check_memory
from core.training.samples import Samples
from core.training.step import Run
from tests.tooling import nothing_fits

CPU = torch.device("cpu")
CONFIG = TrainConfig(method="dreambooth", rank=8, min_snr_gamma=0.0, precision="fp32", learning_rate=1e-3, steps=3)


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_step_is_one_of_adamw_on_all_weights_of_diffusers_network(bases, caches, family):
    base = bases[family]
    run = Run(TrainingInputs.on(CPU, caches[family], base, replace(CONFIG, weight_decay=0.1)))
    images = [run.examples.images[index] for index in run.examples.batches.at(0)]
    _, noise, noisy, timesteps = run.examples.noised(images, run.examples.generator("noise", 0))
    text = run.examples.conditioning(images, [image.caption for image in images])
    run.train_step()
    unet = base.load("denoiser", CPU, torch.float32)
    for parameter in unet.parameters():
        parameter.data = parameter.data.clone()
    unet.requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=0.1, foreach=False, fused=False)
    extra = (
        {"added_cond_kwargs": {"text_embeds": text["pooled"], "time_ids": text["time_ids"]}} if family == "sdxl" else {}
    )
    loss = F.mse_loss(unet(noisy, timesteps, encoder_hidden_states=text["context"], **extra).sample, noise)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    assert run.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert run.parameters.keys() == {f"denoiser.{name}" for name, _ in unet.named_parameters()}
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(run.parameters[f"denoiser.{name}"], parameter, rtol=1e-4, atol=1e-5)


def test_only_recomputing_saves_memory_since_no_weight_is_frozen(bases, caches, monkeypatch):
    nothing_fits(monkeypatch)
    warnings: list[str] = []
    config = replace(CONFIG, memory_limit=1, steps=1)
    file = train_lora(
        caches["sd15"], bases["sd15"], config, device=CPU, callbacks=Callbacks(on_warning=warnings.append)
    )
    assert "With everything recomputed it takes" in warnings[0] and "8 bits" not in warnings[0]
    assert WEIGHTS_KEY not in file.metadata and file.metadata["ss_gradient_checkpointing"] == "True"


def test_the_base_itself_stays_as_it_is_and_disabled_is_the_frozen_network(bases, caches):
    base = bases["sd15"]
    before = {name: tensor.clone() for name, tensor in base.components["denoiser"].tensors.items()}
    assert before
    run = Run(TrainingInputs.on(CPU, caches["sd15"], base, CONFIG))
    run.train_step()
    assert before
    for name, tensor in base.components["denoiser"].tensors.items():
        assert torch.equal(tensor, before[name])
        assert not torch.equal(run.parameters[f"denoiser.{name}"], tensor) or not tensor.any()
        with run.model.adapter.disabled():
            assert torch.equal(run.parameters[f"denoiser.{name}"], tensor)


def test_prior_prediction_holds_the_class_to_the_frozen_weights(bases, caches):
    run = Run(TrainingInputs.on(CPU, caches["sd15"], bases["sd15"], replace(CONFIG, prior_prediction=1.0)))
    prior, _ = map(run.loss_of, run.examples.passes(0))
    assert prior.item() < 1e-10  # of other memory, a copy's rounding may be another
    run.train_step()
    assert next(iter(map(run.loss_of, run.examples.passes(1)))).item() > 1e-6


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_the_checkpoint_has_its_bases_names_and_the_trained_weights(bases, caches, family, tmp_path):
    base = bases[family]
    config = replace(CONFIG, text_encoder_lr=1e-3)
    run = Run(TrainingInputs.on(CPU, caches[family], base, config))
    run.train_step()
    run.model.adapter.export(run.parameters, base, {}).save(tmp_path / "tuned.safetensors", torch.float32)
    tuned, original = SafetensorsFile.open(tmp_path / "tuned.safetensors"), base.file
    assert original is not None
    assert tuned.shapes == original.shapes
    read = load_base(tmp_path / "tuned.safetensors")
    for name, value in run.parameters.items():
        part, _, path = name.partition(".")
        assert torch.equal(read.components[part].tensors[path], value)
    theirs = convert_ldm_unet_checkpoint(dict(tuned), dict(base.components["denoiser"].config))
    assert all(torch.equal(tensor, run.parameters[f"denoiser.{path}"]) for path, tensor in theirs.items())
    vae = [name for name in original if name.startswith("first_stage_model.")]
    assert vae and all(torch.equal(tuned[name], original[name]) for name in vae)


def test_the_lora_beside_it_has_the_same_change_where_its_rank_is_enough(bases, caches, tmp_path):
    base = bases["sd15"]
    run = Run(TrainingInputs.on(CPU, caches["sd15"], base, replace(CONFIG, rank=32)))
    run.train_step()
    tuned = run.model.adapter.export(run.parameters, base, {"ss_base_model_version": "sd_v1"})
    files_beside(tuned, base, run.config)["lora"].save(tmp_path / "lora.safetensors", torch.float32)
    modules = LoraFile.read(tmp_path / "lora.safetensors").modules()
    tensors = base.components["denoiser"].tensors
    whole = [module for module, lora in modules.items() if min(lora.down[0].numel(), lora.up.shape[0]) <= 32]
    assert whole
    for module in whole:
        change = run.parameters[f"denoiser.{module[1]}.weight"].detach() - tensors[f"{module[1]}.weight"]
        assert (modules[module].delta().reshape(change.shape) - change).norm() < 1e-3 * change.norm()


def test_what_memory_cannot_hold_is_refused_with_what_would_do():
    sdxl = 2_567_463_684  # weights of SDXL's UNet
    check_memory(sdxl, CONFIG, free=40 * 2**30)
    with pytest.raises(OutOfMemory, match=r"needs 38\.3 GiB for 2567 million weights.*24\.0 GiB are free\. optimizer "
                       r"adamw8bit needs 23\.9 GiB, or method 'lora'"):  # fmt: skip
        check_memory(sdxl, CONFIG, free=24 * 2**30)
    with pytest.raises(OutOfMemory, match=r"8\.0 GiB are free\. method 'lora'"):
        check_memory(sdxl, CONFIG, free=8 * 2**30)


def test_the_base_models_pictures_show_its_own_weights_in_a_resumed_run_with_an_average(bases, caches):
    run = Run(TrainingInputs.on(CPU, caches["sd15"], bases["sd15"], replace(CONFIG, ema_decay=0.9)))
    run.train_step()
    name, original = next(iter(bases["sd15"].components["denoiser"].tensors.items()))
    drawn_with: list[torch.Tensor] = []

    def sampler(denoiser, encoders, shots):
        drawn_with.append(run.parameters[f"denoiser.{name}"].detach().clone())
        return [Image.new("RGB", (8, 8)) for _ in shots]

    watch: Any = SimpleNamespace(base_shots=[("a photo of person", 1)], set_base_pictures=lambda images: None)
    inputs = TrainingInputs.on(CPU, caches["sd15"], bases["sd15"], run.config)
    looks = IntermediateLoras(run, inputs, Samples(sampler, watch=watch), NO_CALLBACKS, {})
    looks.set_base_pictures()
    assert torch.equal(drawn_with[0], original)
