"""Compare a device's loss and gradient with the CPU's, and make weights in 8 bits."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.config import TrainConfig
from core.device import exact_arithmetic, precision_name
from core.models.base import Base
from core.models.quantised_layers import to_int8
from core.models.spec import on_device, placed
from core.storage.stored import FLOAT8, QuantisedTensor, as_stored
from core.training.encode import LatentCache
from core.training.methods import attach

SMALL_CHANNELS, SMALL_RESOLUTION = 64, 128
"""The size of the denoiser that is compared with the CPU."""
DIFFERENCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""The largest allowed distance of a gradient from the CPU's in float32, as a share of its norm, by its dtype.

Rounding all values to 10 or 7 bits causes differences of one or a few hundredths; an error in a kernel causes about 1."""


@dataclass(frozen=True)
class Agreement:
    """How far a device's loss and gradient are from the CPU's in float32, as shares of the CPU's."""

    precision: str
    loss: float
    gradient: float
    is_good: bool


def eight_bit_weight(kind: str, shape: tuple[int, int]) -> QuantisedTensor:
    """Return a random weight of that shape (outputs, inputs) in 8 bits: "int8", as we round weights, or "fp8"."""
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return to_int8(wide) if kind == "int8" else QuantisedTensor((wide.to(FLOAT8[0]),), as_stored, shape)


def agreement(base: Base, cache: LatentCache, device: torch.device, dtype: torch.dtype) -> Agreement:
    """Compare the device in that dtype with the CPU in float32, on the same weights, inputs and adapter."""
    loss, gradient = loss_and_gradient(base, cache, torch.device("cpu"), torch.float32)
    with exact_arithmetic(tf32=dtype != torch.float32):
        other_loss, other = loss_and_gradient(base, cache, device, dtype)
    difference = float((other - gradient).norm() / gradient.norm())
    relative = abs(other_loss / loss - 1)
    return Agreement(precision_name(dtype), relative, difference, max(difference, relative) < DIFFERENCES[dtype])


def loss_and_gradient(base: Base, cache: LatentCache, device: torch.device, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Return the loss of one prediction for the first picture, and the adapter's gradient (N,), float64 on the CPU."""
    image = cache.images[0]
    generator = torch.Generator().manual_seed(1)
    noisy, target = torch.randn(2, 1, *image.mean.shape, generator=generator)
    denoiser = base.load("denoiser", device, dtype)
    adapter = attach({"denoiser": denoiser}, base.family, TrainConfig(rank=4))
    for name, parameter in sorted(adapter.parameters().items()):
        if name.endswith(".up"):
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    conditioning = placed(cache.text[image.caption], device, dtype) | on_device(image.conditioning, device)
    timesteps = torch.tensor([500], device=device)
    prediction = base.family.predict(denoiser, noisy.to(device, dtype), timesteps, conditioning)
    loss = F.mse_loss(prediction.float(), target.to(device))
    loss.backward()
    parts = [p.grad.flatten() for _, p in sorted(adapter.parameters().items()) if p.grad is not None]
    return float(loss.detach()), torch.cat(parts).cpu().double()
