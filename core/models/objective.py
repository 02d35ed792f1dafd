"""The training objective: how noise is added, what the denoiser predicts, and how its error is weighted.

A training picture x_0 is mixed with noise e at timestep t (DDPM, arXiv:2006.11239): `x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e`.
Here a_t is the cumulative product of the schedule's alphas, and `SNR_t = a_t / (1 - a_t)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import LossSettings

TIMESTEPS = 1000


@dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving noise process, as in SD1.x and SDXL."""

    alphas_cumprod: Tensor
    """(1000,) float32: a_t, the share of the picture's variance that is left at each timestep."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"

    @classmethod
    def scaled_linear(
        cls, prediction_type: Literal["epsilon", "v_prediction"] = "epsilon", zero_terminal_snr: bool = False
    ) -> "NoiseSchedule":
        """Create SD's schedule: beta from 0.00085 to 0.012, linear in its square root (arXiv:2112.10752, the authors' code)."""
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if zero_terminal_snr:
            # Shift and scale sqrt(a_t) so that the last timestep is pure noise (arXiv:2305.08891, alg. 1).
            root = alphas_cumprod.sqrt()
            alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return cls(alphas_cumprod.float(), prediction_type)

    def to(self, device: torch.device) -> "NoiseSchedule":
        return NoiseSchedule(self.alphas_cumprod.to(device), self.prediction_type)

    def draw_timesteps(self, latents: Tensor, config: LossSettings, generator: torch.Generator) -> Tensor:
        """Draw an integer timestep (B,) in the range of the settings for each of the latents (B, C, H, W).

        A bias b draws u^(exp(-b)), which is uniform for 0.
        """
        uniform = torch.rand(len(latents), generator=generator, device=latents.device)
        span = config.timestep_max - config.timestep_min + 1
        drawn = (uniform ** math.exp(-config.timestep_bias) * span).long()
        return config.timestep_min + drawn.clamp(max=span - 1)

    def _signal(self, timesteps: Tensor) -> Tensor:
        return self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents x_t, (B, C, H, W)."""
        signal = self._signal(timesteps)
        return signal.sqrt() * latents + (1 - signal).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the prediction's target, (B, C, H, W): the noise, or v = sqrt(a) e - sqrt(1 - a) x_0 (arXiv:2202.00512)."""
        if self.prediction_type == "epsilon":
            return noise
        signal = self._signal(timesteps)
        return signal.sqrt() * noise - (1 - signal).sqrt() * latents

    def loss_weights(self, timesteps: Tensor, config: LossSettings) -> Tensor:
        """Return the weight of each sample's loss, (B,).

        min-SNR-gamma (arXiv:2303.09556) clips the weight that a loss on x_0 would have at gamma. This gives
        `min(SNR, gamma) / SNR` for epsilon and `min(SNR, gamma) / (SNR + 1)` for v. Debiased estimation (arXiv:2310.08442) is
        `1 / sqrt(SNR)` for epsilon and `1 / (SNR + 1)` for v.
        """
        signal = self.alphas_cumprod[timesteps]
        snr = signal / (1 - signal)
        if config.debiased:
            # SNR reaches 0 with zero terminal SNR. The upper bound, SNR 1000, is that of sd-scripts.
            return 1 / (snr + 1) if self.prediction_type == "v_prediction" else 1 / snr.clamp(1e-4, 1e3).sqrt()
        if not config.min_snr_gamma:
            return torch.ones_like(snr)
        clipped = snr.clamp(max=config.min_snr_gamma)
        return clipped / (snr + 1) if self.prediction_type == "v_prediction" else clipped / snr.clamp(min=1e-8)


@dataclass(frozen=True)
class FlowSchedule:
    """A rectified flow (arXiv:2209.03003): x_t = (1 - t) x_0 + t e, and the denoiser predicts its velocity, e - x_0.

    Timesteps are 1000 t. Times are shifted towards noise, t' = s t / (1 + (s - 1) t) (arXiv:2403.03206, eq. 23), since the
    same noise destroys less of a larger picture.
    """

    shift: Callable[[int], float]
    """A function that returns the s to draw with for the number of the denoiser's positions in a picture."""
    positions_side: int
    """The number of latents along a side of a position."""
    training_shift: Callable[[int], float]
    """The same for the s to train with. Authors fit theirs to few sampling steps, which may start far into the noise."""

    def to(self, device: torch.device) -> "FlowSchedule":
        return self

    def shift_for(self, latents: Tensor) -> float:
        """Return the shift s to draw latents (B, C, H, W) with."""
        return self.shift(self._positions(latents))

    def _positions(self, latents: Tensor) -> int:
        return latents.shape[2] * latents.shape[3] // self.positions_side**2

    def draw_timesteps(self, latents: Tensor, config: LossSettings, generator: torch.Generator) -> Tensor:
        """Draw a timestep (B,) for each of the latents, float32 in the range of the settings.

        Times are drawn logit-normally, as the sigmoid of a normal (arXiv:2403.03206, section 3.1), or uniformly, and then
        shifted.
        """
        if config.timestep_sampling == "uniform":
            uniform = torch.rand(len(latents), generator=generator, device=latents.device)
            times = uniform ** math.exp(-config.timestep_bias)
        else:
            normal = torch.randn(len(latents), generator=generator, device=latents.device)
            times = torch.sigmoid(normal + config.timestep_bias)
        shift = config.timestep_shift
        times = shift_times(times, self.training_shift(self._positions(latents)) if shift is None else shift)
        return config.timestep_min + times * (config.timestep_max + 1 - config.timestep_min)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents x_t, (B, C, H, W)."""
        times = timesteps.view(-1, 1, 1, 1) / TIMESTEPS
        return (1 - times) * latents + times * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the velocity e - x_0, (B, C, H, W), which the denoiser predicts."""
        return noise - latents

    def loss_weights(self, timesteps: Tensor, config: LossSettings) -> Tensor:
        """Return a weight of 1 for each sample, (B,), since times are weighted by how often they are drawn."""
        return torch.ones_like(timesteps)

    def sampling_times(self, steps: int, latents: Tensor) -> Tensor:
        """Return the times (steps + 1,) from 1 to 0 for sampling these latents, evenly spaced, then shifted."""
        return shift_times(torch.linspace(1, 0, steps + 1, device=latents.device), self.shift_for(latents))


Schedule = NoiseSchedule | FlowSchedule


def shift_times(times: Tensor, shift: float) -> Tensor:
    return shift * times / (1 + (shift - 1) * times)


def linear_shift(most: int, mu: float) -> Callable[[int], float]:
    """Return a function of the number of positions: exp of a number that rises linearly from 0.5 at 256 to `mu` at `most`.

    It is from Black Forest Labs' code for FLUX.1.
    """
    slope = (mu - 0.5) / (most - 256)
    return lambda positions: math.exp(0.5 + slope * (positions - 256))


def draw_noise(like: Tensor, config: LossSettings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the noise that is predicted and the noise that is added to the input, both (B, C, H, W).

    They differ by the input perturbation (arXiv:2301.11706). Noise offset adds a random constant to each channel, so that the
    model learns to change the overall brightness (crosslabs.org/blog/diffusion-with-offset-noise).
    """
    noise = torch.randn(like.shape, generator=generator, device=like.device)
    if config.noise_offset:
        shift = torch.randn(*like.shape[:2], 1, 1, generator=generator, device=like.device)
        noise = noise + config.noise_offset * shift
    if not config.input_perturbation:
        return noise, noise
    extra = torch.randn(like.shape, generator=generator, device=like.device)
    return noise, noise + config.input_perturbation * extra


def sample_losses(prediction: Tensor, target: Tensor, mask: Tensor | None, config: LossSettings) -> Tensor:
    """Return the loss of each sample, (B,), a mean over channels and latents.

    `mask` (B, 1, H, W) in [0, 1] weights the latents, where 0 counts as the settings' background weight. The sum is divided by
    the sum of the weights, so that a small face does not make a small loss. The Huber loss is the pseudo-Huber of
    arXiv:2310.14189, scaled to equal the squared error for small errors.
    """
    difference = prediction.float() - target.float()
    if config.loss == "huber":
        delta = config.huber_delta
        losses = 2 * delta * (torch.sqrt(difference**2 + delta**2) - delta)
    else:
        losses = difference**2
    losses = losses.mean(dim=1, keepdim=True)
    if mask is None:
        return losses.mean(dim=(1, 2, 3))
    weights = config.background_weight + (1 - config.background_weight) * mask
    return (losses * weights).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3)).clamp(min=1e-6)


def shrink_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Average a mask of pixels (1, H, W) over each latent. Returns (1, height, width) for `size` (height, width)."""
    return F.interpolate(mask.unsqueeze(0), size=size, mode="area").squeeze(0)
