"""The training objective against diffusers' scheduler, its SNR, and the formulas of the papers written out."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from core.config import TrainConfig
from core.models.objective import NoiseSchedule, draw_noise, sample_losses, shrink_mask

TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])


def diffusers_scheduler(prediction_type: Any = "epsilon", zero_terminal_snr: bool = False) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=prediction_type, rescale_betas_zero_snr=zero_terminal_snr,
    )  # fmt: skip


def latents_and_noise(count: int = len(TIMESTEPS)):
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(count, 4, 6, 5, generator=generator) for _ in range(2))


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_noisy_latents_are_those_of_diffusers(zero_terminal_snr):
    latents, noise = latents_and_noise()
    expected = diffusers_scheduler(zero_terminal_snr=zero_terminal_snr).add_noise(latents, noise, TIMESTEPS)  # pyright: ignore
    schedule = NoiseSchedule.scaled_linear(zero_terminal_snr=zero_terminal_snr)
    torch.testing.assert_close(schedule.add_noise(latents, noise, TIMESTEPS), expected, rtol=1e-4, atol=2e-4)


def test_the_last_step_is_pure_noise_with_zero_terminal_snr_only():
    assert NoiseSchedule.scaled_linear(zero_terminal_snr=True).alphas_cumprod[-1] == 0
    # 0.0047: the share of the signal that SD1.5 leaves at the end (arXiv:2305.08891, section 3.1: sqrt(0.0047) = 0.0683)
    assert NoiseSchedule.scaled_linear().alphas_cumprod[-1].sqrt().item() == pytest.approx(0.068265, abs=2e-5)


def test_the_target_of_v_prediction_is_diffusers_velocity():
    latents, noise = latents_and_noise()
    expected = diffusers_scheduler("v_prediction").get_velocity(latents, noise, TIMESTEPS)  # pyright: ignore
    target = NoiseSchedule.scaled_linear("v_prediction").target(latents, noise, TIMESTEPS)
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-4)


def test_debiased_weights_are_one_over_the_root_of_the_snr():
    snr = compute_snr(diffusers_scheduler(), TIMESTEPS)
    config = TrainConfig(debiased=True)
    expected = 1 / torch.minimum(snr, torch.tensor(1000.0)).sqrt()
    torch.testing.assert_close(
        NoiseSchedule.scaled_linear().loss_weights(TIMESTEPS, config), expected, rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(
        NoiseSchedule.scaled_linear("v_prediction").loss_weights(TIMESTEPS, config), 1 / (snr + 1), rtol=1e-3, atol=1e-6
    )


def test_weights_are_finite_at_zero_terminal_snr():
    for prediction_type in ("epsilon", "v_prediction"):
        schedule = NoiseSchedule.scaled_linear(prediction_type, zero_terminal_snr=True)
        for config in (TrainConfig(), TrainConfig(debiased=True), TrainConfig(min_snr_gamma=0.0)):
            assert schedule.loss_weights(torch.arange(1000), config).isfinite().all()


def test_without_weighting_every_weight_is_one():
    weights = NoiseSchedule.scaled_linear().loss_weights(TIMESTEPS, TrainConfig(min_snr_gamma=0.0))
    assert weights.tolist() == [1.0] * len(TIMESTEPS)


def test_the_huber_loss_is_square_near_zero_and_linear_far_away():
    config = TrainConfig(loss="huber", huber_delta=0.5)

    def loss(error: float) -> float:
        return sample_losses(torch.full((1, 4, 2, 2), error), torch.zeros(1, 4, 2, 2), None, config).item()

    # Written out in double precision: 2 d (sqrt(e^2 + d^2) - d), the pseudo-Huber of arXiv:2310.14189, eq. 6, times 2 d
    assert loss(0.3) == pytest.approx(2 * 0.5 * (math.sqrt(0.3**2 + 0.5**2) - 0.5), rel=1e-6)
    assert loss(0.01) == pytest.approx(0.01**2, rel=1e-3)
    assert loss(101.0) - loss(100.0) == pytest.approx(2 * 0.5, rel=1e-3)


def test_the_background_weight_is_the_weight_outside_the_mask():
    error = torch.ones(1, 4, 1, 2)
    error[..., 0] = 3.0
    mask = torch.tensor([[[[1.0, 0.0]]]])
    loss = sample_losses(error, torch.zeros_like(error), mask, TrainConfig(background_weight=0.25))
    assert loss.item() == pytest.approx((9.0 * 1 + 1.0 * 0.25) / 1.25)


def test_an_empty_mask_without_background_gives_no_loss_and_no_nan():
    error = torch.ones(1, 4, 2, 2)
    loss = sample_losses(error, 0 * error, torch.zeros(1, 1, 2, 2), TrainConfig(background_weight=0.0))
    assert loss.item() == 0


def test_a_mask_is_averaged_down_to_the_latents():
    mask = torch.zeros(1, 4, 4)
    mask[0, :2, :2] = 1
    mask[0, 0, 2] = 1
    assert shrink_mask(mask, (2, 2)).tolist() == [[[1.0, 0.25], [0.0, 0.0]]]


def draw_timesteps(count, config):
    generator = torch.Generator().manual_seed(1)
    return NoiseSchedule.scaled_linear().draw_timesteps(torch.empty(count), config, generator)


def test_timesteps_stay_in_their_range_and_reach_both_ends():
    config = TrainConfig(timestep_min=100, timestep_max=103)
    drawn = draw_timesteps(2000, config)
    assert drawn.unique().tolist() == [100, 101, 102, 103]
    assert drawn.dtype == torch.int64


def test_a_positive_bias_draws_late_timesteps_more_often():
    def mean(bias: float) -> float:
        config = TrainConfig(timestep_bias=bias)
        return draw_timesteps(20_000, config).float().mean().item()

    # The mean of u^k is 1 / (k + 1): k = 1, exp(-1) and exp(1).
    assert mean(0.0) == pytest.approx(500, abs=8)
    assert mean(1.0) == pytest.approx(1000 / (math.exp(-1) + 1), abs=8)
    assert mean(-1.0) == pytest.approx(1000 / (math.exp(1) + 1), abs=8)


def test_noise_offset_shifts_whole_channels():
    like = torch.zeros(64, 4, 16, 16)
    noise, _ = draw_noise(like, TrainConfig(noise_offset=0.5), torch.Generator().manual_seed(1))
    # Mean of 256 unit normals (deviation 1/16) plus 0.5 times a normal.
    assert noise.mean(dim=(2, 3)).std().item() == pytest.approx(math.sqrt(0.5**2 + 1 / 256), rel=0.15)


def test_input_perturbation_is_noise_on_the_input_alone():
    like = torch.zeros(8, 4, 16, 16)
    plain, _ = draw_noise(like, TrainConfig(), torch.Generator().manual_seed(1))
    target, on_input = draw_noise(like, TrainConfig(input_perturbation=0.1), torch.Generator().manual_seed(1))
    assert torch.equal(target, plain)
    assert (on_input - target).std().item() == pytest.approx(0.1, rel=0.05)
